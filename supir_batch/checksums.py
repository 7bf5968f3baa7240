"""``checksum.sha256`` in an output: the SHA-256 of each image and of what lies beside it, for tools that know no more.

One line for each file, as ``sha256sum --check`` and Archivematica read it: hash, two spaces, path below the output.
The hashes are those of the run log, so the file never vouches for a file that was changed since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from supir_batch import commit, runlog, signing, store

FILE_NAME = "checksum.sha256"


def sidecars(row: Mapping[str, Any]) -> dict[str, str]:
    """What lies beside the output of a run-log row, and its SHA-256 (hex), by path below the output folder."""
    path = row["output_path"]
    beside = {
        commit.record_uri(path): row["record_sha256"],
        commit.premis_uri(path): row["premis_sha256"],
        signing.credentials_uri(path): row["c2pa_sha256"],
    }
    return {name: digest for name, digest in beside.items() if digest}


def line(digest: str, name: str) -> str:
    """One line of a list of hashes; names that would break it are escaped as GNU coreutils do."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The whole file for the outputs of ``rows``, sorted by path."""
    found: dict[str, str] = {}
    for row in rows:
        found |= {row["output_path"]: row["output_sha256"], **sidecars(row)}
    return "".join(line(digest, name) for name, digest in sorted(found.items()))


def renew(output_uri: str) -> None:
    """Write the file anew if it is not what the run log says; an output without a log gets none.

    Raises StoreError if the log cannot be read or the file not be written.
    """
    wanted = text(runlog.newest_done(runlog.read_log(output_uri)).values()).encode()
    uri = store.join(output_uri, FILE_NAME)
    if wanted and not (store.exists(uri) and store.read_bytes(uri) == wanted):
        store.write_atomic(uri, wanted)


def remove(output_uri: str) -> None:
    """Take the file away, as before a run: half-way through it would be wrong."""
    store.delete(store.join(output_uri, FILE_NAME))
