"""The command line. stdout is data, stderr is talk; every error is one line (a traceback with --debug).

Commands import what they need when they run: ``supir-batch --help`` must not wait for Arrow, Ray or torch.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supir_batch import __version__
from supir_batch.errors import LeaseError, ManifestError, SupirBatchError
from supir_model.errors import SupirModelError

if TYPE_CHECKING:
    from supir_batch.caption_list import CaptionSummary
    from supir_batch.driver import Limits, Summary
    from supir_batch.evaluate import Comparison, LeftOut
    from supir_batch.events import Talk
    from supir_batch.plan import Plan, Selection
    from supir_batch.settings import Manifest
    from supir_batch.types import Job
    from supir_batch.verify import Problem

_SHOWN = 20  # entries of a list for people; --json has them all

_EPILOG = (
    "Exit codes: 0 all done; 1 internal error; 2 usage or manifest; "
    "3 finished, but some images failed or are quarantined; "
    "4 stopped early, the same command resumes; 5 another run is writing to the output; 6 verify found a mismatch; "
    "130 / 143 stopped by a signal, the same command resumes."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts are plain: "[/path]" means itself
    epilog=_EPILOG,
    help="Restore archives of images with SUPIR: manifest in; restored derivatives, provenance and a run log out.",
)

ManifestArgument = Annotated[str, typer.Argument(metavar="MANIFEST", help="YAML file: a path or a URI.")]
OutputArgument = Annotated[str, typer.Argument(metavar="OUTPUT", help="Output folder of earlier runs, or a manifest.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as engine.steps=20. Repeatable."),
]
LogJsonOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-", help="Add one JSON object per line for every event; -: to stderr, in place of words."
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray says, on stderr.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Restore at most this many images.")]
MaxFailuresOption = Annotated[
    str | None, typer.Option(metavar="N|N%", help="Stop when more images fail than this, of all that are to do.")
]
MaxDurationOption = Annotated[
    str | None, typer.Option(metavar="TIME", help="Stop after 90s, 45m or 10h; images on their way are finished.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="GLOB", help="Only images whose id matches, such as 'box1/*'. Repeatable."),
]
ExceptOption = Annotated[
    list[str] | None, typer.Option("--except", metavar="GLOB", help="No images whose id matches. Repeatable.")
]
ShuffleOption = Annotated[
    int | None,
    typer.Option("--shuffle-seed", min=0, metavar="N", help="Work in another order, the same for the same N."),
]
CauseOption = Annotated[
    list[str] | None,
    typer.Option("--cause", metavar="KIND", help="Only failures of this kind, as 'failures' shows it. Repeatable."),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Restore images with faces or text with N seeds, to map where they differ: N times."
    ),
]
AnchorsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Certificates (PEM) of those whose signatures are trusted."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON to stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def main() -> None:
    """Entry point of the ``supir-batch`` command."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"supir-batch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# --- commands ------------------------------------------------------------------------------------------------------


@app.command(epilog=_EPILOG)
def run(
    manifest: ManifestArgument,
    overrides: SetOption = None,
    limit: LimitOption = None,
    max_failures: MaxFailuresOption = None,
    max_duration: MaxDurationOption = None,
    only: OnlyOption = None,
    besides: ExceptOption = None,
    shuffle_seed: ShuffleOption = None,
    redo_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Only images that this file of decisions (.csv, .json) marks redo, as it says."
        ),
    ] = None,
    samples: SamplesOption = None,
    log_json: LogJsonOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Restore what the manifest names and is not done yet."""
    if samples is not None:
        overrides = [*(overrides or []), f"audit.samples={samples}"]
    with _errors(debug):
        from supir_batch.plan import Selection

        redo = None if redo_from is None else _redo(_load(manifest, overrides).output.uri, redo_from)
        selection = Selection(tuple(only or ()), tuple(besides or ()), shuffle_seed=shuffle_seed, redo=redo)
    limits = (limit, max_failures, max_duration)
    asked = [] if redo_from is None else ["--redo-from", redo_from]
    _restore("run", manifest, overrides, selection, limits, log_json, verbose, as_json, debug, asked)


@app.command(epilog=_EPILOG)
def retry(
    manifest: ManifestArgument,
    cause: CauseOption = None,
    overrides: SetOption = None,
    limit: LimitOption = None,
    max_failures: MaxFailuresOption = None,
    max_duration: MaxDurationOption = None,
    only: OnlyOption = None,
    besides: ExceptOption = None,
    shuffle_seed: ShuffleOption = None,
    log_json: LogJsonOption = None,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Try those images again whose newest attempt failed, quarantined ones too, and no others."""
    with _errors(debug):
        from supir_batch import runlog
        from supir_batch.plan import Selection

        failed = runlog.failures(_load(manifest, overrides).output.uri, cause or ())
        ids = frozenset(failed.column("id").to_pylist())
        selection = Selection(tuple(only or ()), tuple(besides or ()), ids, shuffle_seed)
    asked = [word for one in cause or [] for word in ("--cause", one)]
    limits = (limit, max_failures, max_duration)
    _restore("retry", manifest, overrides, selection, limits, log_json, verbose, as_json, debug, asked)


def _redo(output_uri: str, file: str) -> frozenset[str]:
    """Import decisions; the ids of those images of the file that are to be redone."""
    import os

    from supir_batch import review, store

    _, decided = review.import_file(output_uri, store.resolve(os.getcwd(), file))
    wanted = {one.id for one in decided if one.decision == "redo"} & review.redone(review.read(output_uri)).keys()
    if not wanted:
        raise ManifestError(f"{file}: marks no image redo that was not decided otherwise later")
    return frozenset(wanted)


def _restore(
    command: str,
    manifest: str,
    overrides: list[str] | None,
    selection: Selection,
    limits: tuple[int | None, str | None, str | None],
    log_json: str | None,
    verbose: bool,
    as_json: bool,
    debug: bool,
    options: Sequence[str] = (),
) -> None:
    with _errors(debug), _talk(log_json, verbose) as talk:
        from supir_batch.driver import execute

        parsed = _limits(*limits)
        loaded, plan = _plan(manifest, overrides, selection)
        quarantined = f", {len(plan.quarantined)} quarantined" if plan.quarantined else ""
        if talk.people:
            typer.echo(
                f"{len(plan.todo)} to do, {len(plan.done)} done before, {len(plan.refused)} refused{quarantined}"
                f"{_ignored(plan.ignored)}; output {plan.output_uri}",
                err=True,
            )
            for reason, count in list(plan.changed.items())[:_SHOWN]:
                typer.echo(f"{count} again, {reason}", err=True)
        summary = execute(loaded, manifest, plan, parsed, talk)
        if summary.error is not None and talk.people:
            _complain(summary.error, debug)
        same = [word for override in overrides or [] for word in ("--set", override)]
        same += [word for one in selection.only for word in ("--only", one)]
        same += [word for one in selection.besides for word in ("--except", one)]
        again = ["supir-batch", command, manifest, *options, *same]
        flags = dict(zip(("--limit", "--max-failures", "--max-duration"), limits, strict=True))
        flags |= {"--shuffle-seed": selection.shuffle_seed, "--log-json": log_json}
        again += [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
        if as_json:
            typer.echo(json.dumps(_summary_data(summary)))
        else:
            retried = shlex.join(["supir-batch", "retry", manifest, *same])
            typer.echo(_summary_text(summary, shlex.join(again), retried))
        raise typer.Exit(summary.exit_code)


@app.command(epilog=_EPILOG, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    manifest: ManifestArgument,
    address: Annotated[str, typer.Option(metavar="URL", help="The cluster's dashboard, such as http://head:8265.")],
    follow: Annotated[bool, typer.Option(help="Show what the job writes, and end with its exit code.")] = True,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Run a manifest as a job on a Ray cluster. All other options, after the manifest, are those of run.

    A local manifest is sent along, with --set and SUPIR_BATCH__ variables in it and its places made absolute; what it
    names must be within the cluster's reach. A manifest at a URI is read by the cluster.
    """
    _parse_run([manifest, *context.args])  # refused here, not by a job that has waited for its turn
    with _errors(debug):
        import tempfile
        from pathlib import Path

        from supir_batch import pipeline, runlog, store
        from supir_batch.manifest_file import to_yaml

        job = f"supir-batch-{runlog.new_run_id()}"
        options = ["--set", "runtime.address=auto", *context.args]
        if store.is_local(manifest):
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "manifest.yaml").write_text(to_yaml(_load(manifest, overrides)), encoding="utf-8")
                command = shlex.join(["supir-batch", "run", "manifest.yaml", *options])
                pipeline.submit(address, job, command, folder)
        else:
            options += [word for override in overrides or [] for word in ("--set", override)]
            pipeline.submit(address, job, shlex.join(["supir-batch", "run", manifest, *options]), None)
        typer.echo(f"job {job}; to stop it in order: ray job stop --address {address} {job}", err=True)
        if not follow:
            typer.echo(job)
            return
        try:
            code = pipeline.follow(address, job, lambda text: typer.echo(text, nl=False))
        except KeyboardInterrupt:
            typer.echo(f"the job goes on; to see it: ray job logs --follow --address {address} {job}", err=True)
            raise
        raise typer.Exit(code)


@app.command(epilog=_EPILOG)
def caption(
    manifest: ManifestArgument,
    output: Annotated[
        str,
        typer.Option(metavar="LIST", help="Where to write the list: a .csv or .parquet file that is not there yet."),
    ] = "captions.csv",
    overrides: SetOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the caption of every image to a list, to be edited and then used as the manifest's input."""
    with _errors(debug):
        import os

        from supir_batch import store
        from supir_batch.caption_list import check_target, write_captions

        target = store.resolve(os.getcwd(), output)
        check_target(_load(manifest, overrides), target)
        loaded, plan = _plan(manifest, overrides)
        summary = write_captions(loaded, plan, target)
        if summary.error is not None:
            _complain(summary.error, debug)
        if as_json:
            typer.echo(json.dumps(_caption_data(summary)))
        else:
            again = ["supir-batch", "caption", manifest, "--output", output]
            again += [word for override in overrides or [] for word in ("--set", override)]
            typer.echo(_caption_text(summary, manifest, shlex.join(again)))
        raise typer.Exit(summary.exit_code)


@app.command("plan")
def show_plan(
    manifest: ManifestArgument,
    overrides: SetOption = None,
    only: OnlyOption = None,
    besides: ExceptOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a run would do, what is done, and what is refused or quarantined and why. Writes nothing."""
    with _errors(debug):
        from supir_batch.plan import Selection

        _, plan = _plan(manifest, overrides, Selection(tuple(only or ()), tuple(besides or ())))
        typer.echo(json.dumps(_plan_data(plan)) if as_json else _plan_text(plan))


@app.command()
def status(output: OutputArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show what the run log of an output says: its runs, and how each image ended last."""
    with _errors(debug):
        data = _status_data(_output_uri(output))
        typer.echo(json.dumps(data) if as_json else _status_text(data))


@app.command()
def failures(
    output: OutputArgument, cause: CauseOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """List the images whose newest attempt failed, from the run log: id, cause and message, separated by tabs."""
    with _errors(debug):
        from supir_batch import runlog

        failed = runlog.failures(_output_uri(output), cause or ())
        rows = failed.rename_columns(["id", "uri", "cause", "message"]).to_pylist()
        if as_json:
            typer.echo(json.dumps(rows))
            return
        for row in rows:
            typer.echo("\t".join(" ".join(str(row[name]).split()) for name in ("id", "cause", "message")))
        typer.echo(f"{len(rows)} failed", err=True)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An image: a path or a URI.")],
    anchors: AnchorsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say in plain words what an image claims about itself: what it is, its source, engine, prompts, seed, settings."""
    with _errors(debug):
        from supir_batch import store
        from supir_batch.inspect import inspect as look

        lines = look(file, None if anchors is None else store.read_bytes(anchors))
        if as_json:
            typer.echo(json.dumps(lines, ensure_ascii=False))
            return
        width = max(len(label) for label, _ in lines)
        typer.echo("\n".join(f"{label:{width}}  {text}" for label, text in lines))


@app.command(epilog=_EPILOG)
def verify(
    output: OutputArgument, anchors: AnchorsOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Compare a whole output with its run log: every image, its tags, size and record, and files nobody put there."""
    with _errors(debug):
        from supir_batch import store
        from supir_batch.verify import verify as check

        trusted = None if anchors is None else store.read_bytes(anchors)
        uri, count = _output_uri(output), 0
        problems: list[Problem] = []
        for checked in check(uri, trusted):
            count += 1
            problems += checked.problems
            for problem in () if as_json else checked.problems:
                typer.echo(f"{problem.kind:10} {problem.uri}: {problem.message}")
        if as_json:
            typer.echo(json.dumps({"output": uri, "files": count, "problems": [p._asdict() for p in problems]}))
        else:
            typer.echo(f"{count} files verified, {len(problems)} problems")
        raise typer.Exit(6 if problems else 0)


@app.command()
def export(
    output: OutputArgument,
    bagit: Annotated[str | None, typer.Option(metavar="DIR", help="Make DIR a BagIt 1.0 bag of the output.")] = None,
    archivematica: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Make DIR a transfer for Archivematica: originals, and outputs for access."),
    ] = None,
    iiif: Annotated[
        str | None,
        typer.Option(metavar="BASE_URL", help="Write IIIF manifests into the output, to be published at BASE_URL."),
    ] = None,
    accepted: Annotated[bool, typer.Option("--accepted", help="Only images that reviewers have accepted.")] = False,
    debug: DebugOption = False,
) -> None:
    """Hand over what is done: as a bag, as a transfer for Archivematica, or to IIIF viewers."""
    with _errors(debug):
        from supir_batch import export as exports
        from supir_batch.iiif import write_manifests

        if bagit is None and archivematica is None and iiif is None:
            raise ManifestError("nothing to export to; name --bagit, --archivematica or --iiif")
        uri = _output_uri(output)
        if bagit is not None:
            typer.echo(f"{exports.bag(uri, bagit, accepted)} images in the bag {bagit}")
        if archivematica is not None:
            typer.echo(f"{exports.archivematica(uri, archivematica, accepted)} images in the transfer {archivematica}")
        if iiif is not None:
            typer.echo(f"{write_manifests(uri, iiif, accepted)} images in {uri}/_iiif/collection.json")


@app.command("show-config")
def show_config(
    manifest: ManifestArgument, overrides: SetOption = None, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Show every setting with the value that will be used and where it comes from."""
    with _errors(debug):
        from supir_batch.resolve import explain

        explained = explain(_load(manifest, overrides))
        if as_json:
            typer.echo(json.dumps([entry._asdict() for entry in explained]))
            return
        for key, value, origin in explained:
            typer.echo(f"{key} = {json.dumps(value, ensure_ascii=False)}  # {origin}")


@app.command()
def report(output: OutputArgument, debug: DebugOption = False) -> None:
    """Build the report of an output, before and after, with scores and decisions, and print where it is."""
    with _errors(debug):
        from supir_batch.report.build import build_report

        typer.echo(build_report(_output_uri(output)))


@app.command()
def serve(
    output: OutputArgument,
    host: Annotated[str, typer.Option(help="Address to listen at; only this machine reaches 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: a free one.")] = 0,
    debug: DebugOption = False,
) -> None:
    """Build the report of an output, serve it, and save decisions as they are made. Prints the address to open."""
    with _errors(debug):
        from supir_batch.report import serve as server
        from supir_batch.report.build import build_report

        uri = _output_uri(output)
        build_report(uri)
        server.serve(uri, host, port, server.new_token(), typer.echo)


review_app = typer.Typer(no_args_is_help=True, help="What people decided about outputs, in the report.")
app.add_typer(review_app, name="review")


@review_app.command("import")
def review_import(
    output: OutputArgument,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Decisions that the report exported: .csv or .json.")],
    debug: DebugOption = False,
) -> None:
    """Put decisions into the run log of an output, all of the file or none."""
    with _errors(debug):
        import os

        from supir_batch import review, store

        uri = _output_uri(output)
        new, decided = review.import_file(uri, store.resolve(os.getcwd(), file))
        counts = Counter(str(one.decision) for one in decided)
        typer.echo(f"{len(decided)} decisions ({_counts(counts)}), {new} of them new")


@review_app.command("list")
def review_list(output: OutputArgument, debug: DebugOption = False) -> None:
    """Write the decisions that count as CSV, as import reads it."""
    with _errors(debug):
        from supir_batch import review

        decided = sorted(review.read(_output_uri(output)).values(), key=lambda one: (one.id, one.decided_at))
        typer.echo(review.to_csv(decided), nl=False)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(metavar="MANIFEST|FOLDER", help="Photographs to degrade and restore.")],
    output: Annotated[str, typer.Option(help="Folder for the results.")] = "evaluation",
    degradation: Annotated[
        list[str] | None,
        typer.Option(
            help="D1, D2, SRx4, SRx8, blur-SRx4, SRx4-noise, blur-SRx4-noise-JPEG, or none: for photographs that are "
            "damaged already. Repeatable; left out: D1 and D2."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="input, bicubic, lanczos (the last two where the input is smaller), encode-decode, stage-1, sampled. "
            "Repeatable; left out: all."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many photographs.")] = None,
    preset: Annotated[str | None, typer.Option(help="The same as --set engine.preset=...")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The same as --set engine.weights=..., such as the folder that training exports."),
    ] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Also sample without any prompt.")] = False,
    no_negative: Annotated[bool, typer.Option("--no-negative", help="Also sample without negative prompt.")] = False,
    no_restoration: Annotated[
        bool, typer.Option("--no-restoration", help="Also sample without restoration guidance.")
    ] = False,
    tau: Annotated[
        list[float] | None, typer.Option(min=0.01, help="Also sample with this restoration tau. Repeatable.")
    ] = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure a model: degrade photographs, restore them in several ways, compare with what they were."""
    with _errors(debug):
        from supir_batch import store
        from supir_batch.manifest_file import load_manifest, manifest_of_folder

        pairs = _pairs(overrides)
        pairs |= {"engine.preset": preset} if preset else {}
        pairs |= {"engine.weights": model} if model else {}
        if store.is_folder(source):
            loaded = manifest_of_folder(source, output, pairs)
        else:  # where a run of this manifest would write to does not matter here
            loaded = load_manifest(source, {**pairs, "output.uri": output})
        plan = _plan_of(loaded, source)
        jobs = _jobs_to_evaluate(plan, limit)

        from supir_batch.evaluate import METHODS, Ablations, Asked, LeftOut, compare
        from supir_batch.evaluation_report import Evaluation

        ablations = Ablations(no_text, no_negative, no_restoration, tuple(tau or ()))
        asked = Asked(tuple(degradation or ("D1", "D2")), tuple(method or METHODS), ablations)
        refused = [LeftOut(one.job.source.id, "all", one.failure.message) for one in plan.refused]
        evaluation = Evaluation(len(jobs), left_out=refused)
        command, text = f"supir-batch {shlex.join(sys.argv[1:])}", ""
        for found in compare(jobs, loaded.runtime.device, asked):
            evaluation.add(found)
            text = evaluation.write(loaded.output.uri, jobs[0].settings, command)  # what a signal stops is kept
            typer.echo(_evaluated(found), err=True)
        typer.echo(text)
        raise typer.Exit(3 if evaluation.left_out else 0)


def _limits(limit: int | None, max_failures: str | None, max_duration: str | None) -> Limits:
    import re

    from supir_batch.driver import Limits

    failures, seconds = None, None
    if max_failures is not None:
        if (found := re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", max_failures)) is None:
            raise ManifestError(
                f"--max-failures {max_failures}: is neither a number nor a percentage, such as 20 or 1%"
            )
        failures = float(found[1]) if found[1] else float(found[2]) / 100
    if max_duration is not None:
        if (found := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", max_duration)) is None:
            raise ManifestError(f"--max-duration {max_duration}: is no time, such as 90s, 45m or 10h")
        seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
    return Limits(limit, seconds, failures, share=bool(max_failures and max_failures.endswith("%")))


def _jobs_to_evaluate(plan: Plan, limit: int | None) -> list[Job]:
    jobs = [todo.job for todo in plan.todo[:limit]]
    if not jobs and plan.refused:
        raise ManifestError("\n".join(refused.failure.message for refused in plan.refused[:_SHOWN]))
    if not jobs:
        raise ManifestError(
            "there is nothing to evaluate: every image is in the run log of --output; name a new folder"
        )
    return jobs


def _evaluated(found: Comparison | LeftOut) -> str:
    from supir_batch.evaluate import LeftOut

    if isinstance(found, LeftOut):
        return f"left out: {found.reason}"
    scores = [f"{name} {value['psnr']:.2f} dB" for name, value in found.values.items() if "psnr" in value]
    return f"{found.image}, {found.degradation}: {'; '.join(scores) or 'restored'}"


# --- models --------------------------------------------------------------------------------------------------------

models_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Bring models here, convert them, and see whether they are whole.",
)
app.add_typer(models_app, name="models")


@models_app.command("list")
def models_list(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Folder or prefix that holds models.")] = "models",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show which models exist by name, what each is made of, and what FOLDER holds."""
    with _errors(debug):
        from supir_batch import models

        if as_json:
            typer.echo(json.dumps(models.listing(folder)))
            return
        for one in models.known():
            typer.echo(f"{one.name:6} {one.display_name}; license: {one.license}")
            for need in one.needs or ("in the package",):
                typer.echo(f"       {need}")
        found = models.present(folder)
        typer.echo(f"{folder}:{'' if found else ' holds no model'}")
        for thing in found:
            typer.echo(f"  {thing.uri}  {thing.name or thing.kind}, {thing.bytes:,} bytes, {thing.state}")


@models_app.command("check")
def models_check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, or the folder (path or URI) of a model.")],
    debug: DebugOption = False,
) -> None:
    """Compare every file of a model with its hash, and its weights with the networks. Exit code 2: not whole."""
    with _errors(debug):
        from supir_batch import model_folder, models

        problems = models.check(model)
        for problem in problems:
            typer.echo(f"error: {model}: {problem}", err=True)
        if problems:
            raise typer.Exit(2)
        typer.echo(f"{model_folder.model_sha256(model)}  {model_folder.config(model).display_name}")


@models_app.command("convert")
def models_convert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="v0Q or v0F.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Folder to make; it must not exist.")],
    base: Annotated[str, typer.Option(help="SDXL: one file, or a folder in diffusers layout.")],
    supir: Annotated[str, typer.Option(help="The SUPIR file.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder with vocab.json and merges.txt; left out: the base folder's.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="PATH[=SCALE]", help="LoRA to add to the base. Repeatable.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store float16: half the size, rounded weights.")] = False,
    debug: DebugOption = False,
) -> None:
    """Make one model folder from published files: weights, configuration, hashes, model card."""
    with _errors(debug):
        from supir_batch import models

        made = models.convert(name, base, supir, tokenizer, lora or [], target, "float16" if half else "float32")
        typer.echo(f"{made.identity}  {target}")


@models_app.command("fetch")
def models_fetch(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="hf://owner/name[/path], or any path or URI.")],
    target: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Local folder to put it into.")] = "models",
    sha256: Annotated[str | None, typer.Option(help="Hash the file must have.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit, for hf:// sources.")] = None,
    debug: DebugOption = False,
) -> None:
    """Bring a file or a folder of files here; an interrupted copy is continued, hashes are checked."""
    with _errors(debug):
        from supir_batch import models

        for one in models.fetch(source, target, sha256, revision, lambda line: typer.echo(line, err=True)):
            typer.echo(f"{one.sha256}  {one.path}")


# --- shared steps --------------------------------------------------------------------------------------------------


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # a closed pipe (``| head``) is typer's to end quietly
        raise
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        _complain(error, debug)
        if not isinstance(error, SupirBatchError | SupirModelError):
            raise typer.Exit(1) from None
        if isinstance(error, LeaseError):
            raise typer.Exit(5) from None
        raise typer.Exit(4 if getattr(error, "retryable", False) else 2) from None


def _parse_run(words: list[str]) -> None:
    """Raise a usage error if ``run`` does not take these words."""
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    command.commands["run"].make_context("run", words)


@contextmanager
def _talk(log_json: str | None, verbose: bool) -> Iterator[Talk]:
    import os

    from supir_batch.events import Talk

    if log_json is None:
        yield Talk(verbose=verbose)
        return
    try:  # a copy of stderr, because Ray's start holds back what comes there
        lines = open(os.dup(2) if log_json == "-" else log_json, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise ManifestError(f"--log-json {log_json}: cannot be written: {error.strerror}") from error
    with lines:
        yield Talk(log_json != "-", lines, verbose)


def _complain(error: Exception, debug: bool) -> None:
    """Each line of an expected error; the last line of an unexpected one (Ray puts the cause there)."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    lines = str(error).strip().splitlines() or ["no message"]
    if isinstance(error, SupirBatchError | SupirModelError):
        for line in lines:
            typer.echo(f"error: {line}", err=True)
    else:
        typer.echo(f"error: unexpected {type(error).__name__}: {lines[-1]}; --debug shows the traceback", err=True)


def _load(manifest_uri: str, overrides: list[str] | None) -> Manifest:
    from supir_batch.manifest_file import load_manifest

    return load_manifest(manifest_uri, _pairs(overrides))


def _pairs(overrides: list[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise ManifestError(f"--set {override}: has no '='; write a key and a value, such as engine.steps=20")
        pairs[key.strip()] = value
    return pairs


def _plan(manifest_uri: str, overrides: list[str] | None, selection: Selection | None = None) -> tuple[Manifest, Plan]:
    loaded = _load(manifest_uri, overrides)
    return loaded, _plan_of(loaded, manifest_uri, selection)


def _plan_of(loaded: Manifest, manifest_uri: str, selection: Selection | None = None) -> Plan:
    from supir_batch.plan import Selection, make_plan

    model_sha256, captioner_identity = "", ""
    if loaded.engine.name == "supir":
        from supir_batch import captioner, model_folder

        model_sha256 = model_folder.model_sha256(loaded.engine.weights)
        if loaded.caption.mode == "llava" and loaded.caption.model is not None:
            captioner_identity = captioner.identity(loaded.caption.model, loaded.caption.revision)
    return make_plan(loaded, manifest_uri, model_sha256, captioner_identity, selection or Selection())


def _output_uri(output: str) -> str:
    """``output`` itself, made absolute, or where the manifest of that name writes to."""
    import os

    from supir_batch import store

    if output.lower().endswith((".yaml", ".yml")):
        return _load(output, None).output.uri
    return store.resolve(os.getcwd(), output)


# --- texts and data ------------------------------------------------------------------------------------------------


def _summary_data(summary: Summary) -> dict[str, Any]:
    return {
        "output": summary.output_uri,
        "log": summary.log_uri or None,
        "done": summary.done,
        "recovered": summary.recovered,
        "failed": dict(summary.failed),
        "skipped": summary.skipped,
        "quarantined": summary.quarantined,
        "left": summary.left,
        "seconds": round(summary.seconds, 3),
        "stopped_by_signal": summary.stopped_by,
        "stopped_because": summary.reason or None,
        "error": str(summary.error) if summary.error else None,
        "exit_code": summary.exit_code,
    }


def _summary_text(summary: Summary, again: str, retry: str) -> str:
    from supir_batch.progress import duration

    recovered = f" ({summary.recovered} of them committed by an earlier run)" if summary.recovered else ""
    lines = [f"done     {summary.done}{recovered}"]
    if summary.failed:
        lines.append(f"failed   {sum(summary.failed.values())} ({_counts(summary.failed)})")
    if summary.quarantined:
        lines.append(f"kept out {summary.quarantined} quarantined: workers died in them, or they did not end in time")
    lines.append(f"skipped  {summary.skipped} done before")
    if summary.left:
        lines.append(f"left     {summary.left}")
    if summary.reason:
        lines.append(f"stopped  {summary.reason}")
    lines += [f"time     {duration(summary.seconds)}", f"outputs  {summary.output_uri}"]
    if summary.log_uri:
        lines.append(f"log      {summary.log_uri}")
    if summary.left:
        lines.append(f"next     {again}")
    elif summary.failed:
        lines.append(f"next     {again}   (tries the failed images again)")
    elif summary.quarantined:
        lines.append(f"next     {retry}   (tries the quarantined images again)")
    else:
        lines.append(f"next     {shlex.join(['supir-batch', 'report', summary.output_uri])}")
    return "\n".join(lines)


def _caption_data(summary: CaptionSummary) -> dict[str, Any]:
    return {
        "list": summary.list_uri or None,
        "captioned": summary.captioned,
        "given": summary.given,
        "failed": dict(summary.failed),
        "failures": [{"id": id, "kind": kind, "message": message} for id, kind, message in summary.failures],
        "left": summary.left,
        "seconds": round(summary.seconds, 3),
        "stopped_by_signal": summary.stopped_by,
        "error": str(summary.error) if summary.error else None,
        "exit_code": summary.exit_code,
    }


def _caption_text(summary: CaptionSummary, manifest: str, again: str) -> str:
    from supir_batch.progress import duration

    lines = [f"captioned {summary.captioned}", f"given     {summary.given} came with a prompt"]
    if summary.failed:
        lines.append(f"failed    {sum(summary.failed.values())} ({_counts(summary.failed)}); their prompts are empty")
    if summary.left:
        lines.append(f"left      {summary.left}")
    lines.append(f"time      {duration(summary.seconds)}")
    if not summary.list_uri:
        return "\n".join([*lines, f"next      {again}"])
    fed_back = shlex.join(["supir-batch", "run", manifest, "--set", f"inputs={summary.list_uri}"])
    return "\n".join([*lines, f"list      {summary.list_uri}", f"next      edit the list, then {fed_back}"])


def _plan_data(plan: Plan) -> dict[str, Any]:
    return {
        "output": plan.output_uri,
        "todo": [
            {"id": job.source.id, "uri": job.source.uri, "output_stem": job.output_stem, "reason": reason}
            for job, reason in plan.todo
        ],
        "done": [{"id": job.source.id, "uri": job.source.uri, "output": uri} for job, uri in plan.done],
        "refused": [
            {"id": job.source.id, "uri": job.source.uri, "kind": failure.kind, "message": failure.message}
            for job, failure in plan.refused
        ],
        "quarantined": [
            {"id": job.source.id, "uri": job.source.uri, "reason": reason} for job, reason in plan.quarantined
        ],
        "ignored": dict(plan.ignored),
    }


def _plan_text(plan: Plan) -> str:
    lines = [f"to do    {len(plan.todo)}"]
    lines += [f"  {count} {reason}" for reason, count in list(plan.reasons.items())[:_SHOWN]]
    lines += _more(len(plan.reasons), "reasons")
    lines += [f"done     {len(plan.done)}", f"refused  {len(plan.refused)}"]
    lines += [f"  {failure.message}" for _, failure in plan.refused[:_SHOWN]]
    lines += _more(len(plan.refused), "refused")
    if plan.quarantined:
        lines.append(f"quarantined  {len(plan.quarantined)}; only retry tries them again")
        lines += [f"  {job.source.uri}: {reason}" for job, reason in plan.quarantined[:_SHOWN]]
        lines += _more(len(plan.quarantined), "quarantined")
    if plan.ignored:
        lines.append(f"ignored  {sum(plan.ignored.values())} ({_counts(plan.ignored)})")
    lines.append(f"output   {plan.output_uri}")
    if plan.todo:
        lines.append("images to do:")
        lines += [f"  {job.source.uri} -> {job.output_stem}.*  ({reason})" for job, reason in plan.todo[:_SHOWN]]
        lines += _more(len(plan.todo), "images")
    return "\n".join(lines)


def _status_data(output_uri: str) -> dict[str, Any]:
    from supir_batch import runlog

    log = runlog.read_log(output_uri, ("run_id", "id", "status", "recovered"))
    if log.num_rows == 0:
        raise ManifestError(f"{output_uri}: holds no run log; give the output folder of a run, or its manifest")
    runs: dict[str, Counter[str]] = {}
    for row in log.group_by(["run_id", "status", "recovered"]).aggregate([([], "count_all")]).to_pylist():
        counts = runs.setdefault(row["run_id"], Counter(done=0, recovered=0, failed=0))
        counts[row["status"]] += row["count_all"]
        counts["recovered"] += row["count_all"] if row["recovered"] else 0
    images = runlog.newest(log, "id").num_rows
    failed = runlog.failures(output_uri).to_pylist()
    return {
        "output": output_uri,
        "images": images,
        "done": images - len(failed),
        "failed": dict(Counter(row["failure_kind"] for row in failed).most_common()),
        "failures": [
            {"id": row["id"], "uri": row["uri"], "kind": row["failure_kind"], "message": row["failure_message"]}
            for row in failed
        ],
        "runs": [{"run_id": run_id, **counts} for run_id, counts in sorted(runs.items())],
    }


def _status_text(data: Mapping[str, Any]) -> str:
    lines = [f"output   {data['output']}", f"images   {data['images']}", f"done     {data['done']}"]
    failed = f" ({_counts(data['failed'])})" if data["failed"] else ""
    lines.append(f"failed   {sum(data['failed'].values())}{failed}")
    lines += [f"  {failure['message']}" for failure in data["failures"][:_SHOWN]]
    lines += _more(len(data["failures"]), "failed")
    lines += [
        f"run      {one['run_id']}  {one['done']} done, {one['recovered']} of them recovered, {one['failed']} failed"
        for one in data["runs"][-_SHOWN:]
    ]
    return "\n".join(lines)


def _more(count: int, what: str) -> list[str]:
    return [f"  ... and {count - _SHOWN} more {what}; --json lists all"] if count > _SHOWN else []


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())


def _ignored(ignored: Mapping[str, int]) -> str:
    return f", {sum(ignored.values())} other files ignored ({_counts(ignored)})" if ignored else ""
