"""`explain`: which path a layer takes, in how many launches, with which configuration, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_lora import ops
from fused_lora.functional import autocasted
from fused_lora.kernels import config
from fused_lora.layer import LoRALayer
from fused_lora.linear import FusedLoRALinear
from fused_lora.model import holds_peft_layers
from fused_lora.multi import MultiLoRALinear
from fused_lora.quantized import QuantizedLoRALinear, quantization_of
from fused_lora.wrapped import require_module

DEFAULT_TOKENS = 4096


def explain(model_or_layer: nn.Module, x: Tensor | None = None) -> str:
    """A title for each LoRA layer, and under it a line for each direction: backend, path, launches,
    configuration, reason.

    x [..., in_features] gives the number of tokens, dtype and device that the lines speak of;
    without it, 4096 tokens in the weight's dtype on its device, under autocast in autocast's.
    Nothing is run.
    Raises ValueError if there is no LoRA layer in the model, TypeError for an x that none takes.
    """
    require_module(model_or_layer)
    if x is not None and not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0):
        raise TypeError(f"x must be a floating tensor [..., in_features]: got {x!r}")
    layers = [
        (name, module)
        for name, module in model_or_layer.named_modules()
        if isinstance(module, LoRALayer | MultiLoRALinear)
    ]
    if not layers:
        hint = "there is nothing to explain"
        if holds_peft_layers(model_or_layer):
            hint = "its adapters are PEFT's, which fused_lora.integrations.peft.explain explains"
        raise ValueError(f"{type(model_or_layer).__name__} holds no LoRA layer: {hint}")
    return "\n".join(
        _explain_layer(name, layer, x)
        if isinstance(layer, FusedLoRALinear | MultiLoRALinear)
        else _explain_quantized(name, layer, x)
        for name, layer in layers
    )


def _explain_quantized(name: str, layer: LoRALayer, x: Tensor | None) -> str:
    base = layer.base_module()
    title = (
        f"{name or 'layer'}: {layer.in_features} -> {layer.out_features}, r={layer.r}, on a "
        f"quantised base ({quantization_of(base)})"
    )
    if not layer.adapter_enabled:
        return f"{title}\n  the adapter is disabled: the base's own product"
    if layer.merged:
        return f"{title}\n  merged: the base's own product, nothing to add"
    given = layer.lora_A if x is None else x
    computed = getattr(base, "compute_dtype", None)  # of 4-bit layers
    if x is None and computed is not None:
        given = given.to(computed)
    tokens = DEFAULT_TOKENS if x is None else x.numel() // max(1, x.shape[-1])
    rows = given.new_empty((1, layer.in_features)).expand(tokens, -1)
    unable = ops.why_not_triton(rows)
    if layer.backend == "triton" and unable is not None:
        return f"{title}\n  backend='triton' cannot run: {unable}"
    backend = ops.resolve(layer.backend, rows, layer.out_features, layer.r)
    how = "the base's own product, then the adapter added to its output"
    if isinstance(layer, QuantizedLoRALinear) and layer.path(rows) == "dequantise":
        how = "unpacked for the call, then multiplied together with the adapter"
    return f"{title}\n  {how} ({backend})"


def _explain_layer(name: str, layer: FusedLoRALinear | MultiLoRALinear, x: Tensor | None) -> str:
    tokens = DEFAULT_TOKENS if x is None else x.numel() // max(1, x.shape[-1])
    like = layer.weight if x is None else x
    # one row is enough to ask about: only sizes, strides and the dtype matter
    row, _ = autocasted(like.new_empty((1, layer.in_features)))
    rows, dtype, device = row.expand(tokens, -1), row.dtype, row.device
    if isinstance(layer, MultiLoRALinear):
        r, held = layer.pack.total_rank, f"{len(layer.pack.names)} adapters, total "
    else:
        r, held = layer.r, ""
    title = (
        f"{name or 'layer'}: {tokens} x {layer.in_features} -> {layer.out_features}, {held}r={r}, "
        f"{str(dtype).removeprefix('torch.')} on {device}"
    )
    if isinstance(layer, FusedLoRALinear) and not layer.adapter_enabled:
        return f"{title}\n  the adapter is disabled: the base's own product"
    if isinstance(layer, FusedLoRALinear) and layer.merged:
        return f"{title}\n  merged: one library product, nothing to fuse"
    if device.type == "meta":
        return f"{title}\n  on the meta device: nothing runs"
    unable = ops.why_not_triton(rows)
    if layer.backend == "triton" and unable is not None:
        return f"{title}\n  backend='triton' cannot run: {unable}"
    backend = ops.resolve(layer.backend, rows, layer.out_features, r)
    drawn = layer.lora_dropout > 0.0 and layer.training
    if backend == "aten":
        if layer.backend == "aten":
            why = "asked for"
        elif unable is not None:
            why = unable.partition(":")[0]
        elif device.type != "cuda":
            why = "auto: there is no GPU"
        else:
            sizes = (tokens, layer.out_features, layer.in_features, r)
            _, why = config.choose_backend(config.device_of(device), 8 * dtype.itemsize, *sizes)
        mask = " and the dropout mask" if drawn else ""
        return f"{title}\n  aten, 3 library products{mask} forward ({why})"
    lines = [title]
    K, N = layer.in_features, layer.out_features
    addressable = all(size * dtype.itemsize % 16 == 0 for size in (K, N))
    for direction, outputs, inputs, masked in (("forward", N, K, False), ("dX", K, N, drawn)):
        plan = config.choose_product(
            config.FORCED,
            config.device_of(device),
            8 * dtype.itemsize,
            tokens,
            outputs,
            inputs,
            r,
            drawn=drawn and not masked,
            masked=masked,
            followed=direction == "dX",
            addressable=addressable,
        )
        lines.append(f"  {direction}: {_describe(plan, r)}")
    return "\n".join(lines)


def _describe(plan: Any, r: int) -> str:
    tiles = ", ".join(f"{k}={v}" for k, v in vars(plan.decode or plan.matmul).items())
    shrink = ""
    if plan.shrink:
        programs = plan.shrink_programs * config.cdiv(r, plan.shrink.block_r(r))
        shrink = f", shrink in {programs} programs"
    plural = "launch" if plan.launches == 1 else "launches"
    memset = " and a memset" if plan.memsets else ""
    return f"triton {plan.path}, {plan.launches} {plural}{memset}{shrink} ({plan.reason}); {tiles}"
