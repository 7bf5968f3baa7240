"""The demo with everything in an object store: manifest, originals, outputs, log; then resume, and what follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import bagit
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from supir_batch import demo, store
from supir_batch.plan import OWN_FOLDERS
from tests.servers.faulty_proxy import Faults, faulty_proxy
from tests.servers.swift import S3Server

pytest.importorskip("skimage", reason="the demo's photographs come with scikit-image")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def local_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.build(folder)
    return folder


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supir_batch", *words],
        capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=900,
    )  # fmt: skip


def upload(folder: Path, uri: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.write_atomic(store.join(uri, path.relative_to(folder).as_posix()), path)


def hashes(uri: str) -> dict[str, str]:
    return {found.uri.removeprefix(uri): store.sha256(found.uri) for found in store.list_tree(uri)}


def but_lease(found: dict[str, str]) -> dict[str, str]:
    """Who writes to an output is noted there by each run, also by one that has nothing to do."""
    return {name: digest for name, digest in found.items() if not name.startswith("/_runs/_lease/")}


def ours(output: str) -> dict[str, str]:
    """What must not depend on when and how often it ran: the images."""
    endings = (".jpg", ".png", ".tif")
    found = {name: digest for name, digest in hashes(output).items() if name.endswith(endings)}
    return {name: digest for name, digest in found.items() if name.split("/")[1] not in OWN_FOLDERS}


def manifest(engine: str) -> bytes:
    settings = {"name": engine, "upscale": 1.0} | ({"weights": "tiny"} if engine == "supir" else {})
    caption = {"mode": "attributes" if engine == "supir" else "none"}
    settings = {"inputs": "archive", "output": {"uri": "restored"}, "engine": settings, "caption": caption}
    return yaml.safe_dump(settings).encode()


@pytest.mark.parametrize("engine", ["lanczos", "supir"])
def test_the_demo_runs_on_s3(s3: str, local_demo: Path, tmp_path: Path, engine: str) -> None:
    home = f"{s3}/demo"
    upload(local_demo / "archive", f"{home}/archive")
    store.write_atomic(f"{home}/demo.yaml", manifest(engine))
    originals = hashes(f"{home}/archive")
    first = command("run", f"{home}/demo.yaml", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["done"] == 7
    written = but_lease(hashes(f"{home}/restored"))

    second = command("run", f"{home}/demo.yaml", "--json")
    assert second.returncode == 0, second.stderr
    assert (json.loads(second.stdout)["done"], json.loads(second.stdout)["skipped"]) == (0, 7)
    assert but_lease(hashes(f"{home}/restored")) == written
    assert hashes(f"{home}/archive") == originals

    here = tmp_path / "here"
    upload(local_demo / "archive", str(here / "archive"))
    (here / "demo.yaml").write_bytes(manifest(engine))
    assert command("run", str(here / "demo.yaml")).returncode == 0
    assert ours(f"{home}/restored") == ours(str(here / "restored"))

    for words in (["status"], ["verify"], ["report"]):
        ran = command(*words, f"{home}/restored")
        assert ran.returncode == 0, (words, ran.stdout, ran.stderr)
    assert store.exists(f"{home}/restored/report/index.html")
    folders = ["--bagit", str(tmp_path / "bag"), "--archivematica", str(tmp_path / "transfer")]
    ran = command("export", f"{home}/restored", *folders, "--iiif", "https://example.org/restored")
    assert ran.returncode == 0, ran.stderr
    bagit.Bag(str(tmp_path / "bag")).validate()
    assert store.exists(f"{home}/restored/_iiif/collection.json")

    store.delete(f"{home}/restored" + next(name for name in ours(f"{home}/restored") if name.endswith(".png")))
    assert command("verify", f"{home}/restored").returncode == 6
    third = command("run", f"{home}/demo.yaml", "--json")
    assert json.loads(third.stdout)["done"] == 1
    assert ours(f"{home}/restored") == ours(str(here / "restored"))


def test_a_run_through_faults_gives_the_same_images(
    s3_server: S3Server, s3: str, local_demo: Path, tmp_path: Path
) -> None:
    upload(local_demo / "archive", f"{s3}/archive")
    store.write_atomic(f"{s3}/demo.yaml", manifest("lanczos"))
    faults = Faults(unavailable=0.03, reset=0.02, cut_request=0.02, cut_response=0.02, lost_answer=0.02, latency_s=0.05)
    with faulty_proxy(s3_server.port, faults, seed=6) as proxy:
        ran = command("run", f"{s3}/demo.yaml", "--json", AWS_ENDPOINT_URL=proxy.url)
        assert proxy.met.total() - proxy.met["none"] > 5
    assert ran.returncode == 0, ran.stderr
    upload(local_demo / "archive", str(tmp_path / "archive"))
    (tmp_path / "demo.yaml").write_bytes(manifest("lanczos"))
    assert command("run", str(tmp_path / "demo.yaml")).returncode == 0
    assert ours(f"{s3}/restored") == ours(str(tmp_path / "restored"))
    assert command("verify", f"{s3}/restored").returncode == 0


def test_credentials_are_nowhere(s3_server: S3Server, s3: str, local_demo: Path) -> None:
    """Whatever fails and however, on the streams, in the output and in Ray's own logs."""
    secrets = [s3_server.secret, s3_server.guest_secret, "hunter2"]
    image = next(path for path in (local_demo / "archive").rglob("*.jpg"))
    store.write_atomic(f"{s3}/good.jpg", image)
    store.write_atomic(f"{s3}/cut.jpg", image.read_bytes()[:2000])
    rows = ["good.jpg", "cut.jpg", "missing.jpg", "s3://archive-that-is-not/a.jpg"]
    store.write_atomic(f"{s3}/list.jsonl", "\n".join(json.dumps({"uri": uri}) for uri in rows).encode())
    settings = {"inputs": "list.jsonl", "output": {"uri": "out"}, "engine": {"name": "lanczos"}}
    manifests = {
        "m.yaml": settings,
        "input.yaml": {**settings, "inputs": "s3://reader:hunter2@bucket/in"},
        "output.yaml": {**settings, "output": {"uri": "s3://reader:hunter2@bucket/out"}},
        "list.yaml": {**settings, "inputs": "leaky.jsonl"},
    }
    store.write_atomic(f"{s3}/leaky.jsonl", b'{"uri": "https://example.org/a.tif?X-Amz-Signature=hunter2"}\n')
    for name, data in manifests.items():
        store.write_atomic(f"{s3}/{name}", yaml.safe_dump(data).encode())

    guest, here = s3_server.environment(guest=True), f"{s3}/m.yaml"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as ray:  # a longer path than Ray's sockets allow
        runs = [
            (3, command("run", here, "--debug", RAY_TMPDIR=ray)),
            (3, command("run", here, "--debug", "-v", "--log-json", "-", RAY_TMPDIR=ray)),
            (2, command("run", here, "--debug", **guest)),
            (2, command("run", here, "--debug", AWS_SECRET_ACCESS_KEY="hunter2")),
            (2, command("run", here, "--debug", AWS_ENDPOINT_URL="http://reader:hunter2@no host")),
            (2, command("run", f"{s3}/input.yaml", "--debug")),
            (2, command("run", f"{s3}/output.yaml", "--debug")),
            (2, command("run", f"{s3}/list.yaml", "--debug")),
            (2, command("run", "s3://reader:hunter2@bucket/m.yaml", "--debug")),
            (2, command("run", here, "--debug", "--set", "engine.weights=s3://reader:hunter2@bucket/w")),
            (0, command("report", f"{s3}/out", "--debug")),
            (2, command("status", f"{s3}/out", "--debug", **guest)),
        ]
        logs = [path.read_bytes() for path in Path(ray).rglob("*") if path.is_file()]
    assert [ran.returncode for _, ran in runs] == [code for code, _ in runs], [ran.stderr for _, ran in runs]
    said = [ran.stdout.encode() + ran.stderr.encode() for _, ran in runs]
    written = [store.read_bytes(found.uri) for found in store.list_tree(f"{s3}/out")]
    tables = [
        str(pq.read_table(pa.BufferReader(store.read_bytes(found.uri))).to_pylist()).encode()
        for found in store.list_tree(f"{s3}/out")
        if found.uri.endswith(".parquet")
    ]
    assert len(logs) > 5
    assert any(b"good" in table for table in tables)
    for secret in secrets:
        for text in [*said, *written, *tables, *logs]:
            at = text.find(secret.encode())
            assert at < 0, text[max(0, at - 300) : at + 50]
