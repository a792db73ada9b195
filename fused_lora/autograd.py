"""`LoRALinearFunction`: what is saved for backward and which gradients are asked for. The work is
done by the two operators of `ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora import ops

Gradients = tuple[Tensor | None, ...]


def differentiable_once(
    gradients: Callable[[Any, tuple[Tensor | None, ...], Tensor], Gradients],
) -> Callable[..., Gradients]:
    """The `backward` of gradients(ctx, saved tensors, dy), dy of the first output; it raises where
    what it returns is differentiated again. torch's `once_differentiable` raises only for a dy that
    requires grad: what the gradients owe to x, A and B would count as nothing, without a word."""

    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> Gradients:
        saved = ctx.saved_tensors
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients(ctx, saved, dy)
        with torch.no_grad():
            grads = gradients(ctx, saved, dy)
        given = [t for t in (dy, *saved) if t is not None and t.requires_grad]
        made = [grad for grad in grads if grad is not None]
        if not given or not made:
            return grads
        refusing = iter(_Refusal.apply(len(made), *made, *given))
        return tuple(None if grad is None else next(refusing) for grad in grads)

    return backward


class _Refusal(torch.autograd.Function):
    """The first `count` tensors, which from now on depend on the others and have no derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # type: ignore[override]
        raise RuntimeError(ops.TWICE)


ANOTHER_BLOCK = (
    "activation checkpointing has computed a forward pass again in another use_adapters block than "
    "it was made in, with that block's adapters: call backward inside the block that made the "
    "forward pass"
)


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + bias + S B^T with S = scaling * D(x) A^T, rows x [M, K]. With `adapters`, the
    tensors of `scale.Adapters`, A and B pack several and S is zero outside of a token's own.
    options: those of `functional.checked_options`; in a tuple, as torch looks at every argument.
    With `unpack`, W = unpack(weight, x's dtype), formed anew in each direction. `block` holds a
    number for the adapters of a use_adapters block: saved, it comes back as activation
    checkpointing has computed it. `whole` returns all that the operator does: y, S and the mask.

    Saved for backward: x (only for dA or dW), the original W, A and B (parameters, never a cast
    copy; a packed W packed), S [M, r] and, with dropout, one bit per element of x. Nothing of
    size M x N.
    Only the gradients that are needed are computed. Differentiable once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        options: tuple[float, Tensor | None, float, Tensor | None, str],
        adapters: Sequence[Tensor],
        unpack: Callable[[Tensor, torch.dtype], Tensor] | None,
        block: Tensor | None,
        whole: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        scaling, scaling_tensor, dropout_p, seed, backend = options
        y, S, *mask = ops.call(
            ops.forward,
            x,
            weight if unpack is None else unpack(weight, x.dtype),
            lora_A,
            lora_B,
            bias,
            scaling,
            scaling_tensor,
            dropout_p,
            seed,
            adapters,
            backend,
            True,
        )
        ctx.save_for_backward(
            x if weight.requires_grad or lora_A.requires_grad else None,
            weight,
            lora_A,
            lora_B,
            S if lora_B.requires_grad else None,
            mask[0] if mask and (x.requires_grad or lora_A.requires_grad) else None,
            scaling_tensor,
            block,
            *adapters,
        )
        ctx.block = None if block is None else block.item()
        ctx.scaling, ctx.dropout_p, ctx.backend, ctx.unpack = scaling, dropout_p, backend, unpack
        ctx.bias_dtype = None if bias is None else bias.dtype
        if not whole:
            return y
        ctx.mark_non_differentiable(S, *mask)
        return y, S, *mask

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor | None, ...], dy: Tensor) -> Gradients:  # type: ignore[override]
        x, weight, lora_A, lora_B, S, mask, scaling_tensor, block, *adapters = saved
        if block is not None and block.item() != ctx.block:
            raise RuntimeError(ANOTHER_BLOCK)
        needs = list(ctx.needs_input_grad[:5])
        computed = ops.call(
            ops.backward,
            dy,
            x,
            weight if ctx.unpack is None else ctx.unpack(weight, dy.dtype),
            lora_A,
            lora_B,
            S,
            mask,
            ctx.scaling,
            scaling_tensor,
            ctx.dropout_p,
            adapters,
            needs,
            ctx.backend,
        )
        remaining = iter(computed)
        grads = [next(remaining) if needed else None for needed in needs]
        if grads[4] is not None:
            grads[4] = grads[4].to(ctx.bias_dtype)
        return *grads, None, None, None, None, None


def _operator(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    adapters: Sequence[Tensor],
    backend: str,
    for_backward: bool,
) -> list[Tensor]:
    options = (scaling, scaling_tensor, dropout_p, seed, backend)
    arguments = (x, weight, lora_A, lora_B, bias, options, adapters, None, None, True)
    outputs = LoRALinearFunction.apply(*arguments)
    return list(outputs if for_backward else outputs[:1])


ops.differentiate(ops.forward, _operator)
