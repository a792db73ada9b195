"""Layers whose Parameters somebody else holds (accelerate's offload, parametrizations), or that
came from the meta device: what cannot be done is refused and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_layers import BASES, adapted, base_layer, inputs
from torch import nn
from torch.nn.utils import parametrize, prune

import fused_lora
from fused_lora import AdapterPack, FusedLoRALinear, MultiLoRALinear

x = torch.randn(5, 16)


def model():
    torch.manual_seed(0)
    layers = (FusedLoRALinear(a, b, r=4, init_lora_weights=False) for a, b in ((16, 32), (32, 8)))
    return nn.Sequential(*layers).eval()


def test_an_offloaded_model_is_neither_merged_nor_loaded_nor_saved(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("safetensors")
    fused_lora.save_adapter(model(), tmp_path)
    merged = model()
    fused_lora.merge_adapter(merged)
    for given, calls in (
        (model(), (fused_lora.merge_adapter, fused_lora.lora_state_dict)),
        (model(), (lambda m: fused_lora.load_adapter(m, tmp_path),)),
        (model(), (lambda m: fused_lora.save_adapter(m, tmp_path / "other"),)),
        (model(), (fused_lora.unload, lambda m: m[0].reset_lora_parameters())),
        (merged, (fused_lora.unmerge_adapter, fused_lora.unload)),
    ):
        before = given(x)
        accelerate.cpu_offload(given, torch.device("cpu"))
        for call in calls:
            with pytest.raises(RuntimeError, match=r"offloaded.*remove_hook_from_submodules"):
                call(given)
        assert torch.equal(given(x), before)
    accelerate.hooks.remove_hook_from_submodules(merged)
    fused_lora.unmerge_adapter(merged)
    torch.testing.assert_close(merged(x), model()(x))


def test_an_offloaded_pack_is_served_and_not_changed(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    packed = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {"r": 4, "lora_alpha": 4}
    adapters = {"a": options, "b": options}
    fused_lora.apply_lora(packed, adapters=adapters, total_rank=48, init_lora_weights=False)
    names = ["a", None, "b"]
    with fused_lora.use_adapters(packed, names):
        before = packed(x[:3])
    fused_lora.save_adapter(packed, tmp_path / "a", name="a")
    accelerate.cpu_offload(packed, torch.device("cpu"))
    for call in (
        lambda: fused_lora.save_adapter(packed, tmp_path / "other", name="a"),
        lambda: fused_lora.load_adapter(packed, tmp_path / "a", name="a"),
        lambda: fused_lora.add_adapter(packed, "c", r=4, lora_alpha=4),
        lambda: fused_lora.delete_adapter(packed, "a"),
    ):
        with pytest.raises(RuntimeError, match=r"offloaded.*remove_hook_from_submodules"):
            call()
    with fused_lora.use_adapters(packed, packed[0].pack.ids(names)):
        assert torch.equal(packed(x[:3]), before)
    with fused_lora.use_adapters(packed, names):
        assert torch.equal(packed(x[:3]), before)


class Half(nn.Module):
    def forward(self, tensor):
        return 0.5 * tensor


@pytest.mark.parametrize("name", ("lora_A", "weight"))
def test_a_parametrized_layer_is_not_half_exchanged(name):
    layer = model()[0]
    parametrize.register_parametrization(layer, name, Half())
    before = layer(x)
    given = torch.randn(4, 16), torch.randn(32, 4)
    for call in (layer.merge, lambda: layer.set_adapter(*given, lora_alpha=4)):
        with pytest.raises(RuntimeError, match=f"{name} are parametrized or pruned: call"):
            call()
    assert torch.equal(layer(x), before) and not layer.merged


def test_what_deepspeed_has_sharded_is_neither_read_nor_exchanged(tmp_path):
    """ZeRO-3 marks its parameters, and leaves empty ones behind."""
    pytest.importorskip("safetensors")
    fused_lora.save_adapter(model(), tmp_path)
    whole = model()
    for parameter in whole.parameters():
        parameter.ds_id, parameter.data = 1, parameter.new_empty(0)
    gather = r"this process has a shard .* deepspeed.zero.GatheredParameters"
    for call, words in (
        (lambda: fused_lora.save_adapter(whole, tmp_path / "other"), gather),
        (lambda: fused_lora.lora_state_dict(whole), gather),
        (lambda: fused_lora.load_adapter(whole, tmp_path), "is sharded: load an adapter before"),
        (lambda: fused_lora.merge_adapter(whole), "ZeRO-3 holds the base weight"),
        (lambda: fused_lora.unload(whole), "ZeRO-3 looks for its parameters"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
    plain = nn.Sequential(nn.Linear(4, 4))
    plain[0].weight.ds_id = 1
    with pytest.raises(TypeError, match="ZeRO-3 holds its parameters already"):
        fused_lora.apply_lora(plain, r=2, lora_alpha=2)


def test_one_parametrized_layer_leaves_all_of_them_merged():
    whole = nn.Sequential(model()[0], model()[0])
    fused_lora.merge_adapter(whole)
    prune.l1_unstructured(whole[1], "lora_A", 0.5)
    with pytest.raises(RuntimeError, match="lora_A are parametrized or pruned: call"):
        fused_lora.unmerge_adapter(whole)
    assert [layer.merged for layer in whole] == [True, True]


def test_a_parametrized_base_is_not_unloaded():
    whole = nn.Sequential(model()[0], model()[0])
    parametrize.register_parametrization(whole[1], "weight", Half())
    with pytest.raises(RuntimeError, match="1 cannot be unloaded: weight is parametrized"):
        fused_lora.unload(whole)
    assert all(isinstance(layer, FusedLoRALinear) for layer in whole)


@pytest.mark.parametrize("how", ("parametrized", "pruned"))
def test_what_a_factor_is_made_of_is_marked_as_trainable(how):
    whole = nn.Sequential(model()[0])
    if how == "pruned":
        prune.l1_unstructured(whole[0], "lora_A", 0.5)
    else:
        parametrize.register_parametrization(whole[0], "lora_A", Half())
    fused_lora.mark_only_lora_as_trainable(whole)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    source = "lora_A_orig" if how == "pruned" else "parametrizations.lora_A.original"
    assert trained == {"0.lora_B", f"0.{source}"}


@pytest.mark.parametrize("name", ("lora_A", "lora_B"))
@pytest.mark.parametrize("how", ("parametrized", "pruned"))
def test_a_layer_with_a_factor_held_elsewhere_loads_its_own_state(how, name):
    def build(scale):
        layer = model()[0]
        with torch.no_grad():
            getattr(layer, name).mul_(scale)
        if how == "pruned":
            prune.l1_unstructured(layer, name, 0.5)
        else:
            parametrize.register_parametrization(layer, name, Half())
        return layer

    layer, other = build(1.0), build(3.0)
    assert not torch.equal(layer(x), other(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_an_adapter_that_cannot_be_copied_leaves_a_merged_layer_merged():
    layer = model()[0].merge()
    A, weight = layer.lora_A.detach().clone(), layer.weight
    with pytest.raises(NotImplementedError):
        layer.set_adapter(torch.randn(4, 16), torch.empty(32, 4, device="meta"), lora_alpha=4)
    assert layer.merged and layer.weight is weight and torch.equal(layer.lora_A, A)


def test_what_is_made_under_inference_mode_trains_afterwards(tmp_path):
    pytest.importorskip("safetensors")
    fused_lora.save_adapter(model(), tmp_path)
    other = model()
    merged = model().requires_grad_(False)
    pack = MultiLoRALinear(16, 32, total_rank=16)
    pack.pack.add("a", torch.randn(4, 16), torch.randn(32, 4))
    with torch.inference_mode():
        other[0].set_adapter(torch.randn(2, 16), torch.randn(32, 2), lora_alpha=4)
        fused_lora.load_adapter(other, tmp_path)
        fused_lora.merge_adapter(merged)
        ids = pack.pack.ids(["a"] * 5)
    other(x).sum().backward()
    merged(x.clone().requires_grad_()).sum().backward()
    pack(x, ids).sum().backward()
    fused_lora.unmerge_adapter(merged)


@pytest.mark.parametrize("kind", BASES)
def test_a_quantised_layer_on_meta_is_ready_when_both_factors_are_loaded(kind):
    source, _ = adapted(kind)
    layer = copy.deepcopy(source[0])
    layer.lora_A, layer.lora_B = (
        nn.Parameter(t.detach().to("meta")) for t in (layer.lora_A, layer.lora_B)
    )
    layer.adapters_ready = False
    with pytest.raises(RuntimeError, match="not initialised"):
        layer(inputs())
    state = {name: getattr(source[0], name) for name in ("lora_A", "lora_B")}
    layer.load_state_dict(state, strict=False, assign=True)
    assert layer.adapters_ready and torch.equal(layer(inputs()), source(inputs()))


@pytest.mark.parametrize("kind", ("nf4", "int8"))
def test_a_merged_quantised_layer_refuses_gradients_of_its_adapter(kind):
    layer = adapted(kind)[0][0]
    layer.merge(requantise=True)
    given = inputs().requires_grad_()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\) to train"):
        layer(given).sum().backward()
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    layer(given).sum().backward()
    assert given.grad.abs().max() > 0
    assert base_layer(kind) is not layer.base_layer


def pack_model(total_rank=48, **adapters):
    layer = MultiLoRALinear(16, 32, total_rank=total_rank)
    for name, r in adapters.items():
        layer.pack.add(name, torch.randn(r, 16), torch.randn(32, r))
    return layer


def assert_adds_right(layer):
    A, B = torch.randn(4, 16), torch.randn(32, 4)
    ids = torch.full((5,), layer.pack.add("new", A, B))
    expected = fused_lora.reference.lora_linear(x, layer.weight, A, B, layer.bias)
    torch.testing.assert_close(layer(x, ids), expected)


def test_a_pack_from_the_meta_device_is_empty_and_takes_adapters():
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        for layer in (pack_model(a=3), MultiLoRALinear(16, 32, total_rank=48, device="meta")):
            layer.to_empty(device="cpu")
            plain = nn.Linear(16, 32)
            layer.load_state_dict(plain.state_dict(), strict=False)
            assert layer.pack.names == []
            assert_adds_right(layer)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_a_pack_is_loaded_whole_or_not_at_all():
    small, own = pack_model(32, a=3), pack_model(64, z=3, q=20)
    before = {k: v.clone() for k, v in own.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for pack.lora_A.*total_rank"):
        own.load_state_dict(small.state_dict())
    state = pack_model(64, old=40).state_dict()
    tables_alone = {k: v for k, v in state.items() if not k.endswith("_extra_state")}
    with pytest.raises(RuntimeError, match=r"pack\._extra_state is not: what says whose"):
        own.load_state_dict(tables_alone, strict=False)
    for key, value in own.state_dict().items():
        if key.startswith("pack."):
            assert torch.equal(value, before[key])
    factors = {f"pack.{k}": 2 * before[f"pack.{k}"] for k in ("lora_A", "lora_B")}
    own.load_state_dict(factors, strict=False)  # what trains, alone
    assert torch.equal(own.pack.lora_A, factors["pack.lora_A"]) and own.pack.names == ["z", "q"]
    assert_adds_right(own)
    own.pack.remove("new")
    own.load_state_dict(state)
    assert own.pack.names == ["old"]


def test_the_state_of_a_pack_is_tensors_that_safetensors_holds(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = pack_model(a=3, name_ü=16)
    layer.pack.remove("a")
    safetensors.save_file(layer.state_dict(), tmp_path / "pack.safetensors")
    other = pack_model()
    other.load_state_dict(safetensors.load_file(tmp_path / "pack.safetensors"))
    ids = layer.pack.ids(["name_ü", None, "name_ü", None, None])
    assert torch.equal(layer(x, ids), other(x, ids))
    assert isinstance(AdapterPack(4, 4, total_rank=16).state_dict()["_extra_state"], torch.Tensor)
