"""PEFT's LoRA layers through the fused kernels: `patch` a model, or `enable` it for all to come.

Only the class of each LoRA layer over a linear base (PEFT's own for plain, torchao and bitsandbytes
bases, by exact type) is exchanged, for a subclass with another `forward`. Parameters, keys, hooks,
saving, merging and switching adapters stay PEFT's own code.
Every call takes one of three paths, counted and explained:

    full    base product and adapter in one fused layer: the base is a plain nn.Linear (or Conv1D),
            with `adapter_names` the adapter of each sample, or a 4-bit layer of bitsandbytes
            called with so many tokens that its weight is unpacked anyway
    delta   base_layer(x) runs as it is (quantised, hooked, of another class), and the adapter term
            is added to its output without a temporary of that size
    peft    PEFT's own forward, with the reason
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as lora
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from fused_lora import ops
from fused_lora.adapter_pack import ids_of_samples, pack_for_call
from fused_lora.delta import hooked, lora_delta, may_write
from fused_lora.explain import DEFAULT_TOKENS
from fused_lora.four_bit import lora_linear_4bit, unpacks
from fused_lora.functional import DTYPES, check_backend, lora_linear
from fused_lora.multi import multi_lora_linear

__all__ = ["PatchReport", "call_counts", "disable", "enable", "explain", "patch", "unpatch"]

FULL, DELTA, PEFT = "full", "delta", "peft"
BASE_ALONE = "__base__"
"""PEFT's name for no adapter, among `adapter_names`."""
FULL_BASES = (nn.Linear, Conv1D)
FRESH_BASES: set[type] = {nn.Linear}
"""Bases whose output is a tensor of its own that nobody else holds and no backward needs."""

_LINEAR_FORWARD, _F_LINEAR = nn.Linear.forward, F.linear

ComputeDtype = Literal["base", "peft"]


@dataclass
class _State:
    """What a patched layer carries beside PEFT's own attributes."""

    backend: str
    compute_dtype: str
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)


class _Route(NamedTuple):
    path: str
    reason: str
    adapters: tuple[str, ...] = ()


class Fused:
    """The forward of every patched layer. Made by `patch`, never constructed."""

    peft_class: Any
    keeps_dtype = False
    """Whether the base returns x's dtype under autocast, too."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.__dict__.get("_fused_lora")
        if state is None:  # unpatched, but somebody kept the bound method
            return type(self).forward(self, x, *args, **kwargs)
        route = _route(self, x, args, kwargs, state)
        if not torch.compiler.is_compiling():
            state.calls[route.path, route.reason] += 1
        if route.path == PEFT:
            return self.peft_class.forward(self, x, *args, **kwargs)
        base = self.base_layer
        if kwargs.get("adapter_names") is not None:
            return _mixed(self, x, kwargs["adapter_names"], route.adapters, state)
        (name,) = route.adapters
        dropout = self.lora_dropout[name]
        lora_A, lora_B = self.lora_A[name].weight, self.lora_B[name].weight
        options: dict[str, Any] = {
            "scaling": self.scaling[name],
            "dropout_p": dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
            "backend": state.backend,
        }
        if route.path == FULL and type(base) not in FULL_BASES:
            return lora_linear_4bit(x, base, lora_A, lora_B, **options)
        if route.path == FULL:
            return lora_linear(x, _weight(base), lora_A, lora_B, base.bias, **options)
        out = base(x)
        dtype = _compute_dtype(x)
        if torch.promote_types(out.dtype, dtype) != out.dtype and not self.keeps_dtype:
            return _added_as_peft(self, out, x, name)
        fresh = type(base) in FRESH_BASES and may_write(base, out)
        return lora_delta(out, x, lora_A, lora_B, in_place=fresh, **options)


class FusedLinear(Fused, lora.Linear):
    peft_class = lora.Linear


class FusedTorchaoLoraLinear(Fused, TorchaoLoraLinear):
    peft_class = TorchaoLoraLinear


_FUSED: dict[type, type] = {}
_PLAIN: dict[type, type] = {}


def register(*classes: type[Fused]) -> None:
    """Let `patch` exchange layers whose class is exactly the `peft_class` of one of these."""
    for fused in classes:
        _FUSED[fused.peft_class] = fused
        _PLAIN[fused] = fused.peft_class


register(FusedLinear, FusedTorchaoLoraLinear)


def _fused_class(layer: nn.Module) -> type | None:
    if "peft.tuners.lora.bnb" in sys.modules:  # PEFT has imported bitsandbytes
        from fused_lora.integrations import peft_bnb  # noqa: F401
    return _FUSED.get(type(layer))


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did: names of the layers that are fused now, and {name: why not} of the rest."""

    fused: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        total = len(self.fused) + len(self.left)
        lines = [f"fused-lora: {len(self.fused)} of {total} LoRA layers patched"]
        for reason, count in Counter(self.left.values()).items():
            lines.append(f"  {count} left to PEFT: {reason}")
        return "\n".join(lines)


def patch(
    model: nn.Module, *, backend: str = "auto", compute_dtype: ComputeDtype = "base"
) -> PatchReport:
    """Let every LoRA linear layer of `model` run fused, from its next call on; reports which.

    Call it when the adapters are there: after `get_peft_model` or `PeftModel.from_pretrained`.
    Adapters added later to the same layers are covered. Patching again changes the options.

    Args:
        model: a PeftModel, or any module that contains PEFT LoRA layers.
        backend: "auto", "triton" or "aten", see `fused_lora.lora_linear`.
        compute_dtype: what a layer does, outside autocast, whose adapters have another dtype than
            x (fp32 on a bf16 base is PEFT's default). "base" computes them in the base's dtype
            with fp32 accumulation, as autocast does; "peft" leaves such calls to PEFT, which
            copies x to the adapters' dtype. The adapters' storage and gradients keep their dtype.

    Raises:
        ValueError: there is no LoRA layer in `model`, or an option is unknown.
    """
    check_options(backend, compute_dtype)
    fused, left = [], {}
    for name, layer in _lora_layers(model):
        reason = _why_left(layer)
        if reason is None:
            _exchange(layer, backend, compute_dtype)
            fused.append(name)
        else:
            left[name] = reason
    return PatchReport(tuple(fused), left)


def unpatch(model: nn.Module) -> None:
    """Give every layer of `model` PEFT's own class back. Raises ValueError without LoRA layers."""
    for _, layer in _lora_layers(model):
        plain = _PLAIN.get(type(layer))
        if plain is not None:
            layer.__class__ = plain
            del layer.__dict__["_fused_lora"]


def enable(*, backend: str = "auto", compute_dtype: ComputeDtype = "base") -> None:
    """Patch every LoRA linear layer that is made from now on, in this process, until `disable()`.
    Options as in `patch`; layers that exist already are left alone."""
    check_options(backend, compute_dtype)
    _enabled.update(backend=backend, compute_dtype=compute_dtype)
    lora.LoraLayer.__init__ = _init_and_patch  # type: ignore[method-assign]


def disable() -> None:
    """Undo `enable`: layers made from now on are PEFT's own. Patched ones stay patched."""
    _enabled.clear()
    if lora.LoraLayer.__init__ is _init_and_patch:
        lora.LoraLayer.__init__ = _peft_init  # type: ignore[method-assign]


_enabled: dict[str, str] = {}
_peft_init: Any = lora.LoraLayer.__init__


def _init_and_patch(self: Any, *args: Any, **kwargs: Any) -> None:
    _peft_init(self, *args, **kwargs)
    if _enabled and _fused_class(self) is not None:
        _exchange(self, **_enabled)


def call_counts(model: nn.Module) -> dict[str, int]:
    """{"full": n, "delta": n, "peft": n}: how often the patched layers of `model` took each path
    since they were patched. Calls inside a torch.compile graph are not counted."""
    counts = dict.fromkeys((FULL, DELTA, PEFT), 0)
    for _, layer in _lora_layers(model):
        if type(layer) in _PLAIN:
            for (path, _reason), count in layer._fused_lora.calls.items():
                counts[path] += count
    return counts


def explain(model: nn.Module, x: Tensor | None = None) -> str:
    """One line per LoRA layer: the path its next call takes, why, in which dtype, on which backend,
    and the calls so far. Nothing is run.

    x [..., in_features] gives dtype, device and number of tokens; without it, 4096 tokens in the
    base weight's dtype. Autocast, dropout, merging and hooks count as they are now.
    Raises ValueError if there is no LoRA layer in `model`.
    """
    lines = []
    for name, layer in _lora_layers(model):
        if type(layer) in _PLAIN:
            lines.append(f"{name or 'layer'}: {_explain_layer(layer, x)}")
        else:
            why = _why_left(layer) or "not patched, call patch(model)"
            lines.append(f"{name or 'layer'}: {PEFT} ({why})")
    return "\n".join(lines)


def _explain_layer(layer: Any, x: Tensor | None) -> str:
    if x is None:
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            weight = next(layer.lora_A.parameters(), layer.base_layer.weight)
        # not weight.new_empty: quantised tensors have none
        x = torch.empty((1, layer.in_features), dtype=weight.dtype, device=weight.device)
        x = x.expand(DEFAULT_TOKENS, -1)
    state: _State = layer._fused_lora
    route = _route(layer, x, (), {}, state)
    text = f"{route.path} ({route.reason})"
    if route.path != PEFT:
        dtype = x.dtype if layer.keeps_dtype else _compute_dtype(x)
        if route.path == FULL:  # a 4-bit base says itself in what it computes
            dtype = getattr(layer.base_layer, "compute_dtype", None) or dtype
        lora_A = layer.lora_A[route.adapters[0]].weight
        rows = x.reshape(-1, layer.in_features)[:1].to(dtype).expand(max(1, x[..., 0].numel()), -1)
        unable = ops.why_not_triton(rows)
        if state.backend == "triton" and unable is not None:
            text += f", backend='triton' cannot run: {unable}"
        else:
            text += f", {ops.resolve(state.backend, rows, layer.out_features, lora_A.shape[0])}"
        text += f" in {_name(dtype)}"
        if lora_A.dtype != dtype:
            text += f", {_name(lora_A.dtype)} adapters rounded to it (compute_dtype='base')"
    calls = ", ".join(f"{count} {path} ({why})" for (path, why), count in state.calls.items())
    text += f"; so far {calls}" if calls else "; not called yet"
    if "forward" in layer.__dict__:
        text += ", calls go through a forward of the instance, which may not hand on to this one"
    return text


def _route(
    layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], state: _State
) -> _Route:
    """The path of this call. Read on every call, since all of it may change between two; modules
    and parameters come from their dictionaries, nn.Module's attribute access being slow."""
    names = None
    if args or kwargs:
        given = {name: value for name, value in kwargs.items() if value is not None}
        if args or given.keys() - {"adapter_names"}:
            return _Route(PEFT, f"called with {', '.join(given) or 'more arguments'}")
        names = given.get("adapter_names")
    if layer.disable_adapters:
        return _Route(PEFT, "adapters are disabled")
    if layer.merged:
        return _Route(PEFT, "merged into the base weight")
    if names is not None:
        return _route_of_mixed(layer, x, names, state)
    modules = layer._modules
    adapters = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in adapters]
    if len(active) != 1:
        return _Route(PEFT, f"{len(active) or 'no'} active adapters, one is fused")
    name = active[0]
    base = modules["base_layer"]
    why = _why_peft(layer, modules, name, base, x, state)
    if why is not None:
        return _Route(PEFT, why)
    why = _why_delta(base)
    if why is not None and unpacks(base, x):
        return _Route(FULL, f"{type(base).__name__} base, unpacked for the call", (name,))
    if why is not None:
        return _Route(DELTA, why, (name,))
    return _Route(FULL, f"{type(base).__name__} base", (name,))


def _route_of_mixed(layer: Any, x: Tensor, names: Sequence[str], state: _State) -> _Route:
    """The path of a call that names an adapter for each sample."""
    modules = layer._modules
    base, held = modules["base_layer"], modules["lora_A"]._modules
    # as PEFT does, the base alone for names that this layer does not have
    used = tuple(name for name in dict.fromkeys(names) if name in held and name != BASE_ALONE)
    why = _why_mixed_peft(layer, modules, x, names, used)
    why = why or _why_delta(base)
    for name in used:
        why = why or _why_peft(layer, modules, name, base, x, state)
    if why is None:
        parts = [modules[part]._modules[name] for part in ("lora_A", "lora_B") for name in used]
        if len({part.weight.dtype for part in parts}) > 1:
            why = "adapters of several dtypes"
    if why is not None:
        return _Route(PEFT, f"called with adapter_names, {why}")
    return _Route(FULL, f"an adapter for each sample, {type(base).__name__} base", used)


def _why_mixed_peft(
    layer: Any, modules: dict[str, Any], x: Tensor, names: Sequence[str], used: tuple[str, ...]
) -> str | None:
    if not used:
        return "none of them in this layer"
    if x.dim() < 2 or len(names) != len(x):
        return f"{len(names)} for x {tuple(x.shape)}"
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return "being compiled"
    for name in used:
        dropout = modules["lora_dropout"]._modules[name]
        if dropout.training and getattr(dropout, "p", 0.0):
            return "dropout is active"
        if isinstance(layer.scaling[name], Tensor):
            return "scaling is a tensor"
    return None


def _mixed(
    layer: Any, x: Tensor, names: Sequence[str], used: tuple[str, ...], state: _State
) -> Tensor:
    """The adapters are packed anew for every call, those of this batch only. A pack that is kept
    could go stale unseen: a write through `.data`, as hot swap does, raises no version."""
    factors = [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in used]
    ids = ids_of_samples(tuple(used.index(n) if n in used else -1 for n in names), x.device)
    base, pack = layer.base_layer, pack_for_call(factors)
    return multi_lora_linear(x, _weight(base), pack, ids, base.bias, backend=state.backend)


def _added_as_peft(layer: Any, out: Tensor, x: Tensor, name: str) -> Tensor:
    """The term of an adapter added to the output of a base that computes in a narrower dtype than x
    asks for, by PEFT's modules and in its dtypes."""
    lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
    x = layer.lora_dropout[name](layer._cast_input_dtype(x, lora_A.weight.dtype))
    return (out + lora_B(lora_A(x)) * layer.scaling[name]).to(out.dtype)


def _weight(base: Any) -> Tensor:
    return base.weight if type(base) is nn.Linear else base.weight.t()


def _why_peft(
    layer: Any, modules: dict[str, Any], name: str, base: nn.Module, x: Tensor, state: _State
) -> str | None:
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__.removesuffix('Variant')}"
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    for part, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear:
            return f"{part} is {type(module).__name__}, wrapped or sharded"
        if hooked(module):
            return f"{part} has hooks"
    dropout = modules["lora_dropout"]._modules[name]
    if type(dropout) not in (nn.Dropout, nn.Identity) or hooked(dropout):
        return f"lora_dropout is {type(dropout).__name__} or has hooks"
    if type(dropout) is nn.Dropout and dropout.p >= 1.0:
        return "lora_dropout drops everything"
    A, B, W = (module._parameters.get("weight") for module in (lora_A, lora_B, base))
    if lora_B._parameters["bias"] is not None:
        return "lora_bias"
    for tensor in (x, A, B, W):
        if type(tensor).__name__ == "DTensor":
            return "DTensor"
    for part, tensor in (("lora_A", A), ("lora_B", B)):
        if type(tensor) is not nn.Parameter and is_traceable_wrapper_subclass(tensor):
            return f"{part} is a {type(tensor).__name__}"  # quantised, say
    if nn.Linear.forward is not _LINEAR_FORWARD or F.linear is not _F_LINEAR:
        return "nn.Linear.forward or F.linear was replaced"
    if hasattr(A, "ds_id"):
        return "DeepSpeed ZeRO-3"
    if base.__dict__.get("_hf_tp_plan"):
        return "tensor parallel"
    if A is None or B is None or A.dim() != 2 or B.dim() != 2:
        return "lora_A or lora_B is sharded"
    if x.is_nested:
        return "x is a nested tensor"
    if not {x.dtype, A.dtype, B.dtype} <= DTYPES:
        return f"x is {_name(x.dtype)}, lora_A {_name(A.dtype)}"
    if not x.device == A.device == B.device:
        return "x and the adapters are on different devices"
    scaling = layer.scaling[name]
    if isinstance(scaling, Tensor) and (scaling.dim() != 0 or scaling.requires_grad):
        return "scaling is trained or not a scalar"
    if A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        if state.compute_dtype == "peft":
            return f"{_name(A.dtype)} adapters on {_name(x.dtype)} x, compute_dtype='peft'"
        if not layer.cast_input_dtype_enabled:
            return "casting of the input's dtype is disabled"
    if layer.keeps_dtype and torch.promote_types(_compute_dtype(x), x.dtype) != x.dtype:
        return f"{_name(x.dtype)} x under autocast in {_name(_compute_dtype(x))}"
    if torch.compiler.is_compiling():
        return "being exported" if ops.exporting() else None
    if torch._C._get_tracing_state() is not None:
        return "being traced"
    if ops.transformed():
        return "inside of a torch.func transform or forward-mode differentiation"
    return "global module hooks" if _has_any_global_hook() else None


def _why_delta(base: Any) -> str | None:
    if type(base) not in FULL_BASES:
        return f"base is {type(base).__name__}"
    if hooked(base):
        return "base has hooks"
    weight = base.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"base weight is {type(weight).__name__}"
    if weight.dtype not in DTYPES or weight.dim() != 2:
        return f"base weight is {_name(weight.dtype)} {tuple(weight.shape)}"
    return None


def _compute_dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _exchange(layer: Any, backend: str, compute_dtype: str) -> None:
    state = layer.__dict__.get("_fused_lora")
    if state is None:
        layer._fused_lora = _State(backend, compute_dtype)
        layer.__class__ = _fused_class(layer)
    else:
        state.backend, state.compute_dtype = backend, compute_dtype


def _why_left(layer: nn.Module) -> str | None:
    """Why `patch` leaves this LoRA layer as it is; None if it fuses it."""
    fused = _fused_class(layer)
    if fused is None and type(layer) not in _PLAIN:
        return f"lora.{type(layer).__name__} has no fused class"
    if "forward" in layer.__dict__ and fused is not None:
        return "its forward was replaced on the instance before patch"
    return None


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no PEFT LoRA layer: call get_peft_model(model, "
            "LoraConfig(...)) or PeftModel.from_pretrained first"
        )
    yield from layers


def check_options(backend: str, compute_dtype: str) -> None:
    check_backend(backend)
    if compute_dtype not in ("base", "peft"):
        raise ValueError(f"compute_dtype must be 'base' or 'peft': got {compute_dtype!r}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
