from __future__ import annotations

import errno
import importlib.util
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from supir_batch import store
from supir_batch.errors import StoreError, TransientStoreError


@pytest.fixture(params=["local", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/some folder"
    return str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_what_is_written_is_read_listed_and_deleted(base: str) -> None:
    uri = store.join(base, "a/b.tif")
    assert not store.exists(uri)
    assert store.find(uri) is None
    store.write_atomic(uri, b"one")
    assert store.exists(uri)
    assert store.read_bytes(uri) == b"one"
    info = store.info(uri)
    assert (info.uri, info.size) == (uri, 3)
    assert [found.uri for found in store.list_tree(base)] == [uri]
    store.delete(uri)
    store.delete(uri)
    assert not store.exists(uri)


def test_version_changes_with_the_bytes(base: str) -> None:
    uri = store.join(base, "a.tif")
    store.write_atomic(uri, b"one")
    before = store.info(uri)
    assert store.info(uri) == before
    store.write_atomic(uri, b"two")
    assert store.info(uri).version != before.version


def test_a_file_can_be_written_from_a_path(base: str, tmp_path: Path) -> None:
    made = tmp_path / "made.bin"
    made.write_bytes(b"x" * 3_000_000)
    uri = store.join(base, "copy.bin")
    store.write_atomic(uri, made)
    assert store.read_bytes(uri) == made.read_bytes()
    assert made.exists()


def test_listing_is_sorted_by_full_name_and_empty_without_a_folder(base: str) -> None:
    names = ["b/a.png", "a.png", "b.png", "b/c/d.png", "B.png", "b-1.png"]
    for name in names:
        store.write_atomic(store.join(base, name), b"x")
    assert [found.uri for found in store.list_tree(base)] == sorted(store.join(base, name) for name in names)
    assert list(store.list_tree(store.join(base, "nowhere"))) == []


def test_glob(base: str) -> None:
    for name in ["x/a.png", "x/b.jpg", "x/deep/c.png"]:
        store.write_atomic(store.join(base, name), b"x")
    assert [found.uri for found in store.expand_glob(f"{base}/x/*.png")] == [store.join(base, "x/a.png")]
    assert len(list(store.expand_glob(f"{base}/**/*.png"))) == 2
    assert list(store.expand_glob(f"{base}/y/*.png")) == []
    assert store.glob_root(f"{base}/x/*.png") == f"{base}/x"


def test_local_copy_has_the_bytes_and_the_extension(base: str) -> None:
    uri = store.join(base, "a.tif")
    store.write_atomic(uri, b"pixels")
    with store.local_copy(uri) as path:
        assert path.read_bytes() == b"pixels"
        assert path.suffix == ".tif"
    assert path.exists() == store.is_local(uri)


@pytest.mark.parametrize("read", [store.read_bytes, store.read_text, store.info])
def test_missing_object_is_named(base: str, read: Callable[[str], object]) -> None:
    uri = store.join(base, "gone.tif")
    with pytest.raises(StoreError, match=r"gone\.tif: does not exist"):
        read(uri)
    with pytest.raises(StoreError, match=r"gone\.tif: does not exist"), store.local_copy(uri):
        pass


def test_folders_are_not_objects(base: str) -> None:
    store.write_atomic(store.join(base, "f/a.tif"), b"x")
    folder = store.join(base, "f")
    assert store.is_folder(folder)
    assert not store.exists(folder)
    with pytest.raises(StoreError, match="is a folder"):
        store.find(folder)


def test_text_must_be_utf8(base: str) -> None:
    uri = store.join(base, "a.txt")
    store.write_atomic(uri, b"\xef\xbb\xbfhello")
    assert store.read_text(uri) == "hello"
    store.write_atomic(uri, b"\xff\xfe")
    with pytest.raises(StoreError, match=r"a\.txt: is not UTF-8"):
        store.read_text(uri)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_object_and_no_temp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    uri = str(tmp_path / "a.tif")
    store.write_atomic(uri, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(StoreError, match=r"a\.tif: cannot write it: No space left") as caught:
        store.write_atomic(uri, b"new")
    assert not caught.value.retryable
    assert Path(uri).read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.tif"]


def test_an_interrupted_write_leaves_no_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write_atomic(str(tmp_path / "a.tif"), b"new")
    assert os.listdir(tmp_path) == []


def test_the_temp_lies_hidden_beside_the_target_and_fits_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        seen.append(Path(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    longest = "é" * 125 + ".tif"
    store.write_atomic(str(tmp_path / longest), b"x")
    store.write_atomic(str(tmp_path / "a.tif"), b"x")
    assert all(path.parent == tmp_path and store.is_partial(str(path)) for path in seen)
    assert seen[1].name.startswith(".a.tif.")


def test_create_keeps_what_is_there(base: str) -> None:
    uri = store.join(base, "lease/a.json")
    assert store.create(uri, b"first")
    assert not store.create(uri, b"second")
    assert store.read_bytes(uri) == b"first"
    store.delete(uri)
    assert store.create(uri, b"third")
    assert [found.uri for found in store.list_tree(base)] == [uri]


def test_of_many_who_create_one_wins(base: str) -> None:
    uri = store.join(base, "lease.json")
    tokens = [f"{i}".encode() for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda token: store.create(uri, token), tokens))
    assert [token for token, mine in zip(tokens, won, strict=True) if mine] == [store.read_bytes(uri)]


def test_create_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")  # as exFAT answers

    monkeypatch.setattr(os, "link", unsupported)
    uri = str(tmp_path / "lease.json")
    assert store.create(uri, b"first")
    assert not store.create(uri, b"second")
    assert Path(uri).read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["lease.json"]


def test_stale_temps_are_removed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / ".a.tif.0badcafe.partial").write_bytes(b"half")
    (tmp_path / "sub" / "a.partial").write_bytes(b"someone's file")
    assert store.remove_partials(str(tmp_path)) == 1
    assert os.listdir(tmp_path / "sub") == ["a.partial"]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LONGEST_PAUSE_S", 0.0)


def _failing(monkeypatch: pytest.MonkeyPatch, error: OSError, times: int) -> list[int]:
    """Opening a file fails so often; returns a list that grows by one with each try."""
    tries: list[int] = []
    really = Path.open

    def open_(path: Path, *args: Any, **options: Any) -> Any:
        tries.append(1)
        if len(tries) <= times:
            raise error
        return really(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_)
    return tries


@pytest.mark.usefixtures("no_pauses")
def test_what_can_pass_is_tried_again_and_then_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tif").write_bytes(b"x")
    uri = str(tmp_path / "a.tif")
    tries = _failing(monkeypatch, OSError(errno.ETIMEDOUT, "timed out"), 4)
    assert store.read_bytes(uri) == b"x"
    assert len(tries) == 5
    tries = _failing(monkeypatch, OSError(errno.ETIMEDOUT, "timed out"), 99)
    with pytest.raises(TransientStoreError, match=r"a\.tif: cannot read it: timed out \(tried 5 times in 0 s\)"):
        store.read_bytes(uri)
    assert len(tries) == 5


def test_no_try_begins_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_DEADLINE_S", 0.0)
    tries = _failing(monkeypatch, OSError(errno.ETIMEDOUT, "timed out"), 99)
    with pytest.raises(TransientStoreError, match="tried 1 times"):
        store.read_bytes(str(tmp_path / "a.tif"))
    assert len(tries) == 1


def test_what_cannot_pass_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = _failing(monkeypatch, PermissionError(errno.EACCES, "Permission denied"), 99)
    with pytest.raises(StoreError, match="access denied; cannot read it with these rights") as caught:
        store.read_bytes(str(tmp_path / "a.tif"))
    assert not caught.value.retryable
    assert len(tries) == 1


@pytest.mark.usefixtures("no_pauses")
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"x" * 100)
    with store.open_read(str(path)) as file:
        assert file.read(10) == b"x" * 10
        os.truncate(path, 50)
        with pytest.raises(TransientStoreError, match=r"a\.tif: is cut off at byte 50 of 100"):
            file.read()


def test_reading_seeks_and_stops_at_the_end(base: str) -> None:
    uri = store.join(base, "a.bin")
    store.write_atomic(uri, b"0123456789")
    with store.open_read(uri) as file:
        assert file.read(3) == b"012"
        assert file.seek(-2, os.SEEK_END) == 8
        assert file.read(99) == b"89"
        assert file.read(1) == b""
        file.seek(1)
        assert file.read() == b"123456789"
    assert file.closed


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hunter2@bucket/a.tif",
        "s3://key:hun/ter2@bucket/a.tif",
        "https://reader:hunter2@example.org/a.tif",
        "https://bucket.example.org/a.tif?X-Amz-Signature=hunter2",
        "https://account.example.net/a.tif?sv=2026&sig=hunter2",
        "https://example.org/a.tif?token=hunter2",
    ],
)
@pytest.mark.parametrize("use", [store.refuse_credentials, store.read_bytes, store.exists])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, use: Callable[[str], object]) -> None:
    with pytest.raises(StoreError, match="take it out and give credentials by environment or profile") as caught:
        use(uri)
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/scan 3: me@home.tif",
        "s3://arn:aws:s3:eu-north-1:123456789012:accesspoint/masters/me@home.tif",
        "sftp://reader@example.org:22/me@home.tif",
        "abfs://masters@museum.dfs.core.windows.net/a:b@c.tif",
        "s3://bucket/what?sign=of the times.tif",
        "/archive/a:b@c.tif",
    ],
)
def test_a_colon_or_an_at_sign_is_no_credential(uri: str) -> None:
    assert store.refuse_credentials(uri) == uri


@pytest.mark.parametrize(("uri", "module", "extra"), [("gs://b/a", "gcsfs", "gs"), ("az://b/a", "adlfs", "az")])
def test_a_missing_package_is_named(uri: str, module: str, extra: str) -> None:
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(StoreError, match=rf"needs another package: pip install 'supir-batch\[{extra}\]'"):
        store.read_bytes(uri)


def test_forbidden_and_unknown_storage() -> None:
    with pytest.raises(StoreError, match=r"nosuch://a: cannot .*nosuch"):
        store.read_bytes("nosuch://a")


@pytest.mark.parametrize("part", ["..", "a/../b", "/etc", "", "s3://x", "a\0b"])
def test_join_only_leads_down(part: str) -> None:
    with pytest.raises(StoreError, match="without"):
        store.join("/out", part)


def test_join_and_names() -> None:
    assert store.join("/out/", "a//b", "./c") == "/out/a/b/c"
    assert store.join("s3://b", "k") == "s3://b/k"
    assert store.parent("s3://b/k/x.tif") == "s3://b/k"
    assert store.parent("/a/x.tif") == "/a"
    assert store.name("s3://b/k/x.tif") == "x.tif"


def test_two_spellings_of_a_file_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "a.tif").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    spellings = ["real/a.tif", "./link/../real/a.tif", str(tmp_path / "link/a.tif"), f"file://{tmp_path}/real/a.tif"]
    assert len({store.normalize(spelling) for spelling in spellings}) == 1
    assert store.normalize("S3://b/k/") == "s3://b/k"


def test_relative_to(tmp_path: Path) -> None:
    assert store.relative_to("/a/b/c.tif", "/a/") == "b/c.tif"
    assert store.relative_to("/ab/c.tif", "/a") is None
    assert store.relative_to("/a", "/a") is None
    assert store.relative_to("s3://b/k/x", "s3://b/k") == "x"
    assert store.relative_to("s3://b/k/x", "/b/k") is None
    (tmp_path / "link").symlink_to(tmp_path)
    assert store.relative_to(str(tmp_path / "link" / "a"), str(tmp_path)) == "link/a"


def test_resolve() -> None:
    assert store.resolve("/a/b", "../c.tif") == "/a/c.tif"
    assert store.resolve("/a/b", "/c.tif") == "/c.tif"
    assert store.resolve("/a/b", "s3://x/y") == "s3://x/y"
    assert store.resolve("s3://b/k", "../c.tif") == "s3://b/c.tif"


def test_broken_links_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.tif").symlink_to("nowhere.tif")
    assert [(found.size, found.version) for found in store.list_tree(str(tmp_path))] == [(-1, "missing")]
