"""`LoRALayer`: what every LoRA layer has, whatever holds its base weight: the adapter, its scaling,
its switch. `FusedLoRALinear` keeps a plain weight, `QuantizedLoRALinear` a quantised base layer."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_lora.functional import DTYPES, check_backend, check_kinds
from fused_lora.wrapped import manager_of

InitLoRA = bool | Literal["kaiming", "gaussian"]
_OPTIONS = ("r", "lora_alpha", "use_rslora", "lora_dropout")
_ADAPTER_STATE = ("lora_A", "lora_B", *_OPTIONS, "adapters_ready")


class LoRALayer(nn.Module):
    """A linear layer in_features -> out_features with an adapter lora_A [r, in], lora_B [out, r].

    `adapter_enabled` is the switch of `fused_lora.disable_adapters`: False means the base alone.
    `adapters_ready` is False until lora_A and lora_B hold values (a layer on the meta device).
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    adapters_ready: bool
    adapter_enabled: bool

    def _setup_adapter(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        init_lora_weights: InitLoRA,
        adapter_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        """Check the options and make room for the adapter; `dtype` is adapter_dtype's default."""
        check_adapter_options(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            adapter_dtype=adapter_dtype or dtype,
            backend=backend,
        )
        self.in_features, self.out_features = in_features, out_features
        self.r = plain(r)
        self.lora_alpha, self.lora_dropout = plain(lora_alpha), plain(lora_dropout)
        self.use_rslora, self.init_lora_weights = use_rslora, init_lora_weights
        self.backend = backend
        self.adapter_enabled = True
        like = torch.empty(0, device=device, dtype=adapter_dtype or dtype)
        self.lora_A = nn.Parameter(like.new_empty((r, in_features)))
        self.lora_B = nn.Parameter(like.new_empty((out_features, r)))
        self.adapters_ready = False

    @property
    def scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def merged(self) -> bool:
        """Whether the base weight currently holds W0 + scaling * B A."""
        raise NotImplementedError

    def base_module(self) -> nn.Module:
        """The plain layer with the base weight as it is now (the merged one if merged), sharing
        its Parameters; what `fused_lora.unload` puts in this layer's place."""
        raise NotImplementedError

    @property
    def has_base(self) -> bool:
        """Whether the layer still knows its base weight (merge(keep_base=False) lets it go)."""
        return True

    def why_not_merge(self, requantise: bool = False) -> str | None:
        """Why `merge` would refuse this layer, None if it would not."""
        if self.merged:
            return "the layer is merged already: call unmerge() before merging again"
        if not self.adapters_ready:
            return "lora_A and lora_B are not initialised: there is nothing to merge"
        unwritable = self.why_not_write()
        if unwritable is not None:
            return unwritable
        manager = self.manager
        if manager is not None:
            return (
                f"{manager} holds the base weight and would put the unmerged one back: gather the "
                "state_dict (full_state_dict=True of torch.distributed.checkpoint.state_dict) into "
                "a model on one process and merge that"
            )
        return None

    @property
    def manager(self) -> str | None:
        """Who exchanges the layer's Parameters for shards and back, None if nobody does."""
        return manager_of(self, self.lora_A)

    @property
    def sharded(self) -> bool:
        """Whether the adapter is one that all processes have together."""
        return self.manager is not None or type(self.lora_A).__name__ == "DTensor"

    @property
    def offloaded(self) -> bool:
        """Whether the adapter's values are elsewhere, as accelerate keeps them."""
        return self.adapters_ready and self.lora_A.is_meta

    def why_not_read(self) -> str | None:
        """Why lora_A and lora_B are not the adapter's values, None if they are; a DTensor is."""
        if self.offloaded:
            return (
                "the parameters are on the meta device, where accelerate leaves those that it has "
                "offloaded, and would put the old ones back: call "
                "accelerate.hooks.remove_hook_from_submodules(model) first"
            )
        shapes = (self.r, self.in_features), (self.out_features, self.r)
        if (tuple(self.lora_A.shape), tuple(self.lora_B.shape)) != shapes:
            if self.manager is None:
                got = f"{tuple(self.lora_A.shape)} and {tuple(self.lora_B.shape)}"
                return f"lora_A and lora_B are {got}, expected {shapes}: set_adapter exchanges them"
            gather = "FullyShardedDataParallel.summon_full_params(model)"
            if self.manager != "FSDP":
                gather = "deepspeed.zero.GatheredParameters(list(model.parameters()))"
            return f"this process has a shard of lora_A and lora_B: call this inside of {gather}"
        return None

    def why_not_write(self) -> str | None:
        """Why the layer's Parameters cannot be exchanged in place, None if they can."""
        if self.offloaded:
            return self.why_not_read()
        absent = [name for name in self._written if self._parameters.get(name) is None]
        if absent:
            return (
                f"{' and '.join(absent)} are parametrized or pruned: call "
                "torch.nn.utils.parametrize.remove_parametrizations or prune.remove first"
            )
        return None

    def _require_writable(self) -> None:
        reason = self.why_not_write()
        if reason is not None:
            raise RuntimeError(reason)

    _written: tuple[str, ...] = ("lora_A", "lora_B")
    """What `set_adapter`, `merge` and `unmerge` exchange."""

    def _require_mergeable(
        self, keep_base: bool | Literal["cpu"], requantise: bool = False
    ) -> None:
        reason = self.why_not_merge(requantise)
        if reason is not None:
            raise RuntimeError(reason)
        if keep_base not in (True, False, "cpu"):
            raise ValueError(f"keep_base must be True, False or 'cpu': got {keep_base!r}")

    def merge(self, keep_base: bool | Literal["cpu"] = True, requantise: bool = False) -> LoRALayer:
        """Put W0 + scaling * B A in the place of the base weight; returns self. Raises RuntimeError
        where `why_not_merge` has a reason, ValueError for another keep_base."""
        raise NotImplementedError

    def unmerge(self) -> LoRALayer:
        """Put the base weight back, bit for bit; returns self. Raises RuntimeError if the layer is
        not merged or the base was let go."""
        raise NotImplementedError

    def reset_lora_parameters(self) -> None:
        """Initialise lora_A and lora_B as `init_lora_weights` says; where only they are still on
        the meta device, on the base's. Raises RuntimeError if the layer is merged or offloaded."""
        if self.merged:
            raise RuntimeError("the layer is merged: call unmerge() before reset_lora_parameters()")
        if self.offloaded:
            raise RuntimeError(self.why_not_read())
        if self.lora_A.is_meta and not self.weight.is_meta:
            for name in ("lora_A", "lora_B"):
                own = getattr(self, name)
                empty = torch.empty_like(own, device=self.weight.device)
                setattr(self, name, nn.Parameter(empty, requires_grad=own.requires_grad))
        initialise(self.lora_A, self.lora_B, self.init_lora_weights)
        self.adapters_ready = not self.lora_A.is_meta

    def set_adapter(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
        lora_dropout: float | None = None,
    ) -> None:
        """Copy another adapter, lora_A [r, in] and lora_B [out, r] of any rank, into the layer, in
        the dtype and on the device of its own. The Parameters stay the same objects if the rank
        does. lora_dropout None keeps the layer's. A merged layer is merged with the new adapter
        afterwards, and keeps its base weight as before. Raises ValueError for shapes that do not
        fit and options out of range, TypeError for tensors that are not floating, RuntimeError if
        the base weight was let go or the layer is sharded, offloaded or parametrized; then nothing
        has changed."""
        if self.sharded:
            raise RuntimeError(
                "lora_A and lora_B are sharded: set an adapter before the model is, or load it by "
                "torch.distributed.checkpoint.state_dict"
            )
        self._require_writable()
        for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
            check_kinds(((value, name),))
        r = lora_A.shape[0] if lora_A.dim() == 2 else 0
        expected = ((r, self.in_features), (self.out_features, r))
        if r < 1 or (tuple(lora_A.shape), tuple(lora_B.shape)) != expected:
            raise ValueError(
                f"lora_A and lora_B must be [r, {self.in_features}] and [{self.out_features}, r]: "
                f"got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            )
        p = self.lora_dropout if lora_dropout is None else lora_dropout
        check_adapter_options(r=r, lora_alpha=lora_alpha, lora_dropout=p, use_rslora=use_rslora)
        merged_by = self._merge_arguments()
        with torch.inference_mode(False), torch.no_grad():
            given = {}
            for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
                own = getattr(self, name)
                holder = self.weight if own.is_meta else own
                device = value.device if holder.is_meta else holder.device
                given[name] = value.to(device, own.dtype, copy=True)
            if merged_by is not None:
                self.unmerge()
            for name, new in given.items():
                own = getattr(self, name)
                if own.shape == new.shape and not own.is_meta:
                    own.copy_(new)
                else:
                    setattr(self, name, nn.Parameter(new, requires_grad=own.requires_grad))
        self.r, self.use_rslora = r, use_rslora
        self.lora_alpha, self.lora_dropout = plain(lora_alpha), plain(p)
        self.adapters_ready = True
        if merged_by is not None:
            self.merge(**merged_by)

    def _merge_arguments(self) -> dict[str, Any] | None:
        """What `merge` was called with, None if the layer is not merged."""
        raise NotImplementedError

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to undo any of `set_adapter`, `merge` and `unmerge`."""
        kept = {name: getattr(self, name) for name in _ADAPTER_STATE}
        values = {name: kept[name].detach().clone() for name in ("lora_A", "lora_B")}
        return kept | {"values": values}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot: the same Parameters, with the values they had."""
        for name in _ADAPTER_STATE:
            setattr(self, name, snapshot[name])
        with torch.no_grad():
            for name, value in snapshot["values"].items():
                getattr(self, name).copy_(value)

    def delta_weight(self) -> Tensor:
        """scaling * B A, [out_features, in_features], in fp32 (fp64 for fp64 adapters). Raises
        RuntimeError if the adapters are not initialised, or not whole on this process."""
        self._require_adapters()
        reason = self.why_not_read()
        if reason is not None:
            raise RuntimeError(reason)
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with torch.no_grad():
            return self.lora_B.to(dtype) @ self.lora_A.to(dtype) * self.scaling

    def _without_adapter(self, merged: Tensor) -> Tensor:
        """`merged`, a merged weight or its product, refusing gradients to lora_A and lora_B."""
        if torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad):
            return _Merged.apply(merged, self.lora_A, self.lora_B)
        return merged

    def _require_adapters(self) -> None:
        if not self.adapters_ready:
            raise RuntimeError(
                "lora_A and lora_B are not initialised (the layer was built on the meta device or "
                "emptied): call reset_lora_parameters() or load a state_dict with both of them "
                "(where something else has filled them, set adapters_ready = True)"
            )

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"scaling={self.scaling:g}"
        )
        if self.lora_dropout > 0.0:
            text += f", lora_dropout={self.lora_dropout}"
        return text

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
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = [name for name in ("lora_A", "lora_B") if name in self._parameters]
        given = all(prefix + name in state_dict for name in own)
        if own and given and len(error_msgs) == errors:
            self.adapters_ready = not self.lora_A.is_meta

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALayer:
        was_meta = self.lora_A.is_meta
        super()._apply(fn, recurse)
        if is_to_empty(fn) or (was_meta and not self.lora_A.is_meta):
            self.adapters_ready = False
        return self


def is_to_empty(fn: Any) -> bool:
    """Whether nn.Module._apply was given the function of `to_empty`, which leaves no values."""
    return "to_empty" in getattr(fn, "__qualname__", "")


class _Merged(torch.autograd.Function):
    """A tensor of a merged layer, refusing gradients to the adapters it no longer depends on."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return merged.view_as(merged)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        raise RuntimeError(
            "backward through a merged LoRA layer wants gradients of lora_A and lora_B, which the "
            "merged weight does not have: call unmerge() to train, or freeze the adapters "
            "(requires_grad_(False)) to differentiate the merged layer"
        )


@torch.no_grad()
def initialise(lora_A: Tensor, lora_B: Tensor, how: InitLoRA) -> None:
    """Fill lora_A [r, in] and lora_B [out, r] as `init_lora_weights` says."""
    if how == "gaussian":
        nn.init.normal_(lora_A, std=1.0 / lora_A.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


def is_size(n: object) -> bool:
    """Whether n is an integer of at least 1, of Python or another library, and no bool."""
    return isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 1


def plain(number: Any) -> Any:
    """Python's own int or float of a number, which JSON knows."""
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def check_adapter_options(
    *,
    r: int,
    lora_alpha: float = 1.0,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: InitLoRA = True,
    adapter_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> None:
    """Raise ValueError or TypeError for an option that no layer can be made with."""
    if not is_size(r):
        raise ValueError(f"r must be an integer of at least 1: got {r!r}")
    real = isinstance(lora_alpha, numbers.Real) and not isinstance(lora_alpha, bool)
    if not real or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number: got {lora_alpha!r}")
    if not isinstance(lora_dropout, numbers.Real) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1): got {lora_dropout!r}")
    if not isinstance(use_rslora, bool):
        raise TypeError(f"use_rslora must be True or False: got {use_rslora!r}")
    check_backend(backend)
    if not (isinstance(init_lora_weights, bool) or init_lora_weights in ("kaiming", "gaussian")):
        raise ValueError(
            "init_lora_weights must be True, False, 'kaiming' or 'gaussian': got "
            f"{init_lora_weights!r}"
        )
    if adapter_dtype is not None and adapter_dtype not in DTYPES:
        raise TypeError(
            "adapter_dtype must be None or a floating dtype of 16, 32 or 64 bits: got "
            f"{adapter_dtype!r}"
        )
