"""Adapters of a model to and from files in PEFT's format, written all at once. A file that is
refused leaves the model exactly as it was."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapter_config import CONFIG_FILE, AdapterConfig, Bias
from fused_lora.adapter_files import (
    PREFIX,
    Adapter,
    adapter_folder,
    check_same,
    read_adapter,
    shape_of,
)
from fused_lora.atomic import write_directory
from fused_lora.extras import (
    all_names,
    extras_of,
    require_extras_here,
    require_here,
    require_same_embeddings,
    whole_modules,
    write_extras,
)
from fused_lora.layer import LoRALayer
from fused_lora.model import (
    all_or_nothing,
    bias_parameters,
    holds_peft_layers,
    require_layers,
    require_values,
)
from fused_lora.multi import MultiLoRALinear
from fused_lora.packs import put_adapter
from fused_lora.places import (
    Replacement,
    find_targets,
    lora_layers,
    module_places,
    pack_layers,
    require_names,
    some,
)
from fused_lora.targets import describe_targets, describe_values, in_whole, layer_indices
from fused_lora.wrapped import below_ddp, sharded_now, unwrapped, warn


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    bias: Bias | None = None,
    modules_to_save: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """Write the adapters of `model` as PEFT does, so that PEFT loads them; needs `safetensors`.

    bias, modules_to_save: as in `mark_only_lora_as_trainable`, and by default as it was told, or as
        the file that was loaded last has them; else "none" and [].
    name: PEFT keeps an adapter that is not the default one in a folder of its name. In a model with
        packs it is the adapter to save; only its factors are, biases and modules are all adapters'.
    The files are replaced both at once: a reader never finds one without the other. Raises
    ValueError for non-finite or uninitialised adapters, unknown modules or no LoRA layer, KeyError
    for an adapter that the packs do not hold.
    """
    if modules_to_save is not None:
        require_names("modules_to_save", modules_to_save)
    adapter = adapter_of(model, bias, modules_to_save, name)
    _warn_of_shared(unwrapped(model), adapter.factors)
    write_directory(adapter_folder(directory, name), adapter.files())


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], name: str | None = None
) -> nn.Module:
    """Load an adapter that PEFT or `save_adapter` wrote; returns `model`.

    A model with LoRA layers gets the new adapter in all of them, of any rank, in the dtype they
    have; layers that are merged are merged with it, into a new weight. lora_A and lora_B stay the
    same objects where the rank does, so an optimizer, or a CUDA graph of the unmerged model, keeps
    them. In a model without LoRA layers they are put in first. Biases and whole modules in the file
    are written over the model's; loading an adapter without them brings the original values back
    (load a base checkpoint before: what comes later counts as the adapter's). Embeddings that PEFT
    has saved beside the adapter are the base's: where they differ from the model's, they are
    written over those for good.

    A model with packs (`apply_lora(adapters=...)`) gets the adapter into all of them in place, as
    one more or in the place of the adapter of this name, in the packs' dtype; the id stays, a new
    one is the smallest free one. It may touch any of the layers; the packs' dropout stays.
    `directory` holds a folder `name`, as PEFT and `save_adapter` write it, or is itself the
    adapter's folder.

    Only safetensors are read, never pickle. Raises FileNotFoundError without files, ValueError,
    naming key or field, for a file that is broken, does not fit the model or asks for what this
    library does not compute, RuntimeError if merge(keep_base=False) let a base weight go, other
    embeddings would be written to a merged layer or the layers are sharded. Then the model is
    exactly as it was.
    """
    given, model = model, unwrapped(model)
    packs = pack_layers(model)
    if packs:
        _load_into_packs(model, packs, directory, name)
        return given
    adapter = read_adapter(adapter_folder(directory, name))
    layers = lora_layers(model)
    _require_fit(given, layers, adapter)
    replacement = None if layers else _layers_for(model, adapter)
    if replacement is not None:
        layers = replacement.layers
    for path, layer in layers.items():
        _require_place(path, layer, adapter)
    _warn_of_shared(model, layers)  # a warning may be an error: before anything is written
    config = adapter.config
    with write_extras(model, adapter), all_or_nothing(layers.values()):
        for path, layer in layers.items():
            layer.set_adapter(
                *adapter.factors[path],
                lora_alpha=config.alpha(path),
                use_rslora=config.use_rslora,
                lora_dropout=config.lora_dropout,
            )
        if replacement is not None:
            replacement.commit()
    return given


def _load_into_packs(
    model: nn.Module,
    packs: Mapping[str, MultiLoRALinear],
    directory: str | os.PathLike[str],
    name: str | None,
) -> None:
    named = folder = adapter_folder(directory, name)
    if not named.is_dir():
        folder = Path(directory)
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"neither {named} nor {folder} holds an adapter")
    adapter = read_adapter(folder)
    require_same_embeddings(model, adapter)
    put_adapter(packs, name or "default", adapter.for_packs("layers with a pack", packs))


def _require_fit(given: nn.Module, layers: Mapping[str, LoRALayer], adapter: Adapter) -> None:
    """Raise if the file is not one for the LoRA layers that the model has, or if it would bring
    other Parameters than data parallelism around them knows."""
    ranks = {path: lora_A.shape[0] for path, (lora_A, _) in adapter.factors.items()}
    if not layers and holds_peft_layers(given):
        require_layers(given)  # raises, and says what to do with those
    known = below_ddp(given)
    exchanged: list[nn.Module] = [m for path, m in layers.items() if m.r != ranks.get(path)]
    if not layers and known:
        places = module_places(unwrapped(given)).items()
        exchanged = [m for m, where in places if any(place.path in ranks for place in where)]
    if known.intersection(exchanged):
        raise RuntimeError(
            "DistributedDataParallel averages the gradients of the parameters that it was made "
            "with: load an adapter of another rank, or a first one, before it"
        )
    if layers:
        remedy = "call unload() and load again, or take the adapter of this model"
        check_same("LoRA layers of the model", set(layers), set(ranks), remedy)


def _layers_for(model: nn.Module, adapter: Adapter) -> Replacement:
    """LoRA layers with room for the factors of the file, whose lora_alpha comes with them."""
    _check_targets(model, adapter)
    options = {}
    for path, (lora_A, lora_B) in adapter.factors.items():
        dtype = torch.promote_types(lora_A.dtype, lora_B.dtype)
        options[path] = {"r": lora_A.shape[0], "lora_alpha": 1.0, "adapter_dtype": dtype}
    return Replacement(model, options)


def _require_place(path: str, layer: LoRALayer, adapter: Adapter) -> None:
    """Raise if the layer cannot take its factors."""
    if layer.sharded:
        raise RuntimeError(
            f"{path} is sharded: load an adapter before the model is, or its tensors by "
            "torch.distributed.checkpoint.state_dict"
        )
    reason = layer.why_not_write()
    if reason is not None:
        raise RuntimeError(f"{path}: {reason}")
    _check_factors(path, layer, *adapter.factors[path])
    if not layer.has_base:
        raise RuntimeError(
            f"{path} is merged and merge(keep_base=False) let its base weight go: load a base "
            "checkpoint first"
        )


def _warn_of_shared(model: nn.Module, paths: Collection[str]) -> None:
    several = [
        where[0].path
        for where in module_places(model).values()
        if len(where) > 1 and any(place.path in paths for place in where)
    ]
    if several:
        warn(
            f"{some(several)} is used under several names: here an adapter stands in all of its "
            "places, in PEFT in the first alone, so that one file means two things"
        )


def _check_targets(model: nn.Module, adapter: Adapter) -> None:
    """The file's layers are in the model, and so is what its configuration targets in the file."""
    config = adapter.config
    places = {place.path for where in module_places(model).values() for place in where}
    given = set(adapter.factors)
    remedy = "take the adapter of this model"
    check_same("modules of the model", places & given, given, remedy)
    if isinstance(config.target_modules, list) and not isinstance(config.exclude_modules, str):
        first = {where[0].path for where in module_places(model).values()}
        if given <= first and not config.layers_pattern:
            targets = find_targets(model, config.target_modules, config.exclude_modules)
            expected = {path for path in targets if path in given or _is_due(path, config)}
            check_same(f"target_modules of {CONFIG_FILE}", expected, given, remedy)


def _is_due(path: str, config: AdapterConfig) -> bool:
    """Whether every PEFT gives this target an adapter."""
    if in_whole(config.modules_to_save or [], path):
        return False
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return True
    indices = layer_indices(path)
    return bool(indices) and indices <= set(chosen if isinstance(chosen, list) else [chosen])


def _check_factors(path: str, layer: LoRALayer, lora_A: Tensor, lora_B: Tensor) -> None:
    r = lora_A.shape[0]
    for letter, tensor, own, expected in (
        ("A", lora_A, layer.lora_A, (r, layer.in_features)),
        ("B", lora_B, layer.lora_B, (layer.out_features, r)),
    ):
        key = f"{PREFIX}{path}.lora_{letter}.weight"
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{key} is {shape_of(tensor)}, the layer expects {expected}")
        if not tensor.to(own.dtype).isfinite().all():
            raise ValueError(
                f"{key} holds values that {own.dtype} of the layer cannot: load it into a model "
                "with wider adapters (adapter_dtype)"
            )


def adapter_of(
    model: nn.Module,
    bias: Bias | None = None,
    modules_to_save: Sequence[str] | None = None,
    name: str | None = None,
) -> Adapter:
    """The adapter of a model, with biases and modules as `save_adapter` says; of its packs the one
    of this name."""
    shards, model = sharded_now(model), unwrapped(model)
    packs = pack_layers(model)
    if packs and (bias not in (None, "none") or modules_to_save):
        raise ValueError(
            "biases and whole modules belong to all adapters of packs: save them apart"
        )
    if packs:
        return _adapter_of_packs(model, packs, name or "default")
    layers = require_layers(model)
    require_extras_here(model)
    earlier = extras_of(model)
    bias = earlier.bias if bias is None else bias
    modules_to_save = earlier.modules_to_save if modules_to_save is None else modules_to_save
    for path, layer in layers.items():
        require_values(path, layer)
        for letter in "AB":
            if not layer.adapters_ready:
                raise ValueError(f"{path}.lora_{letter} is not initialised: nothing to save yet")
            if type(getattr(layer, f"lora_{letter}")).__name__ == "DTensor":
                raise ValueError(
                    f"{path}.lora_{letter} is sharded: gather the state_dict (full_state_dict=True "
                    "of torch.distributed.checkpoint.state_dict), load it into the model on one "
                    "process and save that"
                )
    biases = bias_parameters(model, bias)
    extras = all_names(model, biases)
    for name in modules_to_save or ():
        extras |= whole_modules(model, name, list(layers))
    for key, value in extras.items():
        require_here(key, value, shards)
    rslora = {layer.use_rslora for layer in layers.values()}
    alphas = {
        path: layer.lora_alpha if len(rslora) == 1 else layer.scaling * layer.r
        for path, layer in layers.items()
    }
    config = _config_of(
        model,
        layers,
        {path: layer.r for path, layer in layers.items()},
        alphas,
        use_rslora=rslora == {True},
        bias=bias,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
    )
    return Adapter(
        config,
        {path: (layer.lora_A.detach(), layer.lora_B.detach()) for path, layer in layers.items()},
        {key: value.detach() for key, value in extras.items()},
    )


def _adapter_of_packs(
    model: nn.Module, layers: Mapping[str, MultiLoRALinear], name: str
) -> Adapter:
    packs = {path: layer.pack for path, layer in layers.items() if layer.pack.rank(name) > 0}
    if not packs:
        raise ValueError(f"adapter {name!r} has rank 0 in every layer: there is nothing to save")
    ranks = {path: pack.rank(name) for path, pack in packs.items()}
    alphas = {path: _alpha(pack.scaling_of(name), ranks[path]) for path, pack in packs.items()}
    touched = {path: layers[path] for path in packs}
    factors = {path: pack.factors(name) for path, pack in packs.items()}
    return Adapter(_config_of(model, touched, ranks, alphas), factors, {})


def _alpha(scaling: float, r: int) -> float:
    """lora_alpha of a scaling: the integer it came from, if it may have come from one."""
    alpha = scaling * r
    return round(alpha) if round(alpha) / r == scaling else alpha


def _config_of(
    model: nn.Module,
    layers: Mapping[str, LoRALayer | MultiLoRALinear],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    **fields: Any,
) -> AdapterConfig:
    r, rank_pattern = describe_values(ranks)
    alpha, alpha_pattern = describe_values(alphas)
    dropouts = Counter(layer.lora_dropout for layer in layers.values())
    paths = [where[0].path for where in module_places(model).values()]
    return AdapterConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=describe_targets(list(layers), paths),
        lora_dropout=dropouts.most_common(1)[0][0],
        fan_in_fan_out=all(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None),
        **fields,
    )
