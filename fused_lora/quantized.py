"""`QuantizedLoRALinear`: an adapter beside a quantised base layer, which is kept whole and called
as it is. Knows the layers of bitsandbytes and torchao; works without either."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_lora import four_bit
from fused_lora.delta import lora_delta, may_write
from fused_lora.layer import InitLoRA, LoRALayer

_REPACKS = "support_avx512bf16_for_cpu"


class QuantizedLoRALinear(LoRALayer):
    """`base_layer(x) + scaling * (dropout(x) A^T) B^T`, by one of two paths:

    * "dequantise", where bitsandbytes would unpack a 4-bit weight for the call anyway (many tokens;
      on a CPU any number): W is unpacked once for forward and once for backward and multiplied
      together with the adapter, as in `FusedLoRALinear`. W's memory is the allocator's to reuse.
    * "delta" for every other base: its own forward, to whose output the adapter term is added
      without a temporary of that size (`lora_delta`), in that output's dtype.

    Args:
        base_layer: Linear4bit or Linear8bitLt of bitsandbytes, or an nn.Linear whose weight is a
            quantised tensor of torchao. Held under this name, frozen, never written to.
        adapter_dtype: fp32 by default for bitsandbytes, the dtype that the weight stands for with
            torchao.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, backend: as `FusedLoRALinear`.

    Gradients reach x and the adapters. In a state_dict the base's keys begin with `base_layer.`:
    save adapters by `save_adapter`; for transformers' `save_pretrained`, `unload` the model first.
    Raises TypeError for another base layer.
    """

    base_layer: nn.Module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The base layer's, quantised: some models look at its dtype."""
        return self.base_layer.weight  # type: ignore[return-value]

    _base: nn.Module | None
    _let_go: bool

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: InitLoRA = True,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kind = quantization_of(base_layer)
        if kind is None:
            raise TypeError(
                "expected a quantised linear layer of bitsandbytes or torchao: got "
                f"{type(base_layer).__name__}"
            )
        weight: Any = base_layer.weight
        self._setup_adapter(
            int(base_layer.in_features),  # type: ignore[arg-type]
            int(base_layer.out_features),  # type: ignore[arg-type]
            device=weight.device,
            # bitsandbytes may store a 4-bit weight in a floating dtype, which says nothing of it
            dtype=torch.float32 if kind.startswith("bitsandbytes") else weight.dtype,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )
        self.base_layer = base_layer.requires_grad_(False)
        if hasattr(base_layer, _REPACKS):
            # bitsandbytes would repack the weight of a CPU layer at its first call in eval mode,
            # after which it neither trains nor can be read
            setattr(base_layer, _REPACKS, False)
        self._set_base(None)
        self.reset_lora_parameters()
        self.train(base_layer.training)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def merged(self) -> bool:
        """Whether `base_layer` currently holds W0 + scaling * B A, quantised anew."""
        return self._base is not None or self._let_go

    @property
    def has_base(self) -> bool:
        return not self._let_go

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if not self.adapter_enabled:
            if self._base is None:
                return self.base_layer(x)
            base = self._base.to(x.device)
            base.register_parameter("bias", self.bias)  # type: ignore[arg-type]
            return base(x)
        self._require_adapters()
        if self.merged:
            return self._without_adapter(self.base_layer(x))
        options: dict[str, Any] = {
            "scaling": self.scaling,
            "dropout_p": self.lora_dropout if self.training else 0.0,
            "backend": self.backend,
        }
        if self.path(x) == "dequantise":
            return four_bit.lora_linear_4bit(
                x, self.base_layer, self.lora_A, self.lora_B, **options
            )
        out = self.base_layer(x)
        in_place = may_write(self.base_layer, out)
        return lora_delta(out, x, self.lora_A, self.lora_B, in_place=in_place, **options)

    def path(self, x: Tensor) -> Literal["dequantise", "delta"]:
        """Which path a call with `x` takes."""
        return "dequantise" if four_bit.unpacks(self.base_layer, x) else "delta"

    def why_not_merge(self, requantise: bool = False) -> str | None:
        kind = quantization_of(self.base_layer)
        if super().why_not_merge() is None and not requantise:
            return (
                f"the base is quantised ({kind}), so that merging would round the adapter to its "
                "few levels: keep it unmerged, or ask for it with requantise=True"
            )
        if requantise and _dequantized(self.base_layer) is None:
            return (
                f"the base is quantised ({kind}) in a way that its weight does not tell: merge a "
                "model in full precision and quantise that"
            )
        return super().why_not_merge()

    def merge(
        self, keep_base: bool | Literal["cpu"] = True, requantise: bool = False
    ) -> QuantizedLoRALinear:
        """With requantise=True put a new base layer, W0 + scaling * B A summed in fp32 and
        quantised as the old one was, in its place. keep_base as in `FusedLoRALinear.merge`. Raises
        RuntimeError without requantise, and where the weight does not tell how it was quantised,
        ValueError for another keep_base."""
        self._require_mergeable(keep_base, requantise)
        base, weight = self.base_layer, _dequantized(self.base_layer)
        assert weight is not None
        total = self.delta_weight().to(weight.device).add_(weight)
        self.base_layer = _quantized_as(base, total)
        if keep_base == "cpu":
            base = base.to("cpu")
        self._set_base(base if keep_base else None, let_go=not keep_base)
        return self

    def unmerge(self) -> QuantizedLoRALinear:
        """Put the base layer back, bit for bit; returns self. Raises RuntimeError if not merged or
        not kept."""
        if not self.merged:
            raise RuntimeError("the layer is not merged: there is nothing to unmerge")
        self._require_writable()
        if self._base is None:
            raise RuntimeError(
                "the base layer was let go by merge(keep_base=False): load it again, or merge with "
                "keep_base=True"
            )
        self.base_layer = self._base.to(self.lora_A.device)
        self._set_base(None)
        return self

    def _merge_arguments(self) -> dict[str, Any] | None:
        if not self.merged:
            return None
        kept = self._base is not None and next(self._base.parameters()).device
        moved = kept and kept != self.lora_A.device
        return {"keep_base": "cpu" if moved else True, "requantise": True}

    def base_module(self) -> nn.Module:
        return self.base_layer

    def snapshot(self) -> dict[str, Any]:
        base = {"base_layer": self.base_layer, "base": self._base, "let_go": self._let_go}
        return super().snapshot() | base

    def restore(self, snapshot: dict[str, Any]) -> None:
        super().restore(snapshot)
        self.base_layer = snapshot["base_layer"]
        self._set_base(snapshot["base"], let_go=snapshot["let_go"])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.merged:
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'the layer'} is merged into a quantised base, whose state "
                "would load as if it were not: call unmerge() before state_dict(), or unload()"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        state = ", merged" if self.merged else ""
        return super().extra_repr() + f", backend={self.backend}{state}"

    def _set_base(self, base: nn.Module | None, *, let_go: bool = False) -> None:
        # past nn.Module's attribute, which would register a kept base layer as a child
        object.__setattr__(self, "_base", base)
        object.__setattr__(self, "_let_go", let_go)


def quantization_of(module: nn.Module) -> str | None:
    """How the weight of a linear layer is quantised, in words; None if it is not, or unknown."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None:
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            return f"bitsandbytes {module.weight.quant_type}"
        if isinstance(module, bitsandbytes.nn.Linear8bitLt) and not module.state.has_fp16_weights:
            return "bitsandbytes int8"
    weight = type(getattr(module, "weight", None))
    if type(module) is nn.Linear and weight.__module__.partition(".")[0] == "torchao":
        return f"torchao {weight.__name__}"
    return None


def _dequantized(base: nn.Module) -> Tensor | None:
    """W0 in fp32, [out, in], of a layer that `_quantized_as` can make; None for others."""
    weight: Any = base.weight
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None or not isinstance(
        base, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt
    ):
        return None
    functional = bitsandbytes.functional
    if isinstance(base, bitsandbytes.nn.Linear4bit):
        state = four_bit.state_of(base)
        return None if state is None else functional.dequantize_4bit(weight.data, state).float()
    levels = weight.CB if weight.CB is not None else base.state.CB
    scales = weight.SCB if weight.SCB is not None else base.state.SCB
    if levels is None or scales is None:
        return None
    return functional.int8_vectorwise_dequant(levels, scales).float()


def _quantized_as(base: nn.Module, weight: Tensor) -> nn.Module:
    """A new layer like `base` that holds `weight` [out, in], with the same bias Parameter."""
    import bitsandbytes

    old: Any = base.weight
    new: Any
    if isinstance(base, bitsandbytes.nn.Linear4bit):
        new = bitsandbytes.nn.Linear4bit(
            base.in_features,
            base.out_features,
            bias=False,
            compute_dtype=base.compute_dtype,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            device="meta",
        )
        new.weight = bitsandbytes.nn.Params4bit(
            weight.to("cpu", old.quant_state.dtype),
            requires_grad=False,
            compress_statistics=old.compress_statistics,
            blocksize=old.blocksize,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=new,
        )
    else:
        assert isinstance(base, bitsandbytes.nn.Linear8bitLt)
        new = bitsandbytes.nn.Linear8bitLt(
            base.in_features,
            base.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=base.state.threshold,
            device="meta",
        )
        new.weight = bitsandbytes.nn.Int8Params(
            weight.to("cpu"), requires_grad=False, has_fp16_weights=False
        )
    if hasattr(base, _REPACKS):
        setattr(new, _REPACKS, getattr(base, _REPACKS))
    new = new.to(old.device).train(base.training)
    new.register_parameter("bias", base.bias)
    return new
