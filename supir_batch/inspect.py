"""What an image file claims about itself, in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supir_batch import commit, metadata, probe, provenance, signing, store

_SOURCE_TYPES = {
    provenance.GENERATIVE_SOURCE_TYPE: "a captured picture that generative software has altered",
    provenance.ENHANCED_SOURCE_TYPE: "a captured picture that software has altered, inventing nothing",
}
_PLAIN = {
    "dc:title": "title",
    "dc:creator": "creator",
    "dc:rights": "rights",
    "dc:description": "description",
    "photoshop:Instructions": "instructions",
    "xmp:CreatorTool": "written by",
    "xmpMM:DocumentID": "document id",
    "xmpMM:OriginalDocumentID": "original's id",
}
_OURS = {
    "Iptc4xmpExt:AISystemUsed": "restored by",
    "Iptc4xmpExt:AISystemVersionUsed": "version",
    "Iptc4xmpExt:AIPromptInformation": "prompts",
    "Iptc4xmpExt:AIPromptWriterName": "prompt written by",
    "supirBatch:Engine": "engine",
    "supirBatch:Seed": "seed",
    "supirBatch:Scale": "scale",
    "supirBatch:TileSpec": "tiles",
    "supirBatch:ColorFix": "color fix",
    "supirBatch:SourceSHA256": "source's SHA-256",
    "supirBatch:ConfigSHA256": "settings' SHA-256",
    "supirBatch:Fingerprint": "fingerprint",
}


def inspect(uri: str, anchors: bytes | None = None) -> list[tuple[str, str]]:
    """Label and text of everything the image at ``uri`` and the record beside it say, in reading order.

    ``anchors`` (certificates, PEM) say whose signature is to be trusted.
    Raises StoreError if it cannot be reached, ImageError if it is no image or its XMP cannot be read.
    """
    with store.local_copy(uri) as path:
        header = probe.read_header(path)  # no limits: nothing is decoded
        claims = metadata.read_claims(path)
        digest = commit.file_sha256(path)
        signature = _signature(uri, path, header.format, anchors)
    lines = [
        ("file", uri),
        ("image", f"{header.format}, {header.width} x {header.height} pixels, {header.bit_depth} bits, {header.mode}"),
        ("SHA-256", digest),
        ("is", _nature(claims)),
        ("signature", signature),
    ]
    for names in (_OURS, _PLAIN):
        lines += [(label, claims[key]) for key, label in names.items() if key in claims]
    return lines + _beside(uri, digest)


def _signature(uri: str, path: Path, file_format: str, anchors: bytes | None) -> str:
    if not signing.available():
        return "not looked for; the extra c2pa is needed: pip install 'supir-batch[c2pa]'"
    state = signing.beside(uri, path, file_format, anchors)
    if state is None:
        return "none"
    match state.state:
        case "Trusted":
            return f"intact, by {state.signer}, for whom the anchors vouch"
        case "Valid" if anchors is None:
            return f"intact, says to be by {state.signer}; no anchors were given that could vouch for that"
        case "Valid":
            return f"intact, says to be by {state.signer}, for whom the anchors do NOT vouch"
    return f"BROKEN: {'; '.join(state.reasons)}"


def _nature(claims: Mapping[str, str]) -> str:
    declared = claims.get("Iptc4xmpExt:DigitalSourceType", "")
    in_words = _SOURCE_TYPES.get(declared, f"declared as {declared}")
    match claims.get("supirBatch:GenerativeReconstruction"):
        case "True":
            return f"a GENERATIVE RECONSTRUCTION made by supir-batch; detail may be invented. IPTC: {in_words}"
        case "False":
            return f"a derivative made by supir-batch without a generative model. IPTC: {in_words}"
    if declared:
        return f"not made by supir-batch, or its marks are gone. IPTC: {in_words}"
    return "not made by supir-batch, or its marks are gone; it says nothing about its making"


def _beside(uri: str, digest: str) -> list[tuple[str, str]]:
    record_uri = commit.record_uri(uri)
    if not store.exists(record_uri):
        return [("record", "there is none beside it")]
    try:
        record: dict[str, Any] = json.loads(store.read_bytes(record_uri))
        named = str(record["output"]["sha256"])
        source = f"{record['run']['source_uri']}, {record['source_size'][0]} x {record['source_size'][1]} pixels"
        settings = {key: value for key, value in record["settings"].items() if value not in (None, "")}
        finished = str(record["run"]["finished_at"])
    except (ValueError, KeyError, TypeError, IndexError):
        return [("record", f"{record_uri} is none of supir-batch")]
    fits = "belongs to these bytes" if named == digest else "belongs to OTHER bytes: this file was changed"
    return [
        ("record", f"{record_uri} {fits}"),
        ("source", source),
        ("finished", finished),
        *((f"  {key}", json.dumps(value, ensure_ascii=False)) for key, value in settings.items()),
        *(("note", str(note)) for note in record.get("notes", ())),
    ]
