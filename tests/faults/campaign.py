"""Kills at random moments, and what must hold however a run was disturbed: python -m tests.faults.campaign --kills 200.

A Ray cluster of three nodes on this machine stays up, as a real one would; drivers come and go on it. In each round an
archive is restored while whatever makes it up is killed with SIGKILL: the driver, a restoring actor, a CPU worker, the
ledger, a whole node. A driver that was killed is started again. When a run has ended by itself, the output is compared
with that of an undisturbed run. Every other round writes to an S3 store behind a proxy that answers 10% of the requests
with errors, resets and cut bodies, and delays all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from supir_batch import runlog, store
from supir_batch.verify import verify
from tests.runs import COMMAND, manifest, photograph
from tests.servers.faulty_proxy import Faults, faulty_proxy
from tests.servers.swift import swift_server

IMAGES = 12
FAULTS = Faults(unavailable=0.04, reset=0.02, cut_request=0.02, cut_response=0.02, latency_s=0.05)
TARGETS = {"driver": 4, "actor": 3, "worker": 4, "ledger": 1, "node": 2}  # and how often, relative to each other
QUARANTINED = ("poison", "hang")
_AT_WORK = ("ray::MapBatches(decode_stage)", "ray::MapBatches(write_stage)")


@dataclass
class Figures:
    """What a campaign did and saw."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)  # that requests to the store met
    rounds: int = 0
    drivers: int = 0
    done: int = 0
    recovered: int = 0  # committed by a run that was killed before it could log them
    set_aside: int = 0  # images that happened to be in two workers that were killed
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One JSON object."""
        return json.dumps(self.__dict__ | {"total_kills": sum(self.kills.values())})


class Nodes:
    """A cluster of a head, on which drivers run, and two nodes that may be lost."""

    def __init__(self) -> None:
        memory = 150 * 2**20
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": memory},
        )
        self._memory = memory
        self._nodes = [self._add(), self._add()]
        self.address = self._cluster.address

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=self._memory)

    def lose(self, index: int) -> None:
        """Kill a node's raylet and all that it has started; a new one comes in its place."""
        self._cluster.remove_node(self._nodes[index], allow_graceful=False)
        self._nodes[index] = self._add()

    def processes(self, *titles: str) -> list[int]:
        """The workers of this cluster, and of no other, whose title begins with one of these."""
        raylets = {
            started.process.pid
            for node in self._cluster.list_all_nodes()
            for started in node.all_processes.get(PROCESS_TYPE_RAYLET, [])
        }
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                title = (path / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if title.startswith(titles) and parent in raylets:
                found.append(int(path.name))
        return sorted(found)

    def shutdown(self) -> None:
        """End everything."""
        self._cluster.shutdown()


@contextmanager
def nodes() -> Iterator[Nodes]:
    """A cluster for the body."""
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.shutdown()


def strike(target: str, driver: subprocess.Popen[str], cluster: Nodes, rng: random.Random) -> bool:
    """Kill something; False if there was nothing of the kind."""
    if target == "driver":
        driver.kill()
        driver.wait()
        return True
    if target == "node":
        cluster.lose(rng.randrange(2))
        return True
    titles = {
        "actor": ("ray::MapWorker(MapBatches(RestoreStage))",),
        "worker": ("ray::MapBatches(decode_stage)", "ray::MapBatches(write_stage)", "ray::MapBatches(feed_stage)"),
        "ledger": ("ray::_LedgerActor",),
    }[target]
    victims = cluster.processes(*titles)
    if not victims:
        return False
    try:
        os.kill(rng.choice(victims), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def outputs(uri: str) -> dict[str, str]:
    """The hash of every image of an output folder."""
    return {store.name(one.uri): store.sha256(one.uri) for one in store.list_tree(uri) if _is_image(uri, one.uri)}


def stamps(uri: str) -> dict[str, str]:
    """When every image of an output folder was written, as its store says."""
    found = {}
    for one in store.list_tree(uri):
        if _is_image(uri, one.uri):
            filesystem, path = store.filesystem(one.uri)
            facts = filesystem.info(path)
            found[store.name(one.uri)] = str(facts.get("LastModified") or facts["mtime"])
    return found


def _is_image(uri: str, found: str) -> bool:
    return store.parent(found) == uri and found.endswith(".png") and not store.is_partial(found)


def start(path: Path, cluster: Nodes, command: str = "run") -> subprocess.Popen[str]:
    """A driver."""
    return subprocess.Popen(
        [*COMMAND, command, str(path), "--json", "--set", f"runtime.address={cluster.address}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def archive(folder: Path, output: str) -> Path:
    """Images of which one is cut into tiles, and their manifest."""
    (folder / "in").mkdir(parents=True)
    for i in range(IMAGES):
        photograph(folder / f"in/{i:02d}.png", 420, 300, seed=i)
    photograph(folder / "in/large.png", 900, 700, seed=99)
    return manifest(
        folder,
        output={"uri": output},
        engine={"name": "lanczos", "upscale": 2},
        tiling={"max_pixels": 1_000_000, "overlap": 64},
        runtime={"images_in_flight": 8, "actors": 2},
    )


def disturbed(path: Path, out: str, cluster: Nodes, rng: random.Random, kills: int, figures: Figures) -> list[str]:
    """One round: a run that is struck ``kills`` times at most, to its end. Returns what is wrong with it then."""
    written, struck = dict[str, str](), 0
    driver, command = start(path, cluster), "run"
    figures.drivers += 1
    while True:
        try:
            driver.wait(_moment(rng, driver, cluster) if struck < kills else 300)
        except subprocess.TimeoutExpired:
            if struck >= kills:
                driver.kill()
                driver.communicate()
                return ["the run did not end within 300 s of the last kill"]
            target = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
            if strike(target, driver, cluster, rng):
                struck += 1
                figures.kills[target] += 1
            if target != "driver":
                continue
        told, said = driver.communicate()
        written = stamps(out) | written  # what is committed when a driver ends must never be written again
        if driver.returncode == 0:
            break
        if driver.returncode == 3:
            kinds = json.loads(told)["failed"]
            if not set(kinds) <= set(QUARANTINED):
                return [f"failed {kinds}: {said[-2000:]}"]
            figures.set_aside += sum(kinds.values())
            command = "retry"
        elif driver.returncode not in (-signal.SIGKILL, 4):
            return [f"the driver ended with {driver.returncode}: {said[-2000:]}"]
        driver = start(path, cluster, command)
        figures.drivers += 1
    return problems(path, out, written, figures)


def _moment(rng: random.Random, driver: subprocess.Popen[str], cluster: Nodes) -> float:
    """Seconds to let pass before something is struck: mostly while images are worked on, else while a run begins."""
    if rng.random() < 0.8:
        end = time.monotonic() + 60
        while driver.poll() is None and time.monotonic() < end and not cluster.processes(*_AT_WORK):
            time.sleep(0.05)
    return rng.uniform(0.0, 4.0)


def problems(path: Path, out: str, written: dict[str, str], figures: Figures) -> list[str]:
    """What does not hold of an output after its run has ended."""
    wrong = []
    if outputs(out) != outputs(str(path.parent.parent / "undisturbed")):
        wrong.append("the images are not those of an undisturbed run")
    now = stamps(out)
    wrong += [f"{name} was written again" for name, at in written.items() if now[name] != at]
    logged = list(runlog.read_log(out).to_pylist())
    done = Counter(row["id"] for row in logged if row["status"] == "done")
    if set(done.values()) != {1} or set(done) != {found.name for found in (path.parent / "in").iterdir()}:
        wrong.append(f"the log does not name every image once: {done}")
    figures.done += len(done)
    figures.recovered += sum(bool(row["recovered"]) for row in logged)
    left = [one.uri for one in store.list_tree(out) if "/_parts/" in one.uri or store.is_partial(one.uri)]
    wrong += [f"{uri} was left behind" for uri in left]
    return wrong + [f"verify: {problem}" for checked in verify(out, None) for problem in checked.problems]


def campaign(folder: Path, kills: int, seed: int, per_round: int = 16, minutes: float = 600.0) -> Figures:
    """Rounds until so many kills were made, or so much time has passed."""
    figures, rng, began = Figures(seed), random.Random(seed), time.monotonic()
    with ExitStack() as stack:
        server = stack.enter_context(swift_server(folder / "store"))
        proxy = stack.enter_context(faulty_proxy(server.port, Faults(), seed))
        os.environ.update(server.environment(proxy.url))
        store.filesystem("s3://campaign")[0].mkdir("campaign")
        cluster = stack.enter_context(nodes())
        path = archive(folder / "first", str(folder / "undisturbed"))
        first = start(path, cluster)
        _, said = first.communicate()
        if first.returncode != 0:
            raise RuntimeError(f"the undisturbed run failed: {said}")
        while sum(figures.kills.values()) < kills and time.monotonic() - began < minutes * 60 and not figures.wrong:
            figures.rounds += 1
            name = f"round-{figures.rounds:03d}"
            remote = figures.rounds % 2 == 0
            proxy.faults = FAULTS if remote else Faults()
            out = f"s3://campaign/{name}" if remote else str(folder / name / "out")
            wanted = min(per_round, kills - sum(figures.kills.values()))
            wrong = disturbed(archive(folder / name, out), out, cluster, rng, wanted, figures)
            figures.wrong += [f"{name}: {problem}" for problem in wrong]
            figures.faults = Counter({kind: count for kind, count in proxy.met.items() if kind != "none"})
            figures.seconds = round(time.monotonic() - began, 1)
            print(figures.text(), file=sys.stderr, flush=True)
    return figures


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="supir-batch-campaign-") as folder:
        figures = campaign(Path(folder), chosen.kills, chosen.seed, minutes=chosen.minutes)
    print(figures.text())
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
