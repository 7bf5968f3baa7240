"""Bags and transfers: whole or absent, true to the log, read by the tools they are for."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import bagit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from supir_batch import checksums, export, premis, runlog, store
from supir_batch.cli import app
from supir_batch.errors import ManifestError, StoreError
from supir_batch.iiif import write_manifests
from supir_batch.runlog import RunLog
from supir_batch.types import Outcome
from supir_batch.verify import verify

Restore = Callable[..., Outcome]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, restore: Restore, rng: np.random.Generator) -> Make:
    """Restored images of the given names with their log, and one failed image."""

    def run(*names: str, **options: object) -> Path:
        with RunLog(str(tmp_path / "out"), "run") as log:
            for name in names:
                Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(tmp_path / name)
                outcome = restore(tmp_path / name, **{"sidecars": ("json", "premis"), **options})
                assert outcome.status == "done", outcome.ticket.failure
                log.append(runlog.to_row(outcome, "run"))
            (tmp_path / "bad.png").write_text("no image")
            log.append(runlog.to_row(restore(tmp_path / "bad.png"), "run"))
        return tmp_path / "out"

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- BagIt ---------------------------------------------------------------------------------------------------------


def test_a_bag_is_valid_and_holds_what_is_done(make: Make, tmp_path: Path) -> None:
    output = make("a.png", "é ü.jpg", "c.tif", organization="Town\narchive")
    assert export.bag(str(output), str(tmp_path / "bag")) == 3
    bag = bagit.Bag(str(tmp_path / "bag"))
    bag.validate()
    assert bag.info["Source-Organization"] == "Town archive"
    assert (bag.version_info, set(bag.algorithms)) == ((1, 0), {"sha256"})
    names = [name + suffix for name in ("a.png", "c.tif", "é ü.jpg") for suffix in ("", ".json", ".premis.xml")]
    assert files(tmp_path / "bag" / "data") == sorted(names)
    assert set(bag.entries) == {
        *(f"data/{name}" for name in names),
        *("bagit.txt", "bag-info.txt", "manifest-sha256.txt"),
    }
    assert (tmp_path / "bag" / "data" / "a.png").read_bytes() == (output / "a.png").read_bytes()


def test_a_log_that_is_older_than_the_hashes_of_records(make: Make, tmp_path: Path) -> None:
    output = make("a.png")
    rows = runlog.read_log(str(output)).to_pylist()
    shutil.rmtree(output / "_runs")
    with RunLog(str(output), "run") as log:
        for row in rows:
            log.append(row | {"record_sha256": None})
    assert export.bag(str(output), str(tmp_path / "bag")) == 1
    assert (tmp_path / "bag/data/a.png.json").read_bytes() == (output / "a.png.json").read_bytes()


def test_the_validator_would_see_a_changed_bag(make: Make, tmp_path: Path) -> None:
    export.bag(str(make("a.png")), str(tmp_path / "bag"))
    (tmp_path / "bag" / "bag-info.txt").write_text("Contact-Name: x\n")
    with pytest.raises(bagit.BagValidationError):
        bagit.Bag(str(tmp_path / "bag")).validate()


@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_paths_in_a_bag_are_encoded_as_the_rfc_wants(name: str) -> None:
    encoded = export._bag_path(name)
    assert not set(encoded) & set("\r\n")
    assert encoded.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%") == name


def test_premis_is_made_where_the_run_wrote_none(make: Make, tmp_path: Path) -> None:
    output = make("a.png", sidecars=("json",))
    export.bag(str(output), str(tmp_path / "bag"))
    bagit.Bag(str(tmp_path / "bag")).validate()
    record = json.loads((output / "a.png.json").read_text())
    assert (tmp_path / "bag" / "data" / "a.png.premis.xml").read_bytes() == premis.document(record)


# --- Archivematica -------------------------------------------------------------------------------------------------


def test_a_transfer_holds_originals_access_copies_relations_and_hashes(make: Make, tmp_path: Path) -> None:
    output = make("a.png", "b, c.jpg", format="tiff")
    assert export.archivematica(str(output), str(tmp_path / "transfer")) == 2
    transfer = tmp_path / "transfer"
    assert files(transfer) == [
        "metadata/checksum.sha256",
        *(f"metadata/submissionDocumentation/a.tif{end}" for end in (".json", ".premis.xml")),
        *(f"metadata/submissionDocumentation/b, c.tif{end}" for end in (".json", ".premis.xml")),
        "objects/a.png",
        "objects/b, c.jpg",
        "objects/manualNormalization/access/a.tif",
        "objects/manualNormalization/access/b, c.tif",
        "objects/manualNormalization/normalization.csv",
    ]  # fmt: skip
    assert (transfer / "objects" / "a.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    access = "manualNormalization/access/"
    with (transfer / "objects/manualNormalization/normalization.csv").open(newline="") as relations:
        assert list(csv.reader(relations)) == [["a.png", f"{access}a.tif", ""], ["b, c.jpg", f"{access}b, c.tif", ""]]
    # Archivematica runs this below objects/, and wants as many lines as there are files
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "../metadata/checksum.sha256"], cwd=transfer / "objects",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    lines = (transfer / "metadata" / "checksum.sha256").read_text().splitlines()
    assert len(lines) == len(files(transfer / "objects"))


def test_originals_that_differ_in_extension_only_keep_their_access_copies_apart(make: Make) -> None:
    (first,) = export.deliverables(str(make("a.png")))
    second = dataclasses.replace(first, path="2.png", record={**first.record, "source_name": "A.jpg"})
    taken: set[str] = set()
    assert [export._access_name(one, taken) for one in (first, second)] == ["a.png", "A.jpg.png"]


def test_a_changed_source_is_not_handed_over(make: Make, tmp_path: Path) -> None:
    output = make("a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes() + b"\0")
    with pytest.raises(StoreError, match=r"a\.png: has SHA-256 .* so nothing is exported"):
        export.archivematica(str(output), str(tmp_path / "transfer"))
    assert not list(tmp_path.glob("*transfer*"))


# --- whole or absent -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b.png", "b.png.json", "b.png.premis.xml"])
@pytest.mark.parametrize("kind", ["bagit", "archivematica"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_what_is_not_as_logged_is_not_exported_and_leaves_nothing(
    make: Make, tmp_path: Path, name: str, kind: str, damage: str
) -> None:
    output = make("a.png", "b.png")
    if damage == "missing":
        (output / name).unlink()
    else:
        data = bytearray((output / name).read_bytes())
        data[len(data) // 2] ^= 1
        (output / name).write_bytes(data)
    before = set(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["export", str(output), f"--{kind}", str(tmp_path / "target")])
    assert result.exit_code == 2
    assert name in result.stderr
    assert set(tmp_path.iterdir()) == before


def test_a_kill_leaves_no_folder_of_that_name(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    output = make("a.png")
    monkeypatch.setattr("supir_batch.export.os.rename", die)
    with pytest.raises(Killed):
        export.bag(str(output), str(tmp_path / "bag"))
    assert not (tmp_path / "bag").exists()


def test_an_old_folder_a_remote_one_and_an_empty_output_are_refused(make: Make, tmp_path: Path) -> None:
    output = make("a.png")
    (tmp_path / "old").mkdir()
    with pytest.raises(ManifestError, match="exists already"):
        export.bag(str(output), str(tmp_path / "old"))
    with pytest.raises(ManifestError, match="local folder"):
        export.bag(str(output), "s3://bucket/bag")
    with pytest.raises(ManifestError, match="holds no finished image"):
        export.bag(str(tmp_path / "nothing"), str(tmp_path / "bag"))
    assert CliRunner().invoke(app, ["export", str(output)]).exit_code == 2


def test_of_each_image_the_newest_output_counts(make: Make, tmp_path: Path, restore: Restore) -> None:
    output = make("a.png")
    with RunLog(str(output), "second") as log:
        log.append(runlog.to_row(restore(tmp_path / "a.png", format="tiff"), "second"))
    assert (output / "a.png").exists()
    export.bag(str(output), str(tmp_path / "bag"))
    assert "a.tif" in files(tmp_path / "bag" / "data")
    assert "a.png" not in files(tmp_path / "bag" / "data")


def test_a_moved_output_is_exported_from_where_it_is(make: Make, tmp_path: Path) -> None:
    moved = make("a.png").rename(tmp_path / "moved")
    assert CliRunner().invoke(app, ["export", str(moved), "--bagit", str(tmp_path / "bag")]).exit_code == 0
    bagit.Bag(str(tmp_path / "bag")).validate()
    assert sha256(tmp_path / "bag" / "data" / "a.png") == sha256(moved / "a.png")


def test_an_output_on_an_object_store(make: Make, tmp_path: Path) -> None:
    output = make("a.png", "d.tif")
    remote = f"memory://{tmp_path.name}"
    for path in output.rglob("*"):
        if path.is_file():
            store.write_atomic(store.join(remote, str(path.relative_to(output))), path)
    checksums.renew(remote)
    assert [problem for checked in verify(remote) for problem in checked.problems] == []
    export.bag(remote, str(tmp_path / "bag"))
    bagit.Bag(str(tmp_path / "bag")).validate()
    export.archivematica(remote, str(tmp_path / "transfer"))
    assert write_manifests(remote, "https://example.org") == 2
    assert store.exists(store.join(remote, "_iiif/collection.json"))
    checksums.remove(remote)
    assert not store.exists(store.join(remote, checksums.FILE_NAME))
