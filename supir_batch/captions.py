"""Captions that were made once and are kept: small JSON records below the output, ``_captions/<kk>/<key>.json``.

The key hashes everything that decides a caption and nothing else, so a run that is resumed, or changes only how images
are restored, does not caption again. A record is written whole; two workers that race write the same bytes.
"""

from __future__ import annotations

import hashlib
import json

from supir_batch import store
from supir_batch.types import Job, Settings, TileTicket

CAPTIONS_FOLDER = "_captions"

_VERSION = 1  # raised when the program itself would caption the same image otherwise


def find(ticket: TileTicket) -> str | None:
    """The kept caption of the image behind ``ticket``, which must carry facts; None when it must be made.

    Raises StoreError if the store cannot be asked. A record that cannot be read as one does not count.
    """
    uri = _uri(ticket)
    if uri is None or not store.exists(uri):
        return None
    try:
        record = json.loads(store.read_bytes(uri))
        caption, deciding = record["caption"], record["deciding"]
    except (ValueError, KeyError, TypeError):
        return None
    return caption if isinstance(caption, str) and deciding == _deciding(ticket) else None


def keep(ticket: TileTicket) -> None:
    """Keep the caption that ``ticket`` carries. Raises StoreError."""
    uri = _uri(ticket)
    if uri is not None:
        record = {"caption": ticket.caption, "captioner": ticket.job.settings.captioner, "deciding": _deciding(ticket)}
        text = json.dumps(record, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        store.write_atomic(uri, text.encode())


def _uri(ticket: TileTicket) -> str | None:
    """Where the caption is kept; None for captions that cost less than a look-up."""
    job: Job = ticket.job
    if job.settings.prompt_source != "llava":
        return None
    text = json.dumps(_deciding(ticket), sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(text.encode()).hexdigest()
    return store.join(job.output_root, CAPTIONS_FOLDER, key[:2], f"{key}.json")


def _deciding(ticket: TileTicket) -> dict[str, str | int | float]:
    """What decides the caption: the bytes, the robust encoder that shows them, the captioner, and how it is asked."""
    if ticket.facts is None:
        raise ValueError(f"{ticket.job.source.origin}: a ticket without image facts has no caption")
    settings: Settings = ticket.job.settings
    return {
        "version": _VERSION,
        "source_sha256": ticket.facts.sha256,
        "page": settings.page,
        "model_sha256": settings.model_sha256,
        "captioner_identity": settings.captioner_identity,
        "question": settings.caption_question,
        "template": settings.caption_template,
        "max_new_tokens": settings.caption_max_new_tokens,
        "temperature": float(settings.caption_temperature),
        "top_p": float(settings.caption_top_p),
        "precision": settings.caption_precision,
        "quantization": settings.caption_quantization,
        "seed": ticket.seed if settings.caption_temperature > 0 else 0,
    }
