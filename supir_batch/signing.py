"""C2PA content credentials: signing a finished output, and what the signature of a file is worth.

The original goes in as the ``parentOf`` ingredient, so that the credentials say of what the output was made; the
actions are ``c2pa.opened``, ``c2pa.edited`` with the IPTC source type, and ``c2pa.resized`` where the size changed, and
never ``c2pa.created``. Embedded in JPEG, PNG and WebP; beside a TIFF, whose readers trip over embedded ones, and beside
a JPEG 2000, which cannot hold them. Signing is the last thing that touches a file: a byte changed later breaks it.

Keys come from the user; nothing is ever signed with a key of our own. The only file that imports c2pa and cryptography,
which the extra ``c2pa`` installs. Source: C2PA specification 2.x.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from supir_batch import store
from supir_batch.errors import ImageError, ManifestError, StoreError
from supir_batch.provenance import MEDIA_TYPES, ProvenanceRecord
from supir_batch.types import SigningKey

if TYPE_CHECKING:
    import c2pa

EMBEDDED = ("png", "jpeg", "webp")
"""Formats that carry their credentials; those of the others lie beside them."""

_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_PIECE = 4 * 1024 * 1024  # bytes hashed at once
_STAND_IN = b"\0"
"""What c2pa sees of a file beside which credentials lie: it would hold copies of giants, and needs the hash alone."""

_ORIGINAL = "original"  # links the first action with the ingredient


@dataclass(frozen=True)
class Signed:
    """What signing gave. ``credentials`` lie beside the file, b"" if they are inside; ``signer`` is for the record."""

    credentials: bytes
    signer: dict[str, str]


@dataclass(frozen=True)
class State:
    """What a signature is worth: ``Invalid``, ``Valid`` (intact, whoever signed) or ``Trusted`` (by the anchors)."""

    state: str
    signer: str
    reasons: tuple[str, ...]  # why it is not more than it is


def credentials_uri(output: str) -> str:
    """Where the content credentials of the output at URI ``output`` lie, if it has some and cannot hold them."""
    return output + ".c2pa"


def available() -> bool:
    """Whether the extra ``c2pa`` is installed."""
    return importlib.util.find_spec("c2pa") is not None


def check(signing: SigningKey) -> str:
    """Sign a picture of one pixel, so that a bad key is known before any work; returns what to warn of, or "".

    Raises ManifestError if key and certificates cannot be read or do not fit, StoreError if they cannot be reached.
    """
    if not available():
        raise ManifestError("signing needs the extra c2pa: pip install 'supir-batch[c2pa]'")
    import c2pa  # noqa: PLC0415 (an extra)

    pixel = io.BytesIO()
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(pixel, "PNG")
    try:
        builder = c2pa.Builder({"assertions": []}, context=_context(None))
        builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
        builder.add_ingredient({"relationship": "parentOf"}, "image/png", io.BytesIO(pixel.getvalue()))
        signed = io.BytesIO()
        with _signer(signing) as signer:
            builder.sign(signer, "image/png", io.BytesIO(pixel.getvalue()), signed)
        state = _read(signed, "image/png", None, None)[1]
        if state.state == "Invalid":
            raise ValueError("; ".join(state.reasons))
    except (c2pa.C2paError, ValueError, TypeError) as error:
        raise ManifestError(
            f"signing: cannot sign with {signing.key} and {signing.certificates}: {error}; "
            "give an unencrypted key in PEM, and the certificates from its own up to, but not with, the root"
        ) from error
    if signing.timestamp:
        return ""
    return (
        f"signatures end with their certificate on {_expiry(signing)}, as there is no time stamp; "
        "give the address of an authority in signing.timestamp"
    )


def sign(path: Path, record: ProvenanceRecord, title: str, original: Path, signing: SigningKey) -> Signed:
    """Sign the finished file at ``path``, which changes if it can hold its credentials; pixels and metadata stay.

    ``original`` is the source's file, unchanged. Where the credentials are embedded, c2pa holds copies of the file in
    memory; credentials beside a file are made of its hash alone. Raises ImageError ``signing-failed``, StoreError if
    key or certificates cannot be reached.
    """
    import c2pa  # noqa: PLC0415 (an extra)

    media_type, embedded = MEDIA_TYPES[record.output_format], record.output_format in EMBEDDED
    manifest = _manifest(record, title)
    if not embedded:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
        data = {"name": "the whole file", "alg": "sha256", "hash": list(digest.digest()), "pad": []}
        manifest["assertions"].append({"label": "c2pa.hash.data", "data": data})
    try:
        builder = c2pa.Builder(manifest, context=_context(None))
        with original.open("rb") as stream:
            builder.add_ingredient(_ingredient(record), MEDIA_TYPES[record.source_format], stream)
        with _signer(signing) as signer:
            credentials = _embed(builder, signer, path, media_type) if embedded else _detached(builder, signer)
        with path.open("rb") if embedded else io.BytesIO(_STAND_IN) as stream:
            store_json, state = _read(stream, media_type, None if embedded else credentials, None)
    except (c2pa.C2paError, ValueError, TypeError) as error:
        raise ImageError("signing-failed", f"it cannot be signed: {error}; the next run tries again") from error
    # nobody is trusted without anchors, and the stand-in has another hash than the file
    meant = ("signingCredential.untrusted", *(() if embedded else ("assertion.dataHash.mismatch",)))
    if wrong := [reason for reason in state.reasons if not reason.startswith(meant)]:
        raise ImageError("signing-failed", f"its new signature is not valid: {'; '.join(wrong)}")
    info = store_json["manifests"][store_json["active_manifest"]]["signature_info"]
    signer_info = {key: str(value) for key, value in info.items() if value is not None}
    return Signed(b"" if embedded else credentials, signer_info)


def beside(uri: str, path: Path, file_format: str, anchors: bytes | None) -> State | None:
    """As ``read`` for the object at ``uri``, which ``path`` is a copy of, with the credentials that lie beside it."""
    credentials = credentials_uri(uri)
    return read(path, file_format, store.read_bytes(credentials) if store.exists(credentials) else None, anchors)


def read(path: Path, file_format: str, credentials: bytes | None, anchors: bytes | None) -> State | None:
    """What the signature of the file at ``path`` is worth; None if it has none.

    ``credentials`` are those beside it; ``anchors`` are certificates in PEM, and without them nobody is trusted.
    Raises StoreError if the extra ``c2pa`` is missing.
    """
    if not available():
        raise StoreError("reading a signature needs the extra c2pa: pip install 'supir-batch[c2pa]'")
    import c2pa  # noqa: PLC0415 (an extra)

    if credentials is None and file_format not in EMBEDDED:
        return None
    try:
        with path.open("rb") as stream:
            return _read(stream, MEDIA_TYPES.get(file_format, file_format), credentials, anchors)[1]
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as error:
        return State("Invalid", "", (str(error),))


# --- inside --------------------------------------------------------------------------------------------------------


def _embed(builder: c2pa.Builder, signer: c2pa.Signer, path: Path, media_type: str) -> bytes:
    signed = path.with_name(f"signed{path.suffix}")
    with path.open("rb") as source, signed.open("w+b") as sink:
        credentials: bytes = builder.sign(signer, media_type, source, sink)
    signed.replace(path)
    return credentials


def _detached(builder: c2pa.Builder, signer: c2pa.Signer) -> bytes:
    builder.set_no_embed()
    credentials: bytes = builder.sign(signer, "application/c2pa", io.BytesIO(_STAND_IN), io.BytesIO())
    return credentials


def _ingredient(record: ProvenanceRecord) -> dict[str, str]:
    return {
        "title": record.source_name,
        "relationship": "parentOf",
        "instance_id": _ORIGINAL,
        "description": f"the original, SHA-256 {record.source_sha256}",  # C2PA has no field for it
    }


def _manifest(record: ProvenanceRecord, title: str) -> dict[str, Any]:
    edited = {
        "action": "c2pa.edited",
        "digitalSourceType": record.digital_source_type,
        "softwareAgent": {"name": record.engine_name, "version": record.system_version},
        "parameters": {
            "description": record.notice or "processed without a generative model",
            "source_sha256": record.source_sha256,
            "settings_sha256": record.settings_sha256,
            "fingerprint": record.fingerprint,
            "seed": str(record.seed),  # CBOR integers of readers may be shorter than 63 bits
            "prompt": record.prompt,
        },
    }
    actions: list[dict[str, Any]] = [
        {"action": "c2pa.opened", "parameters": {"ingredientIds": [_ORIGINAL]}},
        edited,
    ]
    if record.output_size != record.source_size:
        actions.append({"action": "c2pa.resized"})
    return {
        "claim_generator_info": [{"name": record.tool, "version": record.tool_version}],
        "title": title,
        "format": MEDIA_TYPES[record.output_format],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}],
    }


def _context(anchors: bytes | None) -> c2pa.Context:
    """No network but for the time stamp, no thumbnails (they would decode the whole image), trust by anchors alone."""
    import c2pa  # noqa: PLC0415 (an extra)

    settings: dict[str, Any] = {
        "builder": {"thumbnail": {"enabled": False}},
        "verify": {
            "verify_trust": True,
            "verify_after_sign": False,  # what was signed is read back here
            "remote_manifest_fetch": False,
            "ocsp_fetch": False,
        },
    }
    if anchors is not None:
        settings["trust"] = {"trust_anchors": anchors.decode("ascii", "replace")}
    return c2pa.Context.from_dict(settings)


def _signer(signing: SigningKey) -> c2pa.Signer:
    import c2pa  # noqa: PLC0415 (an extra)

    key, chain = store.read_bytes(signing.key), store.read_bytes(signing.certificates)
    return c2pa.Signer.from_info(c2pa.C2paSignerInfo(_algorithm(key), chain, key, signing.timestamp))


def _algorithm(key: bytes) -> str:
    """C2PA's name of the signature that a private key makes; raises ValueError or TypeError for one it cannot use."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 (an extra)
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415

    loaded = serialization.load_pem_private_key(key, None)
    if isinstance(loaded, ec.EllipticCurvePrivateKey) and loaded.curve.name in _CURVES:
        return _CURVES[loaded.curve.name]
    if isinstance(loaded, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(loaded, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise ValueError("the key must be EC (P-256, P-384, P-521), RSA or Ed25519")


def _expiry(signing: SigningKey) -> str:
    from cryptography import x509  # noqa: PLC0415 (an extra)

    chain = x509.load_pem_x509_certificates(store.read_bytes(signing.certificates))
    return min(certificate.not_valid_after_utc for certificate in chain).date().isoformat()


def _read(
    stream: BinaryIO, media_type: str, credentials: bytes | None, anchors: bytes | None
) -> tuple[Mapping[str, Any], State]:
    import c2pa  # noqa: PLC0415 (an extra)

    stream.seek(0)
    with c2pa.Reader(media_type, stream, credentials, context=_context(anchors)) as reader:
        found: dict[str, Any] = json.loads(reader.json())
    info = found["manifests"][found["active_manifest"]].get("signature_info", {})
    signer = ", ".join(str(info[key]) for key in ("common_name", "issuer") if info.get(key))
    failures = [f"{one['code']}: {one.get('explanation', '')}" for one in found.get("validation_status", ())]
    return found, State(str(found.get("validation_state", "Invalid")), signer, tuple(failures))
