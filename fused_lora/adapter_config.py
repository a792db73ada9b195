"""`AdapterConfig`: adapter_config.json as PEFT writes it, checked field by field."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fused_lora.targets import is_name, match_pattern

Bias = Literal["none", "all", "lora_only"]
BIASES: tuple[Bias, ...] = ("none", "lora_only", "all")  # each of them more than the last
CONFIG_FILE = "adapter_config.json"
LARGEST_CONFIG = 16 << 20  # bytes; a list of every layer of a large model is far below
# fields that say nothing about what the adapter computes
_SILENT = {
    *("auto_mapping", "peft_version", "revision", "inference_mode", "init_lora_weights"),
    *("megatron_config", "megatron_core", "low_cpu_mem_usage", "runtime_config"),
    *("qalora_group_size", "ensure_weight_tying", "eva_config", "lora_ga_config"),
    *("corda_config", "loftq_config"),
}
# initialisations that leave the base weight as it was
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MOST_EXPRESSIONS = 256
"""In rank_pattern and alpha_pattern each; of plain names, as PEFT writes them, any number."""


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of PEFT's LoraConfig that a LoRA layer of this library can express."""

    r: int
    lora_alpha: float
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    lora_dropout: float | None = None
    use_rslora: bool = False
    bias: Bias = "none"
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None

    def rank(self, path: str) -> int:
        key = match_pattern(self.rank_pattern, path)
        return self.rank_pattern.get(key or "", self.r)

    def alpha(self, path: str) -> float:
        key = match_pattern(self.alpha_pattern, path)
        return self.alpha_pattern.get(key or "", self.lora_alpha)

    def scaling(self, path: str) -> float:
        r = self.rank(path)
        return self.alpha(path) / (math.sqrt(r) if self.use_rslora else r)

    def to_json(self) -> bytes:
        """What PEFT and the servers read."""
        fields = asdict(self) | {
            "peft_type": "LORA",
            "inference_mode": True,
            "init_lora_weights": True,
            "use_dora": False,
            "lora_dropout": self.lora_dropout or 0.0,
        }
        return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> AdapterConfig:
        """Raises ValueError, naming the field, for anything this library would compute wrongly."""
        try:
            fields = json.loads(
                content, object_pairs_hook=_distinct, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{CONFIG_FILE} is not JSON we can read: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{CONFIG_FILE} must hold an object: got {type(fields).__name__}")
        if fields.pop("peft_type", None) != "LORA":
            raise ValueError(f"{CONFIG_FILE}: peft_type must be 'LORA', the only kind read here")
        init = fields.get("init_lora_weights")
        if not any(init is known for known in _INITS[:3]) and init not in _INITS[3:]:
            raise ValueError(
                f"{CONFIG_FILE}: init_lora_weights is {init!r}, which changes the base weight: "
                "save the adapter with PEFT's path_initial_model_for_weight_conversion first"
            )
        unknown = set(fields) - set(cls.__dataclass_fields__) - _SILENT
        for name in sorted(unknown):
            if fields[name] not in (None, False, 0, "", [], {}):  # a feature that is off
                raise ValueError(
                    f"{CONFIG_FILE}: {name} is {_short(fields[name])}, which this library does not "
                    "compute: convert the adapter with PEFT, or load it there"
                )
        known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        for name in ("r", "lora_alpha"):
            if name not in known:
                raise ValueError(f"{CONFIG_FILE} has no {name}: it decides what is computed")
        for name, value in known.items():
            _check(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            expressions = [p for p in known.get(name) or {} if not is_name(p)]
            if len(expressions) > MOST_EXPRESSIONS:
                raise ValueError(
                    f"{CONFIG_FILE}: {name} has {len(expressions)} expressions, at most "
                    f"{MOST_EXPRESSIONS} are read: give the names of layers"
                )
            for pattern in expressions:
                try:
                    match_pattern([pattern], "")
                except ValueError as error:
                    raise ValueError(f"{CONFIG_FILE}: {name}: {error}") from error
        for name in ("rank_pattern", "alpha_pattern"):
            known[name] = known.get(name) or {}
        return cls(**known)


def _check(name: str, value: Any) -> None:
    kinds: dict[str, tuple[str, Any]] = {
        "r": ("an integer of at least 1", _is_rank),
        "lora_alpha": ("a finite number", _is_number),
        "lora_dropout": ("a number in [0, 1)", _is_probability),
        "use_rslora": ("true or false", lambda v: isinstance(v, bool)),
        "fan_in_fan_out": ("true or false", lambda v: isinstance(v, bool)),
        "bias": ("none, all or lora_only", lambda v: v in BIASES),
        "target_modules": ("a string or a list of strings", _is_names),
        "exclude_modules": ("a string or a list of strings", _is_names),
        "layers_to_transform": ("an integer or a list of integers", _is_indices),
        "layers_pattern": ("a string or a list of strings", _is_names),
        "modules_to_save": ("a list of strings", lambda v: v is None or _is_list(v)),
        "rank_pattern": ("{name: integer of at least 1}", lambda v: _is_pattern(v, _is_rank)),
        "alpha_pattern": (
            "{name: finite number}",
            lambda v: _is_pattern(v, _is_number),
        ),
    }
    expected, fits = kinds.get(name, ("a string", lambda v: v is None or isinstance(v, str)))
    if not fits(value):
        raise ValueError(f"{CONFIG_FILE}: {name} must be {expected}: got {_short(value)}")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**100


def _is_probability(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_list(value)


def _is_indices(value: Any) -> bool:
    return value is None or all(
        isinstance(index, int) for index in (value if isinstance(value, list) else [value])
    )


def _is_pattern(value: Any, fits: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(fits(v) for v in value.values()))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{twice[0]!r} is given twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
