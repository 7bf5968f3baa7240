"""Models from published files to a plan, through the command line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from supir_batch import engine, model_folder, models, store
from supir_batch.captioner import load_captioner
from supir_batch.cli import app
from supir_batch.errors import ManifestError, StoreError
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import make_plan
from supir_batch.types import ModelRef, TileBox, TileTicket
from supir_model import folder
from supir_model.checkpoint_keys import to_released
from supir_model.config import MODELS, V0Q, ControlConfig, TextConfig, TowerConfig, UNetConfig, VAEConfig
from supir_model.networks import Networks

SMALL = replace(
    V0Q,
    vae=VAEConfig((8, 16), 1, 4, 4, mid_attention=True, scale=0.13025),
    unet=UNetConfig(4, (16, 32), 1, (0, 1), 16, context_dim=20, vector_dim=22, norm_groups=8),
    control=ControlConfig((0, 1), hidden=8, norm_groups=8, attention_head_dim=16, attention_levels=(1,)),
    text=TextConfig("sdxl", 77, (TowerConfig(8, 2, 2), TowerConfig(12, 3, 2, projection=10)), 600, size_embedding=2),
)
SUPIR = ("model.control_model.", "model.diffusion_model.project_modules.", "first_stage_model.denoise_encoder.")


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a person has downloaded: sdxl.safetensors, SUPIR-v0Q.ckpt, tokenizer/."""
    where = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    released = {key: value.contiguous() for key, value in to_released(Networks(SMALL).state_dict(), SMALL).items()}
    supir = {key: value for key, value in released.items() if key.startswith(SUPIR)}
    save_file({key: value for key, value in released.items() if key not in supir}, where / "sdxl.safetensors")
    torch.save(supir, where / "SUPIR-v0Q.ckpt")
    (where / "tokenizer").mkdir()
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (where / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (where / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    return where


def convert(published: Path, target: Path, *options: str) -> Result:
    return cli(
        "models", "convert", "v0Q", target,
        "--base", published / "sdxl.safetensors",
        "--supir", published / "SUPIR-v0Q.ckpt",
        "--tokenizer", published / "tokenizer",
        *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def converted(published: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "v0Q", SMALL)  # the released widths would need 20 GB
        result = convert(published, published.parent / "converted" / "v0Q")
    assert result.exit_code == 0, result.stderr
    return published.parent / "converted" / "v0Q"


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """A converted model to break."""
    return Path(shutil.copytree(converted, tmp_path / "models" / "v0Q"))


# --- convert and check ---------------------------------------------------------------------------------------------


def test_what_is_converted_is_whole_and_says_its_hash(model: Path) -> None:
    result = cli("models", "check", model)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{model_folder.model_sha256(str(model))}  SUPIR v0Q on sdxl\n"
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert names == {"README.md", "checksums.json", *folder.needed_files(SMALL)}


def test_the_model_in_the_package_is_whole() -> None:
    result = cli("models", "check", "tiny")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("  supir-tiny\n")


def test_conversion_of_other_widths_than_the_release_is_refused_by_name(published: Path, tmp_path: Path) -> None:
    result = convert(published, tmp_path / "full")  # SMALL's files are not those of the full model
    assert result.exit_code == 2
    assert "error: weights file sdxl.safetensors with SUPIR-v0Q.ckpt does not fit the network; " in result.stderr
    assert "missing: " in result.stderr
    assert not (tmp_path / "full").exists()


def test_conversion_never_overwrites(published: Path, model: Path) -> None:
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    result = convert(published, model)
    assert result.exit_code == 2
    assert "exists and is not overwritten" in result.stderr
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiny", "{t}", "--base", "{p}/sdxl.safetensors", "--supir", "{p}/SUPIR-v0Q.ckpt"],
            "'tiny' is not a model made",
        ),
        (
            ["v0Q", "{t}", "--base", "{p}/none.safetensors", "--supir", "{p}/SUPIR-v0Q.ckpt"],
            "none.safetensors: does not",
        ),
        (["v0Q", "{t}", "--base", "s3://b/x", "--supir", "{p}/SUPIR-v0Q.ckpt"], "is not on this machine"),
        (["v0Q", "s3://b/x", "--base", "{p}/sdxl.safetensors", "--supir", "{p}/SUPIR-v0Q.ckpt"], "on this machine"),
        (["v0Q", "{t}", "--base", "{p}/sdxl.safetensors", "--supir", "{p}/SUPIR-v0Q.ckpt"], "holds no CLIP vocabulary"),
        (
            ["v0Q", "{t}", "--base", "{p}/sdxl.safetensors", "--supir", "{p}/SUPIR-v0Q.ckpt", "--lora", "x=strong"],
            "'strong' is not a number",
        ),
    ],
)
def test_convert_says_what_is_wrong(published: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = cli("models", "convert", *(word.format(p=published, t=tmp_path / "t") for word in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "t").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", flip, "model.safetensors has SHA-256"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        (
            "tokenizer/vocab.json",
            lambda path: path.write_bytes(b"{}"),
            "tokenizer/vocab.json has 2 bytes, recorded are",
        ),
        ("checksums.json", Path.unlink, "checksums.json: does not exist"),
        ("config.json", Path.unlink, "name no model"),
        ("checksums.json", lambda path: path.write_text("{}"), "checksums.json: has format None"),
    ],
)
def test_check_names_what_is_not_as_recorded_and_exits_2(model: Path, name: str, change: object, message: str) -> None:
    assert callable(change)
    change(model / name)
    result = cli("models", "check", model)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def record_again(model: Path) -> None:
    """Checksums of the folder as it is, as a conversion gone wrong would have written them."""
    names = folder.needed_files(SMALL)
    sums = {name: folder.file_sum(model / name) for name in names}
    (model / "checksums.json").write_text(folder.to_text(folder.Checksums(1, sums)))


def test_check_compares_names_and_shapes_of_the_weights(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    state["stranger"] = state.pop("control.hint.bias").clone()
    save_file(state, model / "model.safetensors")
    record_again(model)
    result = cli("models", "check", model)
    assert result.exit_code == 2
    assert "1 missing: control.hint.bias; 1 unexpected: stranger" in result.stderr


@pytest.mark.parametrize("content", ["{", '{"a": 600}'])
def test_check_reads_the_vocabulary(model: Path, content: str) -> None:
    (model / "tokenizer" / "vocab.json").write_text(content)
    record_again(model)
    result = cli("models", "check", model)
    assert result.exit_code == 2
    assert "CLIP vocabulary in 'tokenizer' " in result.stderr


def test_checksums_must_cover_everything_that_shapes_results(model: Path) -> None:
    data = json.loads((model / "checksums.json").read_text())
    del data["files"]["tokenizer/merges.txt"]
    (model / "checksums.json").write_text(json.dumps(data))
    assert "tokenizer/merges.txt is not in checksums.json" in cli("models", "check", model).stderr


# --- list ----------------------------------------------------------------------------------------------------------


def test_list_shows_what_is_known_needed_and_present(model: Path, published: Path) -> None:
    shutil.copy(published / "SUPIR-v0Q.ckpt", model.parent)
    shutil.copytree(model, model.parent / "broken")
    (model.parent / "broken" / "model.safetensors").unlink()
    result = cli("models", "list", model.parent)
    assert result.exit_code == 0, result.stderr
    for line in ("tiny   supir-tiny", "v0F    SUPIR v0F; license: supir-noncommercial", "supir: SUPIR-v0Q"):
        assert line in result.stdout
    data = json.loads(cli("models", "list", model.parent, "--json").stdout)
    assert [one["name"] for one in data["known"]] == ["tiny", "v0Q", "v0F"]
    states = {Path(one["uri"]).name: (one["kind"], one["name"], one["state"]) for one in data["present"]}
    assert states == {
        "v0Q": ("model", "v0Q", "ready"),
        "broken": ("model", "v0Q", "damaged: model.safetensors is missing"),
        "SUPIR-v0Q.ckpt": ("file", "", "not converted"),
    }
    assert "holds no model" in cli("models", "list", model.parent / "nowhere").stdout


# --- fetch ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "remote") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_fetch_brings_one_file_and_says_its_hash(remote: str, tmp_path: Path) -> None:
    store.write_atomic(store.join(remote, "a.safetensors"), b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    for _ in range(2):  # what is here is not fetched again
        result = cli("models", "fetch", f"{remote}/a.safetensors", tmp_path / "here", "--sha256", digest.upper())
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"{digest}  {tmp_path}/here/a.safetensors\n"
    assert (tmp_path / "here" / "a.safetensors").read_bytes() == b"weights"


def test_another_hash_is_refused_and_nothing_stays(remote: str, tmp_path: Path) -> None:
    store.write_atomic(store.join(remote, "a.ckpt"), b"other weights")
    result = cli("models", "fetch", f"{remote}/a.ckpt", tmp_path / "here", "--sha256", "ab" * 32)
    assert result.exit_code == 2
    assert (
        f"arrived with SHA-256 {hashlib.sha256(b'other weights').hexdigest()}, expected SHA-256 abab" in result.stderr
    )
    assert list((tmp_path / "here").iterdir()) == []


def test_what_is_here_with_another_content_is_not_overwritten(remote: str, tmp_path: Path) -> None:
    store.write_atomic(store.join(remote, "a.ckpt"), b"new")
    (tmp_path / "a.ckpt").write_bytes(b"old")
    result = cli("models", "fetch", f"{remote}/a.ckpt", tmp_path)
    assert result.exit_code == 2
    assert "is not overwritten" in result.stderr
    assert (tmp_path / "a.ckpt").read_bytes() == b"old"


def test_the_rest_of_another_version_is_not_appended(remote: str, tmp_path: Path) -> None:
    uri, target = store.join(remote, "a.ckpt"), tmp_path / "a.ckpt"
    store.write_atomic(uri, b"first version")
    token = hashlib.sha256(f"{uri} {store.info(uri).version}".encode()).hexdigest()[:16]
    (tmp_path / f".a.ckpt.{token}.partial").write_bytes(b"first")
    store.write_atomic(uri, b"the second version")
    store.download(uri, target)
    assert target.read_bytes() == b"the second version"


def test_a_damaged_rest_is_thrown_away(remote: str, tmp_path: Path) -> None:
    uri, target = store.join(remote, "a.ckpt"), tmp_path / "a.ckpt"
    store.write_atomic(uri, b"weights")
    token = hashlib.sha256(f"{uri} {store.info(uri).version}".encode()).hexdigest()[:16]
    (tmp_path / f".a.ckpt.{token}.partial").write_bytes(b"longer than the object")
    with pytest.raises(StoreError, match="arrived with 22 bytes, expected 7"):
        store.download(uri, target)
    store.download(uri, target)
    assert target.read_bytes() == b"weights"


def upload(model: Path, remote: str) -> None:
    for path in model.rglob("*"):
        if path.is_file():
            store.write_atomic(store.join(remote, path.relative_to(model).as_posix()), path)


def test_a_converted_model_is_fetched_whole_and_verified(model: Path, remote: str, tmp_path: Path) -> None:
    upload(model, store.join(remote, "v0Q"))
    assert cli("models", "fetch", f"{remote}/v0Q", tmp_path / "here").exit_code == 0
    assert cli("models", "check", tmp_path / "here" / "v0Q").exit_code == 0
    store.write_atomic(store.join(remote, "v0Q/tokenizer/vocab.json"), b"{}")
    result = cli("models", "fetch", f"{remote}/v0Q", tmp_path / "again")
    assert result.exit_code == 2
    assert "v0Q/tokenizer/vocab.json: arrived with SHA-256" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{t}/none"], "none: does not exist"),
        (["{t}", "--sha256", "xyz"], "must be 64 hexadecimal digits"),
        (["{p}/tokenizer", "--sha256", "ab" * 32], "is a folder of 2"),
        (["{p}/SUPIR-v0Q.ckpt", "--revision", "main"], "--revision is for hf:// sources"),
        (["hf://owner"], "write hf://owner/name"),
    ],
)
def test_fetch_says_what_is_wrong(published: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    words = [word.format(p=published, t=tmp_path) for word in arguments]
    result = cli("models", "fetch", words[0], tmp_path / "here", *words[1:])
    assert result.exit_code == 2
    assert message in result.stderr


# --- the hub -------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILES = {"sdxl.safetensors": b"w" * 100_000, "tokenizer/vocab.json": b"{}"}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a client needs to list a repository and to download from it."""

    wrong_hash = False

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/o/n", "/api/models/o/n/revision/v1"):
            self._answer(
                json.dumps({"id": "o/n", "modelId": "o/n", "sha": COMMIT, "siblings": self._siblings()}).encode()
            )
        else:
            self._file(path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _siblings(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for name, content in HUB_FILES.items():
            digest = "0" * 64 if self.wrong_hash else hashlib.sha256(content).hexdigest()
            lfs = {"sha256": digest, "size": len(content), "pointerSize": 1}
            found.append({"rfilename": name, "size": len(content), **({"lfs": lfs} if len(content) > 99 else {})})
        return found

    def _file(self, path: str) -> None:
        content = HUB_FILES.get(path.removeprefix(f"/o/n/resolve/{COMMIT}/"))
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if path.startswith("/api") else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._answer(content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _answer(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *_: object) -> None:
        """Say nothing."""


class ForgedHub(Hub):
    """Announces other hashes than its files have."""

    wrong_hash = True


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), getattr(request, "param", Hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch_from(endpoint: str, cache: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its variables once."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **variables,
    }
    command = [sys.executable, "-m", "supir_batch", "models", "fetch", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_a_repository_of_the_hub_is_fetched_with_its_hashes(hub: str, tmp_path: Path) -> None:
    ran = fetch_from(hub, tmp_path / "cache", "hf://o/n", tmp_path / "here", "--revision", "v1")
    assert ran.returncode == 0, ran.stderr
    found = dict(reversed(line.split("  ")) for line in ran.stdout.splitlines())
    for name, content in HUB_FILES.items():
        path = tmp_path / "here" / "n" / name
        assert path.read_bytes() == content
        assert found[str(path)] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("source", "message"),
    [("hf://o/n/none.ckpt", "no such file or folder"), ("hf://o/other", "no such repository or revision")],
)
def test_what_the_hub_does_not_have(hub: str, tmp_path: Path, source: str, message: str) -> None:
    ran = fetch_from(hub, tmp_path / "cache", source, tmp_path / "here")
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("hub", [ForgedHub], indirect=True)
def test_a_file_that_is_not_what_the_hub_says_is_removed(hub: str, tmp_path: Path) -> None:
    ran = fetch_from(hub, tmp_path / "cache", "hf://o/n/sdxl.safetensors", tmp_path / "here")
    assert ran.returncode == 2
    assert "arrived with SHA-256" in ran.stderr
    assert not (tmp_path / "here" / "n" / "sdxl.safetensors").exists()


def test_without_the_hub_the_error_says_what_to_do(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"  # the discard port: nothing listens
    ran = fetch_from(closed, tmp_path / "cache", "hf://o/n/x.ckpt", tmp_path / "here")
    assert ran.returncode == 4  # worth another try
    assert "error: hf://o/n/x.ckpt: cannot reach the hub" in ran.stderr
    assert "fetch the files on another machine" in ran.stderr
    off = fetch_from(closed, tmp_path / "cache", "hf://o/n/x.ckpt", tmp_path / "here", HF_HUB_OFFLINE="1")
    assert off.returncode == 2
    assert "switched off by HF_HUB_OFFLINE" in off.stderr


# --- from a manifest -----------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"pixels")
    (tmp_path / "m.yaml").write_text(
        "inputs: in\noutput: {uri: out}\ncaption: {material: map}\n"
        "engine: {weights: models/v0Q, accept_license: supir-noncommercial, steps: 2}\n"
    )
    return tmp_path / "m.yaml"


def test_what_the_manifest_names_is_what_a_plan_uses(manifest: Path, model: Path) -> None:
    loaded = load_manifest(str(manifest), {}, {})
    ((job, reason),) = make_plan(loaded, str(manifest), model_folder.model_sha256(loaded.engine.weights)).todo
    assert reason == "new"
    assert job.model is not None
    assert (job.model.uri, job.settings.weights) == (str(model), "v0Q")
    assert job.settings.engine_name == "SUPIR v0Q on sdxl"
    assert job.settings.model_sha256 == folder.read_local(model)[1].identity
    assert job.settings.accepted_license == "supir-noncommercial"
    assert (job.settings.material, job.settings.negative_prompt) == ("map", V0Q.prompts_for("map").negative)


def test_planning_with_a_converted_model_loads_no_torch(manifest: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from supir_batch.cli import app; "
        "print(CliRunner().invoke(app, ['plan', sys.argv[1]]).exit_code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(manifest)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0 False\n"


def test_a_plan_refuses_a_model_that_is_not_as_recorded(manifest: Path, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"cut")
    result = cli("plan", manifest)
    assert result.exit_code == 2
    assert "model.safetensors has 3 bytes, recorded are" in result.stderr
    assert "copy or convert the model again" in result.stderr


def test_a_remote_model_is_copied_once_and_whole(model: Path, tmp_path: Path) -> None:
    uri = f"memory://{uuid.uuid4().hex}/v0Q"
    upload(model, uri)
    copy = model_folder.local(uri, tmp_path / "cache")
    assert Path(copy).name == model_folder.model_sha256(uri) == model_folder.model_sha256(str(model))
    stamps = {path: path.stat().st_mtime_ns for path in Path(copy).rglob("*.safetensors")}
    assert model_folder.local(uri, tmp_path / "cache") == copy
    assert {path: path.stat().st_mtime_ns for path in Path(copy).rglob("*.safetensors")} == stamps
    assert cli("models", "check", copy).exit_code == 0


def test_the_engine_restores_with_a_converted_model(manifest: Path) -> None:
    loaded = load_manifest(str(manifest), {}, {})
    ((job, _),) = make_plan(loaded, str(manifest), "hash").todo
    assert isinstance(job.model, ModelRef)
    supir = engine.load_engine(job.model, "cpu")
    height = width = engine.alignment(job.model) * 4
    tile = np.full((height, width, 3), 0.5, np.float32)
    ticket = TileTicket(job, box=TileBox(0, 1, 0, 0, width, height), prompt=engine.full_prompt(job.settings, "a map"))
    (restored,) = supir.restore([ticket], [tile])
    assert restored.shape == tile.shape
    assert np.isfinite(restored).all()


def test_the_captioner_sees_with_a_converted_model(manifest: Path) -> None:
    ((job, _),) = make_plan(load_manifest(str(manifest), {}, {}), str(manifest), "hash").todo
    (caption,) = load_captioner(job, "cpu").caption([TileTicket(job)], [np.full((40, 24, 3), 0.5, np.float32)])
    assert "map" in caption


def test_no_model_is_named_by_its_manifest_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="'v0Q' are not in the package"):
        models.check("v0Q")
