"""Quantised base layers for tests; each skips a test that asks for it where its library is not."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from fused_lora import apply_lora

K, N, R = 64, 48, 3


def nf4(dtype=torch.float32, source=None, quant_storage=torch.uint8):
    bnb = pytest.importorskip("bitsandbytes", minversion="0.50")
    options = {"compute_dtype": dtype, "quant_type": "nf4", "quant_storage": quant_storage}
    layer = bnb.nn.Linear4bit(K, N, **options)
    layer.load_state_dict((source or nn.Linear(K, N)).state_dict())
    return layer.to("cpu")


def int8(dtype=torch.float32, source=None):
    bnb = pytest.importorskip("bitsandbytes", minversion="0.50")
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    layer.load_state_dict((source or nn.Linear(K, N)).state_dict())
    return layer.to("cpu")


def torchao(name):
    def make(dtype=torch.float32):
        quantization = pytest.importorskip("torchao.quantization")
        config = getattr(importlib.import_module("torchao.quantization"), name)()
        model = nn.Sequential(nn.Linear(K, N, dtype=dtype))
        try:
            quantization.quantize_(model, config)
        except (RuntimeError, NotImplementedError, AssertionError, ImportError) as error:
            pytest.skip(f"torchao cannot quantise here: {error}")
        return model[0]

    return make


BASES = {
    "nf4": nf4,
    "int8": int8,
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
}
BITSANDBYTES = ("nf4", "int8")


def base_layer(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return BASES[kind](dtype)


def adapted(kind, dtype=torch.float32, **options):
    base = base_layer(kind, dtype)
    model = nn.Sequential(base)
    options = {"r": R, "lora_alpha": 6, "init_lora_weights": False} | options
    return apply_lora(model, **options), base


def inputs(*leading, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(leading or (7,)), K, generator=generator).to(dtype)
