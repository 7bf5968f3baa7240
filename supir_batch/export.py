"""A whole output as other systems take it in: a BagIt bag, or a transfer for Archivematica.

Only what the log says is done goes in, of each image its newest output, and every copy is compared with the hash of the
log. The folder is made under another name beside its place and renamed when it is complete, so it is whole or absent.

Sources: RFC 8493 (BagIt 1.0); Archivematica's documentation of transfers with checksums and manual normalization.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import posixpath
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supir_batch import __version__, checksums, commit, premis, review, runlog, store
from supir_batch.errors import ManifestError, StoreError

_DESCRIPTION = (
    "Derivatives of digitized images, made by software. What a generative model adds need not have been in the "
    "original; none of these files is a record copy. Each image has its record (.json, PREMIS) beside it."
)

_COLUMNS = (*checksums.COLUMNS, "uri", "fingerprint", "source_sha256", "setting_page", "setting_organization")


@dataclass(frozen=True)
class Deliverable:
    """One output that is done. ``path`` and the keys of ``sidecars`` count from the output folder."""

    path: str
    row: Mapping[str, Any]  # of the run log, some columns
    record: Mapping[str, Any]  # the JSON beside it
    sidecars: Mapping[str, str]  # SHA-256 of what lies beside it

    @property
    def source_name(self) -> str:
        """Path of its source below the input root."""
        return str(self.record["source_name"])


def deliverables(output_uri: str, accepted: bool = False) -> list[Deliverable]:
    """The newest output of each image that is done, sorted by path; or only if reviewers have ``accepted`` it.

    Raises ManifestError if there is none, StoreError if the log or a record cannot be read or a record was changed.
    """
    newest = runlog.newest_done(runlog.read_log(output_uri, (*runlog.OF_OUTPUTS, *_COLUMNS)))
    if not newest:
        raise ManifestError(f"{output_uri}: holds no finished image; give the output folder of a run, or its manifest")
    rows = list(newest.values())
    if accepted:
        decided = review.read(output_uri)
        good = {key for key, one in decided.items() if one.decision == "accept"}
        rows = [row for row in rows if (row["id"], row["fingerprint"]) in good]
        if not rows:
            raise ManifestError(
                f"{output_uri}: of {len(newest)} finished images none was accepted as it is now; "
                f"decide in the report, then `supir-batch review import`"
            )
    return [_deliverable(output_uri, row) for row in rows]


def bag(output_uri: str, target: str, accepted: bool = False) -> int:
    """Make the folder ``target`` a BagIt 1.0 bag (SHA-256) of images and sidecars; returns the number of images.

    Raises ManifestError if ``target`` exists or is not local, StoreError for a file that is missing or was changed.
    """
    found = deliverables(output_uri, accepted)
    with _whole_or_absent(target) as folder:
        payload: dict[str, str] = {}
        for one in found:
            payload[one.path] = _copy(store.join(output_uri, one.path), _below(folder / "data", one.path), _digest(one))
            for name, digest in _sidecars(output_uri, one, folder / "data").items():
                payload[name] = digest
        sizes = [(folder / "data" / name).stat().st_size for name in payload]
        tags = {
            "bagit.txt": "BagIt-Version: 1.0\nTag-File-Character-Encoding: UTF-8\n",
            "bag-info.txt": _bag_info(found, f"{sum(sizes)}.{len(sizes)}"),
            "manifest-sha256.txt": "".join(
                f"{digest}  data/{_bag_path(name)}\n" for name, digest in sorted(payload.items())
            ),
        }
        listed = {name: _write(folder / name, text) for name, text in tags.items()}
        _write(folder / "tagmanifest-sha256.txt", "".join(f"{listed[name]}  {name}\n" for name in sorted(listed)))
    return len(found)


def archivematica(output_uri: str, target: str, accepted: bool = False) -> int:
    """Make the folder ``target`` a transfer for Archivematica; returns the number of images.

    The originals go to ``objects/``, the outputs as access copies with the stems of their originals to
    ``objects/manualNormalization/access/`` with ``normalization.csv``, hashes to ``metadata/checksum.sha256``, records
    to ``metadata/submissionDocumentation/``. Raises as ``bag``; a source must still be what it was.
    """
    found = deliverables(output_uri, accepted)
    with _whole_or_absent(target) as folder:
        objects, hashes, relations = folder / "objects", dict[str, str](), io.StringIO()
        writer = csv.writer(relations, lineterminator="\n")
        taken: set[str] = set()
        for one in found:
            source = one.source_name
            hashes[source] = _copy(one.row["uri"], _below(objects, source), one.row["source_sha256"])
            access = f"manualNormalization/access/{_access_name(one, taken)}"
            hashes[access] = _copy(store.join(output_uri, one.path), _below(objects, access), _digest(one))
            writer.writerow([source, access, ""])
            _sidecars(output_uri, one, folder / "metadata" / "submissionDocumentation")
        name = "manualNormalization/normalization.csv"
        hashes[name] = _write(objects / name, relations.getvalue())
        # one line for each file below objects/, with its path from there: Archivematica counts and runs sha256sum
        lines = [checksums.line(digest, path) for path, digest in sorted(hashes.items())]
        _write(folder / "metadata" / checksums.FILE_NAME, "".join(lines))
    return len(found)


# --- what is delivered ---------------------------------------------------------------------------------------------


def _deliverable(output_uri: str, row: Mapping[str, Any]) -> Deliverable:
    path, sidecars = str(row["output_path"]), checksums.sidecars(row)
    name = commit.record_uri(path)
    uri = store.join(output_uri, name)
    digest = store.sha256(uri)
    if digest != (row["record_sha256"] or digest):  # a log may be older than the hashes of records
        raise StoreError(f"{uri}: is not the record that was written; `supir-batch verify` names what was changed")
    return Deliverable(path, row, json.loads(store.read_bytes(uri)), {**sidecars, name: digest})


def _digest(one: Deliverable) -> str:
    return str(one.row["output_sha256"])


def _sidecars(output_uri: str, one: Deliverable, folder: Path) -> dict[str, str]:
    """Copy what lies beside an output below ``folder``; PREMIS is made of the record where the run wrote none."""
    found = {
        name: _copy(store.join(output_uri, name), _below(folder, name), digest) for name, digest in one.sidecars.items()
    }
    name = commit.premis_uri(one.path)
    if name not in found:
        found[name] = _write(_below(folder, name), premis.document(one.record).decode())
    return found


def _access_name(one: Deliverable, taken: set[str]) -> str:
    """The original's name with the output's extension, or with both where two originals differ in extension only."""
    extension = posixpath.splitext(one.path)[1]
    name = posixpath.splitext(one.source_name)[0] + extension
    if name.casefold() in taken:
        name = one.source_name + extension
    taken.add(name.casefold())
    return name


def _bag_info(found: list[Deliverable], oxum: str) -> str:
    organizations = {one.row["setting_organization"] for one in found} - {None, ""}
    fields = {
        "Source-Organization": organizations.pop() if len(organizations) == 1 else "",
        "Bagging-Date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "Bag-Software-Agent": f"supir-batch {__version__}",
        "Payload-Oxum": oxum,
        "Internal-Sender-Description": _DESCRIPTION,
    }
    return "".join(f"{key}: {' '.join(value.split())}\n" for key, value in fields.items() if value)


def _bag_path(name: str) -> str:
    """RFC 8493, 2.1.3: line breaks and percent signs, and only those, are percent-encoded."""
    return re.sub("[%\r\n]", lambda found: f"%{ord(found[0]):02X}", name)


# --- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def _whole_or_absent(target: str) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` if nothing goes wrong and is removed if something does."""
    if not store.is_local(target):
        raise ManifestError(f"{target}: an export is made in a local folder; name one, and upload it when it is there")
    place = store.local_path(target).absolute()
    if place.exists():
        raise ManifestError(f"{target}: exists already; name a new folder, an export never writes into an old one")
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = place.with_name(f".{place.name}.{secrets.token_hex(4)}{store.PARTIAL_SUFFIX}")
    try:
        folder.mkdir()
        yield folder
        os.rename(folder, place)
    except OSError as error:
        raise StoreError(f"{target}: cannot be made: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _below(folder: Path, name: str) -> Path:
    """A place that a log or a record names: neither may lead out of ``folder``."""
    return Path(store.join(str(folder), name))


def _copy(uri: str, target: Path, digest: str) -> str:
    """Copy a file and compare what was written with the hash it must have, which is returned."""
    if target.exists():
        raise StoreError(f"{uri}: its place {target.name} in the export is taken by another file; rename the source")
    with store.local_copy(uri) as path:
        store.write_atomic(str(target), path)
    found = store.sha256(str(target))
    if found != digest:
        raise StoreError(f"{uri}: has SHA-256 {found}, not {digest} as logged; it was changed, so nothing is exported")
    return digest


def _write(target: Path, text: str) -> str:
    store.write_atomic(str(target), text.encode())
    return store.sha256(str(target))
