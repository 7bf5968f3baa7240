"""What all tests share: options, servers, models."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.servers.swift import S3Server, swift_server

_SHARED = Path(__file__).parents[2] / "shared"  # beside the repository


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("supir")
    group.addoption(
        "--vectors",
        type=Path,
        default=_SHARED / "vectors",
        metavar="DIR",
        help="numbers recorded from the released SUPIR program (default: shared/vectors beside the repository)",
    )
    group.addoption(
        "--kuberay-crds",
        type=Path,
        default=_SHARED / "kuberay",
        metavar="DIR",
        help="KubeRay's ray.io_rayjobs.yaml and ray.io_rayclusters.yaml, from its helm-chart/kuberay-operator/crds "
        "(default: shared/kuberay beside the repository)",
    )
    group.addoption(
        "--parity-table", type=Path, metavar="FILE", help="write the largest measured differences as a Markdown table"
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The tensors of the tests are small: threads would only wait for each other, long where cores are shared.

    For each test anew, as an engine that one of them loads takes all cores.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real object store on loopback (see tests/servers/swift.py), started when the first test asks for it."""
    with swift_server(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """``s3://`` and a new bucket; the environment leads there, and no profile of whoever runs the tests counts."""
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()  # one made by a test that had another environment
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"archive-{uuid.uuid4().hex[:12]}"
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA of random weights (CLIP vision, Llama text, 0.6 MB) in the layout of llava-hf."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}",
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28,
                    patch_size=14, projection_dim=32,
                ),
                text_config=LlamaConfig(
                    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1,
                    eos_token_id=2, pad_token_id=0, initializer_range=0.2,
                ),
                image_token_index=vocabulary["<image>"],
                pad_token_id=0,
            )
        )  # fmt: skip
        for weights in (*model.model.multi_modal_projector.parameters(), *model.lm_head.parameters()):
            torch.nn.init.normal_(weights, std=0.5)  # so that the image matters, and no two words are nearly as likely
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True  # as released ones have it
    model.save_pretrained(folder)
    return folder
