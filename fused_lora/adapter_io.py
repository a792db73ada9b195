"""Adapter files in PEFT's format: adapter_config.json beside adapter_model.safetensors, written all
at once, read without trust. A file that is refused leaves the model exactly as it was."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.adapter_config import CONFIG_FILE, LARGEST_CONFIG, AdapterConfig
from fused_lora.atomic import write_directory
from fused_lora.layer import LoRALayer
from fused_lora.model import (
    Bias,
    Replacement,
    all_or_nothing,
    bias_parameters,
    clean_path,
    find_targets,
    holds_peft_layers,
    lora_layers,
    module_places,
    require_layers,
    unwrapped,
)
from fused_lora.targets import describe_targets, describe_values, layer_index, named

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_ORIGINALS = "_fused_lora_originals"


@dataclass(frozen=True)
class Adapter:
    """What an adapter directory holds: the configuration, {path: (lora_A [r, in], lora_B [out, r])}
    and {key: tensor} of trained biases and whole modules, keys as in the base's state_dict."""

    config: AdapterConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor]

    def files(self) -> dict[str, bytes]:
        safetensors = _safetensors()
        tensors = {
            f"{PREFIX}{path}.lora_{letter}.weight": factor
            for path, factors in self.factors.items()
            for letter, factor in zip("AB", factors, strict=True)
        }
        for key, value in self.extras.items():
            path, _, last = key.rpartition(".")
            inside = ".base_layer" if path in self.factors else ""
            tensors[f"{PREFIX}{path}{inside}.{last}" if path else PREFIX + last] = value
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise ValueError(f"{key} holds NaN or infinity: there is nothing worth keeping")
        tensors = {key: value.contiguous().cpu().clone() for key, value in tensors.items()}
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        return {CONFIG_FILE: self.config.to_json(), WEIGHTS_FILE: content}


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    bias: Bias = "none",
    modules_to_save: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """Write the adapters of `model` as PEFT does, so that PEFT loads them; needs `safetensors`.

    bias: "all" or "lora_only" saves the biases that `mark_only_lora_as_trainable` trained with it.
    modules_to_save: names (ends of paths) of modules that were trained whole, a classifier say.
    name: PEFT keeps an adapter that is not the default one in a folder of its name.
    The files are replaced both at once: a reader never finds one without the other. Raises
    ValueError for non-finite or uninitialised adapters, unknown modules or no LoRA layer.
    """
    write_directory(_folder(directory, name), adapter_of(model, bias, modules_to_save).files())


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], name: str | None = None
) -> nn.Module:
    """Load an adapter that PEFT or `save_adapter` wrote; returns `model`.

    A model with LoRA layers gets the new adapter in all of them, of any rank, in the dtype they
    have; layers that are merged are merged with it. Parameters stay the same objects where the rank
    does, so an optimizer or a CUDA graph keeps them. In a model without LoRA layers they are put in
    first. Biases and whole modules in the file are written over the model's; loading an adapter
    without them brings the original values back.

    Only safetensors are read, never pickle. Raises FileNotFoundError without files, ValueError,
    naming key or field, for a file that is broken, does not fit the model or asks for what this
    library does not compute, RuntimeError if merge(keep_base=False) let a base weight go or the
    layers are sharded. Then the model is exactly as it was.
    """
    given, model = model, unwrapped(model)
    adapter = read_adapter(_folder(directory, name))
    layers, replacement = lora_layers(model), None
    if not layers and holds_peft_layers(model):
        require_layers(model)  # raises, and says what to do with those
    if not layers:
        _check_targets(model, adapter)
    else:
        _check_same("LoRA layers of the model", set(layers), set(adapter.factors))
    extras = _check_extras(model, adapter)
    options = {}
    for path, (lora_A, lora_B) in adapter.factors.items():
        dtype = torch.promote_types(lora_A.dtype, lora_B.dtype)
        options[path] = {"r": lora_A.shape[0], "lora_alpha": 1.0, "adapter_dtype": dtype}
    if not layers:
        replacement = Replacement(model, options)
        layers = replacement.layers
    for path, layer in layers.items():
        if type(layer.lora_A).__name__ == "DTensor":
            raise RuntimeError(
                f"{path} is sharded: load an adapter before fully_shard or parallelize_module, or "
                "its tensors by torch.distributed.checkpoint.state_dict"
            )
        _check_factors(path, layer, *adapter.factors[path])
        if not layer.has_base:
            raise RuntimeError(
                f"{path} is merged and merge(keep_base=False) let its base weight go: load a base "
                "checkpoint first"
            )
    config = adapter.config
    with all_or_nothing(layers.values()), _written(model, extras):
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


def read_adapter(directory: Path) -> Adapter:
    """Read and check an adapter directory, as far as it can be checked without a model."""
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    for file in (config_path, weights_path):
        if not file.is_file():
            hint = ""
            if (directory / "adapter_model.bin").exists():
                hint = ": adapter_model.bin is pickle, which is never read; save it again with PEFT"
            raise FileNotFoundError(f"{file} is missing{hint}")
    if config_path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{config_path} has more than {LARGEST_CONFIG} bytes: no configuration")
    config = AdapterConfig.from_json(config_path.read_bytes())
    tensors = _read_tensors(weights_path)
    pairs: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key)
        if found is not None:
            pairs.setdefault(found["path"], {})[found["factor"]] = tensor
        elif key.startswith(PREFIX) and _is_extra(key.removeprefix(PREFIX), config):
            inner = key.removeprefix(PREFIX)
            extras[_own_key(inner)] = tensor
        else:
            raise ValueError(
                f"{WEIGHTS_FILE} has {_short(key)}, which no LoRA layer, bias or modules_to_save "
                f"of {CONFIG_FILE} explains: expected {PREFIX}<path>.lora_A.weight and .lora_B"
            )
    if not pairs:
        raise ValueError(f"{WEIGHTS_FILE} holds no lora_A and lora_B")
    factors = {}
    for path, pair in pairs.items():
        for letter in "AB":
            if letter not in pair:
                missing = f"{PREFIX}{_short(path)}.lora_{letter}.weight"
                raise ValueError(f"{WEIGHTS_FILE} has no {missing}: an adapter has both factors")
        _check_rank(path, config.rank(path), pair["A"], pair["B"])
        factors[path] = (pair["A"], pair["B"])
    return Adapter(config, factors, extras)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise ValueError(
                        f"{_short(key)} has dtype {dtype}, expected one of {', '.join(_DTYPES)}"
                    )
                tensors[key] = file.get_tensor(key)
                if not tensors[key].isfinite().all():
                    raise ValueError(f"{_short(key)} holds NaN or infinity")
    except (safetensors.SafetensorError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is no safetensors file we can read: {error}") from error
    return tensors


def _check_rank(path: str, r: int, lora_A: Tensor, lora_B: Tensor) -> None:
    for letter, tensor, axis in (("A", lora_A, 0), ("B", lora_B, 1)):
        if tensor.dim() != 2 or tensor.shape[axis] != r:
            shape = "[r, in]" if letter == "A" else "[out, r]"
            raise ValueError(
                f"{PREFIX}{path}.lora_{letter}.weight is {_shape(tensor)}, expected {shape} with "
                f"r = {r} from {CONFIG_FILE}"
            )


def _check_targets(model: nn.Module, adapter: Adapter) -> None:
    """The file's layers are in the model, and so is what its configuration targets in the file."""
    config = adapter.config
    places = {place.path for where in module_places(model).values() for place in where}
    given = set(adapter.factors)
    _check_same("modules of the model", places & given, given)
    if isinstance(config.target_modules, list) and not isinstance(config.exclude_modules, str):
        first = {where[0].path for where in module_places(model).values()}
        if given <= first and not config.layers_pattern:
            targets = find_targets(model, config.target_modules, config.exclude_modules)
            if config.layers_to_transform not in (None, []):
                chosen = config.layers_to_transform
                chosen = chosen if isinstance(chosen, list) else [chosen]
                targets = [path for path in targets if layer_index(path) in chosen]
            _check_same(f"target_modules of {CONFIG_FILE}", set(targets), given)


def _check_same(what: str, expected: set[str], given: set[str]) -> None:
    for path in sorted(given - expected):
        raise ValueError(
            f"{WEIGHTS_FILE} has {PREFIX}{_short(path)}.lora_A.weight, which is not among the "
            f"{what}: call unload() and load again, or take the adapter of this model"
        )
    for path in sorted(expected - given):
        raise ValueError(
            f"{WEIGHTS_FILE} has no {PREFIX}{_short(path)}.lora_A.weight, which is among the "
            f"{what}: call unload() and load again, or take the adapter of this model"
        )


def _check_factors(path: str, layer: LoRALayer, lora_A: Tensor, lora_B: Tensor) -> None:
    r = lora_A.shape[0]
    for letter, tensor, own, expected in (
        ("A", lora_A, layer.lora_A, (r, layer.in_features)),
        ("B", lora_B, layer.lora_B, (layer.out_features, r)),
    ):
        key = f"{PREFIX}{path}.lora_{letter}.weight"
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{key} is {_shape(tensor)}, the layer expects {expected}")
        if not tensor.to(own.dtype).isfinite().all():
            raise ValueError(
                f"{key} holds values that {own.dtype} of the layer cannot: load it into a model "
                "with wider adapters (adapter_dtype)"
            )


def _check_extras(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """The biases and modules of the file, after checking that they can be written."""
    parameters = _parameters(model)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for key, value in adapter.extras.items():
        own = parameters.get(key)
        if own is None or own.shape != value.shape:
            got = "no such parameter" if own is None else f"a parameter {_shape(own)}"
            raise ValueError(
                f"{WEIGHTS_FILE} has {PREFIX}{_short(key)} {_shape(value)}: the model has {got}"
            )
        if uses[id(own)] > 1:
            raise ValueError(
                f"{PREFIX}{key} would be written to a parameter that the model uses elsewhere too: "
                "give that module a copy of its own first"
            )
        if not own.is_floating_point() or not value.to(own.dtype).isfinite().all():
            raise ValueError(f"{PREFIX}{key} does not fit the model's {own.dtype}")
    return adapter.extras


@contextlib.contextmanager
def _written(model: nn.Module, extras: dict[str, Tensor]) -> Iterator[None]:
    """Write `extras` over the model's parameters and bring back those that an earlier adapter had
    written; undone if the context fails."""
    parameters = _parameters(model)
    originals: dict[str, Tensor] = getattr(model, _ORIGINALS, {})
    written = {*extras, *originals} & set(parameters)
    kept = {key: parameters[key].detach().clone() for key in written}
    values = originals | extras
    try:
        with torch.no_grad():
            for key in kept:
                parameters[key].copy_(values[key])
        yield
    except BaseException:
        with torch.no_grad():
            for key, value in kept.items():
                parameters[key].copy_(value)
        raise
    remembered = {key: originals.get(key, kept[key]) for key in extras}
    if remembered or originals:
        setattr(model, _ORIGINALS, remembered)


def adapter_of(model: nn.Module, bias: Bias, modules_to_save: Sequence[str] | None) -> Adapter:
    model = unwrapped(model)
    layers = require_layers(model)
    for path, layer in layers.items():
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
    extras: dict[str, Tensor] = {_own_key(key): value for key, value in biases.items()}
    for name in modules_to_save or ():
        paths = [
            place.path
            for where in module_places(model).values()
            for place in where
            if named([name], place.path)
        ]
        inside = [path for path in layers if any(f"{path}.".startswith(f"{p}.") for p in paths)]
        if not paths or inside:
            reason = f"it holds the LoRA layer {inside[0]}" if inside else "the model has none"
            raise ValueError(f"modules_to_save has {name!r}, which cannot be saved: {reason}")
        parameters = _parameters(model)
        extras |= {k: p for k, p in parameters.items() if any(k.startswith(f"{q}.") for q in paths)}
    return Adapter(
        _config_of(model, layers, bias, modules_to_save),
        {path: (layer.lora_A.detach(), layer.lora_B.detach()) for path, layer in layers.items()},
        {key: value.detach() for key, value in extras.items()},
    )


def _config_of(
    model: nn.Module,
    layers: dict[str, LoRALayer],
    bias: Bias,
    modules_to_save: Sequence[str] | None,
) -> AdapterConfig:
    rslora = {layer.use_rslora for layer in layers.values()}
    alphas = {
        path: layer.lora_alpha if len(rslora) == 1 else layer.scaling * layer.r
        for path, layer in layers.items()
    }
    r, ranks = describe_values({path: layer.r for path, layer in layers.items()})
    alpha, alpha_pattern = describe_values(alphas)
    dropouts = Counter(layer.lora_dropout for layer in layers.values())
    paths = [where[0].path for where in module_places(model).values()]
    return AdapterConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=describe_targets(list(layers), paths),
        lora_dropout=dropouts.most_common(1)[0][0],
        use_rslora=rslora == {True},
        bias=bias,
        fan_in_fan_out=all(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        rank_pattern=ranks,
        alpha_pattern=alpha_pattern,
        task_type="CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None),
    )


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {_own_key(clean_path(key)): parameter for key, parameter in model.named_parameters()}


def _own_key(key: str) -> str:
    """The key that a parameter has in the base model: an adapter may have wrapped its layer."""
    return re.sub(r"\.base_layer\.(bias|weight)$", r".\1", key)


def _is_extra(key: str, config: AdapterConfig) -> bool:
    """Whether the configuration says that the file holds this parameter of the base model."""
    path, _, last = key.rpartition(".")
    if last == "bias" and config.bias != "none":
        return True
    above = path.split(".")
    paths = (".".join(above[:n]) for n in range(1, len(above) + 1))
    return any(named(config.modules_to_save or [], p) for p in paths)


def _folder(directory: str | os.PathLike[str], name: str | None) -> Path:
    if name is None or name == "default":
        return Path(directory)
    if name in ("", os.curdir, os.pardir) or re.search(r"[/\\\0:]", name):
        raise ValueError(f"{name!r} is no adapter name: give a plain name, without separators")
    return Path(directory) / name


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need safetensors: pip install 'fused-lora[adapters]'"
        ) from error
    return safetensors


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _short(key: str) -> str:
    text = repr(key)[1:-1]
    return text if len(text) <= 120 else text[:117] + "..."
