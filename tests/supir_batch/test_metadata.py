from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pyexiv2
import pytest
import tifffile
from PIL import Image

from supir_batch import metadata, provenance
from supir_batch.decode import decode
from supir_batch.metadata import SourceMetadata
from supir_batch.provenance import ProvenanceRecord
from supir_batch.types import Job, Outcome, OutputFormat

Restore = Callable[..., Outcome]
GENERATIVE = {"engine": "supir", "engine_name": "SUPIR v0Q", "model_sha256": "ab" * 32, "weights": "v0Q"}

SOURCE_XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:d="http://purl.org/dc/elements/1.1/" xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
 xmlns:e="http://ns.adobe.com/xap/1.0/sType/ResourceEvent#" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:own="http://archive.example/1.0/" tiff:Orientation="6"
 xmp:ModifyDate="2001-01-01" xmpMM:DocumentID="xmp.did:source" xmpMM:InstanceID="xmp.iid:source" own:Shelf="K 17">
<d:creator><rdf:Seq><rdf:li>Jane Doe</rdf:li></rdf:Seq></d:creator>
<d:description><rdf:Alt>
<rdf:li xml:lang="x-default">A street</rdf:li><rdf:li xml:lang="de">Eine Straße</rdf:li></rdf:Alt></d:description>
<xmpMM:History><rdf:Seq><rdf:li e:action="scanned" e:softwareAgent="Scan 1.0"/></rdf:Seq></xmpMM:History>
</rdf:Description></rdf:RDF></x:xmpmeta>"""


def _source(path: Path) -> Path:
    """A photograph with EXIF (a thumbnail, a private tag), IPTC and XMP."""
    levels = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    if path.suffix == ".tif":
        tags = [(315, "s", 0, "Jane Doe", True), (269, "s", 0, "K 17", True), (65001, "s", 0, "private", True)]
        tifffile.imwrite(path, levels, photometric="rgb", metadata=None, extratags=tags, software="Scan 1.0")
    else:
        Image.fromarray(levels).save(path)
    with pyexiv2.Image(str(path)) as image:
        image.modify_exif(
            {
                "Exif.Image.Artist": "Jane Doe",
                "Exif.Image.Copyright": "City archive",
                "Exif.Image.ImageDescription": "A street",
                "Exif.Photo.DateTimeOriginal": "1911:05:04 10:00:00",
                "Exif.Photo.PixelXDimension": "60",
                "Exif.GPSInfo.GPSLatitudeRef": "N",
                "Exif.GPSInfo.GPSLatitude": "48/1 8/1 0/1",
                "Exif.Image.Orientation": "1",
            }
        )
        image.modify_iptc({"Iptc.Application2.Caption": "A street", "Iptc.Application2.Keywords": ["street", "1911"]})
        image.modify_raw_xmp(SOURCE_XMP)
        if path.suffix == ".jpg":
            image.modify_thumbnail(path.read_bytes())
    return path


def _properties(packet: str) -> dict[str, str]:
    with pyexiv2.ImageData(SourceMetadata.from_bytes(b"").carrier) as image:
        image.modify_raw_xmp(packet)
        return {key: str(value) for key, value in image.read_xmp().items()}


@pytest.mark.parametrize("target", ["tiff", "png", "jpeg"])
@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
def test_everything_of_the_source_is_kept_and_ours_added(
    tmp_path: Path, restore: Restore, name: str, target: OutputFormat
) -> None:
    outcome = restore(_source(tmp_path / name), upscale=2.0, format=target, prompt="a street", **GENERATIVE)
    assert outcome.status == "done", outcome.ticket.failure
    with pyexiv2.Image(outcome.output_uri) as image:
        exif, iptc = image.read_exif(), image.read_iptc()
        xmp = {key: str(value) for key, value in image.read_xmp().items()}
        thumbnail = image.read_thumbnail()
    assert exif["Exif.Image.Artist"] == "Jane Doe"
    assert exif["Exif.Image.Copyright"] == "City archive"
    assert exif["Exif.Photo.DateTimeOriginal"] == "1911:05:04 10:00:00"
    assert exif["Exif.GPSInfo.GPSLatitude"] == "48/1 8/1 0/1"
    if name == "a.tif":
        assert exif["Exif.Image.DocumentName"] == "K 17"
        assert exif["Exif.Image.0xfde9"] == "private"
    assert exif["Exif.Image.Software"].endswith("(SUPIR v0Q)")
    assert exif["Exif.Image.ImageDescription"].startswith("A street | AI-assisted reconstruction")
    assert exif["Exif.Image.Orientation"] == "1"
    assert exif["Exif.Photo.PixelXDimension"] == "120"
    assert thumbnail == b""
    assert iptc["Iptc.Application2.Keywords"] == ["street", "1911"]
    assert str(iptc["Iptc.Application2.Caption"]).startswith("A street | AI-assisted")

    assert xmp["Xmp.iptcExt.DigitalSourceType"] == provenance.GENERATIVE_SOURCE_TYPE
    assert xmp["Xmp.iptcExt.AISystemUsed"] == "SUPIR v0Q"
    assert "weights sha256:abab" in xmp["Xmp.iptcExt.AISystemVersionUsed"]
    assert xmp["Xmp.iptcExt.AIPromptInformation"].startswith("positive: a street; negative: ")
    assert xmp["Xmp.dc.creator"] == "['Jane Doe']"
    assert "AI-assisted reconstruction" in xmp["Xmp.dc.description"]
    assert "Eine Straße" in xmp["Xmp.dc.description"]
    assert xmp["Xmp.xmpMM.OriginalDocumentID"] == "xmp.did:source"
    assert xmp["Xmp.xmpMM.DerivedFrom/stRef:documentID"] == "xmp.did:source"
    assert xmp["Xmp.xmpMM.DocumentID"] != "xmp.did:source"
    assert xmp["Xmp.xmpMM.History[1]/stEvt:action"] == "scanned"
    assert xmp["Xmp.xmpMM.History[2]/stEvt:action"] == "derived"
    assert xmp["Xmp.supirBatch.GenerativeReconstruction"] == "True"
    assert xmp["Xmp.supirBatch.SourceSHA256"] == outcome.ticket.facts.sha256  # type: ignore[union-attr]
    assert "Xmp.xmp.ModifyDate" not in xmp  # of another file; and a date of ours would differ from run to run
    assert [value for key, value in xmp.items() if key.endswith("Shelf")] == ["K 17"]
    assert xmp["Xmp.tiff.Orientation"] == "1"


def test_a_structural_tag_of_a_tiff_does_not_reach_a_jpeg(tmp_path: Path, restore: Restore) -> None:
    outcome = restore(_source(tmp_path / "a.tif"), format="jpeg", upscale=2.0)
    with pyexiv2.Image(outcome.output_uri) as image:
        exif = image.read_exif()
    assert not {"Exif.Image.ImageWidth", "Exif.Image.Compression", "Exif.Image.StripOffsets"} & exif.keys()


@pytest.fixture
def record(tmp_path: Path, make_job: Callable[..., Job]) -> ProvenanceRecord:
    path = tmp_path / "source.png"
    Image.new("RGB", (8, 8)).save(path)
    return provenance.build_record(next(decode(make_job(path, **GENERATIVE), 16)).ticket, "png", 8)


def test_serialized_metadata_returns(tmp_path: Path) -> None:
    source = metadata.read_metadata(_source(tmp_path / "a.jpg"))
    again = SourceMetadata.from_bytes(source.to_bytes())
    assert again == source
    assert again.exif["Exif.Image.Artist"] == "Jane Doe"
    assert again.iptc["Iptc.Application2.Keywords"] == ["street", "1911"]
    assert SourceMetadata.from_bytes(b"").exif == {}


def test_a_bigtiff_gives_its_xmp_and_a_note(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    packet = SOURCE_XMP.encode()
    tags = [(700, "B", len(packet), packet, True)]
    tifffile.imwrite(path, np.zeros((4, 4), np.uint8), bigtiff=True, metadata=None, extratags=tags)
    source = metadata.read_metadata(path)
    assert b"Jane Doe" in source.xmp
    assert "EXIF and IPTC" in source.notes[0]


@pytest.mark.parametrize(
    "packet",
    [
        b"<not closed",
        b"<a/>",
        b'<!DOCTYPE x [<!ENTITY a "b">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&a;</x:xmpmeta>',
    ],
)
def test_an_unusable_xmp_packet_is_left_out_and_noted(record: ProvenanceRecord, packet: bytes) -> None:
    written, notes = metadata.build_xmp(dataclasses.replace(SourceMetadata.from_bytes(b""), xmp=packet), record)
    assert "left out" in notes[0]
    assert _properties(written.decode())["Xmp.iptcExt.AISystemUsed"] == "SUPIR v0Q"


def test_hostile_text_stays_text(record: ProvenanceRecord) -> None:
    nasty = dataclasses.replace(record, prompt='</rdf:li> <b> & " \x00\x0b\ud800 ü 字')
    written, _ = metadata.build_xmp(SourceMetadata.from_bytes(b""), nasty)
    minidom.parseString(written)
    assert '</rdf:li> <b> & "' in _properties(written.decode())["Xmp.iptcExt.AIPromptInformation"]


def test_a_packet_with_prefixes_of_its_own_stays_readable(record: ProvenanceRecord) -> None:
    odd = SOURCE_XMP.replace("rdf:", "r:").replace("xmlns:rdf=", "xmlns:r=").encode()
    written, notes = metadata.build_xmp(dataclasses.replace(SourceMetadata.from_bytes(b""), xmp=odd), record)
    properties = _properties(written.decode())  # a common reader sees nothing if RDF is not spelled rdf
    assert notes == ()
    assert properties["Xmp.dc.creator"] == "['Jane Doe']"
    assert properties["Xmp.xmpMM.DerivedFrom/stRef:documentID"] == "xmp.did:source"
    assert properties["Xmp.iptcExt.AISystemUsed"] == "SUPIR v0Q"


def test_an_xmp_packet_too_long_for_a_jpeg_is_left_out_and_noted(tmp_path: Path, restore: Restore) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    long = SOURCE_XMP.replace("K 17", "K" * 70_000)
    with pyexiv2.Image(str(path)) as image:
        image.modify_raw_xmp(long)
    outcome = restore(path, format="jpeg", **GENERATIVE)
    assert outcome.status == "done", outcome.ticket.failure
    assert outcome.ticket.facts is not None
    assert any("does not fit into a JPEG" in note for note in outcome.ticket.facts.notes)
    with pyexiv2.Image(outcome.output_uri) as image:
        assert "compositeWithTrainedAlgorithmicMedia" in image.read_raw_xmp()


@pytest.mark.parametrize("target", ["tiff", "png", "jpeg"])
def test_bytes_do_not_depend_on_what_was_read_before(tmp_path: Path, restore: Restore, target: OutputFormat) -> None:
    path = _source(tmp_path / "a.jpg")
    before = Path(restore(path, folder="before", format=target).output_uri).read_bytes()
    odd = (
        SOURCE_XMP.replace("xmlns:e=", f"xmlns:z{target}=")
        .replace(" e:", f" z{target}:")
        .replace("own:", f"own{target}:")
        .replace(":own=", f":own{target}=")
    )
    with pyexiv2.ImageData(SourceMetadata.from_bytes(b"").carrier) as image:
        image.modify_raw_xmp(odd)  # Exiv2 now spells these namespaces with these prefixes, for the whole process
        image.read_raw_xmp()
    assert Path(restore(path, folder="after", format=target).output_uri).read_bytes() == before


def test_restoring_a_restored_image_does_not_repeat_the_notice(record: ProvenanceRecord) -> None:
    once, _ = metadata.build_xmp(SourceMetadata.from_bytes(b""), record)
    twice, _ = metadata.build_xmp(dataclasses.replace(SourceMetadata.from_bytes(b""), xmp=once), record)
    properties = _properties(twice.decode())
    assert properties["Xmp.dc.description"].count("AI-assisted") == 1
    assert properties["Xmp.xmpMM.History[2]/stEvt:action"] == "derived"


def test_exiv2_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = _source(tmp_path / "a.jpg")
    data = bytearray(path.read_bytes())
    start = data.index(b"Exif\0\0") + 6
    data[start + 10 : start + 14] = b"\xff\xff\xff\xff"  # a directory entry of nonsense
    path.write_bytes(data)
    metadata.read_metadata(path)
    assert capfd.readouterr() == ("", "")
