"""``checksum.sha256`` in an output: the SHA-256 of each image and of what lies beside it, for tools that know no more.

One line for each file, as ``sha256sum --check`` and Archivematica read it: hash, two spaces, path below the output.
The hashes are those of the run log, so the file never vouches for a file that was changed since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from supir_batch import commit, runlog, signing, store
from supir_batch.errors import ManifestError

FILE_NAME = "checksum.sha256"


COLUMNS = ("output_sha256", "record_sha256", "premis_sha256", "c2pa_sha256")
"""What ``text`` and ``sidecars`` read of a run-log row, besides ``output_path``."""


def sidecars(row: Mapping[str, Any]) -> dict[str, str]:
    """What lies beside the output of a run-log row, and its SHA-256 (hex), by path below the output folder."""
    path = row["output_path"]
    beside = {
        commit.record_uri(path): row["record_sha256"],
        commit.premis_uri(path): row["premis_sha256"],
        signing.credentials_uri(path): row["c2pa_sha256"],
    }
    return {name: digest for name, digest in beside.items() if digest}


def places(path: str) -> tuple[str, ...]:
    """Where the output at ``path`` lies and all that may lie beside it."""
    return path, commit.record_uri(path), commit.premis_uri(path), signing.credentials_uri(path)


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def line(digest: str, name: str) -> str:
    """One line of a list of hashes; names that would break it are escaped as GNU coreutils do."""
    escaped = _escaped(name)
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The whole file for the outputs of ``rows``, sorted by path."""
    found: dict[str, str] = {}
    for row in rows:
        found |= {row["output_path"]: row["output_sha256"], **sidecars(row)}
    return "".join(line(digest, name) for name, digest in sorted(found.items()))


def refuse_foreign(output_uri: str) -> None:
    """Raise ManifestError if a file of that name is there which no run wrote: a run would delete it.

    It is ours if there is a run log that knows every path in it. Raises StoreError if file or log cannot be read.
    """
    uri = store.join(output_uri, FILE_NAME)
    if not store.exists(uri):
        return
    made = runlog.output_paths(runlog.read_log(output_uri, runlog.OF_OUTPUTS))
    known = {_escaped(place) for path in made for place in places(path)}
    # bytes that are no text become names that no log knows
    lines = store.read_bytes(uri).decode("utf-8", "backslashreplace").removesuffix("\n").split("\n")
    strange = next((text for text in lines if text.partition("  ")[2] not in known), None)
    if strange is not None:
        raise ManifestError(
            f"{uri}: is not a list that a run wrote there: no run log knows what it names in {strange[:200]!r}; "
            "a run would write over it, so move it away, or choose another output.uri"
        )


def renew(output_uri: str) -> None:
    """Write the file anew if it is not what the run log says; an output without a log gets none.

    Call it and ``remove`` only where ``refuse_foreign`` had nothing to say.
    Raises StoreError if the log cannot be read or the file not be written.
    """
    table = runlog.read_log(output_uri, (*runlog.OF_OUTPUTS, *COLUMNS))
    wanted = text(runlog.newest_done(table).values()).encode()
    uri = store.join(output_uri, FILE_NAME)
    if wanted and not (store.exists(uri) and store.read_bytes(uri) == wanted):
        store.write_atomic(uri, wanted)


def remove(output_uri: str) -> None:
    """Take the file away, as before a run: half-way through it would be wrong."""
    store.delete(store.join(output_uri, FILE_NAME))
