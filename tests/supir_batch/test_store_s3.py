"""The store against a real S3-compatible server, directly and through a proxy that harms requests."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import traceback
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from supir_batch import store
from supir_batch.errors import StoreError, TransientStoreError
from tests.servers.faulty_proxy import Faults, faulty_proxy
from tests.servers.swift import S3Server

MB = 1 << 20
ODD_NAMES = [
    "with space.tif",
    "# 12.tif",
    "what?.tif",
    "what?version=3",
    "100%.tif",
    "%2F..%2fescaped.tif",
    "a+b.tif",
    "a&b=c;d,e.tif",
    "(1) [copy] {x}.tif",
    "'quoted' \"twice\".tif",
    "back\\slash.tif",
    "chain::of.tif",
    "me@home:8.tif",
    "~$*!|<>^`.tif",
    "Å in one (NFC) \u00c5.tif",
    "Å in two (NFD) A\u030a.tif",
    "写真.tif",
    "👩‍🎨.tif",
    "folder.with/ends in space /a.tif",
]
EVERY_USE: list[Callable[[str], object]] = [
    store.find,
    store.exists,
    store.read_bytes,
    lambda uri: [store.write_atomic(uri, b"x")],
    lambda uri: store.create(uri, b"x"),
    lambda uri: list(store.list_tree(store.parent(uri))),
    lambda uri: list(store.expand_glob(store.parent(uri) + "/*.tif")),
]


@pytest.fixture
def through(s3_server: S3Server, s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Changes the environment that clients made from now on see."""

    def change(**environment: str | None) -> None:
        for name, value in environment.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    yield change
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_odd_names_come_back_as_they_are(s3: str, tmp_path: Path) -> None:
    uris = [store.join(s3, "odd", name) for name in ODD_NAMES]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda uri: store.write_atomic(uri, uri.encode()), uris))
    assert [found.uri for found in store.list_tree(f"{s3}/odd")] == sorted(uris)
    assert {found.uri for found in store.expand_glob(f"{s3}/odd/**")} == set(uris)
    for index, uri in enumerate(uris):
        assert store.read_bytes(uri) == uri.encode()
        assert store.info(uri).size == len(uri.encode())
        store.download(uri, tmp_path / f"{index}")
        store.delete(uri)
    assert list(store.list_tree(f"{s3}/odd")) == []


def test_a_name_that_the_client_would_change_is_refused(s3: str) -> None:
    with pytest.raises(StoreError, match="versions of an object cannot be asked for"):
        store.write_atomic(f"{s3}/a.tif?versionId=3", b"x")
    assert list(store.list_tree(s3)) == []


def test_listing_goes_page_by_page(s3_server: S3Server, s3: str, through: Callable[..., None]) -> None:
    uris = [f"{s3}/deep/{folder}/{number}.tif" for folder, number in itertools.product("abc", range(40))]
    uris += [f"{s3}/deep/a-{number}.tif" for number in range(10)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda uri: store.write_atomic(uri, b"x"), uris))
    with faulty_proxy(s3_server.port, Faults(), 0) as proxy:
        through(AWS_ENDPOINT_URL=proxy.url)
        listing = store.list_tree(f"{s3}/deep")
        assert next(listing).uri == min(uris)
        assert proxy.met.total() == 1  # of three pages of 50
        assert [found.uri for found in listing] == sorted(uris)[1:]
        assert proxy.met.total() == 3
        assert [found.uri for found in store.expand_glob(f"{s3}/deep/a-*.tif")] == sorted(uris)[:10]
        assert proxy.met.total() == 4
        assert len(list(store.expand_glob(f"{s3}/deep/*/1?.tif"))) == 30


def test_a_folder_made_in_a_browser_is_no_object(s3: str) -> None:
    store.write_atomic(f"{s3}/masters/a.tif", b"x")
    fs, there = store.filesystem(s3)
    fs.call_s3("put_object", Bucket=there, Key="masters/", Body=b"")
    assert [found.uri for found in store.list_tree(f"{s3}/masters")] == [f"{s3}/masters/a.tif"]
    assert store.is_folder(f"{s3}/masters")


def test_a_large_file_goes_up_and_down_in_parts(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PIECE", 5 * MB)
    monkeypatch.setattr(store, "_PART", 5 * MB)  # the smallest that S3 allows
    made = tmp_path / "giant.tif"
    made.write_bytes(os.urandom(60 * MB + 17))
    uri = f"{s3}/giant.tif"
    store.write_atomic(uri, b"warm")  # the client is made before memory is measured
    tracemalloc.start()
    store.write_atomic(uri, made)
    up = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with store.local_copy(uri) as copy:
        down = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert copy.read_bytes() == made.read_bytes()
    assert up < 45 * MB  # four parts, and what the client copies of them
    assert down < 25 * MB
    assert store.info(uri).version.endswith("-13")  # so S3 marks the hash of what came in 13 parts
    assert store.sha256(uri) == store.sha256(str(made))


def test_an_upload_in_parts_that_fails_leaves_nothing(
    s3_server: S3Server, s3: str, through: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PART", 5 * MB)
    monkeypatch.setattr(store, "_TRIES", 1)
    made = tmp_path / "giant.tif"
    made.write_bytes(bytes(20 * MB))
    with faulty_proxy(s3_server.port, Faults(cut_request=1.0), 0) as proxy:
        through(AWS_ENDPOINT_URL=proxy.url)
        with pytest.raises(TransientStoreError, match=r"giant\.tif: cannot write it"):
            store.write_atomic(f"{s3}/giant.tif", made)
        assert proxy.met["cut_request"] > 0
    through(AWS_ENDPOINT_URL=s3_server.url)
    assert list(store.list_tree(s3)) == []
    assert _uploads(s3) == []


def test_an_upload_in_parts_that_is_killed_is_never_seen_and_can_be_cleared(
    s3_server: S3Server, s3: str, through: Callable[..., None], tmp_path: Path
) -> None:
    made = tmp_path / "giant.tif"
    made.write_bytes(bytes(100 * MB))
    code = (
        "import sys, pathlib; from supir_batch import store; store.write_atomic(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    uri = f"{s3}/out/giant.tif"
    with faulty_proxy(s3_server.port, Faults(latency_s=2.0), 0) as proxy:
        writer = subprocess.Popen(
            [sys.executable, "-c", code, uri, str(made)], env={**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        )
        end = time.monotonic() + 60
        while not _uploads(s3):
            assert time.monotonic() < end
            time.sleep(0.05)
        writer.kill()
        writer.wait()
    assert store.find(uri) is None
    assert store.remove_partials(f"{s3}/other") == 0
    assert store.remove_partials(f"{s3}/out") == 1
    assert _uploads(s3) == []
    assert list(store.list_tree(s3)) == []


@pytest.mark.parametrize("seed", range(3))
def test_faults_on_the_way_change_nothing(
    s3_server: S3Server, s3: str, through: Callable[..., None], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(store, "_LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(store, "_PIECE", 100_000)  # a body is read in several requests
    contents = {f"{s3}/{size}/{index}.bin": os.urandom(size) for size in (0, 1, 999, 350_000) for index in range(12)}
    kinds = ("unavailable", "garbled", "reset", "cut_request", "cut_response", "lost_answer")
    faults = Faults(latency_s=0.02, **dict.fromkeys(kinds, 0.05))
    with faulty_proxy(s3_server.port, faults, seed) as proxy, ThreadPoolExecutor(4) as pool:
        through(AWS_ENDPOINT_URL=proxy.url)
        list(pool.map(store.write_atomic, contents, contents.values()))
        assert list(pool.map(store.read_bytes, contents)) == list(contents.values())
        assert [found.uri for found in store.list_tree(s3)] == sorted(contents)
        met = {kind for kind, count in proxy.met.items() if count}
    assert met == {"none", *kinds}


def test_a_body_that_is_always_cut_is_an_error_and_never_short(
    s3_server: S3Server, s3: str, through: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = f"{s3}/a.bin"
    store.write_atomic(uri, os.urandom(300_000))
    monkeypatch.setattr(store, "_LONGEST_PAUSE_S", 0.0)
    with faulty_proxy(s3_server.port, Faults(), 0) as proxy:
        through(AWS_ENDPOINT_URL=proxy.url)
        with store.open_read(uri) as file:
            proxy.faults = Faults(cut_response=1.0)
            with pytest.raises(TransientStoreError, match=r"a\.bin: cannot read it: .*\(tried 5 times"):
                file.read()
            assert file.tell() == 0
        with pytest.raises(TransientStoreError):
            store.download(uri, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


def test_an_interrupted_download_is_continued(
    s3_server: S3Server, s3: str, through: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri, content = f"{s3}/a.ckpt", os.urandom(1_000_000)
    store.write_atomic(uri, content)
    monkeypatch.setattr(store, "_PIECE", 100_000)
    monkeypatch.setattr(store, "_TRIES", 1)
    kept = [0]
    with faulty_proxy(s3_server.port, Faults(cut_response=0.6), 3) as proxy:
        through(AWS_ENDPOINT_URL=proxy.url)
        while not (tmp_path / "a.ckpt").exists():
            with suppress(TransientStoreError):
                store.download(uri, tmp_path / "a.ckpt")
            kept += [path.stat().st_size for path in tmp_path.glob(".a.ckpt.*.partial")]
    assert (tmp_path / "a.ckpt").read_bytes() == content
    assert kept == sorted(kept)
    assert len(set(kept)) > 2  # it was cut off more than once, and went on from there
    assert list(tmp_path.iterdir()) == [tmp_path / "a.ckpt"]


def test_what_changes_while_it_is_read_is_not_mixed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PIECE", 10)
    uri = f"{s3}/a.bin"
    store.write_atomic(uri, b"a" * 20)
    with store.open_read(uri) as file:
        assert file.read(10) == b"a" * 10
        store.write_atomic(uri, b"b" * 20)
        with pytest.raises(StoreError, match=r"a\.bin: was changed while it was read; run again"):
            file.read(10)


def test_a_lost_answer_is_no_lost_race(
    s3_server: S3Server, s3: str, through: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_LONGEST_PAUSE_S", 0.0)
    with faulty_proxy(s3_server.port, Faults(lost_answer=0.4), 1) as proxy:
        through(AWS_ENDPOINT_URL=proxy.url)
        for number in range(5):
            assert store.create(f"{s3}/{number}", b"mine")
            assert not store.create(f"{s3}/{number}", b"theirs")
        assert proxy.met["lost_answer"] > 3


@pytest.mark.parametrize("use", EVERY_USE)
def test_a_missing_bucket_is_said(s3: str, use: Callable[[str], object]) -> None:
    with pytest.raises(StoreError, match="there is no such bucket; create it, or correct the URI") as caught:
        use("s3://archive-that-is-not/folder/a.tif")
    assert not caught.value.retryable


@pytest.mark.parametrize("use", EVERY_USE)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("guest", "access denied; cannot .* it with these credentials"),
        ("secret", "the credentials are not valid there; check AWS_PROFILE"),
    ],
)
def test_what_no_retry_can_help_is_said_at_once(
    s3_server: S3Server, s3: str, through: Callable[..., None], use: Callable[[str], object], change: str, message: str
) -> None:
    environment = {
        "guest": s3_server.environment(guest=True),
        "secret": {"AWS_SECRET_ACCESS_KEY": "not-the-secret"},
    }[change]
    store.write_atomic(f"{s3}/folder/a.tif", b"x")
    with faulty_proxy(s3_server.port, Faults(), 0) as proxy:
        through(**{**environment, "AWS_ENDPOINT_URL": proxy.url})
        with pytest.raises(StoreError, match=message) as caught:
            use(f"{s3}/folder/a.tif")
        assert not caught.value.retryable
        assert proxy.met.total() <= 2  # a HEAD, and the GET that says why
    for secret in (s3_server.secret, s3_server.guest_secret, "not-the-secret"):
        assert secret not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("use", EVERY_USE)
def test_the_region_of_a_bucket_is_found(s3: str, through: Callable[..., None], use: Callable[[str], object]) -> None:
    store.write_atomic(f"{s3}/folder/a.tif", b"")
    through(AWS_REGION="us-west-2", AWS_DEFAULT_REGION="us-west-2")
    assert use(f"{s3}/folder/a.tif") not in (None, [])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("AuthorizationHeaderMalformed", "the bucket is in another region; set AWS_REGION to its region"),
        ("PermanentRedirect", "the bucket is in another region"),
        ("ExpiredToken", "the credentials have expired; renew them and run again"),
        ("RequestTimeTooSkewed", "the clock of this machine is wrong"),
        ("InvalidAccessKeyId", "the credentials are not valid there"),
    ],
)
def test_what_a_server_of_our_own_never_answers_is_said_as_well(code: str, message: str) -> None:
    answer = {"Error": {"Code": code, "Message": "Sorry."}, "ResponseMetadata": {"HTTPStatusCode": 400}}
    with pytest.raises(StoreError, match=f"^s3://b/a: {message}") as caught, store._errors("s3://b/a", "read"):
        raise translate_boto_error(ClientError(answer, "GetObject"))
    assert not caught.value.retryable


def test_no_credentials_and_no_profile_are_said(s3: str, through: Callable[..., None]) -> None:
    through(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with pytest.raises(StoreError, match="there are no credentials for it; set AWS_PROFILE"):
        store.read_bytes(f"{s3}/a.tif")
    through(AWS_PROFILE="nobody")
    with pytest.raises(StoreError, match="the profile that AWS_PROFILE names is not in"):
        store.read_bytes(f"{s3}/a.tif")


def test_a_profile_says_where_and_who(
    s3_server: S3Server, s3: str, through: Callable[..., None], tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile museum]\nendpoint_url = {s3_server.url}\nregion = eu-north-1\n"
        f"aws_access_key_id = archive:owner\naws_secret_access_key = {s3_server.secret}\n"
    )
    through(**dict.fromkeys(s3_server.environment()))
    through(AWS_PROFILE="museum", AWS_CONFIG_FILE=str(config))
    store.write_atomic(f"{s3}/a.tif", b"x")
    assert store.read_bytes(f"{s3}/a.tif") == b"x"


def test_no_server_is_transient(s3: str, through: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_LONGEST_PAUSE_S", 0.0)
    monkeypatch.setattr(store, "_TRIES", 2)
    through(AWS_ENDPOINT_URL="http://127.0.0.1:9")
    with pytest.raises(TransientStoreError, match="tried 2 times"):
        store.read_bytes(f"{s3}/a.tif")


def test_a_password_in_the_endpoint_is_not_repeated(s3: str, through: Callable[..., None]) -> None:
    through(AWS_ENDPOINT_URL="http://reader:hunter2@no host")
    with pytest.raises(StoreError, match="Invalid endpoint: http://no host") as caught:
        store.read_bytes(f"{s3}/a.tif")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def _uploads(bucket_uri: str) -> list[str]:
    fs, bucket = store.filesystem(bucket_uri)
    return [upload["Key"] for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])]
