from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from supir_batch import export, review, runlog
from supir_batch.cli import app
from supir_batch.errors import ManifestError, StoreError
from supir_batch.types import Outcome
from tests.runs import manifest, photograph

Restore = Callable[..., Outcome]
HEADER = ",".join(review.COLUMNS)


@pytest.fixture
def output(tmp_path: Path, restore: Restore) -> str:
    """An output of two images, a.png and b.png."""
    with runlog.RunLog(str(tmp_path / "out"), "run1") as log:
        for name in ("a.png", "b.png"):
            photograph(tmp_path / name, 30, 20, seed=1)
            log.append(runlog.to_row(restore(tmp_path / name), "run1"))
    return str(tmp_path / "out")


def fingerprint(output: str, id: str) -> str:
    rows = runlog.read_log(output, ("id", "fingerprint")).to_pylist()
    return str(next(row["fingerprint"] for row in rows if row["id"] == id))


def decision(output: str, id: str = "a.png", **fields: Any) -> review.Decision:
    return review.parse({"id": id, "fingerprint": fingerprint(output, id), "decision": "accept", **fields})


def test_of_several_decisions_about_an_output_the_latest_counts(output: str) -> None:
    now = datetime.now(UTC)
    late = decision(output, decided_at=now.isoformat())
    early = decision(output, decision="reject", decided_at=(now - timedelta(hours=1)).isoformat())
    review.append(output, [late])
    review.append(output, [early])  # imported later, made earlier
    assert review.read(output) == {("a.png", late.fingerprint): late}


def test_what_a_file_says_comes_into_the_log_once(output: str, tmp_path: Path) -> None:
    decided = [
        decision(output, note='sharp, but "new" eyes\nand é'),
        decision(output, "b.png", decision="redo", prompt="a, b", preset="quality", restoration_tau=0.5, seed=7),
    ]
    csv, text = tmp_path / "decisions.csv", tmp_path / "decisions.json"
    csv.write_text("\ufeff" + review.to_csv(decided), encoding="utf-8", newline="")
    text.write_text(json.dumps([vars(one) for one in decided]))
    assert review.import_file(output, str(csv)) == (2, decided)
    assert review.import_file(output, str(text)) == (0, decided)
    assert set(review.read(output).values()) == set(decided)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("c.png,{a},accept,,,,,,", "id 'c.png' is not in the run log"),
        ("a.png,{other},accept,,,,,,", "no output of 'a.png' has the fingerprint 000000000000"),
        ("a.png,12,accept,,,,,,", "fingerprint must be 64 hexadecimal digits, saw '12'"),
        ("a.png,{a},maybe,,,,,,", "saw 'maybe'"),
        ("a.png,{a},redo,,,,,,", "redo without another setting would give the same image"),
        ("a.png,{a},accept,a prompt,,,,,", "decision 'accept' takes no prompt"),
        ("a.png,{a},redo,,best,,,,", "saw 'best'"),
        ("a.png,{a},redo,,,-1,,,", "restoration_tau must be greater than 0, saw '-1'"),
        ("a.png,{a},redo,,,,1.5,,", "saw '1.5'"),
        ("a.png,{a},accept,,,,,,2999-01-01T00:00:00Z", "decided_at is 2999-01-01T00:00:00+00:00, which is yet to come"),
        ("a.png,{a},accept,,,,,,2020-01-01T00:00:00", "decided_at must be a time with its zone"),
        (",{a},accept,,,,,,", "id is missing"),
        ("a.png,{a},accept,,,,,,,,more", "has more fields than line 1 names"),
    ],
)
def test_bad_rows_are_told_with_their_line_and_nothing_is_imported(
    output: str, tmp_path: Path, row: str, complaint: str
) -> None:
    right = fingerprint(output, "a.png")
    file = tmp_path / "decisions.csv"
    good = f"b.png,{fingerprint(output, 'b.png')},accept,,,,,,"
    file.write_text(f"{HEADER}\n{good}\n{row.format(a=right, other='0' * 64)}\n")
    with pytest.raises(ManifestError) as raised:
        review.import_file(output, str(file))
    assert str(raised.value).startswith("decisions.csv:3: ")
    assert complaint in str(raised.value)
    assert review.read(output) == {}


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("d.csv", "id,colour\n", "d.csv:1: unknown column 'colour'"),
        ("d.csv", "", "d.csv:1: is empty"),
        ("d.csv", f'{HEADER}\n"a.png', "is no CSV"),
        ("d.json", "{", "d.json: is no JSON"),
        ("d.json", "{}", "d.json: must be a list"),
        ("d.json", "[1]", "d.json: entry 1: must be an object, saw 1"),
        ("d.txt", "", "must be a .csv or .json file"),
    ],
)
def test_a_file_that_is_none(output: str, tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=complaint.replace("(", r"\(")):
        review.import_file(output, str(tmp_path / name))


def test_a_damaged_file_of_the_log_is_named(output: str) -> None:
    review.append(output, [decision(output)])
    (file,) = (Path(output) / "_runs" / "reviews").iterdir()
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(StoreError, match=rf"{file.name}:2: is no decision"):
        review.read(output)


def test_a_session_puts_each_decision_down_at_once_in_few_files(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "_ROLL_AT", 5)
    session, start, first = review.Session(output), datetime(2026, 1, 1, tzinfo=UTC), decision(output)
    for number in range(6):
        one = replace(
            first, note=str(number), decided_at=(start + timedelta(seconds=number)).isoformat("T", "milliseconds")
        )
        session.add(one)
        assert review.read(output) == {("a.png", one.fingerprint): one}
    assert len(list((Path(output) / "_runs" / "reviews").iterdir())) == 2


def test_the_latest_redo_holds_whatever_was_decided_about_what_came_out(output: str) -> None:
    first = decision(output, decision="redo", seed=1, decided_at="2026-01-01T00:00:00Z")
    second = review.Decision("a.png", "1" * 64, "redo", seed=2, decided_at="2026-01-02T00:00:00.000+00:00")
    third = review.Decision("a.png", "2" * 64, "accept", decided_at="2026-01-03T00:00:00.000+00:00")
    review.append(output, [first, second, third])
    assert review.redone(review.read(output)) == {"a.png": second}
    taken_back = review.Decision("a.png", "1" * 64, "undecided", decided_at="2026-01-04T00:00:00.000+00:00")
    review.append(output, [taken_back])
    assert review.redone(review.read(output)) == {"a.png": first}


def test_decisions_do_not_disturb_who_reads_the_run_log(output: str) -> None:
    before = runlog.read_log(output).num_rows
    review.append(output, [decision(output)])
    assert runlog.read_log(output).num_rows == before


def test_an_export_takes_what_was_accepted_as_it_is_now(output: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="none was accepted"):
        export.bag(output, str(tmp_path / "bag"), accepted=True)
    review.append(output, [decision(output), decision(output, "b.png", decision="reject")])
    assert [one.path for one in export.deliverables(output, accepted=True)] == ["a.png"]
    assert len(export.deliverables(output)) == 2
    review.append(output, [decision(output, decision="undecided")])
    with pytest.raises(ManifestError, match="none was accepted"):
        export.deliverables(output, accepted=True)


def test_the_commands(output: str, tmp_path: Path) -> None:
    file = tmp_path / "decisions.csv"
    file.write_text(review.to_csv([decision(output, note="good")]))

    def say(*words: str) -> tuple[int, str]:
        ran = CliRunner().invoke(app, list(words))
        return ran.exit_code, ran.stdout + ran.stderr

    assert say("review", "import", output, str(file)) == (0, "1 decisions (accept 1), 1 of them new\n")
    assert say("review", "import", output, str(file)) == (0, "1 decisions (accept 1), 0 of them new\n")
    assert say("review", "list", output)[1].splitlines() == file.read_text().splitlines()
    path = manifest(tmp_path, engine={"name": "lanczos"}, output={"uri": output})
    code, said = say("run", str(path), "--redo-from", str(file))
    assert (code, said) == (2, f"error: {file}: marks no image redo that was not decided otherwise later\n")
    code, said = say("review", "import", output, str(tmp_path / "none.csv"))
    assert code == 2
    assert "does not exist" in said


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
_WANTED = st.fixed_dictionaries(
    {},
    optional={
        "prompt": _TEXT.filter(bool),
        "preset": st.sampled_from(["fidelity", "quality"]),
        "restoration_tau": st.floats(1e-6, 100),
        "seed": st.integers(0, 2**53 - 1),
    },
).filter(bool)


@settings(deadline=None, max_examples=50)
@given(_WANTED, _TEXT)
def test_csv_keeps_every_decision(tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, Any], note: str) -> None:
    one = review.parse({"id": "box 1/ä.png", "fingerprint": "a" * 64, "decision": "redo", "note": note, **wanted})
    file = tmp_path_factory.mktemp("csv") / "decisions.csv"
    file.write_text(review.to_csv([one]), encoding="utf-8", newline="")
    assert [placed.decision for placed in review.read_file(str(file))] == [one]
