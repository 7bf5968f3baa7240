"""A whole output compared with its run log: every image and record, and whatever else lies there.

The log is the witness: it names the hash of each image and of the record beside it. Images are read one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from supir_batch import checksums, commit, metadata, probe, provenance, runlog, signing, store, tiles
from supir_batch.errors import ImageError, ManifestError
from supir_batch.plan import OWN_FOLDERS

_COLUMNS = (
    *checksums.COLUMNS,
    *("source_width", "source_height", "output_width", "output_height", "source_sha256", "settings_sha256"),
    *("fingerprint", "seed", "setting_upscale", "setting_geometry", "setting_engine", "setting_signed"),
)


class Problem(NamedTuple):
    """What is wrong with one file. ``kind``: missing, changed, stripped, geometry, signature, foreign or unfinished."""

    uri: str
    kind: str
    message: str


@dataclass(frozen=True)
class Checked:
    """One file of the output, or one that should be there, and what is wrong with it."""

    uri: str
    problems: tuple[Problem, ...]


def verify(output_uri: str, anchors: bytes | None = None) -> Iterator[Checked]:
    """Check the images that the log of ``output_uri`` says are done, then look for what nobody put there.

    Signatures must be by somebody whom ``anchors`` (certificates, PEM) vouch for; without anchors it is enough that
    they are intact, whoever made them.

    Of each image the newest row that says ``done`` counts; an older output of it is known, but need not be there.
    Raises ManifestError if there is no log, StoreError if the output cannot be read.
    """
    table = runlog.read_log(output_uri, (*runlog.OF_OUTPUTS, *_COLUMNS))
    if table.num_rows == 0:
        raise ManifestError(f"{output_uri}: holds no run log; give the output folder of a run, or its manifest")
    rows = runlog.newest_done(table)
    listed = store.join(output_uri, checksums.FILE_NAME)
    older = runlog.output_paths(table) - rows.keys()
    known = {listed, *(store.join(output_uri, name) for path in older for name in checksums.places(path))}
    for path, row in rows.items():
        uri = store.join(output_uri, path)  # where it lies now: the whole folder may have been moved since
        sidecars = {store.join(output_uri, name): digest for name, digest in checksums.sidecars(row).items()}
        known |= {uri, commit.record_uri(uri), *sidecars}  # a log may be older than the hashes of records
        yield Checked(uri, (*_image(uri, row, anchors), *_beside(sidecars)))
    if store.exists(listed):
        yield Checked(listed, tuple(_list(listed, checksums.text(rows.values()))))
    folders = tuple(store.join(output_uri, folder) + "/" for folder in OWN_FOLDERS)
    for found in store.list_tree(output_uri):
        if found.uri in known or (found.uri.startswith(folders) and not store.is_partial(found.uri)):
            continue
        if store.is_partial(found.uri):
            problem = Problem(found.uri, "unfinished", "a write that was broken off; run again, which removes it")
        elif found.uri.endswith(".json") and store.exists(found.uri.removesuffix(".json")):
            problem = Problem(found.uri, "foreign", "the log knows no image that this record belongs to")
        else:
            problem = Problem(found.uri, "foreign", "the log does not know this file; run again, or move it away")
        yield Checked(found.uri, (problem,))


def _image(uri: str, row: dict[str, Any], anchors: bytes | None) -> Iterator[Problem]:
    if not store.exists(uri):
        yield Problem(uri, "missing", "the log says it is done; run again")
        return
    with store.local_copy(uri) as path:
        digest = commit.file_sha256(path)
        if digest != row["output_sha256"]:
            yield Problem(uri, "changed", f"its SHA-256 is {digest}, the log says {row['output_sha256']}")
        try:
            # the limits are for files of strangers: a white page of ours is packed as tightly as a bomb
            header = probe.read_header(path) if digest == row["output_sha256"] else probe.probe(path)
            claims = metadata.read_claims(path)
            state = signing.beside(uri, path, header.format, anchors) if row["setting_signed"] else None
        except ImageError as error:
            yield Problem(uri, "changed", f"it cannot be read: {error}")
            return
    size, logged = (header.width, header.height), (row["output_width"], row["output_height"])
    meant = tiles.output_size(row["source_width"], row["source_height"], row["setting_upscale"])
    if size != logged or (row["setting_geometry"] == "pad" and size != meant):
        yield Problem(
            uri, "geometry", f"it has {size} pixels, the log says {logged}, the source's size asks for {meant}"
        )
    for key, value in _marks(row).items():
        if claims.get(key) != value:
            yield Problem(uri, "stripped", f"{key} is {claims.get(key, 'gone')}, it must be {value}")
    if row["setting_signed"]:
        yield from _signature(uri, state, anchors)


def _signature(uri: str, state: signing.State | None, anchors: bytes | None) -> Iterator[Problem]:
    wanted = ("Valid", "Trusted") if anchors is None else ("Trusted",)
    if state is None:
        yield Problem(uri, "stripped", "its content credentials are gone, the log says it was signed")
    elif state.state not in wanted:
        why = "; ".join(state.reasons) or f"no anchor vouches for {state.signer}"
        yield Problem(uri, "signature", f"its signature is {state.state}, not {wanted[-1]}: {why}")


def _marks(row: dict[str, Any]) -> dict[str, str]:
    """The tags by which the file says what it is."""
    generative = row["setting_engine"] != "lanczos"
    kind = provenance.GENERATIVE_SOURCE_TYPE if generative else provenance.ENHANCED_SOURCE_TYPE
    return {
        "Iptc4xmpExt:DigitalSourceType": kind,
        "supirBatch:GenerativeReconstruction": str(generative),
        "supirBatch:Fingerprint": row["fingerprint"],
        "supirBatch:SourceSHA256": row["source_sha256"],
        "supirBatch:ConfigSHA256": row["settings_sha256"],
        "supirBatch:Seed": str(row["seed"]),
    }


def _list(uri: str, wanted: str) -> Iterator[Problem]:
    if store.read_bytes(uri) != wanted.encode():
        yield Problem(uri, "changed", "its hashes are not those of the log; run again, which writes it anew")


def _beside(sidecars: dict[str, str]) -> Iterator[Problem]:
    for sidecar, logged in sidecars.items():
        if not store.exists(sidecar):
            yield Problem(sidecar, "missing", "it belongs beside an image that is done; bring it back from a copy")
            continue
        digest = store.sha256(sidecar)
        if digest != logged:
            yield Problem(sidecar, "changed", f"its SHA-256 is {digest}, the log says {logged}")
