from __future__ import annotations

import hashlib
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supir_batch import review, runlog, store
from supir_batch.errors import StoreError
from supir_batch.report.build import PIECE, build_report
from supir_batch.report.scores import FLAGS, SCORES

from .conftest import HOSTILE, handed_over, lay_over, size_of

ASSETS = Path(__file__).parents[3] / "supir_batch" / "report" / "assets"


def pieces(index: Path) -> list[Path]:
    return sorted((index.parent / "data").glob("*/*.js"))


def test_the_report_is_a_folder_of_static_files_with_pictures_of_all_images(index: Path) -> None:
    folder = index.parent
    report = handed_over(folder / "data" / "report.js")
    (piece,) = pieces(index)
    rows = dict(zip(report["id"], handed_over(piece)["rows"], strict=True))
    assert report["done"] == [1, 1, 1, 1, 1, 0]
    assert size_of(folder / "pictures" / rows["a.png"]["before"]["file"]) == (120, 90)
    assert size_of(folder / "pictures" / rows["a.png"]["after"]["file"]) == (240, 180)
    assert (rows["a.png"]["after"]["width"], rows["a.png"]["after"]["height"]) == (240, 180)
    thumbnail = dict(zip(report["id"], report["thumbnail"], strict=True))["c.png"]
    assert size_of(folder / "pictures" / thumbnail) == (200, 90)  # never enlarged
    assert rows["bad.jpg"]["failure"]["kind"] == "not-an-image"
    assert report["failures"][0]["count"] == 1
    assert "//" not in (folder / "index.html").read_text().replace("<!doctype html>", "")
    assert {path.name for path in (folder / "assets").iterdir()} == {"report.js", "report.css", "licenses.txt"}


def test_an_image_that_browsers_cannot_take_whole_is_shown_in_tiles(index: Path) -> None:
    report = handed_over(index.parent / "data" / "report.js")
    wide = handed_over(pieces(index)[0])["rows"][report["id"].index("wide.jpg")]["after"]
    assert wide["tile"] == 1024
    levels = sorted(int(path.name) for path in (index.parent / "pictures" / wide["file"]).iterdir())
    assert levels == list(range(16))  # 1 px up to 20,000, as Deep Zoom counts
    assert size_of(index.parent / "pictures" / wide["file"] / "15" / "1_0.jpg") == (1026, 40)


def test_text_of_strangers_is_data_and_nothing_else(index: Path) -> None:
    for script in (index.parent / "data" / "report.js", *pieces(index)):
        assert not {"</script", "\u2028"} & set(script.read_text())
    texts = [row["prompt"] for row in handed_over(pieces(index)[0])["rows"]]
    assert HOSTILE in texts


def test_a_second_report_makes_only_pictures_that_are_new_and_removes_what_nobody_shows(output: Path) -> None:
    build_report(str(output))
    pictures = output / "report" / "pictures"
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*.jpg")}
    (pictures / "zz" / "old").mkdir(parents=True)
    (pictures / "zz" / "old" / "after.jpg").touch()
    lost = next(pictures.rglob("thumbnail.jpg"))
    lost.unlink()
    build_report(str(output))
    after = {path: path.stat().st_mtime_ns for path in pictures.rglob("*.jpg")}
    assert after.keys() == before.keys()
    assert {path.parent for path in before if after[path] != before[path]} == {lost.parent}
    assert len(list((output / "report" / "data").rglob("*.js"))) == 2  # report.js and one piece


def test_overlays_that_come_later_are_added(output: Path) -> None:
    build_report(str(output))
    lay_over(output)
    build_report(str(output))
    rows = handed_over(pieces(output / "report" / "index.html")[0])["rows"]
    (laid,) = rows[0]["overlays"]
    assert laid["name"] == "invention"
    assert size_of(output / "report" / "pictures" / laid["file"]) == (120, 90)


def test_an_image_that_is_gone_or_changed_is_listed_without_pictures(output: Path, tmp_path: Path) -> None:
    (output / "a.png").unlink()
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    build_report(str(output))
    report = handed_over(output / "report" / "data" / "report.js")
    rows = dict(zip(report["id"], handed_over(pieces(output / "report" / "index.html")[0])["rows"], strict=True))
    assert "does not exist" in rows["a.png"]["problem"]
    assert "is not what it was" in rows["b.png"]["problem"]
    assert rows["b.png"]["after"] is None
    assert rows["c.png"]["problem"] == ""


def test_an_output_that_moved_is_found_and_one_without_a_run_has_an_empty_report(output: Path, tmp_path: Path) -> None:
    output.rename(tmp_path / "moved")
    build_report(str(tmp_path / "moved"))
    assert len(list((tmp_path / "moved" / "report").rglob("thumbnail.jpg"))) == 5
    build_report(str(tmp_path / "empty"))
    assert handed_over(tmp_path / "empty" / "report" / "data" / "report.js")["id"] == []


@pytest.mark.parametrize("name", ["report", "report/data", "report/assets", "report/pictures"])
def test_nothing_is_written_through_a_link(output: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a symbolic link"):
        build_report(str(output))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_a_report_in_object_storage(output: Path, s3: str) -> None:
    for path in output.rglob("*"):
        if path.is_file():
            store.write_atomic(f"{s3}/out/{path.relative_to(output)}", path)
    index = build_report(f"{s3}/out")
    build_report(f"{s3}/out")
    assert index == f"{s3}/out/report/index.html"
    names = {name for names in store.list_names(f"{s3}/out/report", ("",)) for name in names}
    assert {"index.html", "assets/report.js", "assets/report.css", "data/report.js"} <= names
    assert len([name for name in names if name.endswith("thumbnail.jpg")]) == 5
    assert len([name for name in names if name.startswith("data/")]) == 2
    assert store.read_bytes(index) == (ASSETS / "index.html").read_bytes()


def test_decisions_of_the_log_are_in_the_report(output: Path) -> None:
    rows = {row["id"]: row for row in runlog.read_log(str(output), ("id", "fingerprint")).to_pylist()}
    fingerprint = rows["a.png"]["fingerprint"]
    decision = review.parse({"id": "a.png", "fingerprint": fingerprint, "decision": "accept", "note": HOSTILE})
    review.append(str(output), [decision])
    build_report(str(output))
    (told,) = handed_over(output / "report" / "data" / "report.js")["decisions"]
    assert (told["id"], told["decision"], told["note"]) == ("a.png", "accept", HOSTILE)


def test_every_number_and_mark_of_the_log_is_a_score_a_flag_a_setting_or_a_time() -> None:
    kinds = (pa.types.is_floating, pa.types.is_boolean)
    columns = {field.name for field in runlog.SCHEMA if any(kind(field.type) for kind in kinds)}
    shown = {score.column for score in SCORES} | FLAGS.keys()
    rest = {name for name in columns - shown if not name.startswith(("setting_", "seconds_"))}
    assert rest == {"recovered", "failure_retryable", "has_alpha", "gate_finite"}


def make_large(output: Path, count: int) -> None:
    """A log of ``count`` images below ``output``, made of that of a few, whose thumbnails are there already."""
    build_report(str(output))
    rows = [row for row in runlog.read_log(str(output)).to_pylist() if row["status"] == "done"]
    thumbnails = sorted((output / "report" / "pictures").rglob("thumbnail.jpg"))
    rng = np.random.default_rng(1)
    scores = rng.gamma(2.0, 0.5, (count, 2))
    for part in range(0, count, 5000):
        made = []
        for number in range(part, min(part + 5000, count)):
            row = dict(rows[number % len(rows)])
            row["id"] = f"box {number // 250:03d}/photograph {number:05d}.jpg"
            row["output_path"] = row["id"]
            row["fingerprint"] = hashlib.sha256(row["id"].encode()).hexdigest()
            row["gate_color_drift"], row["gate_similarity"] = scores[number, 0], 1 - scores[number, 1] / 10
            place = output / "report" / "pictures" / row["fingerprint"][:2] / row["fingerprint"][2:26]
            place.mkdir(parents=True)
            (place / "thumbnail.jpg").hardlink_to(thumbnails[number % len(thumbnails)])
            made.append(row)
        path = output / "_runs" / "20260102T000000Z-000002" / f"part-{part:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(made, schema=runlog.SCHEMA), path)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pages_of_images(output: Path) -> None:
    peaks = []
    for count in (PIECE, 3 * PIECE, 11 * PIECE):
        shutil.rmtree(output / "_runs" / "20260102T000000Z-000002", ignore_errors=True)
        shutil.rmtree(output / "report", ignore_errors=True)
        make_large(output, count)
        tracemalloc.start()
        build_report(str(output))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 8 * PIECE * 4000  # bytes of names and numbers; a whole row has several times that


def test_built_assets_come_from_the_sources_and_hold_no_private_address() -> None:
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / "build.sha256").read_text().splitlines())
    for name, digest in listed.items():
        found = hashlib.sha256((ASSETS / name).read_bytes()).hexdigest()
        assert found == digest, f"{name} was changed after the build; run `make report-assets`"
    frontend = ASSETS.parent / "frontend"
    sources = {path for path in frontend.rglob("*") if path.is_file() and "node_modules" not in path.parts}
    assert {(ASSETS / name).resolve() for name in listed if name.startswith("..")} == sources
    assert {name for name in listed if not name.startswith("..")} == {
        path.name for path in ASSETS.iterdir() if path.name != "build.sha256"
    }
    lock = (frontend / "package-lock.json").read_text()
    assert lock.count("https://") == lock.count("https://registry.npmjs.org/") + lock.count('"url": "https://')
    assert "http://" not in lock
