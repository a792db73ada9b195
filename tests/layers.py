"""One small FusedLoRALinear with an adapter that is not zero, and a snapshot of all that a failed
call must leave alone."""

from __future__ import annotations

import torch

from fused_lora import FusedLoRALinear, reference

K, N, R = 33, 50, 3
KEYS = ["weight", "bias", "lora_A", "lora_B"]
KEEP_BASE = (True, "cpu", False)


def make(seed=0, **options):
    """A layer whose adapter is not zero."""
    torch.manual_seed(seed)
    return FusedLoRALinear(K, N, **{"r": R, "init_lora_weights": False, **options})


def inputs(*leading, dtype=torch.float32, **options):
    return torch.randn(*(leading or (7,)), K, dtype=dtype, **options)


def specified(layer, x):
    tensors = (layer.weight, layer.lora_A, layer.lora_B, layer.bias)
    return reference.lora_linear(x, *tensors, scaling=layer.scaling)


def snapshot(layer):
    """Everything a failed call must leave alone."""
    return layer.merged, {key: value.clone() for key, value in layer.state_dict().items()}


def assert_unchanged(layer, before):
    merged, tensors = snapshot(layer)
    assert merged == before[0]
    assert list(tensors) == list(before[1])
    assert all(torch.equal(tensors[key], value) for key, value in before[1].items())


def put(layer, state):
    """`layer`, merged with keep_base=`state`, or left unmerged for None."""
    return layer if state is None else layer.merge(state)
