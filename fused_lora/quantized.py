"""`QuantizedLoRALinear`: an adapter beside a quantised base layer, which is kept whole and called
as it is. Knows the layers of bitsandbytes and torchao; works without either."""

from __future__ import annotations

import sys
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused_lora import ops
from fused_lora.delta import hooked, lora_delta, may_write
from fused_lora.functional import checked_options
from fused_lora.layer import InitLoRA, LoRALayer


class QuantizedLoRALinear(LoRALayer):
    """`base_layer(x) + scaling * (dropout(x) A^T) B^T`, by one of two paths:

    * "dequantise", where bitsandbytes would unpack a 4-bit weight for the call anyway (more than
      one row, or a gradient): W is unpacked once for forward and once for backward and meets the
      adapter in the fused product, as in `FusedLoRALinear`. W's memory is the allocator's to reuse.
    * "delta" for every other base: its own forward, to whose output the adapter term is added
      without a temporary of that size (`lora_delta`), in that output's dtype.

    Args:
        base_layer: Linear4bit or Linear8bitLt of bitsandbytes, or an nn.Linear whose weight is a
            quantised tensor of torchao. Held under this name, frozen, never written to.
        adapter_dtype: fp32 by default for bitsandbytes, the dtype that the weight stands for with
            torchao.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, backend: as `FusedLoRALinear`.

    Gradients reach x and the adapters. Raises TypeError for another base layer.
    """

    base_layer: nn.Module
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
            dtype=weight.dtype if weight.is_floating_point() else torch.float32,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )
        self.base_layer = base_layer.requires_grad_(False)
        if hasattr(base_layer, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weight of a CPU layer at its first call in eval mode,
            # after which it neither trains nor can be read
            base_layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
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
            base = self.base_layer if self._base is None else self._base.to(x.device)
            return base(x)
        self._require_adapters()
        if self.merged:
            return self.base_layer(x)
        dropout_p = self.lora_dropout if self.training else 0.0
        if self.path(x) == "dequantise":
            return self._dequantise(x, dropout_p)
        out = self.base_layer(x)
        return lora_delta(
            out,
            x,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            dropout_p=dropout_p,
            backend=self.backend,
            in_place=may_write(self.base_layer, out),
        )

    def path(self, x: Tensor) -> Literal["dequantise", "delta"]:
        """Which path a call with `x` takes."""
        bitsandbytes, base = sys.modules.get("bitsandbytes"), self.base_layer
        if bitsandbytes is None or hooked(base):
            return "delta"
        linear = bitsandbytes.nn
        if type(base) not in (linear.Linear4bit, linear.LinearNF4, linear.LinearFP4):
            return "delta"
        weight: Any = base.weight
        state = weight.quant_state
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return "delta"
        autocast = torch.is_autocast_enabled(x.device.type)
        computed_as_given = base.compute_dtype in (None, x.dtype) or autocast
        product = x.numel() > self.in_features or (torch.is_grad_enabled() and x.requires_grad)
        return "dequantise" if computed_as_given and product else "delta"

    def _dequantise(self, x: Tensor, dropout_p: float) -> Tensor:
        weight: Any = self.base_layer.weight
        computed = x.to(self.base_layer.compute_dtype or x.dtype)  # type: ignore[arg-type]
        scaling, _, p, seed, backend = checked_options(
            computed, self.scaling, dropout_p, None, self.backend
        )
        rows = computed.reshape(-1, self.in_features)  # [M, K]
        # inside of the Function grad mode is off: whether backward follows is known here
        options = (scaling, p, seed, backend, torch.is_grad_enabled())
        tensors = (rows, weight.data, weight.quant_state, self.lora_A, self.lora_B, self.bias)
        y = _Dequantised.apply(*tensors, *options)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

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
        RuntimeError without requantise, and where the weight does not tell how it was quantised."""
        reason = self.why_not_merge(requantise)
        if reason is not None:
            raise RuntimeError(reason)
        if keep_base not in (True, False, "cpu"):
            raise ValueError(f"keep_base must be True, False or 'cpu': got {keep_base!r}")
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


class _Dequantised(torch.autograd.Function):
    """y = x W^T + bias + S B^T as in `LoRALinearFunction`, of a 4-bit W that is unpacked for each
    direction: what is saved for backward is the packed weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        state: Any,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
        differentiates: bool,
    ) -> Tensor:
        weight = _unpacked(packed, state, x.dtype)
        cast_bias = None if bias is None else bias.to(x.dtype)
        one_adapter: list[Tensor] = []
        options = (scaling, None, dropout_p, seed, one_adapter, backend)
        needs_x, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        keep = differentiates and (needs_x or needs_A or needs_B)
        given = (x, weight, lora_A, lora_B, cast_bias, *options, keep)
        y, *kept = ops.call(ops.forward, *given)
        S, *mask = kept or (None,)
        ctx.save_for_backward(
            x if needs_A else None,
            packed,
            lora_A,
            lora_B,
            S if needs_B else None,
            mask[0] if mask else None,
        )
        ctx.state, ctx.options = state, (scaling, None, dropout_p)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, packed, lora_A, lora_B, S, mask = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_bias = (ctx.needs_input_grad[i] for i in (0, 3, 4, 5))
        weight = _unpacked(packed, ctx.state, dy.dtype)
        needs = [needs_x, False, needs_A, needs_B, needs_bias]
        computed = iter(
            ops.call(
                ops.backward,
                *(dy, x, weight, lora_A, lora_B, S, mask, *ctx.options),
                *([], needs, ctx.backend),
            )
        )
        dx, dA, dB, dbias = (
            next(computed) if needed else None for needed in (needs_x, needs_A, needs_B, needs_bias)
        )
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, None, None, dA, dB, dbias, None, None, None, None, None


def _unpacked(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    functional = sys.modules["bitsandbytes"].functional
    return functional.dequantize_4bit(packed, state).to(dtype)


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
        state = weight.quant_state
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return None
        return functional.dequantize_4bit(weight.data, state).float()
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
    new = new.to(old.device).train(base.training)
    new.register_parameter("bias", base.bias)
    return new
