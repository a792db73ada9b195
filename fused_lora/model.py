"""LoRA over a whole model: put layers in, choose what trains, merge, switch off, take out again.

Everything happens in place and is all or nothing: what can be refused is refused before the first
module is touched. A module or weight that the model uses in several places is handled once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.adapter_config import BIASES, AdapterConfig, Bias
from fused_lora.extras import (
    forget_extras,
    originals_back,
    remember_extras,
    require_extras_here,
    whole_modules,
)
from fused_lora.layer import InitLoRA, LoRALayer
from fused_lora.packs import apply_packs
from fused_lora.places import (
    Replacement,
    checked_targets,
    lora_layers,
    module_places,
    new_head,
    pack_layers,
    require_names,
    some,
)
from fused_lora.quantized import QuantizedLoRALinear
from fused_lora.wrapped import below_ddp, clean_path, require_module, unwrapped, warn


class TrainableParameters(NamedTuple):
    """How many of a model's parameters train."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        return 100.0 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.percent:.4g} %)"


def apply_lora(
    model: nn.Module,
    *,
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    init_lora_weights: InitLoRA = True,
    adapter_dtype: torch.dtype | None = None,
    backend: str = "auto",
    adapters: Mapping[str, Mapping[str, Any] | str | os.PathLike[str]] | None = None,
    total_rank: int | None = None,
    max_adapters: int = 64,
) -> nn.Module:
    """Put a LoRA layer in the place of each targeted linear layer of `model`; returns `model`.

    The layers share the weights they replace and freeze them; other parameters are left as they
    are (`mark_only_lora_as_trainable` freezes those). nn.Linear, the Conv1D of transformers and
    quantised linear layers of bitsandbytes and torchao can be targeted.

    Args:
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, backend: as in
            `FusedLoRALinear`. Without `adapters`, r and lora_alpha must be given.
        target_modules: as in PEFT: a list of names, each a whole path or the end of one at a dot;
            a string is a regular expression for the whole path; "all-linear" is every linear layer
            but the output layer (`model.get_output_embeddings()`) or, of a model for sequence or
            token classification, the head (`score` or `classifier`), which
            `mark_only_lora_as_trainable` trains whole, and those that are known to have their
            weight read past their forward.
        exclude_modules: a list or a regular expression of the same kind; wins over target_modules.
        rank_pattern, alpha_pattern: {name or regular expression: r or lora_alpha} for single
            layers, matched against the end of the path as PEFT does.
        adapters: {name: options, or a folder in PEFT's format}: many adapters in one batch, chosen
            by `use_adapters`. The layers are then `MultiLoRALinear`. Options are this function's
            own, r, lora_alpha, target_modules, exclude_modules, rank_pattern, alpha_pattern and
            use_rslora, where they differ from those of the call; {} for none.
            In a layer that an adapter does not touch its tokens take the base. Ids are 0, 1, ...
            in the order given, the same in all layers. Quantised layers cannot be targeted.
        total_rank: room in each pack, every adapter's rank rounded up to a multiple of 16; all
            layers of target_modules get a pack then. By default what `adapters` need, where they
            need it: none is free for `add_adapter` and `load_adapter`.
        max_adapters: the largest number of adapters at a time.

    Raises ValueError if nothing is targeted, a pattern fits no target, an option is out of range
    or the room too small; TypeError for a target that cannot take a LoRA layer, with its path and
    the reason; for folders as `load_adapter`. Either way the model is as it was.
    """
    own: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "rank_pattern": rank_pattern or {},
        "alpha_pattern": alpha_pattern or {},
        "use_rslora": use_rslora,
    }
    common: dict[str, Any] = {
        "lora_dropout": lora_dropout,
        "init_lora_weights": init_lora_weights,
        "adapter_dtype": adapter_dtype,
        "backend": backend,
    }
    if adapters is not None:
        apply_packs(model, adapters, own, common, total_rank, max_adapters)
        return model
    if total_rank is not None:
        raise ValueError(
            "total_rank is room for `adapters`: pass them too, or adapters={} to start with none"
        )
    if r is None or lora_alpha is None:
        raise ValueError(f"apply_lora needs r and lora_alpha: got r={r}, lora_alpha={lora_alpha}")
    config = AdapterConfig(**own)
    options = {
        path: {"r": config.rank(path), "lora_alpha": config.alpha(path), "use_rslora": use_rslora}
        for path in checked_targets(model, config, common)
    }
    Replacement(model, {path: each | common for path, each in options.items()}).commit()
    return model


def mark_only_lora_as_trainable(
    model: nn.Module, bias: Bias = "none", modules_to_save: Sequence[str] | None = None
) -> None:
    """Freeze everything but lora_A and lora_B, those of packs too.

    bias: "all" also trains every bias of the model, "lora_only" those of the LoRA layers.
    modules_to_save: names of modules to be trained whole, a new classifier say: ends of paths, at a
        dot or not, as PEFT reads them. None is the head (`score` or `classifier`) of a transformers
        model for sequence or token classification, if it is without LoRA, and otherwise none.
    `save_adapter` saves these modules and the biases with the adapter, also after another call that
    names none. With packs they are all adapters' in common: save them apart.
    Raises ValueError for another bias, no LoRA layer, or a module that is not there, holds a LoRA
    layer, is tied to another or cannot be trained; RuntimeError if DistributedDataParallel has
    taken stock of what trains before; then nothing is frozen."""
    if modules_to_save is not None:
        require_names("modules_to_save", modules_to_save)
    known, model = below_ddp(model), unwrapped(model)
    packed = pack_layers(model)
    packs = [layer.pack for layer in packed.values()]
    layers = lora_layers(model) if packs else require_layers(model)
    biases = bias_parameters(model, bias)
    adapters = [
        parameter  # lora_A and lora_B, or what they are made of where they are parametrized
        for holder in (*layers.values(), *packs)
        for name, parameter in holder.named_parameters()
        if any(part.startswith("lora_") for part in name.split("."))
    ]
    if modules_to_save is None:
        modules_to_save = [] if packs else _new_head(model)
    whole = {
        key: tensor
        for name in modules_to_save
        for key, tensor in whole_modules(model, name, [*layers, *packed]).items()
        if isinstance(tensor, nn.Parameter)
    }
    for key, parameter in whole.items():
        if not parameter.is_floating_point():
            raise ValueError(f"modules_to_save has {key}: {parameter.dtype} cannot be trained")
    trained = {id(p) for p in (*adapters, *biases.values(), *whole.values())}
    for parameter in (p for module in known for p in module.parameters(recurse=False)):
        if id(parameter) in trained and not parameter.requires_grad:
            raise RuntimeError(
                "DistributedDataParallel averages the gradients of what trained when it was made, "
                "and this call would add to that: mark the model before it is wrapped"
            )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    if packs and (whole or biases):
        warn("biases and whole modules of a model with packs are not saved by save_adapter")
    elif not packs:
        remember_extras(model, bias, modules_to_save)


def _new_head(model: nn.Module) -> list[str]:
    """The name of the head that a classifier trains whole, in a list; none if it has LoRA."""
    head = new_head(model)
    if head is None or lora_layers(head):
        return []
    return [next(name for name, module in model.named_children() if module is head)]


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The adapters (and biases, as in `mark_only_lora_as_trainable`) of `model.state_dict()`, under
    the keys of the model itself, without what torch.compile, DDP and checkpoint wrappers put in
    front: `load_state_dict(..., strict=False)` of the model inside them (`_orig_mod`, `module`)
    takes it back. Tensors are not copied. Raises ValueError for another bias or no LoRA layer,
    RuntimeError for layers whose parameters accelerate has offloaded or FSDP1 has sharded."""
    model, state = unwrapped(model), {}
    for path, layer in require_layers(model).items():
        require_values(path, layer)
        for name in ("lora_A", "lora_B"):
            state[f"{path}.{name}" if path else name] = getattr(layer, name).detach()
    return state | {key: value.detach() for key, value in bias_parameters(model, bias).items()}


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Print how many parameters train, of how many and in per cent; returns the counts. A shared
    parameter counts once, a packed 4-bit one as many as it stands for."""
    require_module(model)
    sizes = [(parameter.requires_grad, _size(parameter)) for parameter in model.parameters()]
    counts = TrainableParameters(
        sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)
    )
    print(counts)
    return counts


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what its base does, merged or not, bit for bit (the
    reference model of DPO, for example). Biases and whole modules that `load_adapter` wrote over
    the model's own are away, too, and loading, saving and `unload` are refused meanwhile; those
    trained in place are the model's and stay. A copy of the model that is made inside stays without
    adapters. Under reentrant activation checkpointing call backward inside the block, or outside,
    as the forward pass was: it is computed again with what is on then. Raises RuntimeError if a
    base weight was let go by merge(keep_base=False), ValueError if there is no LoRA layer."""
    layers = require_layers(model)
    _require_kept_base(layers, "disable_adapters")
    before = [(layer, layer.adapter_enabled) for layer in layers.values()]
    try:
        for layer, _ in before:
            layer.adapter_enabled = False
        with originals_back(model):
            yield model
    finally:
        for layer, enabled in before:
            layer.adapter_enabled = enabled


def merge_adapter(
    model: nn.Module, keep_base: bool | Literal["cpu"] = True, *, requantise: bool = False
) -> None:
    """Merge every LoRA layer, as `FusedLoRALinear.merge` does. A quantised base is merged only with
    requantise=True: its sum with the adapter is rounded to the few levels it has; plain bases
    beside it are merged as ever. Raises RuntimeError if a layer is merged already, not initialised,
    or quantised and not to be, or not able to be, quantised anew, ValueError for requantise=True
    where no base is quantised; then nothing is merged."""
    layers = require_layers(model)
    quantised = {path for path, m in layers.items() if isinstance(m, QuantizedLoRALinear)}
    if requantise and not quantised:
        raise ValueError(
            f"requantise=True is for quantised bases, {type(model).__name__} has none: leave it out"
        )
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(
            f"{some(merged)}: merged already; call unmerge_adapter() before merging again"
        )
    for path, layer in layers.items():
        reason = layer.why_not_merge(requantise)
        if reason is not None:
            raise RuntimeError(f"{path}: {reason}")
    with all_or_nothing(layers.values()):
        for path, layer in layers.items():
            layer.merge(keep_base, requantise and path in quantised)


def unmerge_adapter(model: nn.Module) -> None:
    """Put the base weight of every merged layer back, bit for bit. Raises RuntimeError if no layer
    is merged or a base weight was let go; then nothing changes."""
    layers = {path: layer for path, layer in require_layers(model).items() if layer.merged}
    if not layers:
        raise RuntimeError("no LoRA layer is merged: there is nothing to unmerge")
    _require_kept_base(layers, "unmerge_adapter")
    with all_or_nothing(layers.values()):
        for layer in layers.values():
            layer.unmerge()


def unload(model: nn.Module) -> nn.Module:
    """Put plain layers back in the place of the LoRA layers, with the weights as they are now: the
    very base Parameters, or the merged ones after `merge_adapter`. Biases and whole modules that
    were trained, or that a file has brought, stay and are the model's own. Weights stay frozen.
    Returns `model`. Raises ValueError if there is no LoRA layer, RuntimeError where accelerate has
    offloaded one, a weight is parametrized, FSDP holds the parameters or `disable_adapters` has
    some away; then nothing changes."""
    for path, layer in require_layers(model).items():
        reason = layer.why_not_read() if layer.offloaded else None
        if "weight" in layer._written and layer._parameters.get("weight") is None:
            reason = "weight is parametrized or pruned; make it a plain one first"
        if layer.manager is not None:
            reason = f"{layer.manager} looks for its parameters in this very layer; unload before"
        if reason is not None:
            raise RuntimeError(f"{path} cannot be unloaded: {reason}")
    if isinstance(model, LoRALayer):
        raise ValueError("the model is itself a LoRA layer: call its base_module() or to_linear()")
    require_extras_here(model)
    places = module_places(model)
    plain = [(where, m.base_module()) for m, where in places.items() if isinstance(m, LoRALayer)]
    for where, module in plain:
        for place in where:
            setattr(place.parent, place.name, module)
    forget_extras(model)
    return model


@contextlib.contextmanager
def all_or_nothing(layers: Iterable[LoRALayer]) -> Iterator[None]:
    """Whatever fails within the context (memory runs out, say), the layers are as they were."""
    before = [(layer, layer.snapshot()) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, state in before:
            layer.restore(state)
        raise


def require_values(path: str, layer: LoRALayer) -> None:
    """Raise RuntimeError if the adapter's values are not in the layer."""
    reason = layer.why_not_read()
    if reason is not None:
        raise RuntimeError(f"{path or 'the layer'}: {reason}")


def require_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """`lora_layers`, raising ValueError if there are none."""
    layers = lora_layers(model)
    if not layers and pack_layers(model):
        raise ValueError(
            f"{type(model).__name__} holds packs of adapters, not single ones: use_adapters, "
            "add_adapter, load_adapter, save_adapter and delete_adapter are for them"
        )
    if not layers:
        remedy = "call apply_lora or load_adapter first"
        if holds_peft_layers(model):
            remedy = (
                "its adapters are PEFT's, which saves, merges and switches them itself; "
                "fused_lora.integrations.peft.patch runs them fused"
            )
        raise ValueError(f"{type(model).__name__} holds no LoRA layer: {remedy}")
    return layers


def holds_peft_layers(model: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return peft is not None and any(isinstance(m, peft.BaseTunerLayer) for m in model.modules())


def bias_parameters(model: nn.Module, bias: Bias) -> dict[str, nn.Parameter]:
    """{key: Parameter} of the biases that "none", "all" or "lora_only" speaks of."""
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}: got {bias!r}")
    every = {clean_path(key): parameter for key, parameter in model.named_parameters()}
    biases = {key: p for key, p in every.items() if key == "bias" or key.endswith(".bias")}
    if bias == "lora_only":
        layers = (*lora_layers(model).values(), *pack_layers(model).values())
        owned = {id(layer.bias) for layer in layers}
        biases = {key: p for key, p in biases.items() if id(p) in owned}
    return {} if bias == "none" else biases


def _require_kept_base(layers: Mapping[str, LoRALayer], what: str) -> None:
    gone = [path for path, layer in layers.items() if not layer.has_base]
    if gone:
        raise RuntimeError(
            f"{what} needs the base weight of {some(gone)}, which merge(keep_base=False) let go: "
            "load a base checkpoint, or merge with keep_base=True"
        )


def _size(parameter: nn.Parameter) -> int:
    packed: Any = getattr(parameter, "quant_state", None)  # 4-bit weights of bitsandbytes
    return parameter.numel() if packed is None else packed.shape.numel()
