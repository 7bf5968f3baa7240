"""Ray clusters of several nodes on this machine, each node small."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

_MEMORY = 100 * 2**20


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and where it can be reached."""

    cluster: Cluster
    dashboard: str
    metrics: list[str]  # Prometheus endpoints, of nodes that were added too

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, cpus: int, **resources: float) -> Any:
        """Another node."""
        port = free_port()
        self.metrics.append(f"http://127.0.0.1:{port}/metrics")
        return self.cluster.add_node(
            num_cpus=cpus, object_store_memory=_MEMORY, resources=resources, metrics_export_port=port
        )


@contextmanager
def cluster(bin_folder: Path) -> Iterator[Head]:
    """A head with dashboard and Prometheus endpoint; ``supir-batch`` is a command on it, as after an installation."""
    command = bin_folder / "supir-batch"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m supir_batch "$@"\n')
    command.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{bin_folder}{os.pathsep}{path}"  # which the head's processes inherit
    dashboard, metrics = free_port(), free_port()
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": dashboard,
            "metrics_export_port": metrics,
            "object_store_memory": _MEMORY,
            "_system_config": {"metrics_report_interval_ms": 500},
        },
    )
    try:
        yield Head(made, f"http://127.0.0.1:{dashboard}", [f"http://127.0.0.1:{metrics}/metrics"])
    finally:
        made.shutdown()
        os.environ["PATH"] = path


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def restorers(node: Any) -> list[int]:
    """The processes of restoring workers on a node: below its raylet."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title = (path / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if title.startswith("ray::MapWorker(MapBatches(RestoreStage))") and int(fields[1]) == raylet(node):
            found.append(int(path.name))
    return found


def raylet(node: Any) -> int:
    """The process that starts a node's workers."""
    (process,) = node.all_processes["raylet"]
    return int(process.process.pid)
