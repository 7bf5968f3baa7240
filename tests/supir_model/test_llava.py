"""The captioner with a tiny LLaVA of random weights, loaded as a user loads a released one."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from supir_model.errors import RequestError, WeightsError
from supir_model.llava import CaptionerOptions, CaptionRequest, LlavaCaptioner, _SeededDraw, identify

GREEDY = CaptionerOptions(max_new_tokens=16)
DRAWN = CaptionerOptions(max_new_tokens=16, temperature=0.9, top_p=0.95)


def requests(count: int = 4) -> list[CaptionRequest]:
    """Images of unlike sizes and questions of unlike lengths, so that the shorter prompts need padding."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(40, 56), (28, 28), (9, 300), (1, 1)]
    return [
        CaptionRequest(
            torch.rand((3, *sizes[i]), generator=generator) * 2 - 1, "What is it?" + " Say more." * i, seed=i
        )
        for i in range(count)
    ]


def load(folder: Path, options: CaptionerOptions) -> LlavaCaptioner:
    return LlavaCaptioner.load(str(folder), identify(str(folder)), options, "cpu")


@pytest.mark.parametrize("options", [GREEDY, DRAWN])
def test_batched_equals_single_and_twice_is_the_same(tiny_llava: Path, options: CaptionerOptions) -> None:
    captioner = load(tiny_llava, options)
    alone = [captioner.caption([request])[0] for request in requests()]
    assert len(set(alone)) == 4  # the image and the question matter
    assert captioner.caption(requests()) == alone
    assert captioner.caption(requests()[::-1]) == alone[::-1]
    assert load(tiny_llava, options).caption(requests()) == alone


def test_the_image_alone_changes_the_caption(tiny_llava: Path) -> None:
    images = [torch.full((3, 28, 28), value) for value in (-1.0, 1.0)]
    captions = load(tiny_llava, GREEDY).caption([CaptionRequest(image, "What is it?") for image in images])
    assert captions[0] != captions[1]


def test_a_seed_decides_a_drawn_caption_and_nothing_global_does(tiny_llava: Path) -> None:
    captioner = load(tiny_llava, DRAWN)
    image = requests(1)[0].image
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = captioner.caption([CaptionRequest(image, "What?", seed) for seed in (1, 2, 1)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first[0] == first[2] != first[1]
    greedy = load(tiny_llava, GREEDY)
    assert len(set(greedy.caption([CaptionRequest(image, "What?", seed) for seed in (1, 2)]))) == 1


def test_draws_follow_the_probabilities_of_the_nucleus() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = probabilities.log().repeat(4000, 1) / 2  # temperature 0.5 gives the probabilities back
    drawn = _SeededDraw(range(4000), temperature=0.5, top_p=0.75)(torch.zeros(4000, 1), scores).argmax(dim=1)
    shares = Counter(drawn.tolist())
    assert set(shares) == {0, 1}  # 0.5 does not reach 0.75, 0.5 + 0.3 does
    assert shares[0] / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)


def test_captions_are_one_line_and_no_longer_than_asked(tiny_llava: Path) -> None:
    for length in (3, 40):
        captions = load(tiny_llava, CaptionerOptions(max_new_tokens=length)).caption(requests())
        assert all(len(caption) <= length for caption in captions)  # this tokenizer's tokens are bytes
        assert all(caption.isprintable() and caption == caption.strip() for caption in captions)


def test_a_template_of_ones_own_takes_the_place_of_the_models(tiny_llava: Path) -> None:
    same = CaptionerOptions(max_new_tokens=16, template="USER: {image}\n{question} ASSISTANT:")
    other = CaptionerOptions(max_new_tokens=16, template="Be brief. USER: {image}\n{question} ASSISTANT:")
    expected = load(tiny_llava, GREEDY).caption(requests())
    assert load(tiny_llava, same).caption(requests()) == expected
    assert load(tiny_llava, other).caption(requests()) != expected


def test_the_whole_of_a_panorama_is_seen(tiny_llava: Path) -> None:
    panorama = torch.zeros(3, 28, 140)
    changed = panorama.clone()
    changed[:, :, :28] = 1  # what a crop to the central square would leave out
    captions = load(tiny_llava, GREEDY).caption([CaptionRequest(image, "What?") for image in (panorama, changed)])
    assert captions[0] != captions[1]


def test_half_precision_and_no_request(tiny_llava: Path) -> None:
    captioner = load(tiny_llava, CaptionerOptions(max_new_tokens=4, precision="bfloat16"))
    assert len(captioner.caption(requests(2))) == 2
    assert captioner.caption([]) == []


def test_an_image_of_another_shape_is_refused(tiny_llava: Path) -> None:
    with pytest.raises(RequestError, match=r"\[3, H, W\].*got \[1, 8, 8\]"):
        load(tiny_llava, GREEDY).caption([CaptionRequest(torch.zeros(1, 8, 8), "What?")])


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantization_says_what_it_lacks(tiny_llava: Path, quantization: str) -> None:
    options = CaptionerOptions(quantization=quantization)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"tiny-llava.*needs (the packages? .*bitsandbytes|a CUDA device)"):
        LlavaCaptioner.load(str(tiny_llava), options=options, device="cpu")


def test_a_captioner_that_does_not_fit_says_what_to_set(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.nn.Module, "to", too_much)
    with pytest.raises(WeightsError, match=r"does not fit into the memory of cpu; set its quantization to '8bit'"):
        load(tiny_llava, GREEDY)


def test_the_identity_follows_the_files_not_their_folder(tiny_llava: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_llava, copy)
    (copy / "README.md").write_text("about it")
    assert identify(str(copy)) == identify(str(tiny_llava))
    assert identify(str(copy)).startswith("sha256:")
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + " ")
    assert identify(str(copy)) != identify(str(tiny_llava))


def test_a_model_of_the_hub_is_pinned_to_its_commit(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny-llava"
    shutil.copytree(tiny_llava, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    identity = identify("someone/tiny-llava")
    assert identity == f"commit:{commit}"
    captioner = LlavaCaptioner.load("someone/tiny-llava", identity, GREEDY, "cpu")
    assert captioner.caption(requests()) == load(tiny_llava, GREEDY).caption(requests())
    with pytest.raises(WeightsError, match="someone/other is not a model on the hub"):
        identify("someone/other")


def test_folders_that_hold_no_captioner(tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no config\.json"):
        identify(str(tmp_path))
    with pytest.raises(WeightsError, match="a folder has no revision"):
        identify(str(tiny_llava), "main")
    shutil.copy(tiny_llava / "config.json", tmp_path)
    with pytest.raises(WeightsError, match=r"holds no \.safetensors"):
        identify(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=f"captioner '{tmp_path.name}' cannot be loaded"):
        LlavaCaptioner.load(str(tmp_path))


def test_a_model_without_a_chat_template_wants_one(tiny_llava: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llava, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match="no chat template; set a template"):
        load(bare, GREEDY)
    own = CaptionerOptions(max_new_tokens=16, template="USER: {image}\n{question} ASSISTANT:")
    assert load(bare, own).caption(requests()) == load(tiny_llava, GREEDY).caption(requests())
