"""The whole loop as a museum goes through it: run, look, decide, redo, look again, hand over."""

from __future__ import annotations

import json
from pathlib import Path

import bagit
import pytest
from playwright.sync_api import Page, expect
from typer.testing import CliRunner

from supir_batch.cli import app
from tests.runs import log_rows, manifest, photograph, run


def supir_batch(*words: str) -> str:
    ran = CliRunner().invoke(app, list(words))
    assert ran.exit_code == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_run_look_decide_redo_and_hand_over(page: Page, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        photograph(tmp_path / "in" / f"{number}.png", 72, 64, seed=number)
    path = manifest(tmp_path, name="Three prints", engine={"weights": "tiny", "steps": 2})
    output = tmp_path / "out"
    ran = run(path)
    assert ran.returncode == 0, ran.stderr
    first = {row["id"]: row for row in log_rows(output)}
    before = {name: (output / name).read_bytes() for name in first}

    index = supir_batch("report", str(output)).strip()
    page.goto(f"file://{index}#/image/0.png")
    expect(page.get_by_text("Three prints")).to_be_visible()
    expect(page.get_by_role("button", name="Accept")).to_be_visible()
    page.keyboard.press("a")
    page.keyboard.press("j")
    expect(page.locator("h1")).to_have_text("1.png")
    expect(page.get_by_role("button", name="Redo")).to_be_visible()
    page.keyboard.press("d")
    page.get_by_label("Prompt", exact=True).fill("a map of an island")
    page.get_by_label("Restoration tau").fill("4")
    page.get_by_label("Note").fill("paler")
    page.get_by_label("Note").blur()
    page.locator("summary", has_text="Export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="As CSV").click()
    decisions = tmp_path / "decisions.csv"
    download.value.save_as(decisions)

    assert supir_batch("review", "import", str(output), str(decisions)) == (
        "2 decisions (accept 1, redo 1), 2 of them new\n"
    )
    ran = run(path, "--redo-from", str(decisions))
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["done"] == 1
    rows = [row for row in log_rows(output) if row["id"] == "1.png"]
    (again,) = [row for row in rows if row["fingerprint"] != first["1.png"]["fingerprint"]]
    assert (again["setting_prompt"], again["prompt_source"]) == ("a map of an island", "review")
    assert again["setting_restoration_tau"] == 4.0
    assert again["replaces"] == first["1.png"]["fingerprint"]
    assert json.loads((output / "1.png.json").read_text())["run"]["replaces"] == first["1.png"]["fingerprint"]
    now = {name: (output / name).read_bytes() for name in first}
    assert {name for name in now if now[name] != before[name]} == {"1.png"}
    assert json.loads(run(path).stdout)["done"] == 0  # the next run leaves it as the reviewer wanted it

    supir_batch("report", str(output))
    page.goto("about:blank")
    page.goto(f"file://{index}#/image/1.png")
    expect(page.get_by_text("A reviewer sent an earlier result back")).to_be_visible()
    expect(page.get_by_role("button", name="Redo")).to_have_attribute("aria-pressed", "false")  # this one is new
    expect(page.locator(".tally")).to_have_text("1 accepted1 open")

    supir_batch("export", str(output), "--accepted", "--bagit", str(tmp_path / "bag"))
    assert bagit.Bag(str(tmp_path / "bag")).is_valid()
    assert {one.name for one in (tmp_path / "bag" / "data").iterdir() if one.suffix == ".png"} == {"0.png"}
    supir_batch("verify", str(output))
