"""Captions from a vision-language model: LLaVA-1.5, or any other that transformers loads as image-text-to-text.

A caption depends on its own request alone. Unequal prompts are padded on the left, so that every answer begins right
after its question; where an answer is drawn at random, each request has a random stream of its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.utils.hub import cached_file

from supir_model.errors import RequestError, WeightsError

Quantization = Literal["none", "8bit", "4bit"]
Precision = Literal["float32", "bfloat16", "float16"]

_COMMIT = "commit:"
# Files that decide what a captioner says; notes, pictures and weights in other formats beside them do not.
_DECIDING = {".json", ".safetensors", ".jinja", ".model", ".txt"}
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError)


@dataclass(frozen=True)
class CaptionerOptions:
    """How a captioner is loaded and asked.

    temperature: 0 takes the likeliest token each time; above 0 tokens are drawn from the smallest set whose
    probability reaches ``top_p`` (release: 0.2 and 0.7). template: the whole prompt around ``{image}`` and
    ``{question}``; None: the chat template that comes with the model.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    template: str | None = None
    precision: Precision = "float32"
    quantization: Quantization = "none"


@dataclass(frozen=True)
class CaptionRequest:
    """One image to caption.

    image: [3, H, W] float32 RGB in [-1, 1], any size; pass what the robust encoder sees. seed: [0, 2^63), used when
    the temperature is above 0.
    """

    image: Tensor
    question: str
    seed: int = 0


class LlavaCaptioner:
    """A vision-language model with its processor, on one device. The captions of a call come in its order."""

    def __init__(self, model: Any, processor: Any, options: CaptionerOptions, device: torch.device) -> None:
        self.device = device
        self._model, self._processor, self._options = model, processor, options
        self._dtype = getattr(torch, options.precision)

    @classmethod
    def load(
        cls, model: str, identity: str = "", options: CaptionerOptions | None = None, device: str | None = None
    ) -> LlavaCaptioner:
        """Load a captioner: ``model`` is the absolute path of a folder, or a hub id (``llava-hf/llava-1.5-7b-hf``).

        identity: as :func:`identify` gave it; a hub's model is then loaded at that very commit. device: torch device,
        default CUDA where there is one. Raises WeightsError.
        """
        chosen = options or CaptionerOptions()
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        quantization = _quantization(model, chosen, target)
        revision = identity.removeprefix(_COMMIT) if identity.startswith(_COMMIT) else "main"
        try:
            processor = AutoProcessor.from_pretrained(model, revision=revision)  # type: ignore[no-untyped-call]
            network: Any = AutoModelForImageTextToText.from_pretrained(
                model,
                revision=revision,
                dtype=getattr(torch, chosen.precision),
                use_safetensors=True,  # the other format is a pickle, which runs code
                quantization_config=quantization,
                device_map=None if quantization is None else {"": target},
            )
        except _LOAD_ERRORS as error:
            raise WeightsError(f"captioner {_short(model)} cannot be loaded: {_first_line(error)}") from error
        if quantization is None:
            try:
                network.to(target)
            except torch.OutOfMemoryError as error:
                # not done unasked: a quantized model says other words, so that is a setting
                raise WeightsError(
                    f"captioner {_short(model)} does not fit into the memory of {target}; set its quantization to "
                    "'8bit' or '4bit', or give it a larger device"
                ) from error
        _prepare(model, network, processor, chosen)
        return cls(network.eval().requires_grad_(False), processor, chosen, target)

    @torch.inference_mode()
    def caption(self, requests: Sequence[CaptionRequest]) -> list[str]:
        """One line of text per request. Raises RequestError for an image that is not [3, H, W].

        In float32 an answer does not depend on the company it was computed in; in half precision a near tie between
        two words may.
        """
        if not requests:
            return []
        prompts = [self._prompt(request.question) for request in requests]
        bos = self._processor.tokenizer.bos_token
        inputs = self._processor(
            images=[self._pixels(request.image) for request in requests],
            text=prompts,
            padding=True,
            input_data_format="channels_first",  # an image of 1 to 3 pixels could be taken for either
            add_special_tokens=not (bos and prompts[0].startswith(bos)),  # some chat templates begin with it
            return_tensors="pt",
        ).to(self.device, self._dtype)
        drawing = LogitsProcessorList()
        if self._options.temperature > 0:
            seeds = [request.seed for request in requests]
            drawing.append(_SeededDraw(seeds, self._options.temperature, self._options.top_p))
        tokens = self._model.generate(
            **inputs, max_new_tokens=self._options.max_new_tokens, do_sample=False, logits_processor=drawing
        )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        return [_one_line(text) for text in self._processor.batch_decode(answers, skip_special_tokens=True)]

    def _prompt(self, question: str) -> str:
        template = self._options.template
        if template is not None:
            return template.replace("{image}", self._processor.image_token).replace("{question}", question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))

    def _pixels(self, image: Tensor) -> Tensor:
        """[3, S, S] uint8: the image in the middle of a square of the processor's mean color.

        LLaVA-1.5 was trained on such squares; without them the processor would crop the ends of a panorama away.
        """
        if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) == 0:
            raise RequestError(f"image must be [3, H, W] with H, W >= 1, got {list(image.shape)}")
        height, width = image.shape[1:]
        side = max(height, width)
        mean = getattr(self._processor.image_processor, "image_mean", None)
        color = torch.tensor(mean if isinstance(mean, list | tuple) and len(mean) == 3 else [0.5] * 3)
        square = (color * 255).round()[:, None, None].expand(3, side, side).clone()
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = ((image.detach().cpu().float() + 1) * 127.5).round()
        return square.clamp(0, 255).to(torch.uint8)


def identify(model: str, revision: str | None = None) -> str:
    """What a captioner is, for fingerprints: ``sha256:`` over a folder's files, or ``commit:`` of a hub's model.

    ``model``: absolute path of a folder, or a hub id; ``revision``: branch, tag or commit on the hub, default its main
    branch. Asks the hub, or without a network the local hub cache. Raises WeightsError when nothing usable is there.
    """
    if Path(model).is_absolute():
        if revision is not None:
            raise WeightsError(f"captioner {_short(model)}: a folder has no revision; remove it, or name a hub id")
        return f"sha256:{_folder_sha256(Path(model))}"
    try:
        config = cached_file(model, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"captioner {model} is not a model on the hub that can be reached, nor in the hub's local cache "
            f"({_first_line(error)}); correct the id, fetch it first, or give a folder (./name)"
        ) from error
    # the hub's cache keeps every commit in a folder of its own: snapshots/<commit>/config.json
    return f"{_COMMIT}{Path(str(config)).parent.name}"


class _SeededDraw(LogitsProcessor):
    """Makes the greedy choice a draw from the tempered nucleus, by the Gumbel-max trick.

    Each row draws from its own generator: transformers' own sampling would let the rows of a batch share one.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] whose largest entry per row is the drawn token."""
        ordered, order = (scores.float() / self._temperature).sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        outside = probability.cumsum(dim=-1) - probability >= self._top_p  # never the first
        kept = torch.empty_like(ordered).scatter(1, order, ordered.masked_fill(outside, -torch.inf))
        waits = [torch.empty(scores.shape[1]).exponential_(generator=one) for one in self._generators]
        return kept - torch.stack(waits).log().to(kept)


def _prepare(name: str, model: Any, processor: Any, options: CaptionerOptions) -> None:
    """Left padding, and generation free of whatever sampling options came with the model."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise WeightsError(f"captioner {_short(name)}: has no image processor or no tokenizer; fetch the whole model")
    if options.template is None and processor.chat_template is None:
        raise WeightsError(f"captioner {_short(name)}: brings no chat template; set a template of your own")
    if options.template is not None and getattr(processor, "image_token", None) is None:
        raise WeightsError(f"captioner {_short(name)}: names no image token; leave the template to the model")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    shipped = model.generation_config
    end = shipped.eos_token_id if shipped.eos_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=shipped.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )


def _quantization(model: str, options: CaptionerOptions, device: torch.device) -> BitsAndBytesConfig | None:
    if options.quantization == "none":
        return None
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise WeightsError(
            f"captioner {_short(model)}: quantization '{options.quantization}' needs the package"
            f"{'s' * (len(missing) > 1)} {' and '.join(missing)}; install with pip, or use quantization 'none'"
        )
    if device.type != "cuda":
        raise WeightsError(
            f"captioner {_short(model)}: quantization '{options.quantization}' needs a CUDA device, this worker has "
            f"{device}; give the captioner a GPU, or use quantization 'none'"
        )
    if options.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    compute = getattr(torch, options.precision)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)  # type: ignore[no-untyped-call]


def _folder_sha256(folder: Path) -> str:
    """Over names and contents of the deciding files, in the order of their names."""
    if not (folder / "config.json").is_file():
        raise WeightsError(f"captioner {_short(str(folder))}: {folder} holds no config.json; give a model's folder")
    files = sorted(path for path in folder.iterdir() if path.suffix in _DECIDING and path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise WeightsError(f"captioner {_short(str(folder))}: {folder} holds no .safetensors weights; convert them")
    with ThreadPoolExecutor(4) as pool:  # hashing gives up the interpreter lock
        digests = list(pool.map(_file_sha256, files))
    lines = [f"{path.name} {digest}\n" for path, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"captioner file {path} cannot be read: {error.strerror}") from error


def _one_line(text: str) -> str:
    """Line breaks, other white space and control characters to single spaces."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _short(model: str) -> str:
    return f"'{Path(model).name if Path(model).is_absolute() else model}'"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
