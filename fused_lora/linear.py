"""`FusedLoRALinear`: a linear layer with a frozen base weight and a trainable low-rank update."""

from __future__ import annotations

import math
import sys
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapped

from fused_lora.functional import DTYPES, lora_linear
from fused_lora.layer import InitLoRA, LoRALayer

_ADAPTER_KEYS = ("lora_A", "lora_B")
_BASE_LET_GO = (
    "the base weight was let go by merge(keep_base=False): load a base checkpoint, or merge with "
    "keep_base=True"
)
_STATE_KEYS = ("weight", "bias", *_ADAPTER_KEYS, "lora_merged", "lora_base_weight")


class FusedLoRALinear(LoRALayer):
    """`y = x W^T + bias + scaling * (dropout(x) A^T) B^T` (Hu et al. 2022), computed fused.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        r: rank, at least 1.
        lora_alpha: scaling = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`
            (Kalajdzievski 2023).
        lora_dropout: drop probability of the adapter's input in training mode, in [0, 1).
        init_lora_weights: True or "kaiming" (PEFT's default: A Kaiming-uniform, B zero), "gaussian"
            (A normal with std 1/r, B zero; the paper's), False (A and B Kaiming-uniform: the layer
            differs from its base at once; for tests).
        adapter_dtype: dtype of lora_A and lora_B, the base's by default. fp32 adapters on a bf16
            base get fp32 gradients.
        backend: "auto", "triton" or "aten", see `fused_lora.lora_linear`.

    Parameters: weight [out, in] and bias [out] (frozen), lora_A [r, in], lora_B [out, r]. A base
    checkpoint of an nn.Linear loads with strict=True and leaves the adapters as they are.

    Not a subclass of nn.Linear: code that looks for nn.Linear would re-initialise, quantise, shard
    or read `.weight` of it without the adapter.

    Raises ValueError for r < 1, lora_dropout outside [0, 1), an unknown init or backend, TypeError
    for an adapter_dtype that is not floating.
    """

    _written = ("weight", "lora_A", "lora_B")
    weight: Tensor
    fan_in_fan_out: bool
    _base: Tensor | None
    _merged: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLoRA = True,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        bias_tensor = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        super().__init__()
        self._setup(
            nn.Parameter(weight, requires_grad=False),
            None if bias_tensor is None else nn.Parameter(bias_tensor, requires_grad=False),
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLoRA = True,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> FusedLoRALinear:
        """A layer around the weight and bias of `linear`: shared, not copied, and frozen from now
        on (`requires_grad` is turned off on the very Parameters). `linear` may be a Conv1D of
        transformers (GPT-2): its weight stays stored [in, out], `fan_in_fan_out` says so. Raises
        TypeError if it is not exactly one of the two with a plain floating weight."""
        require_plain(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._setup(
            linear.weight,
            linear.bias,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            adapter_dtype=adapter_dtype,
            backend=backend,
            fan_in_fan_out=is_conv1d(linear),
        )
        linear.weight.requires_grad_(False)
        if linear.bias is not None:
            linear.bias.requires_grad_(False)
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def _setup(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        *,
        fan_in_fan_out: bool = False,
        **options: Any,
    ) -> None:
        in_features, out_features = weight.shape if fan_in_fan_out else weight.shape[::-1]
        self._setup_adapter(
            in_features, out_features, device=weight.device, dtype=weight.dtype, **options
        )
        self.fan_in_fan_out = fan_in_fan_out
        self.weight = weight
        self.register_parameter("bias", bias)
        # weight and bias come first in state_dict(), as in an nn.Linear
        for name in _ADAPTER_KEYS:
            self._parameters[name] = self._parameters.pop(name)
        self._set_base(None, merged=False)

    @property
    def merged(self) -> bool:
        """Whether `weight` currently holds W0 + scaling * B A. A Parameter that is assigned to
        `weight` afterwards is a new base: with it the layer is not merged."""
        return self._merged

    def reset_parameters(self) -> None:
        """Initialise the base as nn.Linear does, and the adapters."""
        if self._merged:
            raise RuntimeError("the layer is merged: call unmerge() before reset_parameters()")
        with torch.no_grad():
            nn.init.kaiming_uniform_(self._matrix(self.weight), a=math.sqrt(5))
            if self.bias is not None:
                bound = 1.0 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
                nn.init.uniform_(self.bias, -bound, bound)
        self.reset_lora_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self._forward(x, self.weight, self.lora_A, self.lora_B, self.bias)

    def _forward(
        self,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        seed: Tensor | None = None,
    ) -> Tensor:
        if not self.adapter_enabled:
            base = self.base_weight() if self._merged else weight
            return F.linear(x, self._matrix(base), bias)
        self._require_adapters()
        if self._merged:
            return F.linear(x, self._matrix(self._without_adapter(weight)), bias)
        return lora_linear(
            x,
            self._matrix(weight),
            lora_A,
            lora_B,
            bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
            seed=seed,
            backend=self.backend,
        )

    def merge(
        self, keep_base: bool | Literal["cpu"] = True, requantise: bool = False
    ) -> FusedLoRALinear:
        """Put W0 + scaling * B A, summed in fp32 and rounded once, in place of `weight`.

        W0's storage is never written to: tied weights and the layer it came from stay as they are.
        keep_base=True keeps W0 for `unmerge`, "cpu" keeps a copy on the CPU (a weight that was tied
        to it is then tied no longer), False lets it go.
        A state_dict says that the layer is merged; torch.distributed.checkpoint.state_dict has no
        place for that and refuses the layer (no attribute 'lora_merged'): unmerge first. Raises
        RuntimeError if already merged or if the adapters are not initialised, ValueError for
        requantise=True, which is for quantised bases.
        """
        if requantise:
            raise ValueError(
                "requantise=True is for quantised bases, this one is not quantised: call merge() "
                "without it"
            )
        self._require_mergeable(keep_base)
        base = self.weight
        kept: Tensor | None = None
        with torch.inference_mode(False):  # or nothing could be differentiated through it later
            if keep_base == "cpu":
                kept = base.detach().to("cpu", copy=True)
            elif keep_base:
                kept = base
            self.weight = nn.Parameter(self._merged_weight(), requires_grad=base.requires_grad)
        self._set_base(kept, merged=True)
        return self

    def unmerge(self) -> FusedLoRALinear:
        """Put the base weight back, bit for bit (the very Parameter, if it was kept and the layer
        has not moved since); returns self. Raises RuntimeError if not merged or not kept."""
        if not self._merged:
            raise RuntimeError("the layer is not merged: there is nothing to unmerge")
        if self.manager is not None:
            raise RuntimeError(f"{self.manager} holds the merged weight: call unmerge() before")
        self._require_writable()
        base = self.base_weight()
        if not isinstance(base, nn.Parameter):
            base = nn.Parameter(base, requires_grad=self.weight.requires_grad)
        self.weight = base
        self._set_base(None, merged=False)
        return self

    def to_linear(self) -> nn.Linear:
        """A new nn.Linear with the merged weight and a copy of the bias; self is left as it is."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=self.weight.dtype,
        )
        weight = self.weight.detach().clone() if self._merged else self._merged_weight()
        linear.weight = nn.Parameter(self._matrix(weight).contiguous())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def _merged_weight(self) -> Tensor:
        delta = self.delta_weight()
        with torch.no_grad():
            exact = torch.promote_types(self.weight.dtype, delta.dtype)
            total = delta.to(exact).add_(self._matrix(self.weight)).to(self.weight.dtype)
            return self._matrix(total).contiguous()

    def base_module(self) -> nn.Module:
        plain: nn.Module
        if self.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                plain = Conv1D(self.out_features, self.in_features)
        else:
            plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = self.weight
        plain.register_parameter("bias", self.bias)  # type: ignore[arg-type]
        return plain.train(self.training)

    @property
    def has_base(self) -> bool:
        return not self._merged or self._base is not None

    def _merge_arguments(self) -> dict[str, Any] | None:
        keep = True if isinstance(self._base, nn.Parameter) else "cpu"
        return {"keep_base": keep} if self._merged else None

    def snapshot(self) -> dict[str, Any]:
        base = {"weight": self.weight, "base": self._base, "merged": self._merged}
        return super().snapshot() | base

    def restore(self, snapshot: dict[str, Any]) -> None:
        super().restore(snapshot)
        self.weight = snapshot["weight"]
        self._set_base(snapshot["base"], merged=snapshot["merged"])

    def base_weight(self) -> Tensor:
        """W0, merged or not, where and in the dtype that `weight` is; raises if it was let go."""
        if not self._merged:
            return self.weight
        if self._base is None:
            raise RuntimeError(_BASE_LET_GO)
        return self._base.to(self.weight.device, self.weight.dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        """[out, in] of a weight as stored, and back: stored [in, out] with fan_in_fan_out."""
        return weight.t() if self.fan_in_fan_out else weight

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.lora_A.dtype != self.weight.dtype:
            text += f", adapter_dtype={self.lora_A.dtype}"
        if self.fan_in_fan_out:
            text += ", fan_in_fan_out=True"
        return text + f", backend={self.backend}" + (", merged" if self._merged else "")

    # --- state: what moves, what is saved, what loads

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._merged:
            destination[prefix + "lora_merged"] = torch.tensor(True, device="cpu")
            if self._base is not None:
                base = self._base
                destination[prefix + "lora_base_weight"] = base if keep_vars else base.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key: state_dict[prefix + key] for key in _STATE_KEYS if prefix + key in state_dict}
        refusal = self._refuse(given, prefix)
        if refusal is not None:  # before anything is written
            error_msgs.append(refusal)
            return
        state = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        merged = bool(given.get("lora_merged", False))
        base = given.get("lora_base_weight")
        for key in ("lora_merged", "lora_base_weight"):
            state.pop(prefix + key, None)
        optional = set() if "lora_A" in given else set(_ADAPTER_KEYS)
        if merged:
            # what is written in place is the base weight; the merged one gets storage of its own
            del state[prefix + "weight"]
            if base is not None:
                state[prefix + "weight"] = base
            optional.add("weight")
        if self._merged and (merged or "weight" in given or "lora_A" in given):
            if self._base is not None:
                self.unmerge()
            else:
                self.weight = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
                self._set_base(None, merged=False)
        missing: list[str] = []
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in optional]
        if merged:
            kept = self.weight if base is not None else None
            weight = given["weight"].detach()
            if not local_metadata.get("assign_to_params_buffers", False):
                weight = weight.to(self.weight.device, self.weight.dtype, copy=True)
            self.weight = nn.Parameter(weight, self.weight.requires_grad)
            self._set_base(kept, merged=True)

    def _refuse(self, given: dict[str, Tensor], prefix: str) -> str | None:
        """Why these entries of a state_dict cannot be loaded, None if they can."""
        present = [key for key in _ADAPTER_KEYS if key in given]
        # a factor that is parametrized or pruned has other keys
        if len(present) == 1 and all(key in self._parameters for key in _ADAPTER_KEYS):
            absent = next(key for key in _ADAPTER_KEYS if key not in present)
            return (
                f"{prefix}{present[0]} is in the state_dict, {prefix}{absent} is not: an adapter "
                "has both; give both, or neither to keep the adapter as it is"
            )
        if given.get("lora_merged", False):
            for part, key in (("adapters are", "lora_A"), ("weight is", "weight")):
                if key not in given:
                    return (
                        f"{prefix}lora_merged is in the state_dict, its {part} not: give the whole "
                        "state of a merged layer"
                    )
        elif self._merged and self._base is None and present and "weight" not in given:
            return (
                f"{prefix}weight is not in the state_dict and merge(keep_base=False) let the base "
                "weight go: new adapters have no base weight to apply to; give it too"
            )
        matrix = tuple(self.weight.shape)
        shapes = {"weight": matrix, "lora_base_weight": matrix, "bias": (self.out_features,)}
        shapes |= {"lora_A": tuple(self.lora_A.shape), "lora_B": tuple(self.lora_B.shape)}
        for key, shape in shapes.items():
            if key in given and tuple(given[key].shape) != shape:
                return (
                    f"size mismatch for {prefix}{key}: got {tuple(given[key].shape)}, expected "
                    f"{shape}; give a checkpoint of a layer of this size and rank"
                )
        return None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # another weight is another base: so a model ties an output layer to its embedding again.
        # FSDP exchanges a Parameter for its shard, and back
        state = self.__dict__
        given = name == "weight" and state.get("_merged") and type(value) is nn.Parameter
        if given and self.manager is None:
            self._set_base(None, merged=False)

    def _set_base(self, base: Tensor | None, *, merged: bool) -> None:
        # past nn.Module's attribute, which would register a kept base weight as a parameter
        object.__setattr__(self, "_base", base)
        object.__setattr__(self, "_merged", merged)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is exactly the Conv1D of transformers, a linear layer stored [in, out]."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and type(module) is loaded.Conv1D


def require_plain(linear: nn.Module) -> None:
    """Raise TypeError unless `linear` is exactly an nn.Linear or a Conv1D of transformers, with a
    plain floating weight."""
    if type(linear) is not nn.Linear and not is_conv1d(linear):
        raise TypeError(f"from_linear takes an nn.Linear: got {type(linear).__name__}")
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if weight.dtype not in DTYPES or is_wrapped(weight):
        raise TypeError(
            f"from_linear takes an nn.Linear with a floating weight: got {type(linear).__name__} "
            f"with {weight.dtype} in a {type(weight).__name__}"
        )
