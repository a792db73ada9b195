"""The layer's promises: what it is made of, how it moves and is copied."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from layers import KEEP_BASE, KEYS, K, N, R, assert_unchanged, inputs, make, snapshot, specified
from torch import nn

from fused_lora import FusedLoRALinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [True, "kaiming", "gaussian"])
def test_first_forward_equals_the_base_layer_exactly(init, dtype):
    linear = nn.Linear(K, N, dtype=dtype)
    layer = FusedLoRALinear.from_linear(linear, r=R, init_lora_weights=init, backend="aten")
    x = inputs(2, 7, dtype=dtype)
    assert layer.lora_A.any()
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("bias", [True, False])
def test_base_is_initialised_as_nn_linear_is(bias):
    torch.manual_seed(3)
    linear, layer = nn.Linear(K, N, bias=bias), make(seed=3, bias=bias)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias) if bias else layer.bias is None


@pytest.mark.parametrize("init", [True, "kaiming", "gaussian", False])
def test_adapters_are_initialised_as_named(init):
    torch.manual_seed(0)
    layer = FusedLoRALinear(4096, 2048, r=4, init_lora_weights=init)
    if init == "gaussian":
        assert layer.lora_A.std().item() == pytest.approx(1 / 4, rel=0.05)
    else:  # Kaiming-uniform with a = sqrt(5): 1 / sqrt(in_features)
        assert 0.99 / 64 < layer.lora_A.abs().max() <= 1 / 64
        assert layer.lora_A.std().item() == pytest.approx(1 / 64 / math.sqrt(3), rel=0.05)
    if init is False:
        assert 0.99 / 2 < layer.lora_B.abs().max() <= 1 / 2
    else:
        assert not layer.lora_B.any()


@pytest.mark.parametrize("rslora, scaling", [(False, 4.0), (True, 12 / math.sqrt(3))])
def test_scaling_is_alpha_over_r_or_over_its_root_and_is_applied(rslora, scaling):
    layer, x = make(lora_alpha=12, use_rslora=rslora), inputs()
    assert layer.scaling == scaling
    base = x @ layer.weight.t() + layer.bias
    torch.testing.assert_close(layer(x), base + scaling * (x @ layer.lora_A.t()) @ layer.lora_B.t())


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_shares_and_freezes_the_very_parameters(training):
    linear = nn.Linear(K, N).train(training)
    layer = FusedLoRALinear.from_linear(linear, r=R, lora_dropout=0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not linear.weight.requires_grad and not linear.bias.requires_grad
    assert layer.training == training
    assert FusedLoRALinear.from_linear(nn.Linear(K, N, bias=False)).bias is None


def test_only_the_adapters_are_trainable_and_the_names_are_those_of_nn_linear():
    layer = make(adapter_dtype=torch.float64)
    named = dict(layer.named_parameters())
    assert list(named) == list(layer.state_dict()) == KEYS
    assert [p.requires_grad for p in named.values()] == [False, False, True, True]
    assert [tuple(p.shape) for p in named.values()] == [(N, K), (N,), (R, K), (N, R)]
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float64
    assert not isinstance(layer, nn.Linear)


def test_dropout_acts_in_training_alone():
    layer, x = make(lora_dropout=0.5), inputs()
    dropped = layer(x)
    torch.testing.assert_close(layer.eval()(x), specified(layer, x))
    assert not torch.allclose(dropped, layer(x))


def test_extra_repr_says_what_was_asked_for():
    layer = make(lora_alpha=12, lora_dropout=0.25, adapter_dtype=torch.float64, backend="aten")
    text = (
        "in_features=33, out_features=50, bias=True, r=3, lora_alpha=12, scaling=4, "
        "lora_dropout=0.25, adapter_dtype=torch.float64, backend=aten"
    )
    assert repr(layer) == f"FusedLoRALinear({text})"
    assert repr(layer.merge()) == f"FusedLoRALinear({text}, merged)"


# --- moving, copying, functional calls


@pytest.mark.parametrize("merged", [None, *KEEP_BASE])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_equals(how, merged):
    layer, x = make(), inputs()
    base = layer.weight.detach().clone()
    if merged is not None:
        layer.merge(merged)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_unchanged(twin, snapshot(layer))
    assert torch.equal(twin(x), layer(x))
    if merged in (True, "cpu"):
        assert torch.equal(twin.unmerge().weight, base)
    twin.requires_grad_(False)
    for parameter in twin.parameters():
        parameter.zero_()
    assert all(parameter.any() for parameter in layer.parameters())


@pytest.mark.parametrize("keep_base", [None, True, "cpu"])
def test_layer_moves_between_dtypes_and_devices_merged_or_not(keep_base, device):
    layer, x = make(), inputs(dtype=torch.float64).to(device)
    base = layer.weight.detach().clone()
    if keep_base is not None:
        layer.merge(keep_base)
    layer.to(device).to(torch.float64)
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, device)}
    if keep_base is not None:
        layer.unmerge()
    assert torch.equal(layer.weight.cpu(), base.double())
    torch.testing.assert_close(layer(x), specified(layer, x))


def test_functional_call_uses_the_tensors_given_and_differentiates_them():
    layer, x = make(), inputs()
    given = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    given["lora_A"].requires_grad_()
    y = torch.func.functional_call(layer, given, (x,))
    twin = make(seed=1)
    twin.load_state_dict(given)
    assert torch.equal(y, twin(x))
    dA = torch.autograd.grad(y.sum(), given["lora_A"])[0]
    assert torch.equal(dA, torch.autograd.grad(twin(x).sum(), twin.lora_A)[0])


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_a_weight_that_requires_grad_is_trained_right(backend, device):
    layer = make(backend=backend).to(device).requires_grad_(True)
    x = inputs(2, 7).to(device).requires_grad_()
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).sin().sum(), wanted)
    exact = torch.autograd.grad(specified(layer, x).sin().sum(), wanted)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
