"""Where LoRA layers go in a model, and where they are: paths, targets, and the exchange of modules,
all at once or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_lora.adapter_config import AdapterConfig
from fused_lora.functional import DTYPES
from fused_lora.layer import LoRALayer, check_adapter_options
from fused_lora.linear import FusedLoRALinear, is_conv1d
from fused_lora.multi import MultiLoRALinear
from fused_lora.quantized import QuantizedLoRALinear, quantization_of
from fused_lora.targets import match_pattern, named
from fused_lora.weight_readers import read_by, weights_read_in
from fused_lora.wrapped import below_ddp, clean_path, manager_of, require_module, unwrapped, warn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
_HEADS = ("score", "classifier")


class Place(NamedTuple):
    """Where a module hangs: `parent.name` is the module, `path` is how the model calls it."""

    parent: nn.Module
    name: str
    path: str


def require_names(label: str, names: object) -> None:
    """Raise TypeError unless this is a collection of strings, and not one string."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"{label} must be a list of names: got {names!r}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{label} holds {name!r}, expected names")


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """{path: LoRA layer}, each layer once, under the first of its paths."""
    require_module(model)
    return {
        clean_path(path): module
        for path, module in model.named_modules()
        if isinstance(module, LoRALayer)
    }


def pack_layers(model: nn.Module) -> dict[str, MultiLoRALinear]:
    """{path: layer with a pack of adapters}, as `lora_layers`."""
    require_module(model)
    return {
        clean_path(path): module
        for path, module in model.named_modules()
        if isinstance(module, MultiLoRALinear)
    }


def find_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
) -> list[str]:
    """Paths of the modules that are targeted, as `apply_lora` says. Raises ValueError if none,
    TypeError for what is neither names nor an expression."""
    for label, names in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        if names is not None and not isinstance(names, str):
            require_names(label, names)
    places = module_places(model)
    excluded = exclude_modules or []
    found = []
    last = _last_modules(model)
    for module, where in places.items():
        paths = [place.path for place in where]
        if any(named(excluded, path) for path in paths):
            continue
        if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
            if module not in last and _is_linear(module) and not _is_read(where):
                found.append(paths[0])
        elif any(named(target_modules, path) for path in paths):
            found.append(paths[0])
    if not found:
        linears = [where[0].path for m, where in places.items() if _is_linear(m)]
        adapted = [*lora_layers(model), *pack_layers(model)]
        also = f"; adapters have {some(adapted)} already" if adapted else ""
        if _is_linear(model):
            also = "; it is one itself, of which FusedLoRALinear.from_linear makes a LoRA layer"
        raise ValueError(
            f"target_modules={_brief(target_modules)} (exclude_modules={_brief(excluded)}) fits no "
            f"module of {type(model).__name__}: a list holds ends of paths, a string is a regular "
            f"expression for a whole path; its linear layers are {some(linears) or 'none'}{also}"
        )
    return found


def _last_modules(model: nn.Module) -> set[nn.Module]:
    """What "all-linear" leaves out, as PEFT does: the output layer of a transformers model, and the
    head of a classifier, which is trained whole since it starts from random values."""
    output = output_layer(model) or new_head(model)
    return set(output.modules()) if output is not None else set()


def output_layer(model: nn.Module) -> nn.Module | None:
    """The output layer of a transformers model."""
    embeddings = getattr(unwrapped(model), "get_output_embeddings", None)
    return embeddings() if callable(embeddings) else None


def new_head(model: nn.Module) -> nn.Module | None:
    """The head of a transformers classifier, which starts from random values."""
    model = unwrapped(model)
    if not type(model).__name__.endswith(_CLASSIFIERS):
        return None
    heads = (getattr(model, name, None) for name in _HEADS)
    return next((head for head in heads if isinstance(head, nn.Module)), None)


def checked_targets(
    model: nn.Module, config: AdapterConfig, common: Mapping[str, Any]
) -> list[str]:
    """Paths of the layers that `config` targets, after checking its options."""
    if config.target_modules is None:
        raise ValueError(
            "target_modules is None: give a list of ends of paths, a regular expression or "
            "'all-linear'"
        )
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    places = module_places(model)
    paths = [place.path for where in places.values() for place in where]
    for label in ("target_modules", "exclude_modules"):
        names = getattr(config, label)
        if names is None or isinstance(names, str):
            continue
        idle = [name for name in names if not any(named([name], path) for path in paths)]
        if idle:
            warn(
                f"{label} has {some(idle)}, which no module of {type(model).__name__} is called "
                "(the experts of a mixture are often one tensor)"
            )
    for kind in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, kind)
        if not isinstance(patterns, Mapping):
            raise TypeError(f"{kind} must map names to values: got {patterns!r}")
        require_names(f"{kind}'s keys", list(patterns))
        used = {match_pattern(patterns, path) for path in targets}
        for unused in [key for key in patterns if key not in used]:
            raise ValueError(
                f"{kind} has {unused!r}, which decides for no targeted layer: correct or remove it"
            )
    output = output_layer(model)
    if output in places and places[output][0].path in targets:
        warn(
            f"{places[output][0].path} is the output layer: losses that read its weight, as TRL's "
            "and Liger's do, leave its adapter out and never train it"
        )
    for path in targets:
        check_adapter_options(
            r=config.rank(path),
            lora_alpha=config.alpha(path),
            use_rslora=config.use_rslora,
            **common,
        )
    return targets


class Replacement:
    """LoRA layers, or with `packs` MultiLoRALinear layers, for modules of a model, made and checked
    but not yet in their places.

    `layers` holds them by path. `commit` puts them there and freezes the base; until then the model
    is untouched. Raises TypeError for a module that cannot be replaced, with path and reason.
    """

    def __init__(
        self, model: nn.Module, options: Mapping[str, Mapping[str, Any]], *, packs: bool = False
    ) -> None:
        self._places = module_places(model)
        owners = {place.path: m for m, where in self._places.items() for place in where}
        modules = {path: owners[path] for path in options}
        if below_ddp(model).intersection(modules.values()):
            raise TypeError(
                "DistributedDataParallel averages the gradients of the parameters that it was made "
                "with: put the adapters into model.module, and wrap that anew"
            )
        for path, module in modules.items():
            reason = _why_not(module, self._places[module], owners, packs)
            if reason is not None:
                raise TypeError(f"{path} ({type(module).__name__}) cannot take LoRA: {reason}")
        for parent, name, path in (place for m in modules.values() for place in self._places[m]):
            if name in weights_read_in(type(parent)):  # type: ignore[arg-type]
                warn(
                    f"{type(parent).__name__} reads {name}.weight itself: where it does, the "
                    f"adapter of {path} is left out"
                )
        self._modules = modules
        trained = {path: _requires_grad(module) for path, module in modules.items()}
        self.layers: dict[str, Any] = {}
        try:
            for path, module in modules.items():
                make: Callable[..., nn.Module] = FusedLoRALinear.from_linear
                if packs:
                    make = MultiLoRALinear.from_linear
                elif quantization_of(module) is not None:
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
    require_module(model)
    places: dict[nn.Module, list[Place]] = {}
    for path, parent in model.named_modules(remove_duplicate=False):
        for name, child in parent._modules.items():  # named_children leaves out a second name
            if child is not None:
                full = clean_path(f"{path}.{name}" if path else name)
                places.setdefault(child, []).append(Place(parent, name, full))
    return places


def _is_read(where: Sequence[Place]) -> bool:
    return any(place.name in read_by(place.parent) for place in where)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _why_not(
    module: nn.Module, where: Sequence[Place], owners: Mapping[str, nn.Module], packs: bool
) -> str | None:
    """Why a LoRA layer cannot stand in `module`'s place, and what to do; None if it can."""
    if isinstance(module, LoRALayer):
        return "it is a LoRA layer already; load_adapter() changes its adapter, unload() removes it"
    if isinstance(module, MultiLoRALinear):
        return "it has a pack of adapters already; load_adapter() adds one to it"
    for parent, name, path in where:
        attention = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        if attention or name in read_by(parent):
            return (
                f"{type(parent).__name__} reads {name}.weight itself and would leave the adapter "
                "out; name it in exclude_modules"
                + (", or use an attention made of separate layers" if attention else "")
            )
        peft = sys.modules.get("peft.tuners.tuners_utils")
        above = [path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)]
        if peft is not None and any(isinstance(owners[p], peft.BaseTunerLayer) for p in above):
            return "it is part of a PEFT layer; use fused_lora.integrations.peft for PEFT models"
    manager = manager_of(module, getattr(module, "weight", None))
    if manager is not None:
        return f"{manager} holds its parameters already; give the model its adapters before"
    if quantization_of(module) is not None:
        if packs:
            return (
                f"a pack needs a plain weight, this one is quantised ({quantization_of(module)}); "
                "serve it with PEFT's adapter_names and fused_lora.integrations.peft"
            )
        return None  # it stays, with its hooks
    if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
        return (
            "it has hooks or a forward of its own, which the new layer would not have; remove them "
            "and register them again afterwards"
        )
    if not (type(module) is nn.Linear or is_conv1d(module)):
        return "LoRA layers replace nn.Linear, Conv1D of transformers and quantised linear layers"
    weight: Any = module.weight
    if is_traceable_wrapper_subclass(weight) or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, not a plain tensor"
    return None


def _requires_grad(module: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters(recurse=False)]


def _brief(names: str | Sequence[str]) -> str:
    text = repr(names)
    return text if len(text) <= 200 else text[:197] + "..."


def some(paths: Sequence[str]) -> str:
    """The first few paths, and how many there are besides."""
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    return ", ".join(paths[:4]) + more
