"""The whole flow: jobs in, one run-log row per image out.

    jobs ─▶ feed ─▶ preview ─▶ caption ─▶ decode + tile ─▶ restore ─▶ write ─▶ rows
            1 task  CPU tasks  actors     CPU tasks        actors     CPU tasks

Up to the caption a row of the stream is an image: its ticket (everything known about it) and a preview, if it must be
captioned. From there on it is a tile: its ticket and its pixels. So an image is captioned once, into however many
tiles it is cut, and no full-size pixels wait for a captioner; the price is that its source is read twice.

A block, Ray's unit of retry and of memory, holds small tiles up to BLOCK_BYTES together, or one large one. An error
inside a stage becomes a failure on the ticket and flows on to the log; it never reaches Ray, so one bad image cannot
stop the others. A worker that dies is Ray's to replace, and its rows are tried again; the ledger, an actor beside the
stream, counts whose fault that was (isolation.py) and how many images are on their way. The stages are in stages.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.util.metrics import Counter, Gauge, Histogram
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from supir_batch import isolation, metrics
from supir_batch.alongside import alongside
from supir_batch.engine import LoadEngine, load_engine
from supir_batch.errors import ClusterError, EngineError
from supir_batch.events import Listener
from supir_batch.isolation import Begun, Book, Guards, Item, Worker
from supir_batch.metrics import Metric
from supir_batch.runlog import STAGES
from supir_batch.settings import Runtime
from supir_batch.stages import (
    CaptionStage,
    RestoreStage,
    caption_row_stage,
    decode_stage,
    feed_stage,
    pack,
    preview_stage,
    wants_caption,
    write_stage,
)
from supir_batch.types import Job

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Row = dict[str, Any]  # of the run log

BLOCK_BYTES = 64 * 2**20  # a large tile, or as many small ones: every block costs Ray some milliseconds per stage
_LARGE_BLOCK_BYTES = 160 * 2**20  # where tiles take no time, so that what a block costs counts for more
_FED_TOGETHER = 16  # images, at most
_BATCHES_OF_A_CARD = 4
_PASSES = 3
_GONE_S = 5.0  # where nobody listens any more
_SILENT_S = 45.0  # a network, or the head of a cluster, may come back; Ray itself waits for 60
_STOP_WAIT_S = 1800


def run(
    jobs: Sequence[Job],
    runtime: Runtime,
    listener: Listener,
    run_id: str,
    stop: threading.Event,
    load: LoadEngine | None = None,
) -> None:
    """Do all jobs; the listener gets the run-log row (``runlog.SCHEMA``) of every image as it ends, in any order.

    An image gets a second row only if two writers committed it; the row that finished later is true. Once ``stop`` is
    set, images that are on their way are finished, and no others begun.

    ``load`` is called once in each restoring worker, by default ``engine.load_engine``. An exception that ``on_row``
    raises stops the run; what was committed until then stays. Raises EngineError if the engine or the captioner cannot
    be loaded, or if this machine, on its own, has no place for their workers; ClusterError if Ray dies under the run.
    """
    at_once = load is None and all(job.model is None for job in jobs)  # the baseline, whose tiles take no time
    load = load or partial(load_engine, window_batch=runtime.batch)
    captioned = any(wants_caption(job) for job in jobs)
    gpus = runtime.gpus_per_actor
    if captioned and runtime.caption_gpus_per_actor is None:
        gpus /= 2  # a captioner and a restorer share what one worker may have

    def rows(todo: Sequence[Job], ledger: _Ledger) -> ray.data.Dataset:
        if at_once:
            DataContext.get_current().target_max_block_size = _LARGE_BLOCK_BYTES
        guards = Guards(ledger, run_id, runtime.deadline_seconds)
        images = _images(todo, runtime, ledger)
        if captioned:
            images = _captioned(images, todo, runtime, guards, restoring=True)
        tiles = images.map_batches(decode_stage, batch_size=None, fn_args=(guards,), num_cpus=0.5)
        tiles = tiles.map_batches(
            RestoreStage,
            compute=_pool(runtime.actors, runtime.max_actors),
            # engine, weights and license are the manifest's, the same for every job
            fn_constructor_args=(guards, todo[0].model, runtime.device, load, runtime.batch),
            num_gpus=gpus,
            accelerator_type=runtime.accelerator,
            num_cpus=0,  # so that waiting models never starve the CPU stages
            batch_size=None if at_once else _handed_over(runtime, gpus > 0),
        )
        return tiles.map_batches(write_stage, batch_size=None, fn_args=(guards,), num_cpus=0.5)

    needs = [_Need("restoring", gpus, runtime.accelerator)]
    needs += [_caption_need(runtime)] if captioned else []
    _stream(jobs, runtime, needs, rows, listener, run_id, stop)


def _handed_over(runtime: Runtime, on_card: bool) -> int:
    """Tiles that a restoring worker gets in one call.

    For a card several batches, so that it works on one while the one before is measured, as far as all workers still
    get some. Never more than there are images on their way: Ray waits until it has so many.
    """
    workers = runtime.max_actors or runtime.actors
    several = min(_BATCHES_OF_A_CARD * runtime.batch, runtime.images_in_flight // (2 * workers))
    return min(max(runtime.batch, several if on_card else 1), runtime.images_in_flight)


def caption(jobs: Sequence[Job], runtime: Runtime, listener: Listener, run_id: str, stop: threading.Event) -> None:
    """Caption the images of those jobs whose prompt is left to the captioner, and restore nothing.

    The listener gets a run-log row for each, with its caption or its failure, in any order. Raises EngineError if the
    captioner cannot be loaded, or if this machine, on its own, has no place for its workers; ClusterError if Ray dies.
    """

    def rows(todo: Sequence[Job], ledger: _Ledger) -> ray.data.Dataset:
        guards = Guards(ledger, run_id, runtime.deadline_seconds)
        images = _captioned(_images(todo, runtime, ledger), todo, runtime, guards, restoring=False)
        return images.map_batches(caption_row_stage, batch_size=None, fn_args=(run_id,), num_cpus=0.5)

    wanting = [job for job in jobs if wants_caption(job)]
    _stream(wanting, runtime, [_caption_need(runtime)], rows, listener, run_id, stop)


def _images(jobs: Sequence[Job], runtime: Runtime, ledger: _Ledger) -> ray.data.Dataset:
    # what is fed together stays together; every worker must find some waiting
    workers = int(ray.cluster_resources().get("CPU", 1)) + (runtime.max_actors or runtime.actors)
    together = max(1, min(_FED_TOGETHER, min(len(jobs), runtime.images_in_flight) // (2 * workers)))
    packed = [pack(jobs[i : i + together]) for i in range(0, len(jobs), together)]
    fed = ray.data.from_items(packed, override_num_blocks=len(packed))
    # one at a time, because it waits; without a core, because it only waits
    return fed.map_batches(feed_stage, batch_size=None, fn_args=(ledger,), num_cpus=0, concurrency=1)


def _captioned(
    images: ray.data.Dataset, jobs: Sequence[Job], runtime: Runtime, guards: Guards, restoring: bool
) -> ray.data.Dataset:
    need = _caption_need(runtime)
    previews = images.map_batches(preview_stage, batch_size=None, fn_args=(guards, restoring), num_cpus=0.5)
    return previews.map_batches(
        CaptionStage,
        compute=_pool(runtime.caption_actors, runtime.max_caption_actors),
        # the captioner and its options are the manifest's, the same for every job that wants a caption
        fn_constructor_args=(guards, next(job for job in jobs if wants_caption(job)), runtime.device),
        num_gpus=need.gpus,
        accelerator_type=need.accelerator,
        num_cpus=0,
        batch_size=min(runtime.caption_batch, runtime.images_in_flight),  # as in _handed_over
    )


def _pool(least: int, most: int | None) -> ActorPoolStrategy:
    return ActorPoolStrategy(min_size=least, max_size=least if most is None else most)


def _stream(
    jobs: Sequence[Job],
    runtime: Runtime,
    needs: Sequence[_Need],
    rows: Callable[[Sequence[Job], _Ledger], ray.data.Dataset],
    listener: Listener,
    run_id: str,
    stop: threading.Event,
) -> None:
    """Run a stream, and again with whatever has not come out of it, which a node that is lost may have taken along."""
    ended: dict[str, str | None] = {}
    todo, meters = jobs, _Meters(run_id)

    def on_row(row: Row) -> None:
        if row["id"] not in ended:  # else a second row for the same image
            _count(row, meters)
        listener.on_row(row)

    with _ray(runtime, listener.verbose), _watched(runtime):
        for need in needs:
            _look_for_place(need, runtime, listener)
        for _ in range(_PASSES):
            if todo and not stop.is_set():
                with (
                    _ledger(runtime, len(todo), meters, stop) as ledger,
                    contextlib.closing(_read(rows(todo, ledger))) as tables,
                ):
                    _collect(tables, ledger, ended, on_row)
            todo = [job for job in todo if job.source.id not in ended]
    isolation.remove_notes(run_id)
    if todo and not stop.is_set():
        raise EngineError(f"{len(todo)} images came to no end in {_PASSES} attempts; look at Ray's logs, and run again")


def _read(rows: ray.data.Dataset) -> Generator[pa.Table]:
    """The rows as they come; closing ends the stream."""
    # not by iter_batches: a thread of it outlives a loop that is left, and should that ask Ray for a block once Ray
    # has been shut down, Ray ends the process without a word
    for bundle in rows.iter_internal_ref_bundles():
        yield from ray.get([entry.ref for entry in bundle.blocks])


def _collect(
    tables: Iterable[pa.Table], ledger: _Ledger, ended: dict[str, str | None], on_row: Callable[[Row], None]
) -> None:
    """Hand on all rows; once the blank one says that nothing more is let in, those of images that were."""
    closed = False
    for table in tables:
        for row in table.to_pylist():
            if row["id"] is None:
                closed = True
                continue
            if row["failure_kind"] == EngineError.kind:
                raise EngineError(row["failure_message"])
            # two writers may both see the last part of a cut image arrive, and the later write over the earlier
            if row["id"] not in ended or (row["status"] == "done" and row["record_sha256"] != ended[row["id"]]):
                on_row(row)
                ended[row["id"]] = row["record_sha256"]
            ledger.retire(row["id"])
        if closed and ledger.is_empty():
            return


# --- the ledger ----------------------------------------------------------------------------------------------------


class _LedgerActor:
    """Keeps the book of what is begun, and lets images in while fewer than ``in_flight`` are on their way."""

    def __init__(self, in_flight: int, images: int, meters: _Meters) -> None:
        self._book = Book(_is_lost)
        self._in_flight, self._inside, self._closed = in_flight, set[str](), False
        self._waiting, self._dead, self._meters = images, set[Worker](), meters
        self._changed = asyncio.Condition()

    async def admit(self, images: Sequence[str]) -> bool:
        async with self._changed:
            if not self._inside.issuperset(images):  # let in before, in a task that was lost
                await self._changed.wait_for(
                    lambda: self._closed or not self._inside or len(self._inside) + len(images) <= self._in_flight
                )
                if self._closed:
                    return False
                self._waiting -= len(set(images) - self._inside)
                self._inside.update(images)
                self._tell()
            return True

    async def begin(self, stage: str, items: Sequence[Item], worker: Worker) -> Begun:
        begun = self._book.begin(stage, items, worker)
        if begun.lost:
            dead = {worker for deaths in begun.deaths for worker in deaths} - self._dead
            self._dead |= dead
            self._meters.record(metrics.DEATHS, len(dead))
            self._meters.record(metrics.RETRIES, begun.lost, {"stage": stage})
        return begun

    async def end(self, stage: str, items: Sequence[Item]) -> None:
        self._book.end(stage, items)

    async def retire(self, image: str) -> None:
        self._book.retire(image)
        async with self._changed:
            self._inside.discard(image)
            self._tell()
            self._changed.notify_all()

    def _tell(self) -> None:
        self._meters.record(metrics.IN_FLIGHT, len(self._inside))
        self._meters.record(metrics.WAITING, self._waiting)

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def is_empty(self) -> bool:
        return not self._inside


class _Ledger:
    """The ledger as stages and driver see it: a handle that goes wherever Ray sends it."""

    def __init__(self, actor: Any, meters: _Meters) -> None:
        self._actor, self._meters = actor, meters
        self._since = time.monotonic()  # this process was at work, or has waited

    def __reduce__(self) -> tuple[type[_Ledger], tuple[Any, _Meters]]:
        return _Ledger, (self._actor, self._meters)

    def admit(self, images: Sequence[str]) -> bool:
        return bool(ray.get(self._actor.admit.remote(list(images))))

    def begin(self, stage: str, items: Sequence[Item]) -> Begun:
        worker = Worker(ray.get_runtime_context().get_node_id(), os.getpid())
        begun: Begun = ray.get(self._actor.begin.remote(stage, list(items), worker))
        self._spent(metrics.IDLE_SECONDS, stage)
        return begun

    def end(self, stage: str, items: Sequence[Item]) -> None:
        self._spent(metrics.BUSY_SECONDS, stage)
        self._actor.end.remote(stage, list(items))  # nothing waits: one that is lost costs a second attempt at most

    def retire(self, image: str) -> None:
        self._actor.retire.remote(image)

    def close(self) -> None:
        self._actor.close.remote()

    def is_empty(self) -> bool:
        return bool(ray.get(self._actor.is_empty.remote()))

    def _spent(self, metric: Metric, stage: str) -> None:
        if stage in (CaptionStage.name, RestoreStage.name):  # whose workers stay, and are dear
            self._since, since = time.monotonic(), self._since
            self._meters.record(metric, self._since - since, {"stage": stage})


@contextmanager
def _ledger(runtime: Runtime, images: int, meters: _Meters, stop: threading.Event) -> Iterator[_Ledger]:
    """A ledger on the driver's node, closed when ``stop`` is set."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(_LedgerActor)
    ledger = _Ledger(remote.remote(runtime.images_in_flight, images, meters), meters)

    def close_on_stop(over: threading.Event) -> None:
        while not over.wait(0.2):
            if stop.is_set():
                ledger.close()

    with alongside(close_on_stop, "drain"):
        yield ledger


def _is_lost(node: str) -> bool:
    return not any(found["NodeID"] == node and found["Alive"] for found in ray.nodes())


# --- metrics -------------------------------------------------------------------------------------------------------


class _Meters:
    """The metrics of a run in this process, wherever Ray has sent it."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._made: dict[Metric, Any] = {}

    def __reduce__(self) -> tuple[type[_Meters], tuple[str]]:
        return _Meters, (self._run_id,)

    def record(self, metric: Metric, value: float, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        """Add ``value`` to a counter, set a gauge to it, or put it into a histogram; zero adds nothing."""
        if metric not in self._made:
            self._made[metric] = _made(metric)
        made, every = self._made[metric], {metrics.RUN: self._run_id, **tags}
        if metric.kind == "gauge":
            made.set(value, every)
        elif metric.kind == "histogram":
            made.observe(value, every)
        elif value:
            made.inc(value, every)


def _made(metric: Metric) -> Any:
    tags = (metrics.RUN, *metric.tags)
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.description, list(metric.bounds), tags)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, tags)


def _count(row: Row, meters: _Meters) -> None:
    """Count an image that has come to its end."""
    status = "recovered" if row["recovered"] else row["status"]
    meters.record(metrics.IMAGES, 1, {"status": status, "cause": row["failure_kind"] or ""})
    if status == "done":
        meters.record(metrics.MEGAPIXELS, (row["output_width"] or 0) * (row["output_height"] or 0) / 1e6)
    for stage in STAGES:
        if (seconds := row[f"seconds_{stage}"]) is not None:
            meters.record(metrics.STAGE_SECONDS, seconds, {"stage": stage})


# --- Ray -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Need:
    """What each worker of a pool asks for."""

    work: str
    gpus: float
    accelerator: str | None

    def is_met_by(self, node: Mapping[str, float]) -> bool:
        return node.get("GPU", 0) >= self.gpus and (
            self.accelerator is None or f"accelerator_type:{self.accelerator}" in node
        )

    def __str__(self) -> str:
        return f"a {self.work} worker asks for {self.gpus:g} GPUs" + (
            f" of kind {self.accelerator}" if self.accelerator else ""
        )


def _caption_need(runtime: Runtime) -> _Need:
    share = runtime.caption_gpus_per_actor
    return _Need("captioning", runtime.gpus_per_actor / 2 if share is None else share, runtime.caption_accelerator)


def _look_for_place(need: _Need, runtime: Runtime, listener: Listener) -> None:
    """Say if no node has what a worker asks for: Ray would wait for one, and only a cluster may yet bring it."""
    if any(need.is_met_by(node["Resources"]) for node in ray.nodes() if node["Alive"]):
        return
    if runtime.address is None:
        raise EngineError(f"{need}, which this machine does not have; change section runtime, or name a cluster")
    listener.on_warning(f"{need}, which no node of the cluster has yet; waiting until one comes")


@contextmanager
def _stderr_only_on_failure() -> Iterator[None]:
    """Hold back what native code writes to stderr, and show it if the body fails."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextmanager
def _ray(runtime: Runtime, verbose: bool) -> Iterator[None]:
    """A local Ray, or a connection to a cluster, that says nothing unless something is wrong; or all, ``verbose``."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # threads of several workers share the cores; spinning ones would take them from each other
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")
    # glibc would give every array of some megabytes back to the system, and pay for each of its pages again
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 * 2**20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(128 * 2**20))
    # Ray ends workers that wait for a second, and the next ones import for seconds what those had
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    # Ray Data shares a cluster out among its drivers; one that was killed keeps its share for so long, else 3 minutes
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
    if not verbose:  # Ray's C++ side reports harmless things as errors on stderr
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    handler = signal.getsignal(signal.SIGTERM)
    held = contextlib.nullcontext() if verbose else _stderr_only_on_failure()
    with held, contextlib.redirect_stdout(sys.stderr):  # ... and that its log level was set
        ray.init(
            address=runtime.address or "local",
            num_cpus=None if runtime.address else runtime.cpus,
            include_dashboard=None if runtime.address else False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = verbose
    context.execution_options.preserve_order = False
    context.target_max_block_size = BLOCK_BYTES
    context.execution_no_progress_timeout_s = -1  # deadlines are the stages'
    context.max_consecutive_actor_init_deaths = 3  # a model that ends its process ends the run
    logging.getLogger("ray.data").setLevel(logging.INFO if verbose else logging.ERROR)
    # Ray tells of workers that died on stdout, which is for data; the ledger tells it in our words
    with contextlib.redirect_stdout(sys.stderr if verbose else io.StringIO()):
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _watched(runtime: Runtime) -> Iterator[None]:
    """Raise ClusterError in the body when Ray is gone: within a minute it would end this process, without a word."""
    context = ray.get_runtime_context()
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    places = {  # with how long nobody may listen there
        "Ray's head": (context.gcs_address, _SILENT_S if runtime.address else _GONE_S),
        "Ray on this machine": (f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}", _GONE_S),
    }
    main, gone = threading.get_ident(), ""

    def watch(over: threading.Event) -> None:
        nonlocal gone
        heard = dict.fromkeys(places, time.monotonic())
        while not gone and not over.wait(1):
            for name, (address, patience) in places.items():
                error = _unreachable(address)
                if error is None:
                    heard[name] = time.monotonic()
                silent = time.monotonic() - heard[name]
                if silent > (patience if isinstance(error, ConnectionRefusedError) else _SILENT_S):
                    gone = f"{name} ({address}) has not answered for {silent:.0f} s: {error}"
        if gone:
            signal.pthread_kill(main, signal.SIGUSR1)  # wakes it, whatever it waits for

    def give_up(number: int, frame: FrameType | None) -> None:
        raise ClusterError(f"{gone}; the same command resumes, and Ray's logs may say why")

    before = signal.signal(signal.SIGUSR1, give_up)
    try:
        with alongside(watch, "watch"):
            yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _unreachable(address: str) -> OSError | None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
        return error
    return None


# --- jobs ----------------------------------------------------------------------------------------------------------


def submit(address: str, job: str, command: str, folder: str | None) -> None:
    """Start ``command`` as a Ray job of this name on the cluster whose dashboard is at ``address``.

    It runs in a copy of the local ``folder``, if one is given. Raises ClusterError.
    """
    # so that a job that is stopped may finish the images on their way, as after any SIGTERM
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}}
    if folder is not None:
        environment["working_dir"] = folder
    with _dashboard(address) as client:
        client.submit_job(entrypoint=command, submission_id=job, runtime_env=environment)


def follow(address: str, job: str, on_text: Callable[[str], None]) -> int:
    """Hand on what a job writes until it has ended; returns its exit code. Raises ClusterError."""

    async def tail(client: JobSubmissionClient) -> None:
        async for text in client.tail_job_logs(job):
            on_text(text)

    with _dashboard(address) as client:
        asyncio.run(tail(client))
        while not client.get_job_status(job).is_terminal():
            time.sleep(1)
        ended = client.get_job_info(job)
        if ended.driver_exit_code is None:
            raise ClusterError(f"job {job} ended as {ended.status} without an exit code: {ended.message}")
        return int(ended.driver_exit_code)


@contextmanager
def _dashboard(address: str) -> Iterator[JobSubmissionClient]:
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 (a run should not wait a second for it)

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield JobSubmissionClient(address)
    except ClusterError:
        raise
    except Exception as error:  # of several libraries
        raise ClusterError(f"{address}: {error}; a job that was started goes on without this command") from error
