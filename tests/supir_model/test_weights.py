from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from supir_model import weights
from supir_model.errors import WeightsError


def network(layers: int = 12) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(2, 3) for _ in range(layers)))


def state(layers: int = 12) -> dict[str, torch.Tensor]:
    module = nn.Sequential(*(nn.Linear(2, 3) for _ in range(layers)))
    return {key: value.detach().contiguous() for key, value in module.state_dict().items()}


def load(module: nn.Module, path: Path) -> None:
    weights.load_into(module, path, lambda key, value: torch.float32, torch.device("cpu"))


def test_what_was_saved_is_loaded_in_the_dtype_asked_for(tmp_path: Path) -> None:
    saved, module = state(), network()
    save_file({key: value.half() for key, value in saved.items()}, tmp_path / "weights.safetensors")
    load(module, tmp_path / "weights.safetensors")
    for key, value in module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, saved[key].half().float())


def test_missing_and_unexpected_keys_are_named_ten_at_most(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({f"other.{key}": value for key, value in state().items()}, path)
    with pytest.raises(WeightsError, match=r"other\.safetensors") as caught:
        load(network(), path)
    message = str(caught.value)
    assert "24 missing: 0.bias, 0.weight, 1.bias" in message
    assert "24 unexpected: other.0.bias" in message
    # 10 of each
    assert message.count(".weight") + message.count(".bias") == 20


def test_another_shape_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({**state(), "3.weight": torch.zeros(3, 5)}, path)
    with pytest.raises(WeightsError, match=r"1 of another shape: 3\.weight"):
        load(network(), path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"weights\.safetensors cannot be read"):
        load(network(), path)


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"0.weight": Bomb(tmp_path / "ran")}))
    with pytest.raises(WeightsError):
        load(network(), tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_an_absent_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.safetensors"):
        load(network(), tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match=r"none\.safetensors"):
        weights.sha256(tmp_path / "none.safetensors")


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(WeightsError, match=r"'v1'.*tiny"):
        weights.find("v1")
