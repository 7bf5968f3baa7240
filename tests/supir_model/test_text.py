from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from supir_model.config import TINY, TextConfig, TowerConfig
from supir_model.errors import RequestError, WeightsError
from supir_model.text import HashedTextEncoder, SDXLTextEncoder, build_text_encoder, read_words, sinusoid

SMALL = TextConfig("sdxl", 8, (TowerConfig(16, 2, 2), TowerConfig(24, 2, 2, projection=12)), 32, size_embedding=6)


def small() -> SDXLTextEncoder:
    torch.manual_seed(0)
    encoder = SDXLTextEncoder(SMALL).eval()
    encoder.words = lambda prompt: [2 + len(word) for word in prompt.split()]
    return encoder


def test_the_kind_says_which_encoder_is_built() -> None:
    assert isinstance(build_text_encoder(SMALL), SDXLTextEncoder)
    assert isinstance(build_text_encoder(TINY.text), HashedTextEncoder)


def test_both_paddings_and_truncation() -> None:
    ids_l, ids_bigg = small().tokenize(["a bb", "", "a " * 20])
    assert ids_l.tolist() == [[30, 3, 4, 31, 31, 31, 31, 31], [30] + [31] * 7, [30, 3, 3, 3, 3, 3, 3, 31]]
    assert ids_bigg.tolist() == [[30, 3, 4, 31, 0, 0, 0, 0], [30, 31] + [0] * 6, [30, 3, 3, 3, 3, 3, 3, 31]]


@torch.no_grad()
def test_context_and_vector() -> None:
    encoder = small()
    context, vector = encoder(["a bb", "ccc"])
    assert context.shape == (2, 8, 16 + 24)
    assert vector.shape == (2, 12 + 6 * 6)
    sizes = sinusoid(torch.tensor([1024.0, 1024, 0, 0, 1024, 1024]), 6).flatten()
    torch.testing.assert_close(vector[:, 12:], sizes.expand(2, -1))
    alone, _ = encoder(["ccc"])
    torch.testing.assert_close(context[1:], alone)


def test_sinusoid_puts_cosines_first() -> None:
    assert sinusoid(torch.zeros(2), 4).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_without_a_vocabulary_the_error_says_what_to_give() -> None:
    encoder = SDXLTextEncoder(SMALL)
    with pytest.raises(RequestError, match=r"vocab\.json and merges\.txt"):
        encoder.tokenize(["a"])


def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"merges\.txt not found"):
        read_words(tmp_path, 32)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [("{", "cannot be read"), ("[1, 2]", "cannot be read"), ('{"a": 32, "<|endoftext|>": 1}', "ids up to 32")],
)
def test_a_damaged_or_foreign_vocabulary_is_refused(tmp_path: Path, vocabulary: str, message: str) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(WeightsError, match=message):
        read_words(tmp_path, 32)


def test_a_vocabulary_in_clips_format_is_read(tmp_path: Path) -> None:
    tokens = ["a", "b", "c", ",", "a</w>", "b</w>", "c</w>", ",</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    words = read_words(tmp_path, 32)
    assert words("AB,  c a") == [8, 7, 6, 4]
    assert words("") == []
    assert len(words("a " * 200)) == 200  # cutting is the encoder's business, and no warning is given


def test_hashed_words_need_no_vocabulary() -> None:
    encoder = HashedTextEncoder(TINY.text)
    first, second = encoder.tokenize(["A sharp photograph", "a  SHARP, photograph!"])
    assert torch.equal(first, second)
    assert first[0] == 1
    assert first[4] == TINY.text.vocabulary - 1
    assert not first[5:].any()
