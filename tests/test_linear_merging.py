"""What merging may touch: never the base weight's storage, and all of it comes back bit for bit."""

from __future__ import annotations

import pytest
import torch
from layers import KEEP_BASE, KEYS, K, N, R, assert_unchanged, inputs, make, snapshot
from torch import nn

from fused_lora import FusedLoRALinear, testing


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_merge_never_writes_into_the_base_weights_storage(keep_base):
    linear, embedding = nn.Linear(K, N), nn.Embedding(N, K)
    linear.weight = embedding.weight
    before = linear.weight.detach().clone()
    version = linear.weight._version
    layer = FusedLoRALinear.from_linear(linear, r=R, init_lora_weights=False).merge(keep_base)
    assert layer.weight is not linear.weight and not torch.equal(layer.weight, before)
    if keep_base is not False:
        layer.unmerge()
    assert linear.weight is embedding.weight and linear.weight._version == version
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_base", [True, "cpu"])
def test_unmerge_restores_the_base_bit_for_bit(keep_base, dtype):
    layer, x = make(dtype=dtype), inputs(dtype=dtype)
    base, bits, y = layer.weight, layer.weight.detach().clone(), layer(x)
    for _ in range(3):
        assert layer.merge(keep_base) is layer and layer.merged
        assert layer.unmerge() is layer and not layer.merged
        assert torch.equal(layer.weight, bits) and not layer.weight.requires_grad
        assert layer.weight is base or keep_base == "cpu"
    assert torch.equal(layer(x), y)


def test_a_layer_can_be_merged_again_with_another_keep_base():
    layer = make()
    for keep_base in (True, "cpu", True, "cpu", False):
        assert layer.merge(keep_base).merged
        if keep_base is not False:
            layer.unmerge()


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_a_weight_that_is_assigned_to_a_merged_layer_is_its_new_base(keep_base):
    layer, x, new = make(), inputs(), nn.Parameter(torch.randn(N, K))
    other = make()
    other.weight = new
    layer.merge(keep_base).weight = new
    assert layer.weight is new and not layer.merged and layer.has_base
    assert torch.equal(layer(x), other(x))
    layer.merge(keep_base)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(layer(x), other(x)) and not layer.merged


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_merging_adds_no_parameter(keep_base):
    layer = make().merge(keep_base)
    assert [name for name, _ in layer.named_parameters()] == KEYS
    assert not list(layer.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_layer_computes_what_the_unmerged_one_does(dtype):
    case = testing.make_case(7, N, K, R, dtype)
    layer = make(dtype=dtype, lora_alpha=case.scaling * R)
    layer.load_state_dict(
        dict(weight=case.weight, bias=case.bias, lora_A=case.lora_A, lora_B=case.lora_B)
    )
    exact, eager = (
        {"y": f(*case.tensors())["y"]} for f in (testing.exact_gradients, testing.eager_gradients)
    )
    with torch.no_grad():
        ours = {"y": layer.merge()(case.x)}
    assert not testing.check(ours, eager, exact, dtype)
    assert testing.check({"y": ours["y"] - layer.bias}, eager, exact, dtype)


def test_merging_twice_or_unmerging_what_cannot_be_raises_and_changes_nothing():
    layer = make()
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"not merged: there is nothing to unmerge"):
        layer.unmerge()
    assert_unchanged(layer, before)
    for keep_base in KEEP_BASE:
        layer = make().merge(keep_base)
        before = snapshot(layer)
        with pytest.raises(RuntimeError, match=r"merged already: call unmerge\(\)"):
            layer.merge()
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) before reset_lora_parameters"):
            layer.reset_lora_parameters()
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) before reset_parameters"):
            layer.reset_parameters()
        assert_unchanged(layer, before)
    with pytest.raises(RuntimeError, match=r"let go by merge\(keep_base=False\).*keep_base=True"):
        layer.unmerge()
    assert_unchanged(layer, before)


def test_backward_through_a_merged_layer_refuses_adapter_gradients():
    layer, x = make().merge(), inputs(requires_grad=True)
    y = layer(x)
    with pytest.raises(RuntimeError, match=r"lora_A and lora_B.*call unmerge\(\) to train, or fre"):
        y.sum().backward()
    assert layer.lora_A.grad is None and layer.lora_B.grad is None
    layer.requires_grad_(False)
    dx = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.testing.assert_close(dx, layer.weight.sum(0).expand_as(x))


def test_to_linear_and_delta_weight_hold_scaling_times_b_a():
    layer, x = make().eval(), inputs()
    before = snapshot(layer)
    delta = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    torch.testing.assert_close(layer.delta_weight(), delta)
    linear, from_merged = layer.to_linear(), make().merge().to_linear()
    assert type(linear) is nn.Linear and not linear.training
    torch.testing.assert_close(linear(x), layer(x))
    assert torch.equal(linear.weight, from_merged.weight)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert_unchanged(layer, before)


@pytest.mark.parametrize("keep_base", KEEP_BASE)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora_B": torch.zeros(N + 1, R)}, ValueError, "lora_A and lora_B must be"),
        ({"lora_A": torch.zeros(R, K, dtype=torch.int64)}, TypeError, "lora_A has dtype"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be a finite number: got nan"),
        ({"lora_dropout": 3.0}, ValueError, r"lora_dropout must be in \[0, 1\): got 3.0"),
    ],
    ids=["shape", "dtype", "alpha", "dropout"],
)
def test_an_adapter_that_is_refused_leaves_the_layer_merged(change, error, message, keep_base):
    layer = make().merge(keep_base)
    before = snapshot(layer)
    given = {"lora_A": torch.zeros(R, K), "lora_B": torch.zeros(N, R), "lora_alpha": 1}
    with pytest.raises(error, match=message):
        layer.set_adapter(**(given | change))
    assert_unchanged(layer, before)
    assert layer.merged


@pytest.mark.parametrize("keep_base", [True, "cpu"])
def test_a_merged_layer_is_merged_with_the_next_adapter_and_keeps_its_base(keep_base):
    layer, other = make(), make(lora_alpha=5)
    base = layer.weight
    layer.merge(keep_base).set_adapter(other.lora_A, other.lora_B, lora_alpha=5)
    expected = FusedLoRALinear.from_linear(nn.Linear(K, N), r=R, lora_alpha=5)
    expected.load_state_dict({"weight": base, "bias": layer.bias}, strict=True)
    expected.set_adapter(other.lora_A, other.lora_B, lora_alpha=5)
    assert layer.merged and torch.equal(layer.weight, expected.merge().weight)
    assert (layer.unmerge().weight is base) == (keep_base is True)
    assert torch.equal(layer.weight, base)
