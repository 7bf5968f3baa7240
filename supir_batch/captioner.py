"""Captioners: what says in words what the robust encoder sees behind an image. Loaded once per actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from supir_batch import model_folder
from supir_batch.engine import Device, fix_threads, to_tensor
from supir_batch.types import FloatImage, Job, ModelRef, TileTicket

if TYPE_CHECKING:
    import torch

    from supir_model.first_stage import FirstStage
    from supir_model.llava import LlavaCaptioner


class Captioner(Protocol):
    """Captions images. A caption depends on its image and settings alone, never on the other images of a call."""

    device: str  # for the log

    def caption(self, tickets: Sequence[TileTicket], previews: Sequence[FloatImage]) -> list[str]:
        """One line for each image behind a ticket; previews: the whole images, reduced, [h, w, 3] in [0, 1]."""
        ...


class AttributeCaptioner:
    """What image statistics say; needs no weights but the robust encoder's."""

    def __init__(self, model: ModelRef | None, device: Device) -> None:
        self._eyes = _RobustEyes(model, device)
        self.device = self._eyes.device

    def caption(self, tickets: Sequence[TileTicket], previews: Sequence[FloatImage]) -> list[str]:
        """Tone, brightness, contrast and detail of each image."""
        from supir_model.caption import describe  # noqa: PLC0415

        return [
            describe(self._eyes.see(preview)[None], ticket.job.settings.material)[0]
            for ticket, preview in zip(tickets, previews, strict=True)
        ]


class VisionLanguageCaptioner:
    """What a vision-language model answers; all jobs of a run ask the same one, with the same options."""

    def __init__(self, job: Job, device: Device) -> None:
        from supir_model.llava import CaptionerOptions, LlavaCaptioner  # noqa: PLC0415

        settings = job.settings
        self._eyes = _RobustEyes(job.model, device)
        self.device = self._eyes.device
        self._model: LlavaCaptioner = LlavaCaptioner.load(
            job.captioner,
            settings.captioner_identity,
            CaptionerOptions(
                max_new_tokens=settings.caption_max_new_tokens,
                temperature=settings.caption_temperature,
                top_p=settings.caption_top_p,
                template=settings.caption_template or None,
                precision=settings.caption_precision or "float32",
                quantization=settings.caption_quantization or "none",
            ),
            self.device,
        )

    def caption(self, tickets: Sequence[TileTicket], previews: Sequence[FloatImage]) -> list[str]:
        """The model's answers, each drawn with its image's seed where a temperature asks for that."""
        from supir_model.llava import CaptionRequest  # noqa: PLC0415

        return self._model.caption(
            [
                CaptionRequest(self._eyes.see(preview), ticket.job.settings.caption_question, ticket.seed)
                for ticket, preview in zip(tickets, previews, strict=True)
            ]
        )


def load_captioner(job: Job, device: Device) -> Captioner:
    """The captioner that the settings of ``job`` name, ready to work."""
    if job.settings.prompt_source == "llava":
        return VisionLanguageCaptioner(job, device)
    return AttributeCaptioner(job.model, device)


def identity(model: str, revision: str | None) -> str:
    """What the captioner of mode ``llava`` is, part of every fingerprint. Raises WeightsError."""
    from supir_model.llava import identify  # noqa: PLC0415

    return identify(model, revision)


class _RobustEyes:
    """The part of a SUPIR model that sees behind degradation."""

    def __init__(self, model: ModelRef | None, device: Device) -> None:
        from supir_model.first_stage import FirstStage  # noqa: PLC0415

        if model is None:
            raise ValueError("an engine without a model reads no captions")
        fix_threads()
        self._first_stage: FirstStage = FirstStage.load(
            model_folder.local(model.uri), None if device == "auto" else device, model.precision
        )
        self.device = str(self._first_stage.device)

    def see(self, preview: FloatImage) -> torch.Tensor:
        """[h, w, 3] in [0, 1] to [3, h, w] in [-1, 1], as the robust encoder sees it."""
        return self._first_stage.see(to_tensor(preview))
