"""Forward and backward over the Triton kernels: allocates, asks `kernels.config`, launches.
Imported by `ops` alone, and only where triton can be imported.

Forward and dX are one computation, Y = X W + (scale * D(X) A^T) B, with other operands:
y takes (x, weight^T, lora_A, lora_B^T), dX takes (dY, weight, lora_B^T, lora_A).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora import dropout
from fused_lora.kernels import config
from fused_lora.kernels.decode import decode, workspace
from fused_lora.kernels.launch import INTERPRETING, describable
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.kernels.matmul_producer import producer_matmul
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.shrink import shrink
from fused_lora.scale import Scale, padded_rank

__all__ = ["INTERPRETING", "backward", "choose_backend", "forward", "plan_product"]


class Mask(NamedTuple):
    """Dropout of one call: bits uint8 [M, ceil(K / 8)], drawn by shrink from `seed` in forward."""

    bits: Tensor
    p: float
    seed: Tensor | None = None

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.p)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout_p: float,
    seed: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y [M, N], S [M, padded r] or None, packed mask or None)."""
    x = _unit_column_stride(x)
    M, K = x.shape
    y = x.new_empty((M, weight.shape[0]))
    S = x.new_empty((M, padded_rank(lora_A.shape[0]))) if for_backward else None
    mask = None
    if dropout_p > 0.0:
        bits = x.new_empty((M, dropout.packed_columns(K)), dtype=torch.uint8)
        mask = Mask(bits, dropout_p, seed)
    _adapted_product(x, weight.t(), lora_A, lora_B.t(), y, S, scale, bias=bias, draw=mask)
    return y, S, None if mask is None else mask.bits


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    scale: Scale,
    dropout_p: float,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX [M, K], dA [r, K], dB [N, r]), None for those that are not needed."""
    dy = _unit_column_stride(dy)
    M = dy.shape[0]
    N, K = weight.shape
    r = lora_A.shape[0]
    device = _device(dy.device)
    mask = None if mask_bits is None else Mask(mask_bits, dropout_p)
    dS = dy.new_empty((M, padded_rank(r))) if needs_A else None
    dx = dy.new_empty((M, K)) if needs_x else None

    partial = counters = None
    if needs_A or needs_B:
        tiles = config.select("rank_grad", device, _bits(dy), M, N, K, r)
        counts = tile_counts(K, N, r, tiles, needs_A, needs_B)
        splits = config.rank_grad_splits(device, sum(counts[:2]) * counts[2], M, tiles)
        if splits > 1:
            elements = partial_elements(counts, splits, r, tiles)
            partial = dy.new_empty(elements, dtype=torch.float32)
            counters = dy.new_empty(sum(counts[:2]) * counts[2], dtype=torch.int32)

    if dx is not None:
        _adapted_product(
            dy, weight, lora_B.t(), lora_A, dx, dS, scale, masked=mask, counters=counters
        )
    elif dS is not None:
        _shrink_only(dy, lora_B.t(), dS, scale, counters)
    elif counters is not None:
        counters.zero_()

    dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if needs_A else None
    dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs_B else None
    if needs_A or needs_B:
        rank_grad(
            tiles,
            splits,
            M,
            r,
            x=None if x is None or not needs_A else _unit_column_stride(x),
            dS=dS,
            dA=dA,
            dY=dy if needs_B else None,
            S=S if needs_B else None,
            dB=dB,
            mask=mask.bits if mask is not None and needs_A else None,
            keep_scale=1.0 if mask is None else mask.keep_scale,
            partial=partial,
            counters=counters,
            input_precision=_precision(dy),
        )
    return dx, dA, dB


def choose_backend(x: Tensor, N: int, r: int) -> str:
    """ "triton" or "aten" for a layer input x [M, K] with N outputs and rank r."""
    return config.choose_backend(_device(x.device), _bits(x), x.shape[0], N, x.shape[1], r)


def plan_product(
    device: torch.device,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    r: int,
    *,
    drawn: bool,
    masked: bool,
    addressable: bool,
    adapter_addressable: bool,
) -> config.Product:
    """How Y [M, N] = X [M, K] W + S B runs. drawn: X is dropped before the adapter; masked: the
    adapter term is masked; addressable: X, W and Y by tensor descriptors, as is the adapter."""
    return config.choose_product(
        _device(device),
        8 * dtype.itemsize,
        M,
        N,
        K,
        r,
        dropout=drawn,
        masked_output=masked,
        describable=addressable,
        adapter_describable=adapter_addressable,
    )


def _adapted_product(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    S: Tensor | None,
    scale: Scale,
    *,
    bias: Tensor | None = None,
    draw: Mask | None = None,
    masked: Mask | None = None,
    counters: Tensor | None = None,
) -> None:
    """y = x w + mask * (S b) + bias, S = scale * D(x) a^T stored when a buffer is given.

    x [M, K], w [K, N], a [r, K], b [r, N], y [M, N]. `draw` drops x before a, `masked` masks the
    adapter term; `counters` are zero afterwards.
    """
    M, K = x.shape
    N, r = w.shape[1], a.shape[0]
    transposed = w.stride(1) != 1
    addressable = describable(x) and describable(y) and 1 in w.stride()
    stored_w = _stored(w, transposed)
    if w.dtype == x.dtype:
        addressable = addressable and describable(stored_w)
    else:  # autocast: the copy that is made of it has rows of exactly its width
        addressable = addressable and stored_w.shape[1] * x.element_size() % 16 == 0
    adapter = a if transposed else a.t()  # as the descriptor kernels read it
    plan = plan_product(
        x.device,
        x.dtype,
        M,
        N,
        K,
        r,
        drawn=draw is not None,
        masked=masked is not None,
        addressable=addressable,
        adapter_addressable=a.dtype == x.dtype and describable(adapter),
    )
    precision = _precision(x)
    if plan.launches == 1 and counters is not None:
        counters.zero_()
    if plan.path == "decode":
        assert plan.decode is not None
        sizes = workspace(M, N, r, plan.decode)
        split = plan.decode.SPLITS > 1
        decode(
            x,
            w,
            a,
            b,
            y,
            plan.decode,
            bias=bias,
            S=S,
            scale=scale.value,
            scaling=scale.tensor,
            partial=x.new_empty(sizes[0], dtype=torch.float32) if split else None,
            partial_s=x.new_empty(sizes[1], dtype=torch.float32) if split else None,
            counters=x.new_zeros(sizes[2], dtype=torch.int32) if split else None,
            input_precision=precision,
        )
        return
    assert plan.matmul is not None
    if plan.path == "single":
        matmul(
            x,
            w,
            y,
            plan.matmul,
            a=a,
            b=b,
            S=S,
            bias=bias,
            scale=scale.value,
            scaling=scale.tensor,
            single=True,
            input_precision=precision,
        )
        return

    if S is None:
        S = x.new_empty((M, padded_rank(r)))
    programs = _device(x.device).sm_count
    if plan.path == "producer":
        flags = x.new_zeros(-(-M // plan.matmul.BLOCK_M), dtype=torch.int32)
        if INTERPRETING:  # programs run one after the other there: one may wait for another
            programs = 1
        producer_matmul(
            x,
            w.to(x.dtype),
            a,
            b,
            y,
            S,
            flags,
            plan.matmul,
            programs,
            bias=bias,
            scale=scale.value,
            scaling=scale.tensor,
        )
        return

    assert plan.shrink is not None
    source = packed = None
    descriptors = plan.path in ("pdl", "gluon", "serial")
    pdl = plan.path in ("pdl", "gluon")
    if descriptors:
        # all segments of the loop have one dtype and rows that TMA can address
        w = w.to(x.dtype)  # under autocast a copy, for the length of this call
        stored = _stored(b, transposed)
        if stored.dtype != x.dtype or not describable(stored):
            source = stored
            packed = x.new_empty((stored.shape[0], padded_rank(stored.shape[1])))
            stored = packed
        b = _stored(stored, transposed)
    shrink(
        x,
        a,
        S,
        plan.shrink,
        plan.shrink_programs,
        scale=scale.value * (1.0 if draw is None else draw.keep_scale),
        scaling=scale.tensor,
        seed=None if draw is None else draw.seed,
        threshold=0 if draw is None else dropout.threshold(draw.p),
        mask=None if draw is None else draw.bits,
        source=source,
        packed=packed,
        counters=counters,
        trigger=pdl,
        input_precision=precision,
    )
    if descriptors:
        run: Callable[..., None] = descriptor_matmul
        if plan.path == "gluon":  # an experimental interface of Triton: imported where it is used
            from fused_lora.kernels.matmul_gluon import gluon_matmul

            run = gluon_matmul
        run(x, w, y, plan.matmul, programs, b=b, S=S, bias=bias, pdl=pdl)
        return
    matmul(
        x,
        w,
        y,
        plan.matmul,
        b=b,
        S=S,
        bias=bias,
        mask=None if masked is None else masked.bits,
        keep_scale=1.0 if masked is None else masked.keep_scale,
        input_precision=precision,
    )


def _shrink_only(x: Tensor, a: Tensor, S: Tensor, scale: Scale, counters: Tensor | None) -> None:
    """S = scale * x a^T with no product behind it; zeroes the counters."""
    device = _device(x.device)
    M, K = x.shape
    tiles = config.select("shrink", device, _bits(x), M, K, K, a.shape[0])
    shrink(
        x,
        a,
        S,
        tiles,
        min(device.sm_count, -(-M // tiles.BLOCK_M)),
        scale=scale.value,
        scaling=scale.tensor,
        counters=counters,
        input_precision=_precision(x),
    )


def _device(device: torch.device) -> config.Device:
    return config.device_of(device.index if device.type == "cuda" else None)


def _stored(matrix: Tensor, transposed: bool) -> Tensor:
    """The row-major matrix behind a view that may be its transpose, and the way back."""
    return matrix.t() if transposed else matrix


def _bits(x: Tensor) -> int:
    return 8 * x.element_size()


def _precision(x: Tensor) -> str:
    """How fp32 operands are multiplied: torch's own setting for its fp32 matrix products."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def _unit_column_stride(x: Tensor) -> Tensor:
    """x itself unless its columns are strided (an expanded gradient, a transpose): then a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
