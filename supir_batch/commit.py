"""When an output counts: its record first, then what else lies beside it, then the object itself, each written whole.

Beside ``photo.tif`` lies ``photo.tif.json``, which names the fingerprint of the work and the SHA-256 and size of the
image it belongs to. The record is written first and the image last. A kill between the writes leaves a record whose
image is missing or an older one, and both are seen, because an output counts only if its bytes are those the record
names. PREMIS XML (``photo.tif.premis.xml``) and content credentials (``photo.tif.c2pa``) are written between the two,
so an output that counts has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from supir_batch import encode, premis, store
from supir_batch.signing import credentials_uri
from supir_batch.types import AuditScores, GateScores, Job, Region, Sidecar

_CHUNK = 2**20


@dataclass(frozen=True)
class Committed:
    """An output that counts."""

    uri: str
    sha256: str
    size: int  # bytes
    finished_at: str  # UTC, ISO 8601
    record_sha256: str = ""  # of the record beside it
    premis_sha256: str = ""  # of the PREMIS XML beside it; "" if none was written
    c2pa_sha256: str = ""  # of the content credentials beside it; "" if it has none or holds them
    seed: int = 0  # that the image is tagged with
    again: bool = False  # some of it was restored a second time
    execution: str = ""  # how the engine worked on it
    scores: GateScores | None = None
    audit: AuditScores | None = None


def output_uri(job: Job, source_format: str) -> str:
    """Where the output goes; the extension follows the settings or the source's format, not its name."""
    return job.output_stem + encode.EXTENSIONS[encode.output_format(source_format, job.settings)]


def record_uri(output: str) -> str:
    """Where the JSON record of the output at URI ``output`` lies."""
    return output + ".json"


def premis_uri(output: str) -> str:
    """Where the PREMIS XML of the output at URI ``output`` lies, if it has one."""
    return output + ".premis.xml"


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


def commit(
    output: Committed,
    image: Path,
    record: dict[str, object],
    sidecars: Collection[Sidecar],
    credentials: bytes = b"",
) -> Committed:
    """Put the record, then PREMIS XML if ``sidecars`` names it, then credentials if there are any, then the image.

    ``record`` must hold what ``committed`` and premis.document read. Returns ``output`` with the hashes of what lies
    beside it.
    """
    xml = premis.document(record) if "premis" in sidecars else b""
    output = replace(output, premis_sha256=_sha256(xml), c2pa_sha256=_sha256(credentials))
    hashes = {"premis": output.premis_sha256, "c2pa": output.c2pa_sha256}
    record = {**record, "sidecars": {kind: digest for kind, digest in hashes.items() if digest}}
    text = (json.dumps(record, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
    store.write_atomic(record_uri(output.uri), text)
    for uri, data in ((premis_uri(output.uri), xml), (credentials_uri(output.uri), credentials)):
        if data:
            store.write_atomic(uri, data)
        elif store.exists(uri):  # a role that may only put objects may not delete what does not exist either
            store.delete(uri)  # that of an earlier output would speak of another image
    store.write_atomic(output.uri, image)
    return replace(output, record_sha256=_sha256(text))


def _sha256(data: bytes) -> str:
    """In hex; "" for nothing."""
    return hashlib.sha256(data).hexdigest() if data else ""


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
        beside = record.get("sidecars", {})
        gate = dict(record.get("gate") or {})
        claim = Committed(
            uri,
            str(output["sha256"]),
            int(output["bytes"]),
            finished_at,
            digest,
            str(beside.get("premis", "")),
            str(beside.get("c2pa", "")),
            int(record["seed"]),
            again=bool(gate.pop("restored_again", False)),
            execution=str(record["run"].get("execution", "")),
            scores=GateScores(**gate) if gate else None,
            audit=_audit(record["audit"]) if record.get("audit") else None,
        )
        return str(record["fingerprint"]), claim
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # a foreign or damaged .json: the output does not count, and is made (and recorded) anew


def _audit(fields: dict[str, Any]) -> AuditScores:
    regions = fields["regions"]
    found = None if regions is None else tuple(Region(**region) for region in regions)
    return AuditScores(**fields | {"regions": found})
