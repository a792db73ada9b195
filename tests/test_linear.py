"""The layer's promises: what it is made of, what it saves and loads, what merging may touch."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, reference, testing

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


# --- merging


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


# --- state_dict


def put(layer, state):
    """`layer`, merged with keep_base=`state`, or left unmerged for None."""
    return layer if state is None else layer.merge(state)


@pytest.mark.parametrize("nested", [False, True])
def test_a_base_checkpoint_loads_strictly_and_keeps_the_adapters(nested):
    linear, layer = nn.Linear(K, N), make()
    adapters = layer.lora_A.clone(), layer.lora_B.clone()
    source, target = (nn.ModuleList([m]) for m in (linear, layer)) if nested else (linear, layer)
    loaded = target.load_state_dict(source.state_dict(), strict=True)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert torch.equal(layer.lora_A, adapters[0]) and torch.equal(layer.lora_B, adapters[1])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("state", [None, *KEEP_BASE])
@pytest.mark.parametrize("absent, present", [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_one_adapter_key_alone_is_an_error_and_changes_nothing(absent, present, state, strict):
    layer, checkpoint = put(make(), state), make(seed=1).state_dict()
    before = snapshot(layer)
    del checkpoint[absent]
    with pytest.raises(
        RuntimeError, match=f"{present} is in the state_dict, {absent} is not: .*gi"
    ):
        layer.load_state_dict(checkpoint, strict=strict)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("state", [None, *KEEP_BASE])
@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_shape_is_an_error_and_changes_nothing(key, state, merged):
    layer, checkpoint = (
        put(make(), state),
        put(make(seed=1), "cpu" if merged else None).state_dict(),
    )
    before = snapshot(layer)
    checkpoint[key] = torch.zeros(4, 5)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {key}: .*4, 5\]?\)"):
        layer.load_state_dict(checkpoint)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("state", [None, *KEEP_BASE])
@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_a_merged_state_dict_says_so_and_loads_back_merged(keep_base, state):
    source, target, x = make(seed=1), put(make(), state), inputs()
    base = source.weight.detach().clone()
    checkpoint = source.merge(keep_base).state_dict()
    kept = ["lora_base_weight"] if keep_base is not False else []
    assert list(checkpoint) == [*KEYS, "lora_merged", *kept]
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    for given in (torch.load(file, weights_only=True), checkpoint):
        target.load_state_dict(given)
        assert_unchanged(target, snapshot(source))
        assert torch.equal(target(x), source(x))
    assert target.weight.data_ptr() != source.weight.data_ptr()
    if kept:
        assert torch.equal(target.unmerge().weight, base)
    else:
        with pytest.raises(RuntimeError, match="let go"):
            target.unmerge()


@pytest.mark.parametrize("state", KEEP_BASE)
def test_an_unmerged_checkpoint_unmerges_the_layer_it_is_loaded_into(state):
    source, target, x = make(seed=1), make().merge(state), inputs()
    merged = target.weight.detach().clone()
    held = target.weight
    target.load_state_dict(source.state_dict())
    assert not target.merged and torch.equal(target(x), source(x))
    assert torch.equal(held, merged), "the base was written into the merged weight"

    adapted = make().merge(state)
    adapted.load_state_dict({key: source.state_dict()[key] for key in ("weight", "bias")})
    torch.testing.assert_close(adapted.delta_weight(), make().delta_weight())
    torch.testing.assert_close(adapted(x), specified(adapted, x))
    assert torch.equal(adapted.weight, source.weight)


@pytest.mark.parametrize("state", KEEP_BASE)
def test_a_partial_checkpoint_never_takes_a_merged_weight_for_a_base(state):
    layer, x = make().merge(state), inputs()
    y = layer(x).detach()
    layer.load_state_dict({"bias": layer.bias.detach().clone()}, strict=False)
    torch.testing.assert_close(layer(x), y)

    layer, other = make().merge(state), make(seed=1)
    adapters = {key: other.state_dict()[key] for key in ("lora_A", "lora_B")}
    before = snapshot(layer)
    if state is False:
        with pytest.raises(RuntimeError, match="base weight"):
            layer.load_state_dict(adapters, strict=False)
        assert_unchanged(layer, before)
    else:
        layer.load_state_dict(adapters, strict=False)
        twin = make()
        twin.load_state_dict(adapters, strict=False)
        torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.parametrize(
    "lacking, words", [(("lora_A", "lora_B"), "adapters are not"), (("weight",), "weight is not")]
)
def test_an_incomplete_merged_checkpoint_is_an_error_and_changes_nothing(lacking, words):
    checkpoint, layer = make(seed=1).merge().state_dict(), make()
    before = snapshot(layer)
    checkpoint = {key: value for key, value in checkpoint.items() if key not in lacking}
    with pytest.raises(RuntimeError, match=f"lora_merged is in the state_dict, its {words}"):
        layer.load_state_dict(checkpoint, strict=False)
    assert_unchanged(layer, before)


# --- the meta device


@pytest.mark.parametrize("then", ["reset", "load", "assign", "load merged"])
@pytest.mark.parametrize("emptied", ["own", "parent's", "initialised before"])
def test_an_emptied_layer_refuses_to_run_until_its_adapters_have_values(emptied, then):
    layer, source, x = make(device="meta"), make(seed=1), inputs()
    if emptied == "initialised before":
        layer = make()
    with (
        pytest.raises(RuntimeError, match="not initialised")
        if layer.weight.is_meta
        else (contextlib.nullcontext())
    ):
        layer(x.to(layer.weight.device))
    parent = nn.Sequential(layer)
    (parent if emptied == "parent's" else layer).to_empty(device="cpu")
    for refused in (lambda: layer(x), layer.merge):
        with pytest.raises(RuntimeError, match=r"lora_A and lora_B are not initialised"):
            refused()
    layer.load_state_dict({key: source.state_dict()[key] for key in ("weight", "bias")})
    with pytest.raises(RuntimeError, match=r"reset_lora_parameters\(\) or load a state_dict"):
        layer(x)
    if then == "reset":
        torch.manual_seed(1)
        layer.reset_parameters()
    else:
        checkpoint = put(source, "cpu" if then == "load merged" else None).state_dict()
        parent.load_state_dict(
            {"0." + key: value for key, value in checkpoint.items()}, assign=then == "assign"
        )
    assert_unchanged(layer, snapshot(source))
    assert torch.equal(layer(x), source(x))
    assert [p.requires_grad for p in layer.parameters()] == [False, False, True, True]


def test_a_layer_around_a_meta_linear_refuses_to_run():
    layer = FusedLoRALinear.from_linear(nn.Linear(K, N, device="meta"), r=R)
    assert all(p.is_meta for p in layer.parameters())
    layer.reset_lora_parameters()
    with pytest.raises(RuntimeError, match="built on the meta device"):
        layer(inputs())


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
