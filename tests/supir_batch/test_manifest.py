from __future__ import annotations

import json
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from supir_batch import store
from supir_batch.errors import ManifestError
from supir_batch.manifest import SourceList, list_sources
from supir_batch.settings import Manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "archive"
    for name in ["b.tif", "a.png", "box 1/c.JPG", "box 1/notes.txt", ".DS_Store", "._a.png", "readme"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"pixels")
    return root


def listed(inputs: str | list[str], output: str = "/nowhere/out") -> SourceList:
    manifest = Manifest.model_validate({"inputs": inputs, "output": {"uri": output}})
    return list_sources(manifest, "m.yaml")


def refusal(inputs: str | list[str], output: str = "/nowhere/out") -> str:
    with pytest.raises(ManifestError) as caught:
        listed(inputs, output)
    return str(caught.value)


def write_list(folder: Path, rows: list[dict[str, object]], kind: str) -> str:
    path = folder / f"list.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        columns = list(dict.fromkeys(key for row in rows for key in row))
        pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), path)
    else:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)] + [",".join(str(row.get(key, "")) for key in columns) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_folder_is_searched_and_other_files_are_counted(folder: Path) -> None:
    found = listed(str(folder))
    assert [source.id for source in found.sources] == ["a.png", "b.tif", "box 1/c.JPG"]
    assert found.sources[2].uri == str(folder / "box 1/c.JPG")
    assert found.sources[0].size == 6
    assert found.sources[0].version.startswith("6-")
    assert found.ignored == {".png": 1, ".txt": 1, "(no extension)": 2}


def test_a_file_and_a_glob(folder: Path) -> None:
    assert [source.relative for source in listed(str(folder / "a.png")).sources] == ["a.png"]
    found = listed(str(folder / "**" / "*"))
    assert [source.relative for source in found.sources] == ["a.png", "b.tif", "box 1/c.JPG"]
    assert "no image matches the pattern" in refusal(str(folder / "*.webp"))


def test_remote_folders() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    store.write_atomic(f"{root}/in/x/a.png", b"x")
    store.write_atomic(f"{root}/list.csv", b"uri\nin/x/a.png\n")
    assert [(s.id, s.uri) for s in listed(f"{root}/in").sources] == [("x/a.png", f"{root}/in/x/a.png")]
    assert [(s.id, s.uri) for s in listed(f"{root}/list.csv").sources] == [("in/x/a.png", f"{root}/in/x/a.png")]


def test_earlier_outputs_below_the_input_are_not_inputs(folder: Path) -> None:
    (folder / "restored").mkdir()
    (folder / "restored" / "a.png").write_bytes(b"x")
    (folder / "restored2").mkdir()
    (folder / "restored2" / "a.png").write_bytes(b"x")
    ids = [source.id for source in listed(str(folder), str(folder / "restored")).sources]
    assert "restored/a.png" not in ids
    assert "restored2/a.png" in ids
    ids = [source.id for source in listed(str(folder / "**" / "*.png"), str(folder / "restored")).sources]
    assert ids == ["a.png", "restored2/a.png"]


@pytest.mark.parametrize("up", ["", ".."])
def test_an_output_that_holds_the_input_is_refused(folder: Path, up: str) -> None:
    assert "holds the input folder" in refusal(str(folder), str(folder / up))


def test_inputs_that_are_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_bytes(b"x")
    assert "holds no image (1 other files)" in refusal(str(tmp_path / "empty"))
    assert "does not exist; give a file, folder" in refusal(str(tmp_path / "gone"))
    assert "the list" in refusal(str(tmp_path / "gone.csv"))


def test_missing_and_empty_images_are_refused_one_by_one(folder: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    (folder / "link.png").symlink_to("nowhere.png")
    found = listed([str(folder), str(folder.parent / "gone.tif")])
    assert [(refused.source.id, refused.failure.kind) for refused in found.refused] == [
        ("empty.png", "empty"),
        ("link.png", "missing"),
        ("gone.tif", "missing"),
    ]
    assert found.refused[0].failure.message.startswith(str(folder / "empty.png"))
    assert "is 0 bytes" in found.refused[0].failure.message


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_lists(folder: Path, kind: str) -> None:
    rows: list[dict[str, object]] = [
        {"uri": "a.png", "id": "one", "prompt": "a boat", "upscale": 2, "seed": 7, "material": "map"},
        {"uri": "box 1/c.JPG", "sha256": "AB" * 32, "negative_prompt": "blur"},
        {"uri": "gone.tif"},
    ]
    found = listed(write_list(folder, rows, kind))
    one, two = found.sources
    assert (one.id, one.relative, one.uri) == ("one", "a.png", str(folder / "a.png"))
    assert (one.prompt, one.upscale, one.seed, one.material) == ("a boat", 2.0, 7, "map")
    assert (two.id, two.sha256, two.negative_prompt, two.prompt) == ("box 1/c.JPG", "ab" * 32, "blur", None)
    number = {"csv": 4, "jsonl": 3, "parquet": 3}[kind]
    assert found.refused[0].source.origin == f"list.{kind}:{number}"
    assert found.refused[0].failure.message.startswith(f"list.{kind}:{number} ({folder}/gone.tif): does not exist")


def test_pages_of_one_file_have_outputs_of_their_own(folder: Path) -> None:
    rows: list[dict[str, object]] = [
        {"uri": "a.png"},
        {"uri": "a.png", "page": 1},
        {"uri": "a.png", "page": 12},
        {"uri": "a.png", "page": 3, "relative": "leaf/three.tif"},
    ]
    sources = listed(write_list(folder, rows, "jsonl")).sources
    assert [(source.relative, source.page) for source in sources] == [
        ("a.png", None),
        ("a-p001.png", 1),
        ("a-p012.png", 12),
        ("leaf/three.tif", 3),
    ]
    assert len({source.id for source in sources}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,page\na.png,0\n", "list.csv:2: page must be greater than or equal to 1, saw '0'"),
        ("uri,page\na.png,2\na.png,2\n", "name page 2 of the same file"),
        ("uri,promt\na.png,x\n", "list.csv:1: unknown column 'promt'; did you mean 'prompt'?"),
        ("uri;prompt\na.png;x\n", "list.csv:1: unknown column 'uri;prompt'; separate the columns by commas"),
        ("id\nx\n", "list.csv:1: has no column 'uri'"),
        ("uri,uri\na.png,a.png\n", "list.csv:1: column 'uri' appears twice"),
        ("uri,id\na.png\n", "list.csv:2: has 1 fields, the header has 2"),
        ("uri,upscale\na.png,two\n", "list.csv:2: upscale must be a number, "),
        ("uri,upscale\na.png,0\n", "list.csv:2: upscale must be greater than or equal to 0.1, saw '0'"),
        ("uri,seed\na.png,-1\n", "list.csv:2: seed must be greater than or equal to 0, saw '-1'"),
        ("uri,sha256\na.png,xyz\n", "list.csv:2: sha256 must be 64 hexadecimal digits, saw 'xyz'"),
        ("uri,material\na.png,photo\n", "list.csv:2: material must be 'photograph', 'painting'"),
        ("uri,id\n,x\n", "list.csv:2: uri is empty"),
        ('uri,prompt\n\n\na.png,"two\nlines"\n\nb.tif,x,y\n', "list.csv:7: has 3 fields"),
        ("uri\n", "the list has no rows"),
        ("", "list.csv:1: has no column 'uri'"),
        ("uri\ns3://b/../x.tif\n", "list.csv:2: uri 's3://b/../x.tif' does not name a file"),
    ],
)
def test_bad_csv(folder: Path, text: str, message: str) -> None:
    (folder / "list.csv").write_text(text)
    assert message in refusal(str(folder / "list.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"uri": "a.png"}\nnot json\n', "list.jsonl:2: is not a line of JSON"),
        ('["a.png"]\n', "list.jsonl:1: must be an object"),
        ('{"uri": "a.png", "uri": "b.tif"}\n', "list.jsonl:1: is not a line of JSON: key 'uri' is given twice"),
        ('{"uri": "a.png", "seed": "7"}\n', "list.jsonl:1: seed must be an integer, saw '7'"),
        ('{"uri": 7}\n', "list.jsonl:1: uri must be a string, saw 7"),
    ],
)
def test_bad_json_lines(folder: Path, text: str, message: str) -> None:
    (folder / "list.jsonl").write_text(text)
    assert message in refusal(str(folder / "list.jsonl"))


def test_bad_parquet(folder: Path) -> None:
    (folder / "list.parquet").write_bytes(b"PAR1 not really")
    assert "list.parquet: is not a Parquet file" in refusal(str(folder / "list.parquet"))


def test_all_bad_rows_are_named_up_to_twenty(folder: Path) -> None:
    (folder / "list.csv").write_text("uri,seed\n" + "a.png,x\n" * 30)
    lines = refusal(str(folder / "list.csv")).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 10 more"


def test_two_rows_of_one_file_or_one_id(folder: Path) -> None:
    (folder / "same.png").symlink_to("a.png")
    path = write_list(folder, [{"uri": "a.png"}, {"uri": "same.png"}], "csv")
    assert f"list.csv:2 ({folder}/a.png) and list.csv:3 ({folder}/same.png) name the same file" in refusal(path)
    path = write_list(folder, [{"uri": "a.png", "id": "x"}, {"uri": "b.tif", "id": "x"}], "csv")
    assert f"list.csv:2 ({folder}/a.png) and list.csv:3 ({folder}/b.tif) share the id 'x'" in refusal(path)


def test_a_place_outside_the_list_keeps_its_whole_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    path = write_list(tmp_path / "lists", [{"uri": "../archive/a.png"}, {"uri": str(folder / "b.tif")}], "csv")
    assert [source.relative for source in listed(path).sources] == [
        f"{folder}/a.png".lstrip("/"),
        f"{folder}/b.tif".lstrip("/"),
    ]


def test_a_row_may_say_its_place_below_the_output(folder: Path) -> None:
    path = write_list(folder, [{"uri": "b.tif", "relative": "box 1/b.tif"}, {"uri": "a.png"}], "csv")
    assert [source.relative for source in listed(path).sources] == ["box 1/b.tif", "a.png"]
    assert listed(path).sources[0].id == "box 1/b.tif"


@pytest.mark.parametrize("place", ["/b.tif", "../b.tif", "x/../../b.tif", "s3://bucket/b.tif"])
def test_a_place_outside_the_output_is_refused(folder: Path, place: str) -> None:
    path = write_list(folder, [{"uri": "b.tif", "relative": place}], "csv")
    assert f"list.csv:2: relative '{place}'" in refusal(path)
