"""What layers copy, share and keep: modes, flags, storage, and the way out of a block."""

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import FusedLoRALinear, MultiLoRALinear, unload, use_adapters


def test_a_block_that_an_error_leaves_is_left():
    layer = MultiLoRALinear(8, 8, total_rank=16)
    layer.pack.add("a", torch.randn(4, 8), torch.randn(8, 4))
    with pytest.raises(ZeroDivisionError), use_adapters(layer, ["a"]):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="no adapter ids"):
        layer(torch.randn(1, 8))


@pytest.mark.parametrize("kind", [FusedLoRALinear, MultiLoRALinear])
def test_a_layer_is_in_the_mode_of_the_linear_it_is_made_from(kind):
    def make(linear):
        options = {"total_rank": 16} if kind is MultiLoRALinear else {}
        return kind.from_linear(linear, **options)

    linear = nn.Linear(8, 8)
    assert make(linear).training and not make(linear.eval()).training


def test_an_offloaded_pack_removes_nothing():
    pack = MultiLoRALinear(8, 8, total_rank=16).pack
    pack.add("a", torch.randn(4, 8), torch.randn(8, 4))
    owner = pack.owner.clone()
    for name in ("lora_A", "lora_B"):
        setattr(pack, name, nn.Parameter(getattr(pack, name).to("meta")))
    with pytest.raises(RuntimeError, match="offloaded the pack"):
        pack.remove("a")
    assert pack.names == ["a"] and torch.equal(pack.owner, owner)


def test_a_base_kept_on_the_cpu_is_a_copy():
    linear = nn.Linear(8, 8)
    layer = FusedLoRALinear.from_linear(linear, r=2, init_lora_weights=False)
    weight = linear.weight.detach().clone()
    layer.merge(keep_base="cpu")
    linear.weight.data.zero_()  # tied to it once, no longer
    assert torch.equal(layer.unmerge().weight, weight)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("keep_base", [True, "cpu"])
def test_merging_leaves_a_weight_trainable_or_frozen_as_it_was(keep_base, trained):
    layer = FusedLoRALinear(8, 8, r=2)
    layer.weight.requires_grad_(trained)
    assert layer.merge(keep_base).weight.requires_grad is trained
    assert layer.unmerge().weight.requires_grad is trained


def test_to_linear_of_a_merged_layer_shares_no_storage_with_it():
    layer = FusedLoRALinear(8, 8, r=2).merge()
    linear = layer.to_linear()
    assert torch.equal(linear.weight, layer.weight)
    assert linear.weight.data_ptr() != layer.weight.data_ptr()


def test_what_unload_puts_back_is_in_the_mode_of_the_layer():
    for training in (True, False):
        model = fused_lora.apply_lora(nn.Sequential(nn.Linear(8, 8)), r=2, lora_alpha=2)
        assert unload(model.train(training))[0].training is training


def test_a_merged_conv1d_weight_is_stored_as_the_base_was():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = FusedLoRALinear.from_linear(Conv1D(8, 12), r=2, init_lora_weights=False)
    assert layer.merge().weight.is_contiguous() and layer.to_linear().weight.is_contiguous()


def test_another_rank_is_copied_into_the_layer_too():
    layer = FusedLoRALinear(8, 8, r=2)
    A, B = torch.randn(3, 8), torch.randn(8, 3)
    layer.set_adapter(A, B, lora_alpha=3)
    kept = layer.lora_A.clone(), layer.lora_B.clone()
    A.zero_()
    B.zero_()
    assert torch.equal(layer.lora_A, kept[0]) and torch.equal(layer.lora_B, kept[1])


def test_a_layer_merged_with_its_base_on_the_cpu_is_so_with_the_next_adapter():
    layer = FusedLoRALinear(8, 8, r=2, init_lora_weights=False).merge("cpu")
    layer.set_adapter(torch.randn(2, 8), torch.randn(8, 2), lora_alpha=2)
    assert layer.merged and not isinstance(layer._base, nn.Parameter)


def test_what_leaves_the_meta_device_by_any_way_holds_no_adapter():
    layer = FusedLoRALinear(8, 8, r=2)
    for name, p in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(p.to("meta"), p.requires_grad))
    assert layer.offloaded
    layer._apply(lambda t: torch.empty_like(t, device="cpu"))
    assert not layer.adapters_ready


def test_loading_a_merged_state_leaves_a_weight_trainable():
    state = FusedLoRALinear(8, 8, r=2).merge().state_dict()
    layer = FusedLoRALinear(8, 8, r=2)
    layer.weight.requires_grad_()
    layer.load_state_dict(state)
    assert layer.merged and layer.weight.requires_grad
