"""What the tests of the model share."""

from __future__ import annotations

import pytest
import torch

from supir_model.config import TINY
from supir_model.networks import Networks


@pytest.fixture(scope="module")
def networks() -> Networks:
    """Tiny networks of random weights, none of them zero: what starts at zero would hide a mistake."""
    torch.manual_seed(0)
    networks = Networks(TINY)
    networks.text.fill_positions()
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return networks
