from __future__ import annotations

import dataclasses
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supir_batch import review, runlog, store
from supir_batch.errors import ManifestError
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import Plan, Selection, make_plan
from supir_batch.settings import Manifest
from supir_batch.types import Failure, Job, Outcome, TileTicket
from supir_model.config import TINY


class Archive:
    """An input folder, an output folder, and the log of runs that never ran."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in", folder / "out"
        self.runs = 0

    def add(self, *names: str, data: bytes = b"pixels") -> None:
        for name in names:
            path = self.input / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def plan(self, inputs: str | None = None, model: str = "model", **sections: Any) -> Plan:
        output = {"uri": str(self.output)} | sections.pop("output", {})
        selection = sections.pop("selection", Selection())
        values = {"inputs": inputs or str(self.input), "output": output, **sections}
        return make_plan(Manifest.model_validate(values), "m.yaml", model, selection=selection)

    def did(self, job: Job, status: str = "done", kind: str = "truncated") -> None:
        """Log the job; write its output when it is done."""
        self.runs += 1
        failure = None
        if status == "done":
            store.write_atomic(f"{job.output_stem}.tif", b"restored")
        else:
            failure = Failure("decode", kind, "a.tif: is cut off")
        ticket = TileTicket(job=job, failure=failure, fingerprint="f")
        ended = Outcome(
            ticket,
            "done" if status == "done" else "failed",
            output_uri=f"{job.output_stem}.tif" if status == "done" else "",
            finished_at=f"2026-01-01T00:00:{self.runs:02d}",
        )
        with runlog.RunLog(str(self.output), f"run{self.runs}") as log:
            log.append(runlog.to_row(ended, f"run{self.runs}"))

    def did_all(self, plan: Plan) -> None:
        for entry in plan.todo:
            self.did(entry.job)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    made = Archive(tmp_path)
    made.add("a.tif", "box/b.png")
    return made


def reasons(plan: Plan) -> dict[str, str]:
    return {entry.job.source.id: entry.reason for entry in plan.todo}


def test_first_everything_is_new_and_nothing_is_written(archive: Archive) -> None:
    plan = archive.plan()
    assert reasons(plan) == {"a.tif": "new", "box/b.png": "new"}
    assert [entry.job.output_stem for entry in plan.todo] == [
        str(archive.output / "a"),
        str(archive.output / "box" / "b"),
    ]
    assert plan.todo[0].job.output_root == str(archive.output)
    assert plan.todo[0].job.settings.model_sha256 == "model"
    assert not archive.output.exists()


def test_then_nothing_is_to_do(archive: Archive) -> None:
    archive.did_all(archive.plan())
    plan = archive.plan()
    assert not plan.todo
    assert [entry.output_uri for entry in plan.done] == [
        str(archive.output / "a.tif"),
        str(archive.output / "box" / "b.tif"),
    ]


def test_a_changed_setting_is_new_work_and_says_so(archive: Archive) -> None:
    archive.did_all(archive.plan(engine={"steps": 10}))
    plan = archive.plan(engine={"steps": 20, "cfg_end": 2.5})
    before = TINY.presets["fidelity"].cfg_end
    reason = f"settings changed: steps: 10 -> 20; cfg_end: {before:g} -> 2.5"
    assert set(reasons(plan).values()) == {reason}
    assert plan.changed == {reason: 2}
    assert reasons(archive.plan(engine={"steps": 10}, model="other"))["a.tif"] == (
        "settings changed: model_sha256: model -> other"
    )


def test_going_back_to_old_settings_is_new_work_too(archive: Archive) -> None:
    for steps in (10, 20):
        archive.did_all(archive.plan(engine={"steps": steps}))
    plan = archive.plan(engine={"steps": 10})
    assert set(reasons(plan).values()) == {"settings changed: steps: 20 -> 10"}


def test_runtime_is_not_a_setting(archive: Archive) -> None:
    archive.did_all(archive.plan())
    assert not archive.plan(runtime={"actors": 4, "batch": 8}, name="other").todo


def test_a_changed_source_is_new_work(archive: Archive) -> None:
    archive.did_all(archive.plan())
    archive.add("a.tif", data=b"other pixels")
    assert reasons(archive.plan()) == {"a.tif": "source changed"}


def test_a_touched_source_is_looked_at_again(archive: Archive) -> None:
    archive.did_all(archive.plan())
    os.utime(archive.input / "a.tif", ns=(1, 1))
    assert reasons(archive.plan()) == {"a.tif": "source changed"}


def test_a_missing_output_and_a_failure_are_to_do(archive: Archive) -> None:
    first = archive.plan()
    archive.did(first.todo[0].job)
    archive.did(first.todo[1].job, "failed")
    (archive.output / "a.tif").unlink()
    assert reasons(archive.plan()) == {"a.tif": "output missing", "box/b.png": "failed before: truncated"}


def test_a_file_of_the_right_name_is_not_done(archive: Archive) -> None:
    store.write_atomic(str(archive.output / "a.tif"), b"from elsewhere")
    assert reasons(archive.plan())["a.tif"] == "new"


def test_another_name_is_new_work(archive: Archive) -> None:
    archive.did_all(archive.plan())
    plan = archive.plan(output={"naming": "{stem}_{engine}_x{upscale}"})
    assert reasons(plan)["a.tif"] == "output name changed"
    assert plan.todo[1].job.output_stem == str(archive.output / "box" / "b_supir_x1")


def test_outputs_inside_the_input_are_not_restored_again(archive: Archive) -> None:
    archive.output = archive.input / "restored"
    archive.did_all(archive.plan())
    plan = archive.plan()
    assert (len(plan.todo), len(plan.done)) == (0, 2)


def test_naming_by_id(archive: Archive) -> None:
    plan = archive.plan(output={"naming": "{id}"})
    assert plan.todo[1].job.output_stem == str(archive.output / "box" / "box_b")


@pytest.mark.parametrize(("one", "two"), [("x.tif", "x.png"), ("x.tif", "X.jpg"), ("é.tif", "e\u0301.png")])
def test_two_sources_that_would_write_one_output(archive: Archive, one: str, two: str) -> None:
    archive.add(one, two)
    with pytest.raises(ManifestError) as caught:
        archive.plan()
    assert "would both be written to" in str(caught.value)
    assert str(archive.input / one) in str(caught.value)
    assert str(archive.input / two) in str(caught.value)


def test_two_rows_that_would_write_one_output_are_named(archive: Archive) -> None:
    archive.add("a.png")
    (archive.input / "list.csv").write_text("uri\na.tif\na.png\n")
    with pytest.raises(ManifestError, match=r"list\.csv:2 \(.*\) and list\.csv:3 \(.*\) would both be written"):
        archive.plan(str(archive.input / "list.csv"))


@pytest.mark.parametrize("output_format", ["source", "tiff"])
def test_an_output_never_overwrites_an_input(archive: Archive, output_format: str) -> None:
    archive.output = archive.input
    with pytest.raises(ManifestError, match="would overwrite the input"):
        archive.plan(str(archive.input / "a.tif"), output={"format": output_format})
    archive.plan(str(archive.input / "a.tif"), output={"format": "png"})
    archive.plan(str(archive.input / "a.tif"), output={"naming": "{stem}-restored"})


def test_an_output_never_overwrites_an_input_through_a_link(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(archive.input)
    archive.output = tmp_path / "link"
    with pytest.raises(ManifestError, match="would overwrite the input"):
        archive.plan(str(archive.input / "a.tif"))


@pytest.mark.parametrize("folder", ["_runs", "_parts", "_captions", "_iiif", "report", "Report"])
def test_the_folders_of_an_output_are_reserved(archive: Archive, folder: str) -> None:
    archive.add(f"{folder}.tif")
    archive.plan()
    archive.add(f"{folder}/a.tif")
    with pytest.raises(ManifestError, match=f"would be written below {folder}, which is reserved"):
        archive.plan()


def test_refused_sources_keep_their_settings_for_the_log(archive: Archive) -> None:
    archive.add("empty.tif", data=b"")
    for mode in ("attributes", "manifest", "sidecar"):
        (archive.input / "list.csv").write_text("uri,prompt\nempty.tif,\na.tif,x\n")
        plan = archive.plan(str(archive.input / "list.csv"), caption={"mode": mode})
        assert [(entry.job.source.id, entry.failure.kind) for entry in plan.refused] == [("empty.tif", "empty")]
        assert len(plan.todo) == 1


def test_a_refusal_that_was_mended_says_why_it_runs(archive: Archive) -> None:
    archive.add("c.tif", data=b"")
    plan = archive.plan()
    with runlog.RunLog(str(archive.output), "r") as log:
        for job, failure in plan.refused:
            ended = Outcome(TileTicket(job=job, failure=failure), "failed", finished_at="2026-01-01T00:00:00")
            log.append(runlog.to_row(ended, "r"))
    archive.add("c.tif")
    assert reasons(archive.plan())["c.tif"] == "source changed"


def test_sidecar_captions(archive: Archive) -> None:
    archive.add("a.tif.txt", data=b"a boat\n")
    archive.add("c.jpg", "d.jpg")
    archive.add("c.txt", data=b"a cat")
    archive.add("d.txt", data=b"\xff")
    plan = archive.plan(caption={"mode": "sidecar"})
    prompts = {entry.job.source.id: entry.job.settings.prompt for entry in plan.todo}
    assert prompts == {"a.tif": "a boat", "c.jpg": "a cat"}
    kinds = {entry.job.source.id: entry.failure.kind for entry in plan.refused}
    assert kinds == {"box/b.png": "no-caption", "d.jpg": "unreadable-caption"}
    assert "expects b.png.txt or b.txt" in plan.refused[0].failure.message


def test_every_missing_prompt_is_named(archive: Archive) -> None:
    with pytest.raises(ManifestError) as caught:
        archive.plan(caption={"mode": "manifest"})
    assert len(str(caught.value).splitlines()) == 2


@hypothesis_settings(deadline=None, max_examples=25)
@given(done=st.sets(st.integers(0, 5)), changed=st.sets(st.integers(0, 5)))
def test_todo_done_and_refused_are_a_partition(
    tmp_path_factory: pytest.TempPathFactory, done: set[int], changed: set[int]
) -> None:
    archive = Archive(tmp_path_factory.mktemp("archive"))
    archive.add(*(f"{i}.tif" for i in range(6)))
    for index, entry in enumerate(archive.plan().todo):
        if index in done:
            archive.did(entry.job)
    for index in changed:
        archive.add(f"{index}.tif", data=b"new bytes")
    plan = archive.plan()
    finished = {entry.job.source.id for entry in plan.done}
    assert finished == {f"{i}.tif" for i in done - changed}
    assert finished | set(reasons(plan)) == {f"{i}.tif" for i in range(6)}


def test_a_remote_archive_is_planned_like_a_local_one() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    for name in ("a.tif", "box/b.png"):
        store.write_atomic(f"{root}/in/{name}", b"pixels")
    store.write_atomic(f"{root}/m.yaml", b"inputs: in\noutput: {uri: in/out}\n")
    manifest = load_manifest(f"{root}/m.yaml", {}, {})
    first = make_plan(manifest, f"{root}/m.yaml", "model")
    assert [entry.job.output_stem for entry in first.todo] == [f"{root}/in/out/a", f"{root}/in/out/box/b"]
    with runlog.RunLog(manifest.output.uri, "run") as log:
        for job, _ in first.todo:
            store.write_atomic(f"{job.output_stem}.tif", b"restored")
            ended = Outcome(TileTicket(job=job), "done", f"{job.output_stem}.tif", finished_at="2026-01-01T00:00:00")
            log.append(runlog.to_row(ended, "run"))
    again = make_plan(manifest, f"{root}/m.yaml", "model")
    assert (len(again.todo), len(again.done)) == (0, 2)


# --- who is not tried again, who is asked for, and in which order --------------------------------------------------


@pytest.mark.parametrize("kind", ["poison", "hang"])
def test_what_kills_workers_or_hangs_is_tried_again_only_by_a_retry(archive: Archive, kind: str) -> None:
    archive.did(archive.plan().todo[0].job, "failed", kind)
    plan = archive.plan()
    assert reasons(plan) == {"box/b.png": "new"}
    ((job, reason),) = plan.quarantined
    assert (job.source.id, reason) == ("a.tif", f"{kind}: a.tif: is cut off")
    assert reasons(archive.plan(selection=Selection(retry=frozenset(["a.tif"])))) == {"a.tif": f"failed before: {kind}"}


def test_other_settings_or_another_source_end_a_quarantine(archive: Archive) -> None:
    archive.did(archive.plan().todo[0].job, "failed", "poison")
    assert "a.tif" in reasons(archive.plan(engine={"steps": 7}))
    archive.did(archive.plan(engine={"steps": 7}).todo[0].job, "failed", "truncated")
    assert [entry.job.source.id for entry in archive.plan().quarantined] == ["a.tif"]  # as nothing has changed for it
    archive.add("a.tif", data=b"other pixels")
    assert reasons(archive.plan())["a.tif"] == "source changed"


def test_what_was_done_after_all_is_done(archive: Archive) -> None:
    job = archive.plan().todo[0].job
    archive.did(job, "failed", "poison")
    archive.did(job)
    plan = archive.plan()
    assert (len(plan.done), len(plan.quarantined)) == (1, 0)


def test_only_and_except_choose_by_id(archive: Archive) -> None:
    archive.add("box/sub/c.tif", "BOX.tif")

    def chosen(*only: str, besides: tuple[str, ...] = ()) -> list[str]:
        return list(reasons(archive.plan(selection=Selection(only, besides))))

    assert chosen("box/*") == ["box/b.png", "box/sub/c.tif"]
    assert chosen("*.tif", besides=("box/*", "a.*")) == ["BOX.tif"]
    assert chosen("a.tif", "?OX.tif") == ["BOX.tif", "a.tif"]
    with pytest.raises(ManifestError, match=r"no id is left of 4 by 'box'; plan --json shows the ids"):
        chosen("box")


def test_what_is_not_asked_for_is_not_looked_up_but_may_not_collide(archive: Archive) -> None:
    archive.add("a.png")
    (archive.input / "list.csv").write_text("uri\na.tif\ngone.tif\nbox/b.png\n")
    plan = archive.plan(str(archive.input / "list.csv"), selection=Selection(only=("a.tif",)))
    assert (len(plan.todo), len(plan.refused)) == (1, 0)
    with pytest.raises(ManifestError, match="would both be written"):
        archive.plan(selection=Selection(only=("a.tif",)))


def test_a_seed_decides_the_order_also_of_what_is_left(archive: Archive) -> None:
    archive.add(*(f"{i}.tif" for i in range(20)))

    def order(seed: int | None) -> list[str]:
        return [entry.job.source.id for entry in archive.plan(selection=Selection(shuffle_seed=seed)).todo]

    first = order(1)
    assert sorted(first) == sorted(order(None))
    assert first != order(None)
    assert first != order(2)
    assert first == order(1)
    for entry in archive.plan().todo[::2]:
        archive.did(entry.job)
    left = order(1)
    assert left == [id for id in first if id in left]


def test_a_list_with_hashes_is_not_looked_up(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    (archive.input / "list.csv").write_text(f"uri,sha256\na.tif,{'ab' * 32}\ngone.tif,{'cd' * 32}\n")
    monkeypatch.setattr(store, "find", lambda uri: pytest.fail(f"{uri} was looked up"))
    plan = archive.plan(str(archive.input / "list.csv"))
    assert [(job.source.version, job.source.size) for job, _ in plan.todo] == [("", 0), ("", 0)]
    archive.did_all(plan)
    (archive.input / "a.tif").write_bytes(b"nobody looks")
    assert len(archive.plan(str(archive.input / "list.csv")).done) == 2
    (archive.input / "list.csv").write_text(f"uri,sha256\na.tif,{'ef' * 32}\ngone.tif,{'cd' * 32}\n")
    assert reasons(archive.plan(str(archive.input / "list.csv"))) == {"a.tif": "source changed"}


def test_outputs_are_found_by_one_listing(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.did_all(archive.plan())
    monkeypatch.setattr(store, "exists", lambda uri: uri == str(archive.input / "a.tif"))  # only inputs are asked for
    monkeypatch.setattr(store, "info", lambda uri: pytest.fail(f"{uri} was looked up"))
    assert len(archive.plan(str(archive.input / "a.tif")).done) == 1


def test_an_output_that_another_image_wrote_over_is_not_done(archive: Archive) -> None:
    first = archive.plan().todo[0].job
    archive.did(first)
    other = dataclasses.replace(first, source=dataclasses.replace(first.source, id="other"))
    archive.did(other)
    assert reasons(archive.plan())["a.tif"] == "output missing"


def test_an_output_folder_that_moved_is_still_done(archive: Archive, tmp_path: Path) -> None:
    archive.did_all(archive.plan())
    archive.output.rename(tmp_path / "elsewhere")
    archive.output = tmp_path / "elsewhere"
    plan = archive.plan()
    assert [entry.output_uri for entry in plan.done] == [
        str(archive.output / "a.tif"),
        str(archive.output / "box/b.tif"),
    ]


def test_jobs_are_made_when_asked_for(archive: Archive) -> None:
    archive.add(*(f"{i:04}.tif" for i in range(1100)))
    todo = archive.plan().todo
    assert todo[-1].job.source.id == "box/b.png"
    assert [entry.job.source.id for entry in todo[1098:]] == ["1098.tif", "1099.tif", "a.tif", "box/b.png"]
    assert len(list(todo)) == len(todo) == 1102
    with pytest.raises(IndexError):
        todo[1102]


# --- what reviewers sent back --------------------------------------------------------------------------------------


def sent_back(archive: Archive, id: str, **wanted: Any) -> None:
    review.append(
        str(archive.output), [review.parse({"id": id, "fingerprint": "f" * 64, "decision": "redo", **wanted})]
    )


def test_what_a_reviewer_sent_back_is_new_work_with_other_settings(archive: Archive) -> None:
    archive.did_all(archive.plan())
    sent_back(archive, "a.tif", prompt="a horse", preset="quality", restoration_tau=2.5, seed=7)
    plan = archive.plan(selection=Selection(redo=frozenset(["a.tif"])))
    (todo,) = plan.todo
    before = archive.plan(output={"uri": str(archive.output) + "2"}).todo[0].job
    settings = todo.job.settings
    assert (settings.prompt, settings.prompt_source, settings.preset) == ("a horse", "review", "quality")
    assert (settings.restoration_tau, settings.seed) == (2.5, 7)
    assert settings.cfg_end == TINY.presets["quality"].cfg_end
    assert settings.steps == before.settings.steps
    assert todo.job.settings_sha256 != before.settings_sha256
    assert todo.job.source.replaces == "f" * 64
    assert todo.job.output_stem == str(archive.output / "a")
    assert todo.reason.startswith("settings changed: ")
    assert "preset: fidelity -> quality" in todo.reason


def test_a_redo_holds_for_later_runs_until_it_is_taken_back(archive: Archive) -> None:
    archive.did_all(archive.plan())
    sent_back(archive, "a.tif", seed=7)
    archive.did_all(archive.plan(selection=Selection(redo=frozenset(["a.tif"]))))
    assert not archive.plan().todo  # the next night does not make the old one again
    assert [entry.job.settings.seed for entry in archive.plan(engine={"steps": 3}).todo] == [7, None]
    sent_back(archive, "a.tif", seed=8)
    assert [entry.job.settings.seed for entry in archive.plan().todo] == [8]
    undo = review.parse({"id": "a.tif", "fingerprint": "f" * 64, "decision": "undecided"})
    review.append(str(archive.output), [undo])
    assert [entry.job.settings.seed for entry in archive.plan().todo] == [None]


def test_a_redo_keeps_what_the_list_says_otherwise(archive: Archive) -> None:
    archive.add("a.tif", "b.tif")
    listed = archive.input / "list.csv"
    listed.write_text("uri,prompt,seed,negative_prompt\na.tif,from the list,1,none\nb.tif,other,2,\n")
    sent_back(archive, "a.tif", seed=9)
    first, second = (entry.job.settings for entry in archive.plan(str(listed)).todo)
    assert (first.prompt, first.seed, first.negative_prompt) == ("from the list", 9, "none")
    assert (second.prompt, second.seed, second.prompt_source) == ("other", 2, "manifest")


def test_images_to_redo_must_be_those_of_the_manifest(archive: Archive) -> None:
    archive.add("a.tif")
    with pytest.raises(
        ManifestError, match=r"1 of 2 images to redo are not among those of the manifest, such as 'z.tif'"
    ):
        archive.plan(selection=Selection(redo=frozenset(["a.tif", "z.tif"])))


def test_a_preset_that_the_weights_lack_is_told(archive: Archive) -> None:
    archive.add("a.tif")
    sent_back(archive, "a.tif", preset="quality-lightning")
    with pytest.raises(ManifestError, match="have no preset 'quality-lightning'"):
        archive.plan()
