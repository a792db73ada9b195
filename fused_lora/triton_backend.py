"""Forward and backward over the Triton kernels: allocates, plans and launches, once for all calls
of the same facts (`tape.play`). Imported by `ops` alone, and only where triton can be imported."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora import dropout
from fused_lora.kernels import config
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.tape import INTERPRETING, Tape, play
from fused_lora.product import (
    Mask,
    adapted_product,
    adapter_alone,
    bits_of,
    new_mask,
    plan_for,
    precision_of,
    shrink_alone,
)
from fused_lora.scale import Adapters, Scale, padded_rank

__all__ = [
    "INTERPRETING",
    "adapter_gradients",
    "add_adapter",
    "backward",
    "choose_backend",
    "forward",
]


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout_p: float,
    seed: Tensor | None,
    adapters: Adapters | None,
    for_backward: bool,
) -> list[Tensor]:
    """[y [M, N]], and `for_backward` S [M, padded r] and with dropout the packed mask."""
    x = _unit_column_stride(x)
    bias = None if bias is None else bias.contiguous()
    inputs = (x, weight, lora_A, lora_B, bias, scale.tensor, seed, *(adapters or _ONE_ADAPTER))
    options = (config.FORCED, precision_of(x), scale.value, dropout_p, for_backward)
    return play(_forward, inputs, options)


def _forward(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    seed: Tensor | None,
    ids: Tensor | None,
    owner: Tensor | None,
    column_scaling: Tensor | None,
    window: Tensor | None,
    forced: str | config.Product,
    precision: str,
    scale_value: float,
    dropout_p: float,
    for_backward: bool,
) -> list[Tensor]:
    M, K = x.shape
    y = tape.empty((M, weight.shape[0]))
    S = tape.empty((M, padded_rank(lora_A.shape[0]))) if for_backward else None
    mask = new_mask(tape, M, K, dropout_p, seed)
    scale = _scale(scale_value, scale_tensor, dropout_p)
    w, b = weight.t(), lora_B.t()
    pack = _pack(ids, owner, column_scaling, window)
    plan = plan_for(forced, x, w, lora_A, y, draw=mask)
    adapted_product(
        *(tape, plan, x, w, lora_A, b, y, S, scale, pack, precision),
        bias=bias,
        draw=mask,
    )
    if S is None:
        return [y]
    return [y, S] if mask is None else [y, S, mask.bits]


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    scale: Scale,
    dropout_p: float,
    adapters: Adapters | None,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor | None]:
    """[dX [M, K], dA [r, K], dB [N, r]], None for those that are not needed. Without a weight dX is
    that of the adapter term alone."""
    dy = _unit_column_stride(dy)
    x = _unit_column_stride(x) if needs_A and x is not None else None
    S = _unit_column_stride(S) if needs_B and S is not None else None
    mask_bits = None if mask_bits is None else _readable_in_words(mask_bits)
    inputs = (
        *(dy, x, weight, lora_A, lora_B, S, mask_bits, scale.tensor),
        *(adapters or _ONE_ADAPTER),
    )
    options = (
        *(config.FORCED, precision_of(dy), scale.value, dropout_p),
        *(needs_x, needs_A, needs_B),
    )
    return play(_backward, inputs, options)


def _backward(
    tape: Tape,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    scale_tensor: Tensor | None,
    ids: Tensor | None,
    owner: Tensor | None,
    column_scaling: Tensor | None,
    window: Tensor | None,
    forced: str | config.Product,
    precision: str,
    scale_value: float,
    dropout_p: float,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor | None]:
    M = dy.shape[0]
    N, (r, K) = lora_B.shape[0], lora_A.shape
    device = config.device_of(dy.device)
    scale = _scale(scale_value, scale_tensor, dropout_p)
    mask = None if mask_bits is None else Mask(mask_bits, dropout_p)
    a = lora_B.t()
    pack = _pack(ids, owner, column_scaling, window)
    apart = weight is None and needs_x
    dS = tape.empty((M, padded_rank(r))) if needs_A or apart else None
    dx = tape.empty((M, K)) if needs_x else None
    # allocated before dX is launched: nothing that dX uses and lets go may become theirs
    dA = tape.empty(lora_A.shape, lora_A.dtype) if needs_A else None
    dB = tape.empty(lora_B.shape, lora_B.dtype) if needs_B else None
    plan = None
    if dx is not None and weight is not None:
        plan = plan_for(forced, dy, weight, a, dx, masked=mask, followed=needs_A or needs_B)
    shrinks = plan.launches == 2 if plan is not None else dS is not None

    partial = counters = None
    if needs_A or needs_B:
        masked = mask is not None and needs_A
        tiles = config.rank_grad_tiles(plan, device, bits_of(dy), masked)
        counts = tile_counts(K, N, r, tiles, needs_A, needs_B)
        splits = config.rank_grad_splits(device, sum(counts[:2]) * counts[2], M, tiles)
        if splits > 1:
            partial = tape.empty((partial_elements(counts, splits, r, tiles),), torch.float32)
            # zeroed by shrink where one runs anyway
            slots = (sum(counts[:2]) * counts[2],)
            counters = tape.empty(slots, torch.int32, zeroed=not shrinks)

    if plan is not None:
        assert weight is not None and dx is not None
        adapted_product(
            *(tape, plan, dy, weight, a, lora_A, dx, dS, scale, pack, precision),
            masked=mask,
            counters=counters if shrinks else None,
        )
    elif dS is not None:
        shrink_alone(dy, a, dS, scale, pack, precision, counters=counters)
    if apart:
        assert dx is not None and dS is not None
        adapter_alone(dy, lora_A, dx, dS, pack, precision, masked=mask)

    if needs_A or needs_B:
        rank_grad(
            tiles,
            splits,
            M,
            r,
            x=x,
            dS=dS if needs_A else None,
            dA=dA,
            dY=dy if needs_B else None,
            S=S,
            dB=dB,
            mask=mask.bits if mask is not None and needs_A else None,
            partial=partial,
            counters=counters,
            adapters=pack,
            behind=config.rank_grad_behind(plan),
            input_precision=precision,
        )
    return [dx, dA, dB]


def add_adapter(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Scale,
    dropout_p: float,
    seed: Tensor | None,
    adapters: Adapters | None,
    for_backward: bool,
) -> list[Tensor]:
    """y += S B^T in place, S = scale * D(x) A^T: the product by the library, which reads and writes
    y once. Returns what `forward` returns beside y."""
    x = _unit_column_stride(x)
    inputs = (x, lora_A, scale.tensor, seed, *(adapters or _ONE_ADAPTER))
    kept = play(_term, inputs, (precision_of(x), scale.value, dropout_p))
    y.addmm_(kept[0][:, : lora_A.shape[0]], lora_B.to(y.dtype).t())
    return kept if for_backward else []


def _term(
    tape: Tape,
    x: Tensor,
    lora_A: Tensor,
    scale_tensor: Tensor | None,
    seed: Tensor | None,
    ids: Tensor | None,
    owner: Tensor | None,
    column_scaling: Tensor | None,
    window: Tensor | None,
    precision: str,
    scale_value: float,
    dropout_p: float,
) -> list[Tensor]:
    """[S [M, padded r]] and with dropout the packed mask."""
    M, K = x.shape
    S = tape.empty((M, padded_rank(lora_A.shape[0])))
    pack = _pack(ids, owner, column_scaling, window)
    mask = new_mask(tape, M, K, dropout_p, seed)
    scale = _scale(scale_value, scale_tensor, dropout_p)
    shrink_alone(x, lora_A, S, scale, pack, precision, draw=mask)
    return [S] if mask is None else [S, mask.bits]


def adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    scale: Scale,
    dropout_p: float,
    adapters: Adapters | None,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor | None]:
    """[dX, dA, dB] of the adapter term alone, None for those that are not needed."""
    return backward(
        *(dy, x, None, lora_A, lora_B, S, mask_bits, scale, dropout_p, adapters),
        *(needs_x, needs_A, needs_B),
    )


_ONE_ADAPTER = (None, None, None, None)


def _pack(*tables: Tensor | None) -> Adapters | None:
    """The tables of a pack from the inputs of a tape, None if there is one adapter."""
    given = [table for table in tables if table is not None]
    return Adapters(*given) if given else None


def _scale(value: float, tensor: Tensor | None, dropout_p: float) -> Scale:
    """What S and dS carry: the scaling, and 1 / (1 - p) of what dropout keeps."""
    return Scale(value * dropout.keep_scale(dropout_p), tensor)


def choose_backend(x: Tensor, N: int, r: int) -> str:
    """ "triton" or "aten" for a layer input x [M, K] on a GPU, with N outputs and rank r."""
    device = config.device_of(x.device)
    return config.choose_backend(device, bits_of(x), x.shape[0], N, x.shape[1], r)[0]


def _readable_in_words(bits: Tensor) -> Tensor:
    """The mask itself unless a hook on saved tensors has laid it out anew, so that its rows do not
    begin at 32-bit words: then a copy."""
    if bits.stride(1) == 1 and bits.stride(0) % 4 == 0 and bits.data_ptr() % 4 == 0:
        return bits
    return bits.clone(memory_format=torch.contiguous_format)


def _unit_column_stride(x: Tensor) -> Tensor:
    """x itself unless its columns are strided (an expanded gradient, a transpose): then a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
