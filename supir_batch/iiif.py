"""IIIF Presentation 3 manifests of an output, in which a viewer switches between original and restored image.

Everything lies in ``<output>/_iiif/``: of each image a manifest and two JPEGs for viewers, and a collection of all. The
output folder, published as it is under one address, needs no image server. The restored file itself is offered for
download, the record and the PREMIS XML are linked.

Source: IIIF Presentation API 3.0, https://iiif.io/api/presentation/3.0/.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

from supir_batch import checksums, commit, pictures, premis, store
from supir_batch.errors import ManifestError, StoreError
from supir_batch.export import Deliverable, deliverables
from supir_batch.plan import IIIF_FOLDER
from supir_batch.provenance import MEDIA_TYPES
from supir_batch.types import FloatImage

_CONTEXT = "http://iiif.io/api/presentation/3/context.json"
_LONGER_SIDE = 4096  # of the JPEGs for viewers, pixels


def write_manifests(output_uri: str, base_url: str, accepted: bool = False) -> int:
    """Write manifests for all images that are done; ``base_url`` is where the output folder is published.

    Each manifest is written after its pictures and the collection after the manifests, each whole. Returns the number
    of images. Raises ManifestError for an address that is none, StoreError for a file that is missing or was changed,
    ImageError for one that cannot be read.
    """
    if not re.fullmatch(r"https?://[^\s?#]+", base_url):
        raise ManifestError(f"--iiif {base_url}: must be an address such as https://example.org/restored")
    base = base_url.rstrip("/")
    found = deliverables(output_uri, accepted)
    manifests = [_write(output_uri, base, one) for one in found]
    collection = {
        "@context": _CONTEXT,
        "id": f"{base}/{IIIF_FOLDER}/collection.json",
        "type": "Collection",
        "label": {"en": ["Original and restored images"]},
        "items": [{key: manifest[key] for key in ("id", "type", "label")} for manifest in manifests],
    }
    _put(output_uri, "collection.json", collection)
    return len(found)


def _write(output_uri: str, base: str, one: Deliverable) -> dict[str, Any]:
    """Pictures and manifest of one image; returns the manifest."""
    sizes = {}
    for name, uri, digest, page in (
        ("original", one.row["uri"], one.row["source_sha256"], one.row["setting_page"] or 1),
        ("restored", store.join(output_uri, one.path), one.row["output_sha256"], 1),
    ):
        if store.sha256(uri) != digest:
            raise StoreError(f"{uri}: is not the file the log speaks of; it was changed since and is not shown")
        pixels: FloatImage = pictures.picture(uri, _LONGER_SIDE, page, digest)
        sizes[name] = (pixels.shape[1], pixels.shape[0])
        store.write_atomic(store.place(output_uri, IIIF_FOLDER, one.path, f"{name}.jpg"), pictures.jpeg(pixels))
    manifest = _manifest(base, one, sizes)
    _put(output_uri, f"{one.path}/manifest.json", manifest)
    return manifest


def _put(output_uri: str, path: str, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    store.write_atomic(store.place(output_uri, IIIF_FOLDER, path), text.encode())


def _manifest(base: str, one: Deliverable, sizes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    place = f"{base}/{IIIF_FOLDER}/{quote(one.path)}"
    generative, engine = one.record["generative"], one.record["engine_name"]
    made = "Generative reconstruction" if generative else "Processed without a generative model"
    labels = {"original": "Original", "restored": f"{made} ({engine})"}
    choice = [
        {
            "id": f"{place}/{name}.jpg",
            "type": "Image",
            "format": "image/jpeg",
            "width": sizes[name][0],
            "height": sizes[name][1],
            "label": {"en": [labels[name]]},
        }
        for name in ("original", "restored")
    ]
    annotation = {
        "id": f"{place}/annotation",
        "type": "Annotation",
        "motivation": "painting",
        "body": {"type": "Choice", "items": choice},
        "target": f"{place}/canvas",
    }
    width, height = one.record["output_size"]
    canvas = {
        "id": f"{place}/canvas",
        "type": "Canvas",
        "width": width,
        "height": height,
        "items": [{"id": f"{place}/page", "type": "AnnotationPage", "items": [annotation]}],
    }
    manifest = {
        "@context": _CONTEXT,
        "id": f"{place}/manifest.json",
        "type": "Manifest",
        "label": {"none": [one.source_name]},
        "metadata": [_pair(label, value) for label, value in _facts(one).items() if value],
        "rendering": [_link(base, one.path, "Image", MEDIA_TYPES[one.record["output_format"]], labels["restored"])],
        "seeAlso": _see_also(base, one),
        "items": [canvas],
    }
    if one.record["notice"]:
        manifest["requiredStatement"] = _pair("Notice", one.record["notice"])
    return manifest


def _facts(one: Deliverable) -> dict[str, str]:
    return {
        "Engine": one.record["engine_name"],
        "Prompt": one.record["prompt"],
        "Source SHA-256": one.record["source_sha256"],
        "Restored SHA-256": one.row["output_sha256"],
        "Settings SHA-256": one.record["settings_sha256"],
    }


def _pair(label: str, value: str) -> dict[str, Any]:
    # viewers show values as HTML, and prompts and notices are text
    text = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {"label": {"en": [label]}, "value": {"none": [text]}}


def _link(base: str, path: str, kind: str, media_type: str, label: str) -> dict[str, Any]:
    return {"id": f"{base}/{quote(path)}", "type": kind, "format": media_type, "label": {"en": [label]}}


def _see_also(base: str, one: Deliverable) -> list[dict[str, Any]]:
    found = [_link(base, commit.record_uri(one.path), "Dataset", "application/json", "Record")]
    xml = commit.premis_uri(one.path)
    if xml in checksums.sidecars(one.row):
        found.append(_link(base, xml, "Dataset", "application/xml", "PREMIS") | {"profile": premis.NAMESPACE})
    return found
