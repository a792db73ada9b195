"""`lora_delta`: adds the adapter term to the output of a base layer that computes itself (because
it is quantised, hooked or of another class), without a temporary of the output's size.

out = base_output + scaling * (D(x) A^T) B^T. S = scaling * D(x) A^T is formed as in `lora_linear`,
with the same dropout mask for the same seed; one library product then reads and writes the output.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from fused_lora import dropout, ops
from fused_lora.autograd import Gradients, differentiable_once
from fused_lora.functional import (
    check_kinds,
    checked_options,
    is_tracked,
    require_seen_through,
)
from fused_lora.scale import Scale, padded_rank


def lora_delta(
    base_output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    in_place: bool = False,
) -> Tensor:
    """`base_output + scaling * (D(x) A^T) B^T`, computed in base_output's dtype.

    Args:
        base_output: [..., N], what the base layer returned for x; fp32, fp16, bf16, fp64 (aten).
        x: [..., K], of the same leading dimensions; any of these dtypes, cast to base_output's.
        lora_A: [r, K]; lora_B: [N, r]. Any of these dtypes; gradients come back in it.
        scaling, dropout_p, seed, backend: as in `fused_lora.lora_linear`.
        in_place: write into base_output and return it. Only for an output that nobody else holds:
            not x, not a view, not a leaf that requires grad, not saved by the base's own backward
            (torch raises in backward if it was).

    Returns:
        [..., N] in base_output's dtype: base_output itself if `in_place`.

    Raises:
        TypeError: a tensor is of another dtype, a DTensor or nested.
        ValueError: shapes or devices do not fit, an option is out of range, in_place is asked for
            on x's own storage, a view or a leaf that requires grad.
        RuntimeError: backend="triton" cannot run here; the message says why.
    """
    _check(base_output, x, lora_A, lora_B)
    problem = _why_not_writable(base_output) if in_place else None
    if in_place and problem is None and torch._C._is_alias_of(base_output, x):  # type: ignore[attr-defined]
        problem = "shares its storage with x, which backward needs"
    if problem is not None:
        raise ValueError(f"base_output {problem}, in_place=True cannot write to it: pass False")
    if not torch.compiler.is_compiling():
        require_seen_through(recorded=True)
    options = checked_options(base_output, scaling, dropout_p, seed, backend)
    rows = x.to(base_output.dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])  # [M, K]
    if ops.exporting():  # which calls whatever a Function does a constant
        return delta(base_output, rows, lora_A, lora_B, *options, False)[0]
    tensors = (base_output, rows, lora_A, lora_B)
    wanted = any(tensor.requires_grad for tensor in tensors)
    untracked = wanted and not any(map(is_tracked, tensors))  # made in inference mode
    with torch.no_grad() if untracked else _AS_IT_IS:
        return _LoRADelta.apply(*tensors, *options, in_place, False)


_AS_IT_IS = contextlib.nullcontext()


class _LoRADelta(torch.autograd.Function):
    """out = base_output + S B^T with S = scaling * D(x) A^T, rows x [M, K].

    Saved for backward: x (only for dA), A and B as they are, S [M, r] and, with dropout, one bit
    per element of x; never base_output. Its gradient is out's own. Differentiable once. `whole`
    returns all that the operator does: out, S and the mask.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base_output: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        scaling_tensor: Tensor | None,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
        in_place: bool,
        whole: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        needs_A, needs_B = ctx.needs_input_grad[2:4]
        for_backward = whole or any(ctx.needs_input_grad[1:4])
        options = (scaling, scaling_tensor, dropout_p, seed, backend, for_backward)
        if in_place:
            S, mask = ops.call(delta_, base_output, x, lora_A, lora_B, *options)
            ctx.mark_dirty(base_output)
            out = base_output
        else:
            out, S, mask = ops.call(delta, base_output, x, lora_A, lora_B, *options)
        ctx.save_for_backward(
            x if needs_A else None,
            lora_A,
            lora_B,
            S if needs_B else None,
            mask if dropout_p > 0.0 else None,
            scaling_tensor,
        )
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        if not whole:
            return out
        ctx.mark_non_differentiable(S, mask)
        return out, S, mask

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Tensor | None, ...], dy: Tensor) -> Gradients:  # type: ignore[override]
        x, lora_A, lora_B, S, mask, scaling_tensor = saved
        needs = list(ctx.needs_input_grad[1:4])
        grads: list[Tensor | None] = [None, None, None]
        if any(needs):
            computed = iter(
                ops.call(
                    delta_backward,
                    dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1]),
                    x,
                    lora_A,
                    lora_B,
                    S,
                    mask,
                    ctx.scaling,
                    scaling_tensor,
                    ctx.dropout_p,
                    needs,
                    ctx.backend,
                )
            )
            grads = [next(computed) if needed else None for needed in needs]
        return dy, *grads, None, None, None, None, None, None, None


_TERM = (
    "Tensor x, Tensor lora_A, Tensor lora_B, float scaling, Tensor? scaling_tensor, "
    "float dropout_p, Tensor? seed, str backend, bool for_backward"
)
delta = ops.define(f"delta(Tensor base_output, {_TERM}) -> (Tensor, Tensor, Tensor)")
delta_ = ops.define(f"delta_(Tensor(a!) base_output, {_TERM}) -> (Tensor, Tensor)")
delta_backward = ops.define(
    "delta_backward(Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? S, Tensor? mask, "
    "float scaling, Tensor? scaling_tensor, float dropout_p, bool[3] needs, str backend) "
    "-> Tensor[]"
)


def _delta(base_output: Tensor, x: Tensor, *term: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = base_output.clone(memory_format=torch.contiguous_format)
    return out, *_delta_(out, x, *term)


def _delta_(
    out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Adds to `out` [..., N]; returns (S [M, padded r], packed mask), empty unless needed."""
    rows = out if out.dim() == 2 else out.view(math.prod(out.shape[:-1]), out.shape[-1])
    N, r = lora_B.shape
    backend_module = ops.backend_of(backend, x, N, r, lora_B)
    with ops.as_given(x):
        kept = backend_module.add_adapter(
            *(rows, x, lora_A, lora_B, Scale(scaling, scaling_tensor), dropout_p, seed),
            *(None, for_backward),
        )
    S = kept[0] if kept else x.new_empty((0, 0))
    return S, kept[1] if len(kept) > 1 else x.new_empty((0, 0), dtype=torch.uint8)


def _delta_fake(base_output, x, *term):
    out = base_output.new_empty(base_output.shape)
    return out, *_delta_in_place_fake(base_output, x, *term)


def _delta_in_place_fake(
    base_output,
    x,
    lora_A,
    lora_B,
    scaling,
    scaling_tensor,
    dropout_p,
    seed,
    backend,
    for_backward,
):
    M, K = x.shape
    S_shape = (M, padded_rank(lora_A.shape[0])) if for_backward else (0, 0)
    masked = for_backward and dropout_p > 0.0
    mask_shape = (M, dropout.packed_columns(K)) if masked else (0, 0)
    return x.new_empty(S_shape), x.new_empty(mask_shape, dtype=torch.uint8)


def _delta_backward(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Of [dx, dlora_A, dlora_B] those that `needs` asks for, in this order."""
    r, K = lora_A.shape
    backend_module = ops.backend_of(backend, dy, K, r, lora_A)
    with ops.as_given(dy):
        grads = backend_module.adapter_gradients(
            *(dy, x, lora_A, lora_B, S, mask, Scale(scaling, scaling_tensor), dropout_p),
            *(None, *needs),
        )
    return [grad for grad in grads if grad is not None]


def _delta_backward_fake(
    dy, x, lora_A, lora_B, S, mask, scaling, scaling_tensor, dropout_p, needs, backend
):
    shapes = ((dy.shape[0], lora_A.shape[1]), lora_A.shape, lora_B.shape)
    dtypes = (dy.dtype, lora_A.dtype, lora_B.dtype)
    return [
        dy.new_empty(shape, dtype=dtype)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
        if needed
    ]


def _operator(
    base_output: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (scaling, scaling_tensor, dropout_p, seed, backend)
    out, S, mask = _LoRADelta.apply(base_output, x, lora_A, lora_B, *options, False, True)
    return (out, S, mask) if for_backward else (out, S.new_empty(0, 0), mask.new_empty(0, 0))


ops.register(delta, _delta, _delta_fake)
ops.register(delta_, _delta_, _delta_in_place_fake)
ops.register(delta_backward, _delta_backward, _delta_backward_fake)
ops.differentiate(delta, _operator)


@register_flop_formula((torch.ops.fused_lora.delta, torch.ops.fused_lora.delta_))
def _flops(
    base_output: Sequence[int], x: Sequence[int], lora_A: Sequence[int], *_: Any, **__: Any
) -> int:
    (M, K), N, r = x, base_output[-1], lora_A[0]
    return 2 * M * r * (K + N)


@register_flop_formula(torch.ops.fused_lora.delta_backward)
def _backward_flops(dy: Sequence[int], x: Any, lora_A: Sequence[int], *rest: Any, **_: Any) -> int:
    (M, N), (r, K) = dy, lora_A
    needs_x, needs_A, needs_B = rest[6]
    return 2 * M * r * (N * (needs_x or needs_A) + K * (needs_x + needs_A) + N * needs_B)


def _check(base_output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    named = ((base_output, "base_output"), (x, "x"), (lora_A, "lora_A"), (lora_B, "lora_B"))
    check_kinds(named)
    shapes = {name: tuple(tensor.shape) for tensor, name in named}
    fit = (
        lora_A.dim() == lora_B.dim() == 2
        and lora_A.shape[0] == lora_B.shape[1] > 0
        and x.dim() > 0
        and base_output.shape == (*x.shape[:-1], lora_B.shape[0])
        and x.shape[-1] == lora_A.shape[1]
    )
    if not fit:
        raise ValueError(
            "expected base_output [..., N], x [..., K] with the same leading dimensions, lora_A "
            f"[r, K], lora_B [N, r] with r >= 1: got {shapes}"
        )


def may_write(base: nn.Module, out: Tensor) -> bool:
    """Whether the adapter term may be added in place to what `base`, a layer whose outputs are
    fresh, has just returned: no hook has seen it, nobody else can hold it."""
    return not torch.compiler.is_compiling() and not hooked(base) and _why_not_writable(out) is None


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # replaced on the instance, as accelerate does
    )


def _why_not_writable(out: Tensor) -> str | None:
    if out._is_view():
        return "is a view of another tensor"
    if out.is_leaf and out.requires_grad:
        return "is a leaf that requires grad"
    return None if out.is_contiguous() else "is not contiguous"
