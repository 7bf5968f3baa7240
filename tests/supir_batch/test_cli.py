from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from supir_batch import __version__, driver, runlog, store
from supir_batch.cli import app
from supir_batch.errors import EngineError, LeaseError, TransientStoreError
from supir_batch.types import Failure, Job, Outcome, TileTicket
from supir_model.config import TINY


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in ("a.tif", "b.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"pixels")
    (tmp_path / "m.yaml").write_text("inputs: in\noutput: {uri: out}\nengine: {name: lanczos}\n")
    return tmp_path


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


OnRow = Callable[[dict[str, Any]], None]


def finish(job: Job, run_id: str) -> dict[str, Any]:
    uri = f"{job.output_stem}.tif"
    store.write_atomic(uri, b"restored")
    return runlog.to_row(Outcome(TileTicket(job=job), "done", uri, "ab" * 32, 8, "2026-01-01T00:00:00"), run_id)


def with_pipeline(monkeypatch: pytest.MonkeyPatch, work: Callable[[Sequence[Job], OnRow, str], None]) -> None:
    """Let ``work`` take the place of the Ray stream; the whole of it is tested in test_pipeline.py."""
    module = types.ModuleType("supir_batch.pipeline")
    module.run = lambda jobs, runtime, listener, run_id, stop, load: work(jobs, listener.on_row, run_id)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "supir_batch.pipeline", module)
    monkeypatch.setattr("supir_batch.pipeline", module, raising=False)


def all_done(jobs: Sequence[Job], on_row: OnRow, run_id: str) -> None:
    for job in jobs:
        on_row(finish(job, run_id))


def test_version_and_help() -> None:
    assert cli("--version").stdout.strip() == f"supir-batch {__version__}"
    text = cli("--help").stdout
    for command in ("run", "submit", "plan", "status", "show-config", "report", "Exit codes"):
        assert command in text


def test_every_command_has_help() -> None:
    def paths(command: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, inner in getattr(command, "commands", {}).items():
            yield (*above, name)
            yield from paths(inner, (*above, name))

    found = list(paths(typer.main.get_command(app)))
    assert len(found) > 15
    for path in found:
        shown = cli(*path, "--help")
        assert shown.exit_code == 0, (path, shown.exception)
        assert f"Usage: root {' '.join(path)}" in shown.stdout, path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "error: none.yaml: no such manifest"),
        (["plan", "{m}", "--set", "engine.stpes=2"], "engine.stpes (from --set): unknown key; did you mean 'steps'?"),
        (["plan", "{m}", "--set", "engine"], "error: --set engine: has no '='"),
        (["status", "{d}/nothing"], "holds no run log"),
        (["run", "{m}", "--limit", "0"], "Invalid value for '--limit'"),
        (["run", "{m}", "--log-json", "{d}"], "error: --log-json {d}: cannot be written: Is a directory"),
        (["submit", "{m}"], "Missing option '--address'"),
        (["submit", "{m}", "--address", "http://h:1", "--limit", "x"], "Invalid value for '--limit'"),
        (["run"], "Missing argument"),
    ],
)
def test_usage_and_manifest_errors_are_one_line_and_exit_2(archive: Path, arguments: list[str], message: str) -> None:
    result = cli(*(word.format(m=archive / "m.yaml", d=archive) for word in arguments))
    assert result.exit_code == 2
    assert message.format(m=archive / "m.yaml", d=archive) in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(archive: Path) -> None:
    assert "Traceback" in cli("plan", "none.yaml", "--debug").stderr


def test_plan_says_what_would_be_done_and_writes_nothing(archive: Path) -> None:
    (archive / "in" / "empty.jpg").write_bytes(b"")
    (archive / "in" / "note.txt").write_bytes(b"x")
    result = cli("plan", str(archive / "m.yaml"))
    assert result.exit_code == 0
    assert "to do    2\n  2 new\ndone     0\nrefused  1\n" in result.stdout
    assert "ignored  1 (.txt 1)" in result.stdout
    data = json.loads(cli("plan", str(archive / "m.yaml"), "--json").stdout)
    assert [entry["reason"] for entry in data["todo"]] == ["new", "new"]
    assert data["refused"][0]["kind"] == "empty"
    assert not (archive / "out").exists()


def test_show_config(archive: Path) -> None:
    result = cli("show-config", str(archive / "m.yaml"), "--set", "engine.name=supir", "--set", "engine.steps=7")
    assert "engine.steps = 7  # flag\n" in result.stdout
    cfg_end = TINY.presets["fidelity"].cfg_end
    assert f"engine.cfg_end = {cfg_end}  # preset fidelity of tiny\n" in result.stdout
    data = json.loads(cli("show-config", str(archive / "m.yaml"), "--json").stdout)
    assert {"key": "engine.upscale", "value": 1.0, "origin": "default"} in data


def test_run_then_run_again(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, all_done)
    manifest = str(archive / "m.yaml")
    result = cli("run", manifest, "--set", "engine.upscale=2")
    assert result.exit_code == 0, result.stderr
    assert "done     2\n" in result.stdout
    assert f"next     supir-batch report {archive}/out" in result.stdout
    listed = (archive / "out" / "checksum.sha256").read_text().splitlines()
    assert [line.split("  ")[1] for line in listed] == sorted(line.split("  ")[1] for line in listed)
    assert sum(not line.endswith((".json", ".xml")) for line in listed) == 2
    copied = next((archive / "out" / "_runs").glob("*/manifest.yaml")).read_text()
    assert copied.startswith(f"# supir-batch {__version__} ran m.yaml\n# engine.upscale = 2.0 (flag)\ninputs: in\n")

    again = json.loads(cli("run", manifest, "--set", "engine.upscale=2", "--json").stdout)
    assert (again["done"], again["skipped"], again["log"], again["exit_code"]) == (0, 2, None, 0)
    changed = cli("run", manifest)
    assert "2 again, settings changed: upscale: 2 -> 1" in changed.stderr


def test_events_as_json_lines_beside_words_or_in_place_of_them(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_pipeline(monkeypatch, all_done)
    (archive / "in" / "empty.jpg").write_bytes(b"")
    manifest, log = str(archive / "m.yaml"), archive / "events.jsonl"
    result = cli("run", manifest, "--log-json", str(log), "--limit", "1", "--max-failures", "0")
    assert result.exit_code == 4
    assert "2 to do" in result.stderr
    assert "failed: " in result.stderr
    assert f"--log-json {log}" in result.stdout, "the next command is this one"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] != "drain"] == ["start", "lease", "image", "image", "end"]
    assert {line["level"] for line in lines if line["event"] == "image"} == {"info", "error"}
    assert (lines[-1]["left"], lines[-1]["exit_code"]) == (1, 4)
    assert len({line["run_id"] for line in lines}) == 1

    capfd.readouterr()
    again = cli("run", manifest, "--log-json", "-", "--json")
    assert (again.exit_code, again.stderr) == (3, "")
    events = [json.loads(line)["event"] for line in capfd.readouterr().err.splitlines()]
    assert (events[0], events[-1], events.count("image")) == ("start", "end", 2)


def test_what_stops_a_run_is_an_event(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(jobs: Sequence[Job], on_row: OnRow, run_id: str) -> None:
        raise EngineError("the weights are gone")

    with_pipeline(monkeypatch, breaks)
    log = archive / "events.jsonl"
    assert cli("run", str(archive / "m.yaml"), "--log-json", str(log)).exit_code == 4
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["event"], line["message"]) for line in lines[2:3]] == [("error", "the weights are gone")]

    monkeypatch.setattr(driver.lease, "held", lambda *held: (_ for _ in ()).throw(LeaseError("run x is writing here")))
    assert cli("run", str(archive / "m.yaml"), "--log-json", str(log)).exit_code == 5
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["message"]) == ("error", "run x is writing here")


def test_failures_are_logged_counted_and_exit_3(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, all_done)
    (archive / "in" / "empty.jpg").write_bytes(b"")
    result = cli("run", str(archive / "m.yaml"))
    assert result.exit_code == 3
    assert "failed   1 (empty 1)" in result.stdout
    assert "failed: " in result.stderr
    status = json.loads(cli("status", str(archive / "m.yaml"), "--json").stdout)
    assert (status["images"], status["done"], status["failed"]) == (3, 2, {"empty": 1})
    assert "is 0 bytes" in cli("status", str(archive / "out")).stdout


def test_limit_leaves_the_rest_for_the_next_run(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, all_done)
    manifest = str(archive / "m.yaml")
    first = cli("run", manifest, "--limit", "1")
    assert first.exit_code == 4
    assert "left     1" in first.stdout
    assert f"next     supir-batch run {manifest} --limit 1" in first.stdout
    assert cli("run", manifest, "--limit", "1").exit_code == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TransientStoreError("s3://b/k: cannot write it: slow down"), "error: s3://b/k: cannot write it: slow down"),
        (RuntimeError("many\nlines\nthe cause"), "error: unexpected RuntimeError: the cause"),
    ],
)
def test_what_stops_the_stream_exits_4_with_the_log_written(
    archive: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def breaks(jobs: Sequence[Job], on_row: OnRow, run_id: str) -> None:
        on_row(finish(jobs[0], run_id))
        raise error

    with_pipeline(monkeypatch, breaks)
    result = cli("run", str(archive / "m.yaml"))
    assert result.exit_code == 4
    assert message in result.stderr
    assert "done     1\n" in result.stdout
    assert "left     1\n" in result.stdout
    assert runlog.read_log(str(archive / "out")).num_rows == 1


def test_a_list_of_hashes_that_cannot_be_written_is_an_unfinished_run(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(output_uri: str) -> None:
        raise TransientStoreError(f"{output_uri}/checksum.sha256: cannot write it: slow down")

    with_pipeline(monkeypatch, all_done)
    with monkeypatch.context() as patch:
        patch.setattr("supir_batch.checksums.renew", refuse)
        result = cli("run", str(archive / "m.yaml"))
    assert (result.exit_code, "checksum.sha256: cannot write it" in result.stderr) == (4, True)
    assert not (archive / "out" / "checksum.sha256").exists()
    assert cli("run", str(archive / "m.yaml")).exit_code == 0
    assert (archive / "out" / "checksum.sha256").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def waits(jobs: Sequence[Job], on_row: OnRow, run_id: str) -> None:
        on_row(finish(jobs[0], run_id))
        for seconds in (0.1, 0.3):
            threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
        time.sleep(0.2)  # the first lets it go on
        went_on.append(run_id)
        time.sleep(20)

    with_pipeline(monkeypatch, waits)
    went_on: list[str] = []
    before = signal.getsignal(number)
    result = cli("run", str(archive / "m.yaml"))
    assert result.exit_code == 128 + number
    assert f"next     supir-batch run {archive}/m.yaml" in result.stdout
    assert runlog.read_log(str(archive / "out")).num_rows == 1
    assert signal.getsignal(number) == before
    assert went_on
    assert "signal again to stop at once" in capfd.readouterr().err


def test_rays_own_answer_to_sigterm_counts_as_the_signal(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exits(jobs: Sequence[Job], on_row: OnRow, run_id: str) -> None:
        sys.exit(15)

    with_pipeline(monkeypatch, exits)
    assert cli("run", str(archive / "m.yaml")).exit_code == 143


def test_stale_temps_are_gone_after_a_run(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, all_done)
    (archive / "out").mkdir()
    (archive / "out" / ".a.tif.00000000.partial").write_bytes(b"half")
    cli("run", str(archive / "m.yaml"))
    assert not list((archive / "out").glob(".*"))


def test_an_output_that_cannot_be_looked_up_is_worth_another_try(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(uri: str) -> None:
        raise TransientStoreError(f"{uri}: cannot list it: timed out")

    monkeypatch.setattr(store, "list_tree", unreachable)
    assert cli("plan", str(archive / "m.yaml")).exit_code == 4


def test_exit_codes() -> None:
    def code(**values: Any) -> int:
        given = dict(done=1, recovered=0, failed={}, skipped=0, left=0, seconds=1.0) | values
        return driver.Summary("out", "log", **given).exit_code

    assert [code(), code(failed={"x": 1}), code(left=1), code(left=1, failed={"x": 1})] == [0, 3, 4, 4]
    assert [code(error=ValueError()), code(stopped_by=2), code(stopped_by=15)] == [4, 130, 143]


# --- failures and retry --------------------------------------------------------------------------------------------


def failing(**kinds: str) -> Callable[[Sequence[Job], OnRow, str], None]:
    """Work at which the images of these stems fail, with these kinds."""

    def work(jobs: Sequence[Job], on_row: OnRow, run_id: str) -> None:
        for job in jobs:
            row = finish(job, run_id)
            kind = kinds.get(Path(job.source.id).stem)
            if kind is not None:
                message = f"{job.source.id}: it\nbroke"
                failure = Failure("decode", kind, message)
                ended = Outcome(TileTicket(job, failure=failure), "failed", finished_at="2025-12-31T00:00:00")
                row = runlog.to_row(ended, run_id)
            on_row(row)

    return work


def test_failures_are_listed_one_a_line(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, failing(a="truncated", b="poison"))
    cli("run", str(archive / "m.yaml"))
    result = cli("failures", str(archive / "out"))
    assert result.stdout == "a.tif\ttruncated\ta.tif: it broke\nb.png\tpoison\tb.png: it broke\n"
    assert cli("failures", str(archive / "out"), "--cause", "poison").stdout.startswith("b.png\tpoison")
    assert cli("failures", str(archive / "out"), "--cause", "x").stdout == ""
    (one, _) = json.loads(cli("failures", str(archive / "m.yaml"), "--json").stdout)
    uri = str(archive / "in" / "a.tif")
    assert one == {"id": "a.tif", "uri": uri, "cause": "truncated", "message": "a.tif: it\nbroke"}


def test_retry_tries_what_failed_and_nothing_else(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive / "in" / "c.tif").write_bytes(b"pixels")
    (archive / "in" / "d.tif").write_bytes(b"pixels")
    manifest = str(archive / "m.yaml")
    with_pipeline(monkeypatch, failing(a="truncated", b="poison"))
    assert cli("run", manifest, "--except", "d.*").exit_code == 3
    (archive / "in" / "e.tif").write_bytes(b"pixels")  # new since: no work of a retry

    tried: list[str] = []

    def remember(jobs: Sequence[Job], on_row: OnRow, run_id: str) -> None:
        tried.extend(job.source.id for job in jobs)
        all_done(jobs, on_row, run_id)

    with_pipeline(monkeypatch, remember)
    assert cli("retry", manifest, "--cause", "disk").exit_code == 0
    assert tried == []
    assert cli("retry", manifest, "--cause", "poison").exit_code == 0
    assert tried == ["b.png"]
    assert cli("retry", manifest).exit_code == 0
    assert tried == ["b.png", "a.tif"]
    assert cli("failures", str(archive / "out")).stdout == ""


def test_a_run_of_nothing_but_quarantined_images_says_so_and_exits_3(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = str(archive / "m.yaml")
    with_pipeline(monkeypatch, failing(a="hang", b="truncated"))
    assert cli("run", manifest).exit_code == 3
    with_pipeline(monkeypatch, all_done)
    again = cli("run", manifest)
    assert (again.exit_code, "1 to do, 0 done before, 0 refused, 1 quarantined" in again.stderr) == (3, True)
    last = cli("run", manifest)
    assert last.exit_code == 3
    assert "kept out 1 quarantined" in last.stdout
    assert f"next     supir-batch retry {manifest}   (tries the quarantined images again)" in last.stdout
    assert json.loads(cli("run", manifest, "--json").stdout)["quarantined"] == 1
    assert "quarantined  1; only retry tries them again\n" in cli("plan", manifest).stdout
    (entry,) = json.loads(cli("plan", manifest, "--json").stdout)["quarantined"]
    assert (entry["id"], entry["reason"]) == ("a.tif", "hang: a.tif: it\nbroke")
    assert cli("retry", manifest).exit_code == 0
    assert cli("run", manifest).exit_code == 0


def test_only_and_shuffle_come_back_in_the_next_command(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive / "in" / "a2.tif").write_bytes(b"pixels")
    with_pipeline(monkeypatch, all_done)
    result = cli("run", str(archive / "m.yaml"), "--only", "a*", "--shuffle-seed", "3", "--limit", "1")
    assert result.exit_code == 4
    assert f"next     supir-batch run {archive}/m.yaml --only 'a*' --limit 1 --shuffle-seed 3" in result.stdout
    assert "no id is left of 3 by 'z*'" in cli("plan", str(archive / "m.yaml"), "--only", "z*").stderr


def test_what_is_known_from_the_log_needs_no_ray(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, failing(a="truncated"))
    cli("run", str(archive / "m.yaml"))
    for command in (["status", "out"], ["failures", "out"], ["retry", "m.yaml", "--cause", "none"], ["plan", "m.yaml"]):
        code = (
            "import sys; from supir_batch.cli import app; "
            f"app({command!r}, standalone_mode=False); print([m for m in ('ray', 'torch') if m in sys.modules])"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=archive)
        assert ran.stdout.splitlines()[-1] == "[]"


def test_many_parts_are_merged_by_the_next_run(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pipeline(monkeypatch, all_done)
    cli("run", str(archive / "m.yaml"))
    (part,) = (archive / "out" / "_runs").glob("*/*.parquet")
    for number in range(1, 80):
        shutil.copy(part, part.with_name(f"part-{number:05d}.parquet"))
    assert cli("run", str(archive / "m.yaml")).exit_code == 0
    assert len(list((archive / "out" / "_runs").glob("*/*.parquet"))) == 80  # nothing to do, nothing written
    cli("run", str(archive / "m.yaml"), "--set", "engine.upscale=2")
    assert len(list((archive / "out" / "_runs").glob("*/*.parquet"))) == 2
    assert runlog.read_log(str(archive / "out")).num_rows == 162
