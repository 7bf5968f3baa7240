"""The numbers of a run, for whoever watches it while it goes on: what there is to count.

Ray carries them: its agent on each node offers them to Prometheus, as ``ray_`` and the name, counters with ``_total``.
docs/operations.md says where; jobs/grafana.json shows them. What is true afterwards stands in the run log.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RUN = "run_id"  # a tag of every metric


@dataclass(frozen=True)
class Metric:
    """One number, or one for each combination of its tags."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()  # besides RUN
    bounds: tuple[float, ...] = ()  # of a histogram's bars


IMAGES = Metric(
    "supir_batch_images",
    "counter",
    "Images that came to their end: done, recovered (committed by a killed run) or failed, with the cause.",
    ("status", "cause"),
)
MEGAPIXELS = Metric("supir_batch_megapixels", "counter", "Megapixels of restored outputs.")
STAGE_SECONDS = Metric(
    "supir_batch_stage_seconds",
    "histogram",
    "Seconds of one stage for one image; of an image that was cut, for its last tile.",
    ("stage",),
    (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0),
)
IN_FLIGHT = Metric("supir_batch_images_in_flight", "gauge", "Images between reading and writing.")
WAITING = Metric("supir_batch_images_waiting", "gauge", "Images that were not let in yet.")
BUSY_SECONDS = Metric(
    "supir_batch_busy_seconds", "counter", "Seconds that captioning or restoring workers were at work.", ("stage",)
)
IDLE_SECONDS = Metric(
    "supir_batch_idle_seconds",
    "counter",
    "Seconds that captioning or restoring workers waited for work; counted when it comes.",
    ("stage",),
)
RETRIES = Metric(
    "supir_batch_retries", "counter", "Tiles begun again, because their worker or its node was lost.", ("stage",)
)
DEATHS = Metric("supir_batch_worker_deaths", "counter", "Workers that died at work, or were ended at a deadline.")

METRICS = (
    IMAGES,
    MEGAPIXELS,
    STAGE_SECONDS,
    IN_FLIGHT,
    WAITING,
    BUSY_SECONDS,
    IDLE_SECONDS,
    RETRIES,
    DEATHS,
)
