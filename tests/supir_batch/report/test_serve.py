"""The real server in a process of its own, asked by a real browser and by somebody who means harm."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from supir_batch import review, runlog
from tests.runs import COMMAND


@pytest.fixture
def address(output: Path) -> Iterator[str]:
    """Where `supir-batch serve` says the report of ``output`` is."""
    server = subprocess.Popen(
        [*COMMAND, "serve", str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    line = server.stdout.readline().strip()
    assert line.startswith("http://127.0.0.1:"), server.communicate()
    yield line
    server.send_signal(signal.SIGINT)
    _, said = server.communicate(timeout=60)
    # 0 where whoever started the tests has them ignore the signal, as shells do for what they run in the background
    assert server.returncode == (0 if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else 130), said
    assert urlsplit(line).path.strip("/") not in said  # the token is in no log
    assert "Traceback" not in said


def ask(address: str, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, bytes]:
    """The path as it is: no client tidies it up on the way."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    connection.request(method, path, body or None, {"Content-Type": kind} if body else {})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_decisions_are_saved_as_they_are_made(page: Page, address: str, output: Path) -> None:
    page.goto(f"{address}#/image/a.png")
    page.get_by_role("button", name="Accept").click()
    expect(page.locator(".saving")).to_have_text("saved")
    page.get_by_label("Note").fill("a note that is saved while it is written")
    page.wait_for_timeout(1200)
    expect(page.get_by_label("Note")).to_be_focused()
    decided = {one.id: one for one in review.read(str(output)).values()}
    assert (decided["a.png"].decision, decided["a.png"].note) == ("accept", "a note that is saved while it is written")
    page.goto(f"{address}#/image/b.png")
    page.get_by_role("button", name="Redo").click()
    page.get_by_label("Seed").fill("12")
    page.get_by_label("Seed").blur()
    expect(page.locator(".saving")).to_have_text("saved")
    page.evaluate("localStorage.clear()")
    page.reload()
    expect(page.get_by_label("Seed")).to_have_value("12")  # the server tells it
    decided = {one.id: one for one in review.read(str(output)).values()}
    assert decided["b.png"].seed == 12


def test_what_the_server_did_not_get_is_sent_again(
    page: Page, address: str, output: Path, complaints: list[str]
) -> None:
    page.goto(f"{address}#/image/a.png")
    expect(page.get_by_role("button", name="Accept")).to_be_visible()
    page.route("**/decisions", lambda route: route.fulfill(status=503, body="the disk is full"))
    page.get_by_role("button", name="Accept").click()
    expect(page.get_by_role("alert")).to_contain_text("the disk is full")
    expect(page.locator(".saving")).to_have_text("not saved")
    assert review.read(str(output)) == {}
    page.unroute("**/decisions")
    assert all("503" in one for one in complaints)
    complaints.clear()
    page.reload()
    expect(page.locator(".saving")).to_have_text("saved")
    (one,) = review.read(str(output)).values()
    assert (one.id, one.decision) == ("a.png", "accept")


def test_only_the_report_and_its_decisions_are_reachable_and_only_with_the_token(address: str, output: Path) -> None:
    base = urlsplit(address).path
    thumbnail = next((output / "report").rglob("thumbnail.jpg")).relative_to(output / "report")
    outside = output.parent / "secret.txt"
    outside.write_text("secret")
    os.symlink(outside, output / "report" / "data" / "link.txt")
    (output / "report" / "notes.txt").write_text("not of the report")
    assert ask(address, "GET", base)[0] == 200
    assert ask(address, "GET", f"{base}{thumbnail}")[0] == 200
    assert ask(address, "GET", f"{base}decisions") == (200, b"[]")
    refused = [
        "/",
        "/decisions",
        "/x/index.html",
        f"/{'A' * (len(base) - 2)}/index.html",
        f"{base}../../secret.txt",
        f"{base}assets/../../a.png",
        f"{base}assets/..%2f..%2fa.png",
        f"{base}assets/%2e%2e/%2e%2e/%2e%2e/secret.txt",
        f"{base}assets/..%5c..%5csecret.txt",
        f"{base}data//etc/passwd.txt",
        f"{base}data/link.txt",
        f"{base}notes.txt",
        f"{base}a.png",
        f"{base}_runs/x.txt",
        f"{base}data/",
        f"{base}data",
        f"{base}assets/report.js%00.txt",
    ]
    for path in refused:
        assert ask(address, "GET", path)[0] == 404, path
    for method in ("PUT", "DELETE"):
        assert ask(address, method, f"{base}decisions")[0] == 405


def test_a_decision_that_is_none_is_refused_and_says_why(address: str, output: Path) -> None:
    place = f"{urlsplit(address).path}decisions"
    (row,) = [row for row in runlog.read_log(str(output), ("id", "fingerprint")).to_pylist() if row["id"] == "a.png"]
    good = {**row, "decision": "accept"}

    def send(what: object, kind: str = "application/json") -> tuple[int, str]:
        status, said = ask(address, "POST", place, what if isinstance(what, bytes) else json.dumps(what).encode(), kind)
        return status, said.decode()

    assert send(good)[0] == 204
    assert send({**good, "id": "z.png"}) == (400, f"decision: id 'z.png' is not in the run log of {output}")
    assert send({**good, "decision": "perhaps"})[0] == 400
    assert send({**good, "more": 1})[0] == 400
    assert send([good])[0] == 400
    assert send(b"{")[0] == 400
    assert send(b"x" * 70_000)[0] == 413
    assert send(good, "text/plain")[0] == 415  # what a form of another site could send
    assert ask(address, "POST", "/guess/decisions", json.dumps(good).encode())[0] == 404
    assert len(review.read(str(output))) == 1


def test_a_port_that_is_taken_is_told(output: Path, address: str) -> None:
    port = str(urlsplit(address).port)
    ran = subprocess.run([*COMMAND, "serve", str(output), "--port", port], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert f"--host 127.0.0.1 --port {port}: cannot listen there: Address already in use" in ran.stderr
