from __future__ import annotations

import io
import json
import threading
from datetime import datetime
from typing import Any

import pytest

from supir_batch.events import Events, Talk


def row(**values: Any) -> dict[str, Any]:
    return {
        "id": "a.tif", "uri": "/in/a.tif", "status": "done", "recovered": False, "failure_stage": None,
        "failure_kind": None, "failure_message": None, "output_uri": "/out/a.tif", "notes": None,
        "output_width": 10, "output_height": 10, "seconds_decode": 0.12345, "seconds_write": None,
    } | values  # fmt: skip


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_event_run_and_message() -> None:
    stream = io.StringIO()
    Events(Talk(lines=stream), "r1").tell("info", "start", "3 to do: 'é'\nand more", {"todo": 3})
    (line,) = lines_of(stream)
    assert datetime.fromisoformat(line.pop("ts")).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert line == {"level": "info", "event": "start", "run_id": "r1", "message": "3 to do: 'é'\nand more", "todo": 3}


def test_images_are_told_with_how_they_ended(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    failed = row(status="failed", failure_stage="decode", failure_kind="empty", failure_message="x: is empty")
    with Events(Talk(people=False, lines=stream), "r1").progress(2) as displays:
        for one in (row(), failed):
            for display in displays:
                display.update(one)
    first, second = lines_of(stream)
    assert (first["level"], first["event"], first["id"], first["status"]) == ("info", "image", "a.tif", "done")
    assert first["seconds"] == {"decode": 0.123}
    assert "failure_kind" not in first
    assert (second["level"], second["failure_kind"], second["message"]) == ("error", "empty", "x: is empty")
    assert capsys.readouterr() == ("", ""), "JSON lines are in place of words"


def test_people_and_lines_together(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    events = Events(Talk(lines=stream), "r1")
    events.warn("no node has it")
    with events.progress(1) as displays:
        for display in displays:
            display.update(row(status="failed", failure_message="x: is empty"))
    assert [line["event"] for line in lines_of(stream)] == ["warning", "image"]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "warning: no node has it\nfailed: x: is empty\n"


def test_without_lines_nothing_is_written() -> None:
    with Events(Talk(), "r1").progress(1) as displays:
        assert len(displays) == 1


def test_lines_of_several_threads_stay_whole() -> None:
    stream = io.StringIO()
    events = Events(Talk(lines=stream), "r1")

    def tell(name: str) -> None:
        for i in range(200):
            events.tell("info", "image", name * 50, {"i": i})

    threads = [threading.Thread(target=tell, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines_of(stream)) == 600
