"""The compatibility table of docs/peft.md: every feature is set up on a tiny model, run, and the
paths that its layers took are written down. `python tests/peft_table.py` writes the file anew."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig
from peft_models import FIRST, Tiny, adapted, lora_layer, quantised
from torch import nn

from fused_lora.integrations import peft as fused

DOCUMENT = Path(__file__).parent.parent / "docs" / "peft.md"
BF16 = torch.bfloat16
TOKENS = 6


@dataclass(frozen=True)
class Feature:
    """A row: a model with adapters, made and changed as `config` and `change` say, called by `run`.
    newest: PEFT 0.18 does not have it."""

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    change: Callable[[nn.Module], Any] = lambda model: None
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda model, x: model(x)
    patch: dict[str, Any] = field(default_factory=dict)
    newest: bool = False


def variant(name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    """A configuration object of PEFT that only some releases have: made when its row is."""

    def make() -> Any:
        import peft

        return getattr(peft, name)(*arguments, **options)

    return make


class SubclassedLinear(nn.Linear):
    pass


class Int8Weight(torch.Tensor):
    """Stands for quantised tensors: dequantised by every function that uses it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *rest = args
            return function(x, weight.as_subclass(torch.Tensor) * 1.0, *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapped(nn.Module):
    """As FSDP1 wraps lora_A: a module around the module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    @property
    def weight(self):
        return self.module.weight

    def forward(self, x):
        return self.module(x)


def with_first(base: nn.Module) -> Tiny:
    tiny = Tiny()
    tiny.first = base
    return tiny


def conv1d() -> Tiny:
    from transformers.pytorch_utils import Conv1D

    tiny = Tiny()
    tiny.first, tiny.second = Conv1D(48, 40), Conv1D(24, 48)
    return tiny


def quantise(model: nn.Module) -> None:
    base = lora_layer(model).base_layer
    weight = base.weight.detach().as_subclass(Int8Weight)
    del base.weight
    base.weight = weight


def offload(model: nn.Module) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(lora_layer(model).base_layer, AlignDevicesHook(execution_device="cpu"))


def wrap_lora_A(model: nn.Module) -> None:
    layer = lora_layer(model)
    layer.lora_A["default"] = Wrapped(layer.lora_A["default"])


def zero3(model: nn.Module) -> None:
    lora_layer(model).lora_A["default"].weight.ds_id = 0


def tensor_parallel(model: nn.Module) -> None:
    lora_layer(model).base_layer._hf_tp_plan = "colwise"


def another_active(model: nn.Module) -> None:
    model.add_adapter(
        "other", LoraConfig(target_modules=["first", "second"], r=3, init_lora_weights=False)
    )
    model.set_adapter("other")


def two_active(model: nn.Module) -> None:
    another_active(model)
    model.base_model.set_adapter(["default", "other"])


def hotswap(model: nn.Module) -> None:
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(model, target_rank=12)


def disabled(model, x):
    with model.disable_adapter():
        return model(x)


def per_sample(model, x):
    model.eval()
    names = [*model.peft_config, "__base__"] * TOKENS
    return model(x, adapter_names=names[:TOKENS])


def checkpointed(model, x):
    return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


def autocast(model, x):
    with torch.autocast("cpu", BF16):
        return model(x)


def compiled(model, x):
    return torch.compile(model, fullgraph=True, backend="aot_eager")(x)


def exported(model, x):
    return torch.export.export(model, (x.detach(),)).module()(x)


def distributed(model, x):
    """Weights and x as DTensors on a mesh of one process."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        distribute_module(model, mesh)
        return model(DTensor.from_local(x, mesh, [Replicate()])).full_tensor()
    finally:
        dist.destroy_process_group()


def traced(model, x):
    return torch.jit.trace(model, x.detach(), check_trace=False)(x)


def tangents(model, x):
    return torch.func.jvp(model, (x,), (x,))[1]


def nested(model, x):
    return model(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)).values()


def token_ids(model, x):
    return model(torch.arange(TOKENS))


def hook(module, *arguments):
    return None


FEATURES = [
    Feature("r, lora_alpha, any target_modules"),
    Feature("rsLoRA", {"use_rslora": True}),
    Feature("rank_pattern, alpha_pattern", {"rank_pattern": {"first": 3}}),
    Feature("lora_dropout, in training", {"lora_dropout": 0.1}),
    Feature('bias="all"', {"bias": "all"}),
    Feature("init gaussian", {"init_lora_weights": "gaussian"}),
    Feature("init PiSSA", {"init_lora_weights": "pissa"}),
    Feature("init OLoRA", {"init_lora_weights": "olora"}),
    Feature("another adapter added and switched to", change=another_active),
    Feature("hot swap (scaling is a tensor)", change=hotswap),
    Feature("autocast", run=autocast),
    Feature("fp32 adapters on a bf16 base", {"dtype": BF16}),
    Feature("activation checkpointing", run=checkpointed),
    Feature("torch.compile", run=compiled),
    Feature("adapter_names (one per sample)", change=another_active, run=per_sample),
    Feature("GPT-2's Conv1D base", {"model": conv1d, "fan_in_fan_out": True}),
    Feature(
        "base of another class",
        {"model": lambda: with_first(SubclassedLinear(*FIRST)), "target_modules": ["first"]},
    ),
    Feature("quantised weight in an nn.Linear", {"target_modules": ["first"]}, change=quantise),
    Feature("bitsandbytes NF4 base", {"model": lambda: quantised("nf4")}),
    Feature("bitsandbytes int8 base", {"model": lambda: quantised("int8")}),
    Feature("torchao int8 base", {"model": lambda: quantised("torchao int8")}, newest=True),
    Feature(
        "forward hook on the base",
        {"target_modules": ["first"]},
        lambda model: lora_layer(model).base_layer.register_forward_hook(hook),
    ),
    Feature("accelerate offload hook", {"target_modules": ["first"]}, change=offload),
    Feature("DoRA", {"use_dora": True}),
    Feature("aLoRA", {"alora_invocation_tokens": [1]}),
    Feature("MiCA", {"init_lora_weights": "mica"}, newest=True),
    Feature("VeLoRA", {"velora_config": variant("VeloraConfig", num_groups=8)}, newest=True),
    Feature("lora_bias", {"lora_bias": True}),
    Feature("several active adapters", change=two_active),
    Feature("adapter_names on an NF4 base", {"model": lambda: quantised("nf4")}, run=per_sample),
    Feature("disable_adapter()", run=disabled),
    Feature("merged adapter", change=lambda model: model.merge_adapter()),
    Feature(
        'fp32 adapters on a bf16 base, compute_dtype="peft"',
        {"dtype": BF16},
        patch={"compute_dtype": "peft"},
    ),
    Feature(
        "hook on lora_A or lora_B",
        {"target_modules": ["first"]},
        lambda model: lora_layer(model).lora_A["default"].register_forward_hook(hook),
    ),
    Feature("lora_A wrapped, as by FSDP1", {"target_modules": ["first"]}, change=wrap_lora_A),
    Feature("DeepSpeed ZeRO-3 (its mark on a weight)", {"target_modules": ["first"]}, change=zero3),
    Feature(
        "transformers' tensor parallel (its mark on a base)",
        {"target_modules": ["first"]},
        tensor_parallel,
    ),
    Feature("DTensor weights", run=distributed),
    Feature("torch.export", run=exported),
    Feature("torch.jit.trace", run=traced),
    Feature("torch.func.jvp", run=tangents),
    Feature("nested (jagged) x", run=nested),
    Feature(
        "adapter on nn.Embedding",
        {"model": lambda: nn.Sequential(nn.Embedding(TOKENS, 4)), "target_modules": ["0"]},
        run=token_ids,
    ),
    Feature(
        "target_parameters (experts)",
        {"target_modules": [], "target_parameters": ["first.weight"]},
    ),
]


def build(feature: Feature) -> nn.Module:
    config = dict(feature.config)
    for key in ("model", "velora_config"):
        if callable(config.get(key)):
            config[key] = config[key]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about rare options
        model = adapted(**config)
        feature.change(model)
    return model


def tokens(feature: Feature) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(TOKENS, FIRST[0]).to(feature.config.get("dtype", torch.float32))


def call(feature: Feature, model: nn.Module) -> torch.Tensor:
    return feature.run(model, tokens(feature))


def paths(feature: Feature) -> list[tuple[str, str]]:
    """The (path, reason) that the layers of a patched model took in one call."""
    model = build(feature)
    report = fused.patch(model, **feature.patch)
    taken = [("not patched", reason) for reason in report.left.values()]
    choose = fused._route

    def recorded(*arguments):
        route = choose(*arguments)
        taken.append((route.path, route.reason))
        return route

    with mock.patch.object(fused, "_route", recorded):
        call(feature, model)
    return sorted(set(taken))


def document() -> str:
    rows = []
    for feature in FEATURES:
        for path, reason in paths(feature):
            rows.append(f"| {feature.title} | {path} | {reason} |")
    return "\n".join([HEAD, *rows, ""])


HEAD = """\
# PEFT: which path each feature takes

Written by `python tests/peft_table.py`, which sets every feature up and runs it; a test compares.

* **full**: base product and adapter in one fused layer. A 4-bit weight of bitsandbytes is unpacked
  for the call: on a CPU always, on Hopper and datacentre Blackwell from 65 tokens on, on other GPUs
  from 513; for fewer, delta.
* **delta**: the base layer runs as it is; the adapter term is added to its output, without a
  temporary of that size.
* **peft**: PEFT's own forward, unchanged. **not patched**: a layer of another class, left alone.

Paths are chosen anew at every call; `fused_lora.integrations.peft.explain(model)` prints them for
your model as it stands, `call_counts(model)` says how many calls took each.

Adapter files and state dicts are PEFT's own. A whole model that is pickled while patched needs
fused-lora where it is loaded; `unpatch(model)` first if it is not there. The other adapters of a
layer, and those added later, are covered. Under FSDP2 layers are fused where blocks are the sharded
units, and run in PEFT's code where single projections are. The dropout mask is drawn from torch's
generator, but is not the one that `nn.Dropout` would draw from the same seed.

With `adapter_names` the adapters of the batch are packed anew for each call, so that no change of
theirs is missed. One that holds infinities or NaN spoils the samples of the others, as it does not
in PEFT. PEFT 0.18 makes no LoRA layer at all where torchao 0.18 is installed; 0.21 does.

| feature | path | why |
|---|---|---|"""


if __name__ == "__main__":
    argparse.ArgumentParser(description=f"Write {DOCUMENT.name} anew.").parse_args()
    DOCUMENT.write_text(document(), encoding="utf-8")
    print(f"wrote {DOCUMENT.name}")
