"""The report as people use it, in a real Chromium."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from supir_batch import review
from supir_batch.report.build import build_report

from .conftest import HOSTILE
from .test_build import make_large


def show(page: Page, index: Path, place: str = "") -> None:
    page.goto("about:blank")
    page.goto(f"file://{index}{place}")
    expect(page.locator("h1")).to_be_visible()


def image(page: Page, index: Path, id: str) -> None:
    """Open the page of an image and wait until both pictures are drawn."""
    show(page, index, f"#/image/{id}")
    page.wait_for_function("() => document.querySelector('.choice output')?.textContent.includes('%')")
    for pane in ("before", "after"):
        expect(page.locator(f".pane.{pane} canvas").first).to_be_visible()


def scale(page: Page) -> int:
    return int(page.get_by_label("Scale").inner_text().removesuffix("%"))


def settled(page: Page) -> int:
    """The scale once the viewer has come to rest."""
    before, now = -1, scale(page)
    while before != now:
        page.wait_for_timeout(250)
        before, now = now, scale(page)
    return now


def center(page: Page, pane: str) -> list[int]:
    """The color in the middle of what a viewer shows."""
    box = page.locator(f".pane.{pane} canvas").first.bounding_box()
    assert box is not None
    shot = page.screenshot(
        clip={"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "width": 1, "height": 1}
    )
    return [int(value) for value in pyvips.Image.new_from_buffer(shot, "")(0, 0)[:3]]


def test_the_overview_tells_what_was_done_and_why_not(page: Page, index: Path) -> None:
    show(page, index)
    figures = page.locator(".figures li")
    expect(figures.nth(0)).to_contain_text("5")
    expect(figures.nth(1)).to_contain_text("1")
    expect(page.get_by_role("region", name="Failures by cause")).to_contain_text("not-an-image")
    assert page.locator(".plot svg").count() >= 3
    label = page.locator(".plot svg").first.get_attribute("aria-label") or ""
    assert "of 5 images: from" in label
    page.locator(".figures button", has_text="failed").click()
    expect(page.locator(".grid li")).to_have_count(1)
    expect(page.locator(".grid li")).to_contain_text("bad.jpg")


def test_the_gallery_filters_and_sorts(page: Page, index: Path) -> None:
    show(page, index, "#/images")
    cards = page.locator(".grid li")
    expect(cards).to_have_count(6)
    page.get_by_role("searchbox", name="Name").fill("b.p")
    expect(cards).to_have_count(1)
    page.get_by_role("searchbox", name="Name").fill("")
    page.get_by_label("Show").select_option("failed")
    expect(cards).to_have_count(1)
    page.get_by_label("Show").select_option("")
    page.get_by_label("Sort by").select_option("size")
    expect(cards.first).to_contain_text("bad.jpg")
    page.get_by_role("button", name="Highest first").click()
    expect(cards.first).to_contain_text("wide.jpg")
    page.get_by_label("Sort by").select_option("gate_color_drift")
    expect(cards.last).to_contain_text("bad.jpg")  # what was not measured comes last
    values = [float(text.split()[-1]) for text in page.locator(".grid .value").all_inner_texts() if "not" not in text]
    assert values == sorted(values, reverse=True)
    page.get_by_label("Score between").select_option("gate_color_drift")
    page.get_by_label("At least").fill(str(values[0]))
    page.get_by_label("At least").blur()
    expect(cards).to_have_count(sum(value >= values[0] for value in values))


def test_text_of_strangers_is_text(page: Page, index: Path) -> None:
    show(page, index, "#/images")
    page.get_by_text("<script>alert(3)<&.png").click()
    expect(page.locator("h1")).to_have_text("<script>alert(3)<&.png")
    expect(page.locator("blockquote")).to_have_text(HOSTILE)
    assert page.locator("#page script, #page [onerror]").count() == 0


def test_the_slider_moves_between_before_and_after(page: Page, index: Path) -> None:
    image(page, index, "c.png")
    handle = page.get_by_role("slider")
    stage = page.locator(".stage").bounding_box()
    box = handle.bounding_box()
    assert stage is not None
    assert box is not None
    assert abs(box["x"] + box["width"] / 2 - (stage["x"] + stage["width"] / 2)) < 2
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(stage["x"] + stage["width"] * 0.9, box["y"] + 120, steps=4)
    page.mouse.up()
    assert int(handle.get_attribute("aria-valuenow") or 0) == pytest.approx(90, abs=1)
    clip = page.locator(".pane.before").evaluate("element => getComputedStyle(element).clipPath")
    assert "10" in clip
    handle.press("Home")
    assert handle.get_attribute("aria-valuenow") == "0"
    handle.press("ArrowRight")
    assert handle.get_attribute("aria-valuenow") == "2"


def test_both_sides_zoom_together_to_one_to_one_and_beyond(page: Page, index: Path) -> None:
    image(page, index, "a.png")
    fitted = settled(page)
    page.get_by_role("button", name="1 : 1").click()
    assert settled(page) == 100
    assert fitted > 100  # a small picture is enlarged to be seen
    page.keyboard.press("t")
    page.get_by_role("button", name="Fit").click()
    settled(page)
    page.mouse.move(300, 400)  # over the side of before, which leads now
    page.mouse.wheel(0, -600)
    zoomed = settled(page)
    assert zoomed > 100
    seams = []
    for pane in ("before", "after"):
        shot = page.locator(f".pane.{pane} .viewer").screenshot()
        seams.append(white_line(shot))
    assert seams[0] == pytest.approx(seams[1], abs=6)


def white_line(shot: bytes) -> float:
    """Where the bright line of a test photograph stands, as a column of the screenshot."""
    pixels = pyvips.Image.new_from_buffer(shot, "").numpy()[..., :3].astype(float)
    return float(np.argmax(pixels[80:-80].mean(axis=(0, 2))))


def test_a_picture_in_tiles_is_drawn(page: Page, index: Path) -> None:
    image(page, index, "wide.jpg")
    page.get_by_role("button", name="1 : 1").click()
    assert settled(page) == 100
    page.keyboard.press("b")  # held for a moment
    assert center(page, "after") != [228, 223, 212]  # not the empty stage


def test_overlays_are_laid_over_the_restored_image(page: Page, index: Path) -> None:
    image(page, index, "a.png")
    page.get_by_role("button", name="Restored", exact=True).click()
    settled(page)
    before = page.locator(".stage").screenshot()
    page.get_by_label("Lay over").select_option("invention")
    expect(page.get_by_label("Strength")).to_be_visible()
    page.wait_for_timeout(800)
    laid = page.locator(".stage").screenshot()
    assert magenta(laid) > magenta(before) + 0.05
    page.get_by_label("Lay over").select_option("")
    page.wait_for_timeout(500)
    assert magenta(page.locator(".stage").screenshot()) == pytest.approx(magenta(before), abs=0.01)


def magenta(shot: bytes) -> float:
    pixels = pyvips.Image.new_from_buffer(shot, "").numpy()[..., :3].astype(int)
    return float(((pixels[..., 0] - pixels[..., 1] > 60) & (pixels[..., 2] - pixels[..., 1] > 60)).mean())


def test_the_keyboard_is_enough(page: Page, index: Path) -> None:
    show(page, index, "#/images")
    page.keyboard.press("j")
    expect(page.locator(".grid li").first.locator("a")).to_be_focused()
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Accept")).to_be_visible()
    name = page.locator("h1").inner_text()
    page.keyboard.press("a")
    expect(page.get_by_role("button", name="Accept")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("n")
    page.keyboard.type("jar of eyes")  # letters in a field are no commands
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Accept")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("j")
    expect(page.locator("h1")).not_to_have_text(name)
    page.keyboard.press("r")
    expect(page.get_by_role("button", name="Reject")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("k")
    expect(page.locator("h1")).to_have_text(name)
    expect(page.get_by_label("Note")).to_have_value("jar of eyes")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("a")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("u")
    expect(page.get_by_role("button", name="Accept")).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("Escape")
    expect(page.locator(".grid")).to_be_visible()
    page.get_by_role("button", name="Help and keyboard").click()
    page.get_by_label("Single keys do this").uncheck()
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_hidden()


def exported(page: Page, kind: str) -> str:
    page.locator("summary", has_text="Export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=f"As {kind}").click()
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_decisions_are_kept_and_exported_as_import_reads_them(
    page: Page, index: Path, output: Path, tmp_path: Path
) -> None:
    image(page, index, "a.png")
    page.keyboard.press("a")
    page.get_by_label("Note").fill('=1+1, "quoted"\nand ä')
    page.get_by_label("Note").blur()
    image(page, index, "b.png")
    page.get_by_role("button", name="Redo").click()
    expect(page.get_by_text("the same settings give the same image")).to_be_visible()
    page.locator("summary", has_text="Export").click()
    expect(page.get_by_text("1 to redo without another setting; left out")).to_be_visible()
    page.locator("summary", has_text="Export").click()
    page.get_by_label("Prompt", exact=True).fill("a portrait, soft light")
    page.get_by_label("Preset").select_option("quality")
    page.get_by_label("Restoration tau").fill("0.5")
    page.get_by_label("Seed").fill("-3")
    page.get_by_label("Seed").blur()
    expect(page.get_by_role("alert")).to_have_text("A seed is a whole number from 0.")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Seed").blur()
    page.reload()
    expect(page.locator(".tally")).to_have_text("1 accepted1 to redo3 open")
    text = exported(page, "CSV")
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))}
    assert rows["a.png"]["note"] == '=1+1, "quoted"\nand ä'
    wanted = {key: rows["b.png"][key] for key in ("decision", "prompt", "preset", "restoration_tau", "seed")}
    assert wanted == {
        "decision": "redo",
        "prompt": "a portrait, soft light",
        "preset": "quality",
        "restoration_tau": "0.5",
        "seed": "3",
    }
    (tmp_path / "decisions.csv").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "decisions.json").write_text(exported(page, "JSON"))
    assert review.import_file(str(output), str(tmp_path / "decisions.csv"))[0] == 2
    assert review.import_file(str(output), str(tmp_path / "decisions.json"))[0] == 0
    page.evaluate("localStorage.clear()")
    build_report(str(output))
    show(page, index, "#/images")
    expect(page.locator(".tally")).to_have_text("1 accepted1 to redo3 open")  # from the log
    page.get_by_label("Show").select_option("redo")
    expect(page.locator(".grid li")).to_have_count(1)


def test_decisions_about_another_output_are_none_of_this_one(page: Page, index: Path) -> None:
    image(page, index, "a.png")
    page.evaluate("""() => localStorage.setItem("supir-batch/other/" + "a".repeat(64), "{}")""")
    page.keyboard.press("a")
    page.evaluate("""() => { for (const key of Object.keys(localStorage)) {
        const [project, output, rest] = key.split("/");
        if (!rest) continue;
        localStorage.setItem(`${project}/other/${rest}`, localStorage.getItem(key));
        localStorage.removeItem(key);
    } }""")
    page.reload()
    expect(page.locator(".tally")).to_have_text("5 open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_complain_about(page: Page, index: Path, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    show(page, index)
    refuse_complaints(page)
    show(page, index, "#/images")
    page.get_by_label("Score between").select_option("gate_color_drift")
    refuse_complaints(page)
    image(page, index, "a.png")
    page.get_by_role("button", name="Redo").click()
    page.get_by_text("All settings").click()
    refuse_complaints(page)
    page.keyboard.press("?")
    refuse_complaints(page)
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.locator("summary", has_text="Export").click()
    refuse_complaints(page)
    show(page, index, "#/image/bad.jpg")
    expect(page.get_by_text("Not restored: not-an-image")).to_be_visible()
    refuse_complaints(page)
    show(page, index, "#/image/nowhere")
    refuse_complaints(page)


def refuse_complaints(page: Page) -> None:
    """Whatever axe finds fails the test; it looks once no color is on its way to another."""
    page.wait_for_function("() => document.getAnimations().every((one) => one.playState !== 'running')")
    found = Axe().run(page, options={"preload": False})
    assert found.violations_count == 0, found.generate_report()


def test_the_theme_follows_the_system_until_somebody_chooses(page: Page, index: Path) -> None:
    theme = "document.documentElement.dataset.theme"
    page.emulate_media(color_scheme="dark")
    show(page, index)
    assert page.evaluate(theme) == "dark"
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"() => {theme} === 'light'")
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(theme) == "dark"
    page.reload()
    expect(page.locator("h1")).to_be_visible()
    assert page.evaluate(theme) == "dark"


def test_a_report_without_its_data_says_so(page: Page, index: Path, chromium: Any) -> None:
    (index.parent / "data" / "report.js").unlink()
    lonely = chromium.new_context().new_page()  # the console of this one complains, rightly
    lonely.goto(f"file://{index}")
    expect(lonely.locator("#page")).to_contain_text("missing or damaged; build the report again")
    lonely.context.close()


@pytest.mark.slow
def test_ten_thousand_images_open_in_under_two_seconds_and_scroll(
    page: Page, output: Path, record_property: Any
) -> None:
    make_large(output, 10_000)
    start = time.monotonic()
    index = Path(build_report(str(output)))
    built = time.monotonic() - start
    all_there = """() => {
        const images = [...document.querySelectorAll(".grid img")].filter((image) => {
            const box = image.getBoundingClientRect();
            return box.bottom > 0 && box.top < innerHeight;
        });
        return images.length > 0 && images.every((image) => image.complete && image.naturalWidth > 0);
    }"""
    start = time.monotonic()
    page.goto(f"file://{index}#/images")
    page.wait_for_function(all_there, polling=20)
    opened = time.monotonic() - start
    frames = page.evaluate("""async () => {
        const gaps = [];
        let last = performance.now();
        const end = document.documentElement.scrollHeight - innerHeight;
        for (let at = 0; at <= 60; at++) {
            scrollTo(0, (at / 60) * end);
            const now = await new Promise(requestAnimationFrame);
            gaps.push(now - last);
            last = now;
        }
        return gaps.sort((a, b) => a - b);
    }""")
    start = time.monotonic()
    page.wait_for_function(all_there, polling=20)
    last_shown = time.monotonic() - start
    expect(page.locator(".grid")).to_contain_text("photograph 09999.jpg")
    assert page.locator(".grid li").count() < 100  # what is far away is not in the document
    start = time.monotonic()
    page.get_by_label("Sort by").select_option("gate_color_drift")
    page.get_by_role("button", name="Highest first").click()
    page.get_by_role("searchbox", name="Name").fill("photograph 0999")
    expect(page.locator(".filters h1")).to_have_text("11 of 10,006 images")
    filtered = time.monotonic() - start
    figures = {
        "built_s": round(built, 2),
        "report.js_MB": round((index.parent / "data" / "report.js").stat().st_size / 1e6, 2),
        "opened_s": round(opened, 3),
        "scroll_frame_median_ms": round(frames[len(frames) // 2], 1),
        "scroll_frame_worst_ms": round(frames[-1], 1),
        "end_shown_s": round(last_shown, 3),
        "sorted_and_filtered_s": round(filtered, 3),
    }
    print(json.dumps(figures))
    record_property("gallery", figures)
    assert opened < 2
    assert frames[len(frames) // 2] < 100
    assert last_shown < 2
