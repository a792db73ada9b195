"""Layers and inputs for tests that run on both backends: fixtures, which a test file takes by name
(`make, inputs = both_backends.make, both_backends.inputs`)."""

from __future__ import annotations

import pytest
import torch

from fused_lora import FusedLoRALinear

M, K, N, R = 7, 33, 50, 3


@pytest.fixture
def make(backend, device):
    """Layers on the device of the kernels, whose adapters are not zero."""

    def layer(seed=0, **options):
        torch.manual_seed(seed)
        options = {"r": R, "init_lora_weights": False, **options}
        return FusedLoRALinear(K, N, backend=backend, **options).to(device)

    return layer


@pytest.fixture
def inputs(device):
    def tensor(*leading, requires_grad=True, **options):
        torch.manual_seed(2)
        x = torch.randn(*(leading or (M,)), K, **options).to(device)
        return x.requires_grad_(requires_grad)

    return tensor


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]
