"""What an adapter directory in PEFT's format holds: adapter_config.json beside
adapter_model.safetensors, read without trust. Knows nothing of models."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_lora.adapter_config import CONFIG_FILE, LARGEST_CONFIG, AdapterConfig
from fused_lora.targets import in_whole

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter directory holds: the configuration, {path: (lora_A [r, in], lora_B [out, r])}
    and {key: tensor} of trained biases and whole modules, keys as in the base's state_dict.
    embeddings: weights that nothing in the configuration explains; PEFT puts those of the base's
    embeddings there, if they are targeted or have grown."""

    config: AdapterConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor]
    embeddings: dict[str, Tensor] = field(default_factory=dict)

    def for_packs(
        self, what: str, paths: Collection[str]
    ) -> dict[str, tuple[Tensor, Tensor, float]]:
        """{path: (lora_A, lora_B, scaling)} for packs of adapters. Raises ValueError for a layer
        that is not among `paths`, the `what`, and for what adapters cannot have each."""
        for key in self.extras:
            raise ValueError(
                f"{WEIGHTS_FILE} has {PREFIX}{short(key)}: biases and whole modules are shared by "
                "the adapters of a batch; load this adapter alone, into a model without packs"
            )
        for path in sorted(set(self.factors) - set(paths)):
            raise ValueError(
                f"{WEIGHTS_FILE} has {PREFIX}{short(path)}.lora_A.weight, which is not among the "
                f"{what}: take an adapter of this model, or give this layer a pack (apply_lora)"
            )
        return {path: (*pair, self.config.scaling(path)) for path, pair in self.factors.items()}

    def files(self) -> dict[str, bytes]:
        safetensors = _safetensors()
        tensors = {
            f"{PREFIX}{path}.lora_{letter}.weight": factor
            for path, factors in self.factors.items()
            for letter, factor in zip("AB", factors, strict=True)
        }
        for key, value in (self.extras | self.embeddings).items():
            path, _, last = key.rpartition(".")
            inside = ".base_layer" if path in self.factors else ""
            tensors[f"{PREFIX}{path}{inside}.{last}" if path else PREFIX + last] = value
        for key, value in tensors.items():
            if not value.isfinite().all():
                raise ValueError(
                    f"{key} holds NaN or infinity, which are not saved: go back to an earlier state"
                )
        tensors = {key: value.contiguous().cpu().clone() for key, value in tensors.items()}
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        return {CONFIG_FILE: self.config.to_json(), WEIGHTS_FILE: content}


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
    tensors = _read_tensors(weights_path, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        found, inner = _FACTOR.fullmatch(key), key.removeprefix(PREFIX)
        if found is not None:
            pairs.setdefault(found["path"], {})[found["factor"]] = tensor
        elif inner != key and _is_extra(inner, config):
            if ".original_module." in inner:  # with bias="all" the base's own, beside the trained
                continue
            own = own_key(inner)
            if own in extras and not torch.equal(extras[own], tensor):
                raise ValueError(f"{WEIGHTS_FILE} has two values for {PREFIX}{short(own)}")
            extras[own] = tensor
        elif inner != key and inner.endswith(".weight") and tensor.dim() == 2:
            embeddings[own_key(inner)] = tensor
        else:
            raise ValueError(unexplained(key))
    if not pairs:
        raise ValueError(f"{WEIGHTS_FILE} holds no lora_A and lora_B")
    factors = {}
    for path, pair in pairs.items():
        for letter in "AB":
            if letter not in pair:
                missing = f"{PREFIX}{short(path)}.lora_{letter}.weight"
                raise ValueError(f"{WEIGHTS_FILE} has no {missing}: an adapter has both factors")
        _check_rank(path, config.rank(path), pair["A"], pair["B"])
        factors[path] = (pair["A"], pair["B"])
    return Adapter(config, factors, extras, embeddings)


def _read_tensors(path: Path, config: AdapterConfig) -> dict[str, Tensor]:
    safetensors = _safetensors()
    tensors = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                dtype = file.get_slice(key).get_dtype()
                counter = dtype == "I64" and _is_extra(key.removeprefix(PREFIX), config)
                if dtype not in _DTYPES and not counter:  # BatchNorm's, in a whole module
                    raise ValueError(
                        f"{short(key)} has dtype {dtype}, expected one of {', '.join(_DTYPES)}"
                    )
                tensors[key] = file.get_tensor(key)
                if not tensors[key].isfinite().all():
                    raise ValueError(f"{short(key)} holds NaN or infinity")
    except (safetensors.SafetensorError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is not a safetensors file we can read: {error}") from error
    return tensors


def _check_rank(path: str, r: int, lora_A: Tensor, lora_B: Tensor) -> None:
    for letter, tensor, axis in (("A", lora_A, 0), ("B", lora_B, 1)):
        if tensor.dim() != 2 or tensor.shape[axis] != r:
            shape = "[r, in]" if letter == "A" else "[out, r]"
            raise ValueError(
                f"{PREFIX}{path}.lora_{letter}.weight is {shape_of(tensor)}, expected {shape} with "
                f"r = {r} from {CONFIG_FILE}"
            )


def adapter_folder(directory: str | os.PathLike[str], name: str | None) -> Path:
    if name is None or name == "default":
        return Path(directory)
    check_name(name)
    return Path(directory) / name


def check_name(name: str) -> None:
    """Raise ValueError for a name that an adapter's folder cannot have."""
    plain = isinstance(name, str) and name not in ("", os.curdir, os.pardir)
    if not plain or re.search(r"[/\\\0:]", name):
        raise ValueError(
            f"{name!r} is not a valid adapter name: give a plain one, without separators"
        )


def check_same(what: str, expected: set[str], given: set[str], remedy: str) -> None:
    for verb, whose, paths in (
        ("has", "not among", given - expected),
        ("has no", "among", expected - given),
    ):
        for path in sorted(paths):
            raise ValueError(
                f"{WEIGHTS_FILE} {verb} {PREFIX}{short(path)}.lora_A.weight, which is {whose} the "
                f"{what}: {remedy}"
            )


def unexplained(key: str) -> str:
    return (
        f"{WEIGHTS_FILE} has {short(key)}, which no LoRA layer, bias or modules_to_save of "
        f"{CONFIG_FILE} explains: expected {PREFIX}<path>.lora_A.weight and .lora_B"
    )


def own_key(key: str) -> str:
    """The key that a parameter has in the base model: PEFT may have wrapped its layer."""
    key = re.sub(r"(^|\.)modules_to_save\.", r"\1", key)
    return re.sub(r"\.base_layer\.(bias|weight)$", r".\1", key)


def _is_extra(key: str, config: AdapterConfig) -> bool:
    """Whether the configuration says that the file holds this parameter of the base model."""
    path, _, last = key.rpartition(".")
    if last == "bias" and config.bias != "none":
        return True
    return in_whole(config.modules_to_save or [], path)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need safetensors: pip install 'fused-lora[adapters]'"
        ) from error
    return safetensors


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def short(key: str) -> str:
    text = repr(key)[1:-1]
    return text if len(text) <= 120 else text[:117] + "..."
