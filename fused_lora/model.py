"""LoRA over a whole model: put layers in, choose what trains, merge, switch off, take out again.

Everything happens in place and is all or nothing: what can be refused is refused before the first
module is touched. A module or weight that the model uses in several places is handled once.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_lora.layer import InitLoRA, LoRALayer, check_adapter_options
from fused_lora.linear import FusedLoRALinear, is_conv1d
from fused_lora.quantized import QuantizedLoRALinear, quantization_of
from fused_lora.targets import match_pattern, named

Bias = Literal["none", "all", "lora_only"]
BIASES = ("none", "all", "lora_only")
# what torch.compile and activation checkpointing put into the path of a module
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module)(?=\.|$)")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class Place(NamedTuple):
    """Where a module hangs: `parent.name` is the module, `path` is how the model calls it."""

    parent: nn.Module
    name: str
    path: str


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
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    init_lora_weights: InitLoRA = True,
    adapter_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Put a LoRA layer in the place of each targeted linear layer of `model`; returns `model`.

    The layers share the weights they replace and freeze them; other parameters are left as they
    are (`mark_only_lora_as_trainable` freezes those). nn.Linear, the Conv1D of transformers and
    quantised linear layers of bitsandbytes and torchao can be targeted.

    Args:
        target_modules: as in PEFT: a list of names, each a whole path or the end of one at a dot;
            a string is a regular expression for the whole path; "all-linear" is every linear layer
            but the output layer (`model.get_output_embeddings()`).
        exclude_modules: a list or a regular expression of the same kind; wins over target_modules.
        rank_pattern, alpha_pattern: {name or regular expression: r or lora_alpha} for single
            layers, matched against the end of the path as PEFT does.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, adapter_dtype, backend: as in
            `FusedLoRALinear`.

    Raises ValueError if nothing is targeted, a pattern fits no target or an option is out of range;
    TypeError for a target that cannot take a LoRA layer, with its path and the reason. Either way
    the model is as it was.
    """
    common = {
        "lora_dropout": lora_dropout,
        "init_lora_weights": init_lora_weights,
        "adapter_dtype": adapter_dtype,
        "backend": backend,
    }
    targets = find_targets(model, target_modules, exclude_modules)
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    for kind, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        used = {match_pattern(patterns, path) for path in targets}
        for unused in [key for key in patterns if key not in used]:
            raise ValueError(
                f"{kind} has {unused!r}, which decides for no targeted layer: correct or remove it"
            )
    options: dict[str, dict[str, Any]] = {}
    for path in targets:
        rank = ranks.get(match_pattern(ranks, path) or "", r)
        alpha = alphas.get(match_pattern(alphas, path) or "", lora_alpha)
        check_adapter_options(r=rank, lora_alpha=alpha, **common)  # type: ignore[arg-type]
        options[path] = {"r": rank, "lora_alpha": alpha, "use_rslora": use_rslora, **common}
    Replacement(model, options).commit()
    return model


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freeze everything but lora_A and lora_B. bias "all" also trains every bias of the model,
    "lora_only" those of the LoRA layers. Raises ValueError for another bias or no LoRA layer."""
    layers, biases = require_layers(model), bias_parameters(model, bias)
    adapters = [p for layer in layers.values() for p in (layer.lora_A, layer.lora_B)]
    trained = {id(p) for p in (*adapters, *biases.values())}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The adapters (and biases, as in `mark_only_lora_as_trainable`) of `model.state_dict()`, under
    the same keys: `load_state_dict(..., strict=False)` takes it back. Tensors are not copied.
    Raises ValueError for another bias or no LoRA layer."""
    state = {}
    for path, layer in require_layers(model).items():
        for name in ("lora_A", "lora_B"):
            state[f"{path}.{name}" if path else name] = getattr(layer, name).detach()
    return state | {key: value.detach() for key, value in bias_parameters(model, bias).items()}


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Print how many parameters train, of how many and in per cent; returns the counts. A shared
    parameter counts once, a packed 4-bit one as many as it stands for."""
    sizes = [(parameter.requires_grad, _size(parameter)) for parameter in model.parameters()]
    counts = TrainableParameters(
        sum(size for trains, size in sizes if trains), sum(size for _, size in sizes)
    )
    print(counts)
    return counts


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model computes what its base does, merged or not, bit for bit (the
    reference model of DPO, for example). Raises RuntimeError if a base weight was let go by
    merge(keep_base=False), ValueError if there is no LoRA layer."""
    layers = require_layers(model)
    _require_kept_base(layers, "disable_adapters")
    before = [(layer, layer.adapter_enabled) for layer in layers.values()]
    try:
        for layer, _ in before:
            layer.adapter_enabled = False
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
            f"{_some(merged)}: merged already; call unmerge_adapter() before merging again"
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
    for layer in layers.values():
        layer.unmerge()


def unload(model: nn.Module) -> nn.Module:
    """Put plain layers back in the place of the LoRA layers, with the weights as they are now: the
    very base Parameters, or the merged ones after `merge_adapter`. Weights stay frozen. Returns
    `model`. Raises ValueError if there is no LoRA layer."""
    require_layers(model)
    if isinstance(model, LoRALayer):
        raise ValueError("the model is itself a LoRA layer: call its base_module() or to_linear()")
    places = module_places(model)
    plain = [(where, m.base_module()) for m, where in places.items() if isinstance(m, LoRALayer)]
    for where, module in plain:
        for place in where:
            setattr(place.parent, place.name, module)
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


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """{path: LoRA layer}, each layer once, under the first of its paths."""
    return {
        clean_path(path): module
        for path, module in model.named_modules()
        if isinstance(module, LoRALayer)
    }


def require_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """`lora_layers`, raising ValueError if there are none."""
    layers = lora_layers(model)
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what data parallelism and torch.compile put around it."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def bias_parameters(model: nn.Module, bias: Bias) -> dict[str, nn.Parameter]:
    """{key: Parameter} of the biases that "none", "all" or "lora_only" speaks of."""
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}: got {bias!r}")
    every = {clean_path(key): parameter for key, parameter in model.named_parameters()}
    biases = {key: p for key, p in every.items() if key == "bias" or key.endswith(".bias")}
    if bias == "lora_only":
        owned = {id(layer.bias) for layer in lora_layers(model).values()}
        biases = {key: p for key, p in biases.items() if id(p) in owned}
    return {} if bias == "none" else biases


def clean_path(path: str) -> str:
    """A path without what torch.compile and activation checkpointing add to it."""
    return _WRAPPERS.sub("", path).lstrip(".")


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
) -> list[str]:
    """Paths of the modules that are targeted, as `apply_lora` says. Raises ValueError if none."""
    places = module_places(model)
    excluded = exclude_modules or []
    found = []
    embeddings = getattr(model, "get_output_embeddings", None)
    output = embeddings() if callable(embeddings) else None
    for module, where in places.items():
        paths = [place.path for place in where]
        if any(named(excluded, path) for path in paths):
            continue
        if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
            if module is not output and _is_linear(module):
                found.append(paths[0])
        elif any(named(target_modules, path) for path in paths):
            found.append(paths[0])
    if not found:
        linears = [where[0].path for m, where in places.items() if _is_linear(m)]
        raise ValueError(
            f"target_modules={_brief(target_modules)} (exclude_modules={_brief(excluded)}) fits no "
            f"module of {type(model).__name__}: a list holds ends of paths, a string is a regular "
            f"expression for a whole path; its linear layers are {_some(linears) or 'none'}"
        )
    return found


class Replacement:
    """LoRA layers for modules of a model, made and checked but not yet in their places.

    `layers` holds them by path. `commit` puts them there and freezes the base; until then the model
    is untouched. Raises TypeError for a module that cannot be replaced, with path and reason.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Mapping[str, Any]]) -> None:
        self._places = module_places(model)
        owners = {place.path: m for m, where in self._places.items() for place in where}
        modules = {path: owners[path] for path in options}
        for path, module in modules.items():
            reason = _why_not(module, self._places[module], owners)
            if reason is not None:
                raise TypeError(f"{path} ({type(module).__name__}) cannot take LoRA: {reason}")
        self._modules = modules
        trained = {path: _requires_grad(module) for path, module in modules.items()}
        self.layers: dict[str, LoRALayer] = {}
        try:
            for path, module in modules.items():
                make: Callable[..., LoRALayer] = FusedLoRALinear.from_linear
                if quantization_of(module) is not None:
                    make = QuantizedLoRALinear
                self.layers[path] = make(module, **options[path])
        finally:
            for path, module in modules.items():
                for parameter, requires_grad in zip(
                    module.parameters(recurse=False), trained[path], strict=True
                ):
                    parameter.requires_grad_(requires_grad)

    def commit(self) -> None:
        for path, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            for place in self._places[module]:
                setattr(place.parent, place.name, self.layers[path])


def module_places(model: nn.Module) -> dict[nn.Module, list[Place]]:
    """Every place of every module below `model`, in the order of named_modules."""
    places: dict[nn.Module, list[Place]] = {}
    for path, parent in model.named_modules(remove_duplicate=False):
        for name, child in parent._modules.items():  # named_children leaves out a second name
            if child is not None:
                full = clean_path(f"{path}.{name}" if path else name)
                places.setdefault(child, []).append(Place(parent, name, full))
    return places


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _why_not(
    module: nn.Module, where: Sequence[Place], owners: Mapping[str, nn.Module]
) -> str | None:
    """Why a LoRA layer cannot stand in `module`'s place, and what to do; None if it can."""
    if isinstance(module, LoRALayer):
        return "it is a LoRA layer already; load_adapter() changes its adapter, unload() removes it"
    for parent, name, path in where:
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            return (
                f"{type(parent).__name__} reads {name}.weight itself and would leave the adapter "
                "out; name it in exclude_modules, or use an attention made of separate layers"
            )
        peft = sys.modules.get("peft.tuners.tuners_utils")
        above = [path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)]
        if peft is not None and any(isinstance(owners[p], peft.BaseTunerLayer) for p in above):
            return "it is part of a PEFT layer; use fused_lora.integrations.peft for PEFT models"
    if quantization_of(module) is not None:
        return None  # it stays, with its hooks
    if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
        return (
            "it has hooks or a forward of its own, which the new layer would not have; remove them "
            "and register them again afterwards"
        )
    if not (type(module) is nn.Linear or is_conv1d(module)):
        return "LoRA layers replace nn.Linear, Conv1D of transformers and quantised linear layers"
    weight: Any = module.weight
    if is_traceable_wrapper_subclass(weight) or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not a plain tensor"
    return None


def _requires_grad(module: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters(recurse=False)]


def _require_kept_base(layers: Mapping[str, LoRALayer], what: str) -> None:
    gone = [path for path, layer in layers.items() if not layer.has_base]
    if gone:
        raise RuntimeError(
            f"{what} needs the base weight of {_some(gone)}, which merge(keep_base=False) let go: "
            "load a base checkpoint, or merge with keep_base=True"
        )


def _size(parameter: nn.Parameter) -> int:
    packed: Any = getattr(parameter, "quant_state", None)  # 4-bit weights of bitsandbytes
    return parameter.numel() if packed is None else packed.shape.numel()


def _brief(names: str | Sequence[str]) -> str:
    text = repr(names)
    return text if len(text) <= 200 else text[:197] + "..."


def _some(paths: Sequence[str]) -> str:
    """The first few paths, and how many there are besides."""
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(paths[:4]) + more
