"""Quantised layers that are merged anew, restored, or loaded in part: what they were stays."""

import pytest
import torch
from quantized_layers import K, N, adapted, inputs, nf4
from torch import nn

import fused_lora

bitsandbytes = pytest.importorskip("bitsandbytes")


def unready():
    layer = adapted("nf4")[0][0]
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach().to("meta")))
    layer.adapters_ready = False
    return layer


def test_one_factor_alone_leaves_a_quantised_layer_unready():
    layer = unready()
    layer.load_state_dict({"lora_A": torch.randn(layer.r, K)}, strict=False, assign=True)
    assert not layer.adapters_ready


def test_a_factor_that_does_not_fit_leaves_a_quantised_layer_unready():
    layer = unready()
    state = {"lora_A": torch.randn(layer.r, K), "lora_B": torch.randn(N + 1, layer.r)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state, strict=False, assign=True)
    assert not layer.adapters_ready


def test_a_requantised_layer_computes_as_the_old_one_did():
    base = nf4(torch.float16, nn.Linear(K, N)).eval()
    layer = fused_lora.QuantizedLoRALinear(base, r=2)
    assert not layer.training
    layer.merge(requantise=True)
    new = layer.base_layer
    assert new.compute_dtype == torch.float16 and not new.training
    assert new.support_avx512bf16_for_cpu is False


def test_a_requantised_layer_has_the_old_ones_block_size():
    base = bitsandbytes.nn.Linear4bit(K, N, quant_type="nf4", bias=False)
    options = {"requires_grad": False, "blocksize": 128, "quant_type": "nf4"}
    base.weight = bitsandbytes.nn.Params4bit(torch.randn(N, K), **options, module=base)
    base = base.to("cpu")
    assert base.weight.quant_state.blocksize == 128
    layer = fused_lora.QuantizedLoRALinear(base, r=2)
    layer.merge(requantise=True)
    assert layer.base_layer.weight.quant_state.blocksize == 128


def test_a_requantised_int8_layer_keeps_its_threshold():
    base = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0)
    base.load_state_dict(nn.Linear(K, N).state_dict())
    layer = fused_lora.QuantizedLoRALinear(base.to("cpu"), r=2)
    layer.merge(requantise=True)
    assert layer.base_layer.state.threshold == 6.0


def test_the_base_of_a_merged_layer_has_the_bias_that_the_layer_has_now():
    layer = adapted("nf4")[0][0]
    layer.merge(requantise=True)
    layer.base_layer.bias = nn.Parameter(torch.ones(N), requires_grad=False)
    with fused_lora.disable_adapters(layer):
        on = layer(inputs())
    layer.unmerge()
    layer.base_layer.bias = nn.Parameter(torch.ones(N), requires_grad=False)
    with fused_lora.disable_adapters(layer):
        assert torch.equal(on, layer(inputs()))


def test_a_layer_that_let_its_base_go_is_restored_to_that():
    layer = adapted("nf4")[0][0]
    layer.merge(keep_base=False, requantise=True)
    layer.restore(layer.snapshot())
    assert layer.merged and not layer.has_base
