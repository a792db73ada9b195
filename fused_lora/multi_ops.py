"""The operators `fused_lora::multi_forward` and `fused_lora::multi_backward`, and the autograd
Function over them: what `ops` and `autograd` are, with an adapter id per token.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused_lora import aten_backend, ops
from fused_lora.scale import Adapters, Scale

if ops.triton_backend is not None:
    from fused_lora import multi_backend

CHECK_IDS = os.environ.get("FUSED_LORA_CHECK_IDS") == "1"
"""Whether ids are checked on a GPU, too: a debugging aid, for it waits for the GPU at every call.
Unchecked, an id that no adapter has means the base alone. On a CPU ids are always checked."""

_UNSCALED = Scale(1.0, None)  # every column has a scaling of its own

_library = torch.library.Library("fused_lora", "FRAGMENT")
_library.define(
    "multi_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, "
    "Tensor ids, Tensor owner, Tensor scaling, Tensor window, float dropout_p, Tensor? seed, "
    "str backend, bool for_backward) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "multi_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor ids, "
    "Tensor owner, Tensor scaling, Tensor window, Tensor? S, Tensor? mask, float dropout_p, "
    "bool[5] needs, str backend) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
forward = torch.ops.fused_lora.multi_forward.default
backward = torch.ops.fused_lora.multi_backward.default


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    owner: Tensor,
    scaling: Tensor,
    window: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [M, N], S [M, r], packed mask [M, ceil(K / 8)]), the latter two empty as in `ops`."""
    if not ids.is_cuda or (CHECK_IDS and not torch.cuda.is_current_stream_capturing()):
        _check_ids(ids, window)
    adapters = Adapters(ids, owner, scaling, window)
    with ops._as_given(x):
        if _runs_triton(backend, x, weight.shape[0], weight, lora_A):
            y, S, mask = multi_backend.forward(
                x, weight, lora_A, lora_B, bias, adapters, dropout_p, seed, for_backward
            )
        else:
            y, S, mask = aten_backend.forward(
                *(x, weight, lora_A, lora_B, bias, _UNSCALED),
                *(dropout_p, seed, for_backward, adapters),
            )
    if not for_backward or S is None:
        S = x.new_empty((0, 0))
    if not for_backward or mask is None:
        mask = x.new_empty((0, 0), dtype=torch.uint8)
    return y, S, mask


def _forward_fake(
    x,
    weight,
    lora_A,
    lora_B,
    bias,
    ids,
    owner,
    scaling,
    window,
    dropout_p,
    seed,
    backend,
    for_backward,
):
    return ops._forward_fake(
        x, weight, lora_A, lora_B, bias, 1.0, None, dropout_p, seed, backend, for_backward
    )


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    ids: Tensor,
    owner: Tensor,
    scaling: Tensor,
    window: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    dropout_p: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Of [dx, dweight, dlora_A, dlora_B, dbias] those that `needs` asks for, in this order."""
    needs_x, needs_weight, needs_A, needs_B, needs_bias = needs
    adapters = Adapters(ids, owner, scaling, window)
    with ops._as_given(dy):
        wanted = (dropout_p, needs_x, needs_A, needs_B)
        if _runs_triton(backend, dy, weight.shape[1], weight, lora_A):
            dx, dA, dB = multi_backend.backward(
                dy, x, weight, lora_A, lora_B, S, mask, adapters, *wanted
            )
        else:
            dx, dA, dB = aten_backend.backward(
                dy, x, weight, lora_A, lora_B, S, mask, _UNSCALED, *wanted, adapters
            )
        dweight = (dy.t() @ x).to(weight.dtype) if needs_weight and x is not None else None
        dbias = dy.sum(0) if needs_bias else None
    return [grad for grad in (dx, dweight, dA, dB, dbias) if grad is not None]


def _backward_fake(
    dy,
    x,
    weight,
    lora_A,
    lora_B,
    ids,
    owner,
    scaling,
    window,
    S,
    mask,
    dropout_p,
    needs,
    backend,
):
    return ops._backward_fake(
        dy, x, weight, lora_A, lora_B, S, mask, 1.0, None, dropout_p, needs, backend
    )


for _key in ("CPU", "CUDA"):
    _library.impl("multi_forward", _forward, _key)
    _library.impl("multi_backward", _backward, _key)
torch.library.register_fake("fused_lora::multi_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_lora::multi_backward", _backward_fake, lib=_library)


def _runs_triton(backend: str, x: Tensor, N: int, weight: Tensor, lora_A: Tensor) -> bool:
    """Whether the kernels compute this call. Empty products have nothing to launch."""
    chosen = ops.resolve(backend, x, N, lora_A.shape[0])
    return chosen == "triton" and x.numel() > 0 and weight.numel() > 0


def _check_ids(ids: Tensor, window: Tensor) -> None:
    held = window[:, 1] > 0
    wrong = (ids < -1) | (ids >= len(held))
    wrong |= ~held[ids.clamp(0, len(held) - 1)] & (ids != -1)
    if wrong.any():
        raise ValueError(
            f"adapter_ids holds {ids[wrong][0].item()}, expected -1 (base only) or the id of an "
            f"adapter in the pack: one of {held.nonzero().flatten().tolist()} (pack.id(name))"
        )


class MultiLoRAFunction(torch.autograd.Function):
    """y = x W^T + bias + S B^T with S = scaling * D(x) A^T in the columns of each token's adapter.

    Saved for backward and computed are as in `autograd.LoRALinearFunction`, and the pack's tables.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        owner: Tensor,
        scaling: Tensor,
        window: Tensor,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        tables = (ids, owner, scaling, window)
        y, S, mask = forward(
            x, weight, lora_A, lora_B, bias, *tables, dropout_p, seed, backend, True
        )
        needs_weight, needs_A, needs_B = ctx.needs_input_grad[1:4]
        ctx.save_for_backward(
            x if needs_weight or needs_A else None,
            weight,
            lora_A,
            lora_B,
            *tables,
            S if needs_B else None,
            mask if dropout_p > 0.0 else None,
        )
        ctx.dropout_p, ctx.backend = dropout_p, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = list(ctx.needs_input_grad[:5])
        computed = backward(dy, *ctx.saved_tensors, ctx.dropout_p, needs, ctx.backend)
        remaining = iter(computed)
        grads = [next(remaining) if needed else None for needed in needs]
        if grads[4] is not None:
            grads[4] = grads[4].to(ctx.bias_dtype)
        return *grads, *(None,) * 7
