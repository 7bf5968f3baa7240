"""When an output counts: its record beside it first, then the object itself, each written whole.

Beside ``photo.tif`` lies ``photo.tif.json``, which names the fingerprint of the work and the SHA-256 and size of the
image it belongs to. The record is written first. A kill between the two writes leaves a record whose image is missing
or an older one, and both are seen, because an output counts only if its bytes are those the record names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from supir_batch import encode, store
from supir_batch.types import Job

_CHUNK = 2**20


@dataclass(frozen=True)
class Committed:
    """An output that counts."""

    uri: str
    sha256: str
    size: int  # bytes
    finished_at: str  # UTC, ISO 8601
    record_sha256: str = ""  # of the record beside it


def output_uri(job: Job, source_format: str) -> str:
    """Where the output goes; the extension follows the settings or the source's format, not its name."""
    return job.output_stem + encode.EXTENSIONS[encode.output_format(source_format, job.settings)]


def record_uri(output: str) -> str:
    """Where the JSON record of the output at URI ``output`` lies."""
    return output + ".json"


def committed(job: Job, fingerprint: str, source_format: str) -> Committed | None:
    """The output of this very work if it is there, whole and unchanged, else None.

    Reads the output to compare its hash. Raises StoreError if the store cannot be asked.
    """
    uri = output_uri(job, source_format)
    named = _read_record(uri)
    if named is None or named[0] != fingerprint:
        return None
    claim = named[1]
    if not store.exists(uri) or store.info(uri).size != claim.size:
        return None
    with store.local_copy(uri) as path:
        return claim if file_sha256(path) == claim.sha256 else None


def commit(output: str, image: Path, record: dict[str, object]) -> str:
    """Put the record, then the image file, in place; ``record`` must hold what ``committed`` reads.

    Returns the SHA-256 of the record.
    """
    text = (json.dumps(record, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
    store.write_atomic(record_uri(output), text)
    store.write_atomic(output, image)
    return hashlib.sha256(text).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read_record(uri: str) -> tuple[str, Committed] | None:
    """Fingerprint and claim of the record beside ``uri``; None if there is none that can be understood."""
    if not store.exists(record_uri(uri)):
        return None
    try:
        text = store.read_bytes(record_uri(uri))
        record = json.loads(text)
        output, finished_at = record["output"], str(record["run"]["finished_at"])
        digest = hashlib.sha256(text).hexdigest()
        claim = Committed(uri, str(output["sha256"]), int(output["bytes"]), finished_at, digest)
        return str(record["fingerprint"]), claim
    except (ValueError, KeyError, TypeError):
        return None  # a foreign or damaged .json: the output does not count, and is made (and recorded) anew
