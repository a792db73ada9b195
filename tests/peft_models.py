"""Tiny models with PEFT adapters, and PEFT's own forward as the reference for one layer."""

import contextlib
import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fused_lora import dropout

FIRST, SECOND = (40, 48), (48, 24)  # (in, out) of the two layers
SEED = 11


class Tiny(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(*FIRST)
        self.second = nn.Linear(*SECOND)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(model=None, *, dtype=torch.float32, adapter_dtype=None, device="cpu", **config):
    """`model` (else a Tiny) in `dtype` with adapters that are not zero; PEFT's defaults else.
    PEFT keeps adapters of a 16-bit model in fp32; `adapter_dtype` says otherwise."""
    torch.manual_seed(0)
    model = (model or Tiny().to(dtype)).to(device)
    options = {"r": 8, "lora_alpha": 12, "target_modules": ["first", "second"]} | config
    options = {"init_lora_weights": False} | options
    model = get_peft_model(model, LoraConfig(**options))
    if adapter_dtype is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    return model


def quantised(kind, dtype=torch.float32):
    """A Tiny whose layers are of bitsandbytes ("nf4", "int8") or hold tensors of torchao, as
    transformers would load it; skips where the library is missing."""
    torch.manual_seed(0)
    tiny = Tiny().to(dtype)
    if kind == "torchao int8":
        if peft.__version__.startswith("0.18"):
            pytest.skip("PEFT 0.18 cannot take this torchao")
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
        config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(tiny, config)
        tiny.hf_quantizer = SimpleNamespace(
            quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: config)
        )
        return tiny
    bnb = pytest.importorskip("bitsandbytes", minversion="0.50", reason="needs bitsandbytes")
    for name, size in (("first", FIRST), ("second", SECOND)):
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4")
            layer.support_avx512bf16_for_cpu = False  # repacked in eval mode, it does not train
        else:
            layer = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
        layer.load_state_dict(tiny.get_submodule(name).state_dict())
        layer.bias.data = layer.bias.data.to(dtype)
        setattr(tiny, name, layer.to("cpu"))
    tiny.is_loaded_in_4bit, tiny.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return tiny


def lora_layer(model, name="first"):
    return model.base_model.model.get_submodule(name)


class GivenMask(nn.Module):
    """PEFT's dropout with the mask that the fused layer draws from SEED."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        seed = torch.tensor(SEED, dtype=torch.int64, device=x.device)
        mask = dropout.keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], self.p)
        return x * mask.view(x.shape) * dropout.keep_scale(self.p)


def peft_copy(layer, *, dtype=None, adapter_dtype=None):
    """An unpatched copy of a LoRA layer in other dtypes, its dropout drawn as the fused layer's."""
    layer = copy.deepcopy(layer)
    for name, module in layer.lora_dropout.items():
        if isinstance(module, nn.Dropout):
            layer.lora_dropout[name] = GivenMask(module.p)
    if dtype is not None:
        layer.base_layer.to(dtype)
    if adapter_dtype is not None:
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
    return layer


def results(layer, x, dy, autocast=None, adapter="default"):
    """{"y", "dx", "dA", "dB"} and, if the base's bias trains, "dbias" of one call of a layer."""
    x = x.detach().requires_grad_()
    leaves = {"dx": x, "dA": layer.lora_A[adapter].weight, "dB": layer.lora_B[adapter].weight}
    bias = layer.base_layer.bias
    if bias is not None and bias.requires_grad:
        leaves["dbias"] = bias
    context = contextlib.nullcontext()
    if autocast is not None:
        context = torch.autocast(x.device.type, autocast)
    with context:
        y = layer(x)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
