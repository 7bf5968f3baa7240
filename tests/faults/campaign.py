"""Kills at random moments, and what must hold however a run was disturbed: python -m tests.faults.campaign --kills 200.

A Ray cluster of three nodes on this machine stays up, as a real one would; drivers come and go on it. In each round an
archive is restored while whatever makes it up is killed with SIGKILL: the driver, a restoring actor, a CPU worker, the
ledger, a whole node. A driver that was killed is started again. When a run has ended by itself, the output is compared
with that of an undisturbed run.
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from tests.runs import COMMAND, manifest, photograph

IMAGES = 16
TARGETS = {"driver": 4, "actor": 3, "worker": 4, "ledger": 1, "node": 2}  # and how often, relative to each other
QUARANTINED = ("poison", "hang")


@dataclass
class Figures:
    """What a campaign did and saw."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    drivers: int = 0
    done: int = 0
    recovered: int = 0  # committed by a run that was killed before it could log them
    set_aside: int = 0  # images that happened to be in two workers that were killed
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One JSON object."""
        return json.dumps(self.__dict__ | {"kills": dict(self.kills), "total_kills": sum(self.kills.values())})


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


def processes(*titles: str) -> list[int]:
    """The Ray processes whose title begins with one of these."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().split(b"\0")[0].decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if title.startswith(titles):
            found.append(int(path.parent.name))
    return sorted(found)


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
    victims = processes(*titles)
    if not victims:
        return False
    try:
        os.kill(rng.choice(victims), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def outputs(folder: Path) -> dict[str, bytes]:
    """Every image of an output folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The run log of an output folder, as the product reads it."""
    from supir_batch import runlog

    return list(runlog.read_log(str(folder)).to_pylist())


def start(path: Path, cluster: Nodes, command: str = "run") -> subprocess.Popen[str]:
    """A driver."""
    return subprocess.Popen(
        [*COMMAND, command, str(path), "--json", "--set", f"runtime.address={cluster.address}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def archive(folder: Path) -> Path:
    """Images of which one is cut into tiles, and their manifest."""
    (folder / "in").mkdir(parents=True)
    for i in range(IMAGES):
        photograph(folder / f"in/{i:02d}.png", 420, 300, seed=i)
    photograph(folder / "in/large.png", 900, 700, seed=99)
    return manifest(
        folder,
        engine={"name": "lanczos", "upscale": 2},
        tiling={"max_pixels": 1_000_000, "overlap": 64},
        runtime={"images_in_flight": 8, "actors": 2},
    )


def disturbed(path: Path, cluster: Nodes, rng: random.Random, kills: int, figures: Figures) -> None:
    """One round: a run that is struck ``kills`` times at most, to its end; what is wrong then goes to the figures."""
    out, stamps, struck = path.parent / "out", dict[str, int](), 0
    where = f"round {figures.rounds}"
    driver, command = start(path, cluster), "run"
    figures.drivers += 1
    while True:
        try:
            driver.wait(rng.uniform(0.5, 12.0) if struck < kills else 300)
        except subprocess.TimeoutExpired:
            if struck >= kills:
                driver.kill()
                figures.wrong.append(f"{where}: the run did not end within 300 s of the last kill")
                return
            target = rng.choices(list(TARGETS), list(TARGETS.values()))[0]
            if strike(target, driver, cluster, rng):
                struck += 1
                figures.kills[target] += 1
            if target != "driver":
                continue
        told, said = driver.communicate()
        for found in out.glob("*.png"):  # what is committed when a driver dies must never be written again
            stamps.setdefault(found.name, found.stat().st_mtime_ns)
        if driver.returncode == 0:
            break
        if driver.returncode == 3:
            kinds = json.loads(told)["failed"]
            if not set(kinds) <= set(QUARANTINED):
                figures.wrong.append(f"{where}: failed {kinds}: {said[-2000:]}")
                return
            figures.set_aside += sum(kinds.values())
            command = "retry"
        elif driver.returncode not in (-signal.SIGKILL, 4):
            figures.wrong.append(f"{where}: the driver ended with {driver.returncode}: {said[-2000:]}")
            return
        driver = start(path, cluster, command)
        figures.drivers += 1
    figures.wrong += [f"{where}: {problem}" for problem in problems(path, stamps, figures)]


def problems(path: Path, stamps: dict[str, int], figures: Figures) -> list[str]:
    """What does not hold of an output after its run has ended."""
    from supir_batch.verify import verify

    out, expected = path.parent / "out", path.parent.parent / "undisturbed"
    wrong = []
    if outputs(out) != outputs(expected):
        wrong.append("the images are not those of an undisturbed run")
    wrong += [f"{name} was written again" for name, at in stamps.items() if (out / name).stat().st_mtime_ns != at]
    logged = rows(out)
    done = Counter(row["id"] for row in logged if row["status"] == "done")
    if set(done.values()) != {1} or set(done) != {found.name for found in (path.parent / "in").iterdir()}:
        wrong.append(f"the log does not name every image once: {done}")
    figures.done += len(done)
    figures.recovered += sum(bool(row["recovered"]) for row in logged)
    left = [
        str(found)
        for found in out.rglob("*")
        if found.is_file() and ("_parts" in found.parts or ".partial" in found.name)
    ]
    wrong += [f"{name} was left behind" for name in left]
    wrong += [f"verify: {problem}" for checked in verify(str(out), None) for problem in checked.problems]
    return wrong


def campaign(folder: Path, kills: int, seed: int, per_round: int = 6, minutes: float = 600.0) -> Figures:
    """Rounds until so many kills were made, or so much time has passed."""
    figures, rng, began = Figures(seed), random.Random(seed), time.monotonic()
    with nodes() as cluster:
        path = archive(folder / "undisturbed-run")
        first = start(path, cluster)
        _, said = first.communicate()
        if first.returncode != 0:
            raise RuntimeError(f"the undisturbed run failed: {said}")
        (folder / "undisturbed-run/out").rename(folder / "undisturbed")
        while sum(figures.kills.values()) < kills and time.monotonic() - began < minutes * 60 and not figures.wrong:
            figures.rounds += 1
            wanted = min(per_round, kills - sum(figures.kills.values()))
            disturbed(archive(folder / f"round-{figures.rounds:03d}"), cluster, rng, wanted, figures)
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
