"""What the layer saves and loads, merged or not, and a layer that holds no values yet."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from layers import (
    KEEP_BASE,
    KEYS,
    K,
    N,
    R,
    assert_unchanged,
    inputs,
    make,
    put,
    snapshot,
    specified,
)
from torch import nn

from fused_lora import FusedLoRALinear


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


@pytest.mark.parametrize("how", ("reset", "set"))
def test_adapters_are_made_where_a_base_was_assigned_to_a_meta_layer(how):
    base, x = nn.Linear(K, N), inputs()
    layer = FusedLoRALinear(K, N, device="meta", r=R)
    layer.lora_B.requires_grad_(False)
    layer.load_state_dict(base.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"not initialised.*call reset_lora_parameters\(\)"):
        layer(x)
    if how == "reset":
        layer.reset_lora_parameters()
        assert torch.equal(layer(x), base(x))
    else:
        A, B = torch.randn(2, K), torch.randn(N, 2)
        layer.set_adapter(A, B, lora_alpha=2)
        torch.testing.assert_close(layer(x), base(x) + x @ A.t() @ B.t())
    assert layer.lora_A.requires_grad and not layer.lora_B.requires_grad


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_a_merged_state_is_assigned_as_it_is(keep_base):
    source, x = make(dtype=torch.float64).merge(keep_base), inputs(dtype=torch.float64)
    state = source.state_dict()
    for device in ("meta", "cpu"):
        layer = FusedLoRALinear(K, N, r=R, device=device)
        layer.load_state_dict(state, assign=True)
        assert all(p.data_ptr() == state[key].data_ptr() for key, p in layer.named_parameters())
        assert layer.merged and torch.equal(layer(x), source(x))


def test_torchs_distributed_checkpoints_take_unmerged_layers_alone():
    """They load the keys that a fresh layer has: the adapter would be added to a merged weight."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, layer, x = make(), make(seed=1), inputs()
    set_model_state_dict(layer, get_model_state_dict(source))
    assert torch.equal(layer(x), source(x))
    with pytest.raises(AttributeError, match="no attribute 'lora_merged'"):
        get_model_state_dict(nn.Sequential(source.merge()))
