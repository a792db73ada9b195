"""`export_adapter`: adapter files that a server reads rightly, by writing out what its loader does
not know. The rules of each loader are here and nowhere else."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from fused_lora.adapter_config import AdapterConfig
from fused_lora.adapter_files import Adapter, adapter_folder, read_adapter
from fused_lora.adapter_io import adapter_of
from fused_lora.atomic import write_directory
from fused_lora.places import module_places, pack_layers

Server = Literal["vllm", "sglang", "peft"]
# SGLang stacks these into one product and expects all of them where one is
_STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_SAME_SHAPE = ({"k_proj", "v_proj"}, {"gate_proj", "up_proj"})
_VLLM_MODULES = ("classifier", "score")


def export_adapter(
    model_or_directory: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    for_: Server,
    name: str | None = None,
) -> None:
    """Write the adapter of a model, or of an adapter directory, for "vllm", "sglang" or "peft".
    name: which adapter of a model with packs, or in which folder of the directory it is.

    For the servers every layer gets one rank (smaller ones padded with zeros, which is exact) and
    one plain `lora_alpha / r`: rsLoRA and single layers' own rank or alpha, which their releases
    read differently or not at all, go into lora_B where the number does not come out even (then in
    fp32). For SGLang missing ones of q, k, v and of gate, up get zero factors, since its loader
    stacks them. "peft" writes the adapter as it is.

    Raises ValueError for another server, for a name where there is one adapter, for trained biases,
    whole modules and embeddings that the server cannot load, and where the shape of a missing layer
    is not known (give the model then); otherwise as `load_adapter` for the files and `save_adapter`
    for the model.
    """
    if for_ not in ("vllm", "sglang", "peft"):
        raise ValueError(f"for_ must be 'vllm', 'sglang' or 'peft': got {for_!r}")
    model = model_or_directory if isinstance(model_or_directory, nn.Module) else None
    if isinstance(model_or_directory, nn.Module):
        if name is not None and not pack_layers(model_or_directory):
            raise ValueError(f"name={name!r}, but the model has one adapter: leave name out")
        adapter = adapter_of(model_or_directory, name=name)
    else:
        adapter = read_adapter(adapter_folder(model_or_directory, name))
    if for_ != "peft":
        _refuse_extras(adapter, for_)
        if for_ == "sglang":
            adapter = _with_stacked(adapter, model)
        adapter = _uniform(adapter)
    write_directory(directory, adapter.files())


def _refuse_extras(adapter: Adapter, for_: Server) -> None:
    allowed = _VLLM_MODULES if for_ == "vllm" else ()
    if adapter.config.bias != "none":
        raise ValueError(f"{for_} cannot load trained biases (bias={adapter.config.bias!r})")
    for key in adapter.embeddings:
        raise ValueError(
            f"{for_} takes embeddings from the base model, the file has its own ({key}): save the "
            "adapter with save_embedding_layers=False, or the base model with these embeddings"
        )
    for name in adapter.config.modules_to_save or ():
        if name not in allowed:
            raise ValueError(
                f"{for_} cannot load the whole module {name!r}: merge it into the base"
            )


def _uniform(adapter: Adapter) -> Adapter:
    """The same adapter with one rank and one scaling = lora_alpha / r, lora_alpha an integer."""
    config = adapter.config
    r = max(lora_A.shape[0] for lora_A, _ in adapter.factors.values())
    scalings = {path: config.scaling(path) for path in adapter.factors}
    common = Counter(scalings.values()).most_common(1)[0][0]
    lora_alpha = max(1, round(common * r))
    ratios = {path: scaling * r / lora_alpha for path, scaling in scalings.items()}
    uneven = any(ratio != 1.0 for ratio in ratios.values())
    factors = {}
    for path, (lora_A, lora_B) in adapter.factors.items():
        padding = r - lora_A.shape[0]
        lora_A = nn.functional.pad(lora_A, (0, 0, 0, padding))
        lora_B = nn.functional.pad(lora_B, (0, padding))
        if uneven:  # one dtype for all, wide enough for the product
            dtype = torch.promote_types(lora_B.dtype, torch.float32)
            lora_A, lora_B = lora_A.to(dtype), (lora_B.double() * ratios[path]).to(dtype)
        factors[path] = (lora_A, lora_B)
    uniform = AdapterConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=sorted({path.rpartition(".")[2] for path in factors}),
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    return Adapter(uniform, factors, adapter.extras)


def _with_stacked(adapter: Adapter, model: nn.Module | None) -> Adapter:
    """The same adapter with zero factors for the missing ones of layers that are stacked."""
    factors = dict(adapter.factors)
    for path, (lora_A, lora_B) in adapter.factors.items():
        prefix, name = path[: path.rfind(".") + 1], path.rpartition(".")[2]
        for sibling in next((group for group in _STACKED if name in group), ()):
            if prefix + sibling not in factors:
                out = _out_features(prefix, sibling, adapter, model)
                zeros = lora_B.new_zeros(out, lora_A.shape[0])
                factors[prefix + sibling] = (torch.zeros_like(lora_A), zeros)
    return replace(adapter, factors=factors)


def _out_features(prefix: str, name: str, adapter: Adapter, model: nn.Module | None) -> int:
    """Of a layer without adapter, by the model or by a layer beside it that has the same shape."""
    if model is not None:
        for module, where in module_places(model).items():
            if any(place.path == prefix + name for place in where):
                return int(module.out_features)  # type: ignore[arg-type]
    for other in next((sorted(same) for same in _SAME_SHAPE if name in same), []):
        if prefix + other in adapter.factors:
            return adapter.factors[prefix + other][1].shape[0]
    raise ValueError(
        f"SGLang stacks {prefix}{name}, which has no adapter, with the layers beside it, and its "
        "size is not in the files: pass the model instead of the directory"
    )
