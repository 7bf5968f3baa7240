"""Restore with any network that torch.export saved: python network_engine.py manifest.yaml network.pt2"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from supir_batch import store
from supir_batch.driver import Limits, execute
from supir_batch.events import Talk
from supir_batch.identity import settings_hash
from supir_batch.manifest_file import load_manifest
from supir_batch.plan import make_plan


class NetworkEngine:
    """Takes [1, 3, H, W] of any size to the same; values in [0, 1]."""

    execution = ""  # what else the log is to say of how it worked

    def __init__(self, path, device):
        self.device = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
        self.network = torch.export.load(path).module().to(self.device)

    def restore(self, tickets, tiles):
        """Tiles: [h, w, 3] float32 each. Tickets: all that is known about them."""
        return [self._restored(tile) for tile in tiles]

    def restore_again(self, ticket, tile):
        """None: without a seed another attempt would be the same."""

    @torch.inference_mode()
    def _restored(self, tile):
        pixels = torch.from_numpy(np.ascontiguousarray(tile.transpose(2, 0, 1)))[None].to(self.device)
        return self.network(pixels).clamp(0, 1)[0].permute(1, 2, 0).contiguous().cpu().numpy()


def ours(todo, path, sha256):
    """The work under the engine's own name: log, record and metadata say it, the work's identity is made of it."""
    settings = replace(todo.job.settings, engine="network", engine_name=store.name(path), model_sha256=sha256)
    return todo._replace(job=replace(todo.job, settings=settings, settings_sha256=settings_hash(settings)))


if __name__ == "__main__":
    uri, path = sys.argv[1], str(Path(sys.argv[2]).resolve())
    manifest = load_manifest(uri, {"engine.name": "lanczos"})  # no model of this package, no prompts, no captions
    plan, sha256 = make_plan(manifest, uri, ""), store.sha256(path)
    plan = replace(plan, todo=[ours(todo, path, sha256) for todo in plan.todo])
    summary = execute(manifest, uri, plan, Limits(), Talk(), lambda model, device: NetworkEngine(path, device))
    print(f"{summary.done} done, {dict(summary.failed)} failed")
    sys.exit(summary.exit_code)
