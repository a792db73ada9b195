"""A small model for tests of whole models, and a snapshot of all that a refused call must leave."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import apply_lora

OPTIONS = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)
        self.q = nn.Linear(12, 12)

    def forward(self, x):
        return self.q(self.q_proj(x) * self.v_proj(x))


class Model(nn.Module):
    """Two blocks, a layer used twice under two names, and an output layer that is named as one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.shared = nn.Linear(12, 12)
        self.again = self.shared
        self.norm = nn.LayerNorm(12)
        self.lm_head = nn.Linear(12, 5)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(self.again(self.shared(x))))


def make(seed=0, **options):
    torch.manual_seed(seed)
    return apply_lora(Model(), **{**OPTIONS, **options})


def plain(seed=0):
    torch.manual_seed(seed)
    return Model()


def inputs(seed=7):
    return torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(seed))


def described(model):
    """All that a refused call must leave alone: modules, Parameters, flags and values."""
    modules = [(path, id(module)) for path, module in model.named_modules()]
    tensors = [
        (path, id(p), p.requires_grad, p.detach().clone()) for path, p in model.named_parameters()
    ]
    return modules, tensors


def assert_untouched(model, before):
    modules, tensors = described(model)
    assert modules == before[0]
    for (*got, value), (*expected, old) in zip(tensors, before[1], strict=True):
        assert got == expected and torch.equal(value, old)


def paths(model):
    return sorted(fused_lora.model.lora_layers(model))


def llama(seed=0):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=37)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**sizes, **heads, attention_bias=True)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()
