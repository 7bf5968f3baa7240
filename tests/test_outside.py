"""Whatever ids, names, URIs and links say: nothing is written outside of the output."""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import unicodedata
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from supir_batch import export, models, store
from supir_batch.errors import ManifestError, StoreError, SupirBatchError
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import make_plan

# Dots and slashes of all kinds, what is invisible or turns the direction, what systems strip, and plain letters.
PIECES = [
    "..", ".", "/", "\\", "．", "․", "‥", "／", "＼", "⁄", "∕", " ", "\u00a0", "\u200b", "\u202e", "\ufeff", "\0", "\n",
    "\x7f", "~", ":", "C:", "%2e%2e%2f", "%", "$HOME", "é", "e\u0301", "a", "b.tif",
    "-", "//", "file://", "{id}",
]  # fmt: skip
ODD = st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join)


def _leads_out(path: str, folder: str) -> bool:
    """Whether ``path`` lies elsewhere than below ``folder``: here, on Windows, or where a server normalizes names."""
    if not path.startswith(folder + "/"):
        return True
    below = path.removeprefix(folder + "/")
    readings = {below, below.replace("\\", "/"), unicodedata.normalize("NFKC", below).replace("\\", "/")}
    readings |= {"/".join(piece.strip() for piece in reading.split("/")) for reading in set(readings)}
    return not all(posixpath.normpath(f"/a/b/{one}").startswith("/a/b/") for one in readings)


@settings(max_examples=1500, deadline=None)
@given(parts=st.lists(ODD, min_size=1, max_size=3))
@pytest.mark.parametrize("folder", ["/archive/restored", "s3://bucket/restored", "restored"])
def test_join_only_leads_down(folder: str, parts: list[str]) -> None:
    try:
        joined = store.join(folder, *parts)
    except StoreError:
        return
    assert not _leads_out(joined, folder)


@settings(max_examples=200, deadline=None)
@given(part=ODD)
def test_what_is_written_lies_below(part: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = os.path.realpath(folder)
        with suppress(StoreError):
            store.write_atomic(store.join(f"{home}/a/b/out", part), b"x")
        found = [path for path in Path(home).rglob("*") if path.is_file()]
        assert all(path.is_relative_to(f"{home}/a/b/out") for path in found)


@settings(max_examples=300, deadline=None)
@given(
    row=st.fixed_dictionaries({"uri": ODD}, optional={"id": ODD, "relative": ODD}),
    naming=st.sampled_from(["{stem}", "{id}"]),
)
def test_planned_outputs_lie_below(row: dict[str, str], naming: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(os.path.realpath(folder))
        (home / "list.jsonl").write_text(json.dumps(row), encoding="utf-8", errors="surrogatepass")
        output = home / "out"
        manifest = {"inputs": "list.jsonl", "output": {"uri": "out", "naming": naming}, "engine": {"name": "lanczos"}}
        (home / "m.yaml").write_text(yaml.safe_dump(manifest))
        try:
            plan = make_plan(load_manifest(str(home / "m.yaml"), environ={}), str(home / "m.yaml"), "")
        except SupirBatchError:
            return
        for entry in [*plan.todo, *plan.refused]:
            for written in (entry.job.output_stem + ".png", entry.job.output_stem + ".tif.json"):
                assert not _leads_out(written, str(output))


@pytest.mark.parametrize(
    "name",
    [
        ".",
        "./",
        "/.",
        "././",
        "a/..",
        "..\\a",
        "a\\..\\..\\b",
        "．．/a",
        "‥/a",
        ".. /a",
        "s3://b/a",
        "file:///a",
        " ",
        "\\",
    ],
)
def test_a_name_that_is_none_or_climbs_is_refused(name: str) -> None:
    with pytest.raises(StoreError, match="use a relative path without"):
        store.join("/out", name)


@pytest.mark.parametrize(
    "name", ["写真／2.tif", "1⁄2.tif", "..a.tif", "a..tif", "...tif", "A\u030a.tif", "a\u202eb.tif"]
)
def test_names_that_only_look_odd_are_kept(name: str) -> None:
    assert store.join("/out", name) == f"/out/{name}"


def _archive(folder: Path) -> Path:
    (folder / "in" / "box").mkdir(parents=True)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / "in" / "box" / "a.png")
    path = folder / "m.yaml"
    path.write_text("inputs: in\noutput: {uri: out}\nengine: {name: lanczos}\n")
    return path


@pytest.mark.parametrize("link", ["box", "_runs", "_captions", "report"])
@pytest.mark.parametrize("leads", ["elsewhere", "out/other"])
def test_a_linked_folder_in_the_output_is_refused_before_any_work(tmp_path: Path, link: str, leads: str) -> None:
    path = _archive(tmp_path)
    (tmp_path / "out" / "other").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / link).symlink_to(tmp_path / leads)
    with pytest.raises(ManifestError, match=rf"out/{link}: is a symbolic link to .*: replace it by a folder, or mount"):
        make_plan(load_manifest(str(path), environ={}), str(path), "")


def test_the_output_itself_may_be_a_link(tmp_path: Path) -> None:
    path = _archive(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert len(make_plan(load_manifest(str(path), environ={}), str(path), "").todo) == 1


def test_an_output_that_is_a_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "original.tif").write_bytes(b"original")
    (tmp_path / "out.tif").symlink_to("original.tif")
    store.write_atomic(str(tmp_path / "out.tif"), b"restored")
    assert (tmp_path / "original.tif").read_bytes() == b"original"
    assert (tmp_path / "out.tif").read_bytes() == b"restored"
    assert not (tmp_path / "out.tif").is_symlink()


def test_an_export_does_not_leave_its_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="use a relative path without"):
        export._below(tmp_path, "../../home/a.tif")


def test_a_fetched_model_does_not_leave_its_folder(s3: str, tmp_path: Path) -> None:
    fs, bucket = store.filesystem(s3)
    fs.call_s3("put_object", Bucket=bucket, Key="model/../../evil.json", Body=b"{}")
    with pytest.raises(StoreError, match="use a relative path without"):
        models.fetch(f"{s3}/model", str(tmp_path / "a" / "b"), None, None, lambda _: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_key_that_climbs_is_no_source(s3: str) -> None:
    fs, bucket = store.filesystem(s3)
    fs.call_s3("put_object", Bucket=bucket, Key="in/../../a.png", Body=b"x")
    store.write_atomic(f"{s3}/m.yaml", b"inputs: in\noutput: {uri: out}\nengine: {name: lanczos}\n")
    with pytest.raises(ManifestError, match=r"holds no image \(1 other files\)"):
        make_plan(load_manifest(f"{s3}/m.yaml", environ={}), f"{s3}/m.yaml", "")
