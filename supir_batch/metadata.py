"""Metadata of the source into the output, with ours added: EXIF, IPTC IIM, XMP.

The only file that imports pyexiv2 (Exiv2, GPL v3). EXIF and IPTC travel from source to output inside a *carrier*, a PNG
of one pixel, because Exiv2 copies tags between images with their types, private ones included, while a dictionary of
strings loses them. XMP travels as its packet, is edited as XML, so that nothing in it changes but what must, and is put
into the file here and not by Exiv2: that serializes with whatever prefixes the files it read before have used, so the
bytes would depend on the order of work, and it drops a packet that it cannot parse without a word.

Which property gets which value stands in docs/provenance.md. Dates of modification are not written, and the source's
are removed from XMP as they would speak of another file: a time in the file would make two runs differ. The times
stand in the JSON beside the output.

Sources: XMP specification part 1 and 2, IPTC Photo Metadata Standard 2025.1, Exif 3.0.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.dom import minidom
from xml.parsers.expat import ExpatError

import pyexiv2
import pyvips
import tifffile

from supir_batch import jpeg2000, probe
from supir_batch.errors import ImageError
from supir_batch.provenance import ProvenanceRecord

# Exiv2 logs to stderr about every oddity of the files it reads; its errors still come as exceptions
pyexiv2.set_log_level(4)

OWN_NAMESPACE = "urn:x-supir-batch:ns:1.0/"

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMLNS = "http://www.w3.org/2000/xmlns/"
_NAMESPACES = {
    "rdf": _RDF,
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "stEvt": "http://ns.adobe.com/xap/1.0/sType/ResourceEvent#",
    "stRef": "http://ns.adobe.com/xap/1.0/sType/ResourceRef#",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "tiff": "http://ns.adobe.com/tiff/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "supirBatch": OWN_NAMESPACE,
}

# tags that describe how the source's pixels are stored, or hold what travels by other ways
_STRUCTURE = frozenset(
    re.findall(
        r"\w+",
        """
        NewSubfileType SubfileType ImageWidth ImageLength BitsPerSample Compression PhotometricInterpretation
        Thresholding CellWidth CellLength FillOrder StripOffsets SamplesPerPixel RowsPerStrip StripByteCounts
        MinSampleValue MaxSampleValue PlanarConfiguration T4Options T6Options TransferFunction Predictor WhitePoint
        PrimaryChromaticities ColorMap HalftoneHints TileWidth TileLength TileOffsets TileByteCounts SubIFDs InkSet
        NumberOfInks DotRange ExtraSamples SampleFormat SMinSampleValue SMaxSampleValue TransferRange JPEGTables
        JPEGProc JPEGInterchangeFormat JPEGInterchangeFormatLength JPEGRestartInterval JPEGLosslessPredictors
        JPEGPointTransforms JPEGQTables JPEGDCTables JPEGACTables YCbCrCoefficients YCbCrSubSampling YCbCrPositioning
        ReferenceBlackWhite XMLPacket IPTCNAA ImageResources InterColorProfile XResolution YResolution ResolutionUnit
        """,
    )
)
_OTHER_IFDS = ("Exif.Thumbnail.", "Exif.SubImage", "Exif.Image2.", "Exif.Image3.")  # thumbnails and further pages

# XMP that speaks of the source file and would be false of the output
_STALE_XMP = (
    *(("tiff", name) for name in ("ImageWidth", "ImageLength", "BitsPerSample", "Compression", "Orientation")),
    *(("tiff", name) for name in ("PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration")),
    *(("tiff", name) for name in ("XResolution", "YResolution", "ResolutionUnit", "Software")),
    *(("exif", name) for name in ("PixelXDimension", "PixelYDimension")),
    *(("xmp", name) for name in ("Thumbnails", "ModifyDate", "MetadataDate")),
)

# XMP in which a file speaks of its making and its rights
_CLAIMS = {
    "Iptc4xmpExt": (
        *("DigitalSourceType", "AISystemUsed", "AISystemVersionUsed", "AIPromptInformation", "AIPromptWriterName"),
    ),
    "dc": ("title", "creator", "rights", "description"),
    "photoshop": ("Instructions",),
    "xmp": ("CreatorTool",),
    "xmpMM": ("DocumentID", "OriginalDocumentID"),
    "supirBatch": (
        *("Fingerprint", "SourceSHA256", "ConfigSHA256", "Seed", "Engine", "Scale", "TileSpec", "ColorFix"),
        *("GenerativeReconstruction",),
    ),
}

_JPEG_XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_XMP_LIMIT = 65533 - len(_JPEG_XMP_HEADER)  # of one segment
_IIM_CAPTION_LIMIT = 2000  # octets of IPTC 2:120
_NO_XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="%s"/></x:xmpmeta>' % _RDF  # noqa: UP031


@dataclass(frozen=True)
class SourceMetadata:
    """Metadata of one source. ``carrier`` is a PNG that holds its EXIF and IPTC; ``xmp`` its packet, b"" if none.

    ``notes`` say what could not be read.
    """

    carrier: bytes
    xmp: bytes
    notes: tuple[str, ...] = ()

    @property
    def exif(self) -> dict[str, str]:
        """EXIF and TIFF tags by Exiv2 key."""
        return dict(_read_carrier(self.carrier)[0])

    @property
    def iptc(self) -> dict[str, str | list[str]]:
        """IPTC IIM fields by Exiv2 key."""
        return dict(_read_carrier(self.carrier)[1])

    def to_bytes(self) -> bytes:
        """Serialize, for TileTicket.source_metadata."""
        fields = {
            "carrier": base64.b64encode(self.carrier).decode(),
            "xmp": base64.b64encode(self.xmp).decode(),
            "notes": self.notes,
        }
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> SourceMetadata:
        """Undo ``to_bytes``; empty bytes give empty metadata."""
        if not data:
            return cls(_EMPTY_CARRIER, b"")
        fields = json.loads(data)
        return cls(base64.b64decode(fields["carrier"]), base64.b64decode(fields["xmp"]), tuple(fields["notes"]))


def read_metadata(path: Path) -> SourceMetadata:
    """Read the metadata of an image file that ``probe.probe`` accepted.

    Never raises for odd metadata: pixels are worth more than tags, and a note tells. Exiv2 cannot open BigTIFF, which
    therefore gives its XMP only.
    """
    notes: list[str] = []
    data, xmp = _EMPTY_CARRIER, b""
    try:
        xmp = _read_packet(path)
    except (ImageError, pyvips.Error, tifffile.TiffFileError, ValueError) as error:
        notes.append(f"XMP of the source could not be read and is not in the output ({error})")
    try:
        with pyexiv2.Image(str(path)) as image:
            carrier = pyexiv2.ImageData(_EMPTY_CARRIER)
            try:
                image.copy_to_another_image(carrier, exif=True, iptc=True, xmp=False, comment=False, icc=False)
                stale = [key for key in carrier.read_exif() if _is_structure(key)]
                if stale:
                    carrier.modify_exif(dict.fromkeys(stale))
                data = bytes(carrier.get_bytes())
            finally:
                carrier.close()
    except (RuntimeError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        notes.append(f"EXIF and IPTC of the source could not be read and are not in the output ({error})")
    return SourceMetadata(data, xmp, tuple(notes))


def read_claims(path: Path) -> dict[str, str]:
    """What an image file says about its making and its rights, by XMP property; b"" and absent ones are left out.

    Raises ImageError ``bad-metadata`` if it has XMP that cannot be read.
    """
    try:
        editor = _Xmp(_parse(_read_packet(path)))
    except (ExpatError, ValueError, pyvips.Error, tifffile.TiffFileError) as error:
        raise ImageError("bad-metadata", f"its XMP cannot be read ({error})") from error
    said = {f"{prefix}:{name}": editor.read(prefix, name) for prefix, names in _CLAIMS.items() for name in names}
    return {key: value for key, value in said.items() if value}


def write_metadata(path: Path, source: SourceMetadata, record: ProvenanceRecord) -> tuple[str, ...]:
    """Put the source's metadata and ours into the finished file at ``path``; returns notes.

    Deterministic. Not for BigTIFF, which Exiv2 cannot open: its XMP goes in with the pixels (``build_xmp``). Raises
    ImageError ``metadata-failed``.
    """
    packet, notes = build_xmp(source, record)
    if record.output_format == "jpeg" and len(packet) > _JPEG_XMP_LIMIT:
        notes = (*notes, f"the source's XMP of {len(source.xmp)} bytes does not fit into a JPEG and was left out")
        packet, _ = build_xmp(SourceMetadata(source.carrier, b""), record)
    untagged = path.read_bytes() if record.output_format == "jpeg2000" else b""
    try:
        _write_exif(path, source, record, maker_note=True)
    except RuntimeError as first:
        # a JPEG holds 64 kB of EXIF; maker notes are what overflows it, and their offsets are private anyway
        try:
            _write_exif(path, source, record, maker_note=False)
        except RuntimeError as error:
            raise ImageError("metadata-failed", f"metadata cannot be written into the output: {error}") from error
        notes = (*notes, f"the camera's maker note was left out of the output ({first})")
    embed = {
        "jpeg": _embed_in_jpeg,
        "png": _embed_in_png,
        "tiff": _embed_in_tiff,
        "webp": _embed_in_webp,
    }
    if record.output_format == "jpeg2000":  # Exiv2 keeps no resolution: only its own boxes are taken from what it wrote
        path.write_bytes(jpeg2000.with_metadata(untagged, path.read_bytes(), packet))
    else:
        embed[record.output_format](path, packet)
    if _read_packet(path) != packet:
        raise ImageError("metadata-failed", "the XMP packet of the output does not read back as it was written")
    return notes


def build_xmp(source: SourceMetadata, record: ProvenanceRecord, bigtiff: bool = False) -> tuple[bytes, tuple[str, ...]]:
    """XMP packet of the output: the source's, edited, plus ours; and notes on what of the source is not in it.

    Where the output holds no EXIF and IPTC of its own (``bigtiff``) or no IPTC (WebP), what of them has a counterpart
    in XMP is added, unless the source's XMP has that already.
    """
    notes: tuple[str, ...] = ()
    try:
        document = _parse(source.xmp)
    except (ExpatError, ValueError) as error:
        document = _parse(b"")
        notes = (f"the source's XMP packet is not valid and was left out ({error})",)
    editor = _Xmp(document)
    for prefix, name in _STALE_XMP:
        editor.remove(prefix, name)
    if bigtiff or record.output_format == "webp":
        notes = (*notes, *_into_xmp(editor, source.exif if bigtiff else {}, source.iptc))

    editor.text("Iptc4xmpExt", "DigitalSourceType", record.digital_source_type)
    if record.generative:
        editor.text("Iptc4xmpExt", "AISystemUsed", record.engine_name)
        editor.text("Iptc4xmpExt", "AISystemVersionUsed", record.system_version)
        editor.text("Iptc4xmpExt", "AIPromptInformation", record.prompt_information)
        if record.prompt_writer is not None:
            editor.text("Iptc4xmpExt", "AIPromptWriterName", record.prompt_writer)
    if record.notice:
        editor.localized("dc", "description", _with_notice(editor.read("dc", "description"), record.notice))
        editor.text("photoshop", "Instructions", _with_notice(editor.read("photoshop", "Instructions"), record.notice))
    editor.text("xmp", "CreatorTool", record.software)
    editor.text("tiff", "Orientation", "1")

    source_document = editor.read("xmpMM", "DocumentID")
    source_instance = editor.read("xmpMM", "InstanceID")
    original = editor.read("xmpMM", "OriginalDocumentID") or source_document or record.fallback_original_id
    reference = {
        "documentID": source_document or record.fallback_original_id,
        "instanceID": source_instance,
        "originalDocumentID": original,
        "filePath": record.source_name,
    }
    editor.text("xmpMM", "DocumentID", record.document_id)
    editor.text("xmpMM", "InstanceID", record.instance_id)
    editor.text("xmpMM", "OriginalDocumentID", original)
    editor.struct("xmpMM", "DerivedFrom", "stRef", {key: value for key, value in reference.items() if value})
    editor.append_event(
        {
            "action": "derived",
            "instanceID": record.instance_id,
            "softwareAgent": record.software,
            "parameters": record.history_parameters,
            "changed": "/",
        }
    )
    for name, value in {
        "Fingerprint": record.fingerprint,
        "SourceSHA256": record.source_sha256,
        "ConfigSHA256": record.settings_sha256,
        "Seed": str(record.seed),
        "Engine": record.engine,
        "Scale": f"{record.scale[0]:g} {record.scale[1]:g}",
        "TileSpec": record.tile_spec,
        "ColorFix": str(record.settings["color_fix"]),
        "GenerativeReconstruction": str(record.generative),
    }.items():
        editor.text("supirBatch", name, value)
    return _packet(document), notes


def _into_xmp(editor: _Xmp, exif: dict[str, str], iptc: dict[str, str | list[str]]) -> Iterator[str]:
    """Add what of EXIF and IPTC has a counterpart in XMP (by Exiv2's mapping); a note says what has none."""
    lost: list[str] = []
    for tags, convert in ((exif, pyexiv2.convert_exif_to_xmp), (iptc, pyexiv2.convert_iptc_to_xmp)):
        for tag, told in tags.items():
            found = convert({tag: told} | {key: tags[key] for key in tags if key.startswith(f"{tag}Ref")})
            if not found and not tag.endswith("Ref"):
                lost.append(tag)
            for key, value in found.items():
                _, prefix, name = key.split(".", 2)
                if prefix in _NAMESPACES and (prefix, name) not in _STALE_XMP and not editor.read(prefix, name):
                    editor.value(prefix, name, value)
    if lost:
        yield f"the output holds no EXIF or IPTC; in XMP there is no place for {', '.join(sorted(lost))}"


def _write_exif(path: Path, source: SourceMetadata, record: ProvenanceRecord, *, maker_note: bool) -> None:
    """EXIF and IPTC; RuntimeError where Exiv2 cannot."""
    ours = {
        "Exif.Image.Software": record.software,
        "Exif.Image.Orientation": "1",
    }
    carrier = pyexiv2.ImageData(source.carrier)
    try:
        exif, iptc = carrier.read_exif(), carrier.read_iptc()
        if record.notice:
            described = _with_notice(exif.get("Exif.Image.ImageDescription", ""), record.notice)
            ours["Exif.Image.ImageDescription"] = described.encode("ascii", "replace").decode()
        if record.dpi is not None and record.output_format != "tiff":  # a TIFF's own tags hold it already
            ours["Exif.Image.XResolution"] = _rational(record.dpi[0])
            ours["Exif.Image.YResolution"] = _rational(record.dpi[1])
            ours["Exif.Image.ResolutionUnit"] = "2"
        for key, size in zip(
            ("Exif.Photo.PixelXDimension", "Exif.Photo.PixelYDimension"), record.output_size, strict=True
        ):
            if key in exif:
                ours[key] = str(size)
        carrier.modify_exif(ours)
        if not maker_note:
            carrier.modify_exif({key: None for key in exif if _is_maker_note(key)})
        caption = iptc.get("Iptc.Application2.Caption")
        if caption and record.notice:
            noted = _with_notice(caption, record.notice).encode()[:_IIM_CAPTION_LIMIT].decode(errors="ignore")
            carrier.modify_iptc({"Iptc.Application2.Caption": noted})
        with pyexiv2.Image(str(path)) as image:
            carrier.copy_to_another_image(image, exif=True, iptc=True, xmp=False, comment=False, icc=False)
            if record.output_format == "tiff":
                # makes room: a tag that is there can be overwritten, and Exiv2 writes none for an empty packet
                image.modify_xmp({"Xmp.dc.format": "image/tiff"})
    finally:
        carrier.close()


def _embed_in_jpeg(path: Path, packet: bytes) -> None:
    """An APP1 segment behind JFIF and EXIF, which must come first."""
    data = path.read_bytes()
    at = 2
    while data[at] == 0xFF and data[at + 1] in (0xE0, 0xE1):
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    body = _JPEG_XMP_HEADER + packet
    path.write_bytes(data[:at] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[at:])


def _embed_in_png(path: Path, packet: bytes) -> None:
    """An uncompressed iTXt chunk right behind the header, as XMP part 3 wants."""
    at = 8 + 25  # signature and IHDR
    body = b"iTXt" + b"XML:com.adobe.xmp" + bytes(5) + packet
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    with path.open("r+b") as file:
        file.seek(at)
        rest = file.read()
        file.seek(at)
        file.write(chunk + rest)


def _embed_in_webp(path: Path, packet: bytes) -> None:
    """The last chunk of the RIFF file, announced in VP8X, which Exiv2 has added with the EXIF (RFC 9649, 2.7)."""
    data = path.read_bytes()
    chunks, at = [], 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        kind, body = data[at : at + 4], data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
        if kind == b"VP8X":
            body = bytes([body[0] | 0x04]) + body[1:]
        if kind != b"XMP ":
            chunks.append((kind, body))
    chunks.append((b"XMP ", packet))
    written = b"".join(struct.pack("<4sI", kind, len(body)) + body + bytes(len(body) % 2) for kind, body in chunks)
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(written)) + b"WEBP" + written)


def _embed_in_tiff(path: Path, packet: bytes) -> None:
    """Tag 700 of page 1."""
    with tifffile.TiffFile(path, mode="r+") as tif:
        tif.pages.first.tags[700].overwrite(packet)


def _read_carrier(data: bytes) -> tuple[dict[str, str], dict[str, str | list[str]]]:
    carrier = pyexiv2.ImageData(data)
    try:
        return carrier.read_exif(), carrier.read_iptc()
    finally:
        carrier.close()


def _is_structure(key: str) -> bool:
    group, _, name = key.rpartition(".")
    return (group == "Exif.Image" and name in _STRUCTURE) or key.startswith(_OTHER_IFDS)


def _is_maker_note(key: str) -> bool:
    # Exiv2 names decoded maker notes by vendor group (Exif.Canon.x, Exif.CanonCs.x)
    group = key.split(".")[1]
    return key == "Exif.Photo.MakerNote" or group not in ("Image", "Photo", "GPSInfo", "Iop")


def _with_notice(text: str, notice: str) -> str:
    text = text.strip()
    if notice in text:
        return text
    return f"{text} | {notice}" if text else notice


def _rational(value: float) -> str:
    return f"{round(value * 10000)}/10000" if value != round(value) else f"{round(value)}/1"


# ------------------------------------------------------------------------------------------------ XMP packets as XML


def _read_packet(path: Path) -> bytes:
    """The XMP packet of an image file byte for byte; b"" if there is none."""
    with path.open("rb") as stream:
        image_format = probe.sniff(stream.read(64))
    if image_format == "tiff":
        with tifffile.TiffFile(path) as tif:
            found = tif.pages.first.tags.valueof(700)
        return bytes(found) if found is not None else b""
    if image_format == "jpeg2000":
        return jpeg2000.read_header(path).xmp
    image = probe.open_vips(path, image_format)
    return bytes(image.get("xmp-data")) if "xmp-data" in image.get_fields() else b""


def _parse(packet: bytes) -> minidom.Document:
    """Parse a packet without its wrapper; ValueError if it is no XMP or declares entities."""
    # an XMP packet never has a document type; one that does is an attack on the parser
    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        raise ValueError("it declares a document type")
    body = re.sub(rb"<\?xpacket.*?\?>", b"", packet, flags=re.DOTALL).strip(b"\0\xef\xbb\xbf \r\n\t")
    document = minidom.parseString(body or _NO_XMP.encode())
    roots = document.getElementsByTagNameNS(_RDF, "RDF")
    if not roots:
        raise ValueError("it has no rdf:RDF element")
    _use_common_prefixes(document, roots[0])
    return document


def _use_common_prefixes(document: minidom.Document, root: minidom.Element) -> None:
    """Spell every known namespace with its usual prefix, declared once on ``root`` (the rdf:RDF element).

    XML does not care, but widespread readers reject a packet in which one namespace has two prefixes, and see nothing
    in one that does not spell RDF ``rdf``. Raises ValueError if a usual prefix stands for something else.
    """
    usual = {uri: prefix for prefix, uri in _NAMESPACES.items()}
    elements: list[minidom.Element] = [*document.getElementsByTagName("*")]
    for element in elements:
        for name, value in list(element.attributes.items()):
            attribute = element.getAttributeNode(name)
            if attribute is None:
                continue
            if attribute.namespaceURI == _XMLNS:
                if value in usual:
                    element.removeAttributeNode(attribute)
                elif attribute.localName in _NAMESPACES:
                    raise ValueError(f"it uses the prefix {attribute.localName} for {value}")
            elif attribute.namespaceURI in usual:
                document.renameNode(
                    attribute, attribute.namespaceURI, f"{usual[attribute.namespaceURI]}:{_local(name)}"
                )
        if element.namespaceURI in usual:
            name = f"{usual[element.namespaceURI]}:{_local(element.tagName)}"
            document.renameNode(element, element.namespaceURI, name)
    for prefix, uri in _NAMESPACES.items():
        root.setAttributeNS(_XMLNS, f"xmlns:{prefix}", uri)


def _local(name: str) -> str:
    return name.rpartition(":")[2]


def _packet(document: minidom.Document) -> bytes:
    body = document.documentElement.toxml() if document.documentElement is not None else ""
    return f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{body}\n<?xpacket end="w"?>'.encode()


class _Xmp:
    """Edits the properties of one parsed XMP packet.

    A property can be an attribute or a child of any ``rdf:Description``; ours go into one description of their own.
    """

    def __init__(self, document: minidom.Document) -> None:
        self._document = document
        rdf = document.getElementsByTagNameNS(_RDF, "RDF")[0]
        self._descriptions = [
            node
            for node in rdf.childNodes
            if isinstance(node, minidom.Element) and node.namespaceURI == _RDF and node.localName == "Description"
        ]
        about = self._descriptions[0].getAttributeNS(_RDF, "about") if self._descriptions else ""
        own = document.createElementNS(_RDF, "rdf:Description")
        own.setAttributeNS(_RDF, "rdf:about", about)
        rdf.appendChild(own)
        self._own = own

    def read(self, prefix: str, name: str) -> str:
        """Text of a simple property, or of the first item of an array; "" if absent."""
        uri = _NAMESPACES[prefix]
        for description in self._descriptions:
            if description.hasAttributeNS(uri, name):
                return str(description.getAttributeNS(uri, name))
        for element in self._elements(uri, name):
            items = element.getElementsByTagNameNS(_RDF, "li")
            return _text_of(items[0] if items else element).strip()
        return ""

    def remove(self, prefix: str, name: str) -> None:
        """Remove a property wherever it stands."""
        uri = _NAMESPACES[prefix]
        for description in self._descriptions:
            if description.hasAttributeNS(uri, name):
                description.removeAttributeNS(uri, name)
        for element in self._elements(uri, name):
            if element.parentNode is not None:
                element.parentNode.removeChild(element)

    def text(self, prefix: str, name: str, value: str) -> None:
        """Set a simple property, in place of any of that name."""
        self.remove(prefix, name)
        self._own.appendChild(self._leaf(f"{prefix}:{name}", _NAMESPACES[prefix], value))

    def localized(self, prefix: str, name: str, value: str) -> None:
        """Set the default (first) language of a language alternative; other languages of the source stay."""
        for element in self._elements(_NAMESPACES[prefix], name):
            items = element.getElementsByTagNameNS(_RDF, "li")
            if items:
                for node in list(items[0].childNodes):
                    items[0].removeChild(node)
                items[0].appendChild(self._document.createTextNode(_clean(value)))
                return
        self.remove(prefix, name)
        item = self._leaf("rdf:li", _RDF, value)
        item.setAttribute("xml:lang", "x-default")
        self._array(_NAMESPACES[prefix], f"{prefix}:{name}", "rdf:Alt").appendChild(item)

    def value(self, prefix: str, name: str, value: str | list[str] | dict[str, str]) -> None:
        """Set a property from Exiv2's view of it: a text, a list, or texts by language."""
        if isinstance(value, dict):
            self.localized(prefix, name, next(iter(value.values())))
        elif isinstance(value, list):
            self.remove(prefix, name)
            kind = "rdf:Seq" if (prefix, name) == ("dc", "creator") else "rdf:Bag"
            array = self._array(_NAMESPACES[prefix], f"{prefix}:{name}", kind)
            for one in value:
                array.appendChild(self._leaf("rdf:li", _RDF, one))
        else:
            self.text(prefix, name, value)

    def struct(self, prefix: str, name: str, field_prefix: str, fields: dict[str, str]) -> None:
        """Set a structure of simple fields, in place of any of that name."""
        self.remove(prefix, name)
        element = self._document.createElementNS(_NAMESPACES[prefix], f"{prefix}:{name}")
        self._fill(element, field_prefix, fields)
        self._own.appendChild(element)

    def append_event(self, fields: dict[str, str]) -> None:
        """Append to xmpMM:History, which keeps what the source had."""
        uri = _NAMESPACES["xmpMM"]
        lists = [found for e in self._elements(uri, "History") for found in e.getElementsByTagNameNS(_RDF, "Seq")]
        if not lists:
            self.remove("xmpMM", "History")
            lists = [self._array(uri, "xmpMM:History", "rdf:Seq")]
        event = self._document.createElementNS(_RDF, "rdf:li")
        self._fill(event, "stEvt", fields)
        lists[0].appendChild(event)

    def _array(self, uri: str, qualified: str, kind: str) -> minidom.Element:
        element = self._document.createElementNS(uri, qualified)
        array = self._document.createElementNS(_RDF, kind)
        element.appendChild(array)
        self._own.appendChild(element)
        return array

    def _fill(self, element: minidom.Element, prefix: str, fields: dict[str, str]) -> None:
        element.setAttributeNS(_RDF, "rdf:parseType", "Resource")
        for name, value in fields.items():
            element.appendChild(self._leaf(f"{prefix}:{name}", _NAMESPACES[prefix], value))

    def _leaf(self, qualified: str, uri: str, value: str) -> minidom.Element:
        element = self._document.createElementNS(uri, qualified)
        element.appendChild(self._document.createTextNode(_clean(value)))
        return element

    def _elements(self, uri: str, name: str) -> list[minidom.Element]:
        """Elements of a property at the top level of a description, ours included."""
        return [
            node
            for description in (*self._descriptions, self._own)
            for node in description.childNodes
            if isinstance(node, minidom.Element) and node.namespaceURI == uri and node.localName == name
        ]


def _clean(value: str) -> str:
    """Without the characters that XML 1.0 cannot hold, which would make the whole packet unreadable."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", value)


def _text_of(element: minidom.Element) -> str:
    return "".join(
        str(node.data) if isinstance(node, minidom.Text) else _text_of(node)
        for node in element.childNodes
        if isinstance(node, minidom.Text | minidom.Element)
    )


# a PNG of one grey pixel
_EMPTY_CARRIER = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
