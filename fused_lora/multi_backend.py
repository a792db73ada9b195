"""Several adapters over the Triton kernels: the forward and backward of `triton_backend` for a pack
of adapters and an id per token. Imported by `multi_ops` alone, and only where triton can be.

The kernels are the same. Those that form S or dS are told whose each token and each column is;
the matmul is told so only above a total rank of `kernels.adapters.WINDOW_RANK`, to skip columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora import dropout, triton_backend
from fused_lora.kernels import config
from fused_lora.kernels.decode import decode, workspace
from fused_lora.kernels.launch import describable
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.shrink import shrink
from fused_lora.scale import Adapters, padded_rank
from fused_lora.triton_backend import Mask, _bits, _device, _precision, _unit_column_stride


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    adapters: Adapters,
    dropout_p: float,
    seed: Tensor | None,
    for_backward: bool,
) -> list[Tensor]:
    """[y [M, N]], and `for_backward` S [M, r] and with dropout the packed mask."""
    x = _unit_column_stride(x)
    M, K = x.shape
    y = x.new_empty((M, weight.shape[0]))
    S = x.new_empty((M, padded_rank(lora_A.shape[0]))) if for_backward else None
    mask = None
    if dropout_p > 0.0:
        bits = x.new_empty((M, dropout.packed_columns(K)), dtype=torch.uint8)
        mask = Mask(bits, dropout_p, seed)
    _product(x, weight.t(), lora_A, lora_B.t(), y, S, adapters, bias=bias, draw=mask)
    if S is None:
        return [y]
    return [y, S] if mask is None else [y, S, mask.bits]


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    adapters: Adapters,
    dropout_p: float,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX [M, K], dA [r, K], dB [N, r]), None for those that are not needed."""
    dy = _unit_column_stride(dy)
    M, (N, K), r = dy.shape[0], weight.shape, lora_A.shape[0]
    mask = None if mask_bits is None else Mask(mask_bits, dropout_p)
    dS = dy.new_empty((M, padded_rank(r))) if needs_A else None
    dx = dy.new_empty((M, K)) if needs_x else None

    partial = counters = None
    if needs_A or needs_B:
        device = _device(dy.device)
        tiles = config.select("rank_grad", device, _bits(dy), M, N, K, r)
        counts = tile_counts(K, N, r, tiles, needs_A, needs_B)
        count = sum(counts[:2]) * counts[2]
        splits = config.rank_grad_splits(device, count, M, tiles)
        if splits > 1:
            elements = partial_elements(counts, splits, r, tiles)
            partial = dy.new_empty(elements, dtype=torch.float32)
            counters = dy.new_empty(count, dtype=torch.int32)

    if dx is not None:
        _product(dy, weight, lora_B.t(), lora_A, dx, dS, adapters, masked=mask, counters=counters)
    elif dS is not None:
        _shrink_only(dy, lora_B.t(), dS, adapters, counters)
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
            adapters=adapters,
            input_precision=_precision(dy),
        )
    return dx, dA, dB


def _product(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    S: Tensor | None,
    adapters: Adapters,
    *,
    bias: Tensor | None = None,
    draw: Mask | None = None,
    masked: Mask | None = None,
    counters: Tensor | None = None,
) -> None:
    """y = x w + mask * (S b) + bias with S = scaling * D(x) a^T in the columns of each token's own
    adapter, stored when a buffer is given; operands as in `triton_backend`."""
    M, N, r = x.shape[0], w.shape[1], a.shape[0]
    stored_w, transposed = (w.t(), True) if w.stride(1) != 1 else (w, False)
    addressable = describable(x) and describable(y) and 1 in w.stride()
    if w.dtype == x.dtype:
        addressable = addressable and describable(stored_w)
    else:  # autocast: the copy that is made of it has rows of exactly its width
        addressable = addressable and stored_w.shape[1] * x.element_size() % 16 == 0
    plan = triton_backend.plan_product(
        x.device,
        x.dtype,
        M,
        N,
        x.shape[1],
        r,
        drawn=draw is not None,
        masked=masked is not None,
        addressable=addressable,
        adapter_addressable=False,  # the producer kernel does not look at ids
    )
    precision = _precision(x)
    if plan.launches == 1 and counters is not None:
        counters.zero_()
    if plan.path == "decode":
        assert plan.decode is not None
        sizes = workspace(M, N, r, plan.decode)
        split = plan.decode.SPLITS > 1
        decode(
            *(x, w, a, b, y, plan.decode),
            bias=bias,
            S=S,
            partial=x.new_empty(sizes[0], dtype=torch.float32) if split else None,
            partial_s=x.new_empty(sizes[1], dtype=torch.float32) if split else None,
            counters=x.new_zeros(sizes[2], dtype=torch.int32) if split else None,
            adapters=adapters,
            input_precision=precision,
        )
        return
    assert plan.matmul is not None
    if plan.path == "single":
        matmul(
            *(x, w, y, plan.matmul),
            a=a,
            b=b,
            S=S,
            bias=bias,
            single=True,
            adapters=adapters,
            input_precision=precision,
        )
        return

    assert plan.shrink is not None
    S = x.new_empty((M, padded_rank(r))) if S is None else S
    source = packed = None
    descriptors = plan.path in ("pdl", "gluon", "serial")
    pdl = plan.path in ("pdl", "gluon")
    if descriptors:  # all segments of the loop have one dtype and rows that TMA can address
        w = w.to(x.dtype)
        stored = b.t() if transposed else b
        if stored.dtype != x.dtype or not describable(stored):
            source = stored
            stored = packed = x.new_empty((stored.shape[0], padded_rank(stored.shape[1])))
        b = stored.t() if transposed else stored
    shrink(
        *(x, a, S, plan.shrink, plan.shrink_programs),
        scale=1.0 if draw is None else draw.keep_scale,
        seed=None if draw is None else draw.seed,
        threshold=0 if draw is None else dropout.threshold(draw.p),
        mask=None if draw is None else draw.bits,
        source=source,
        packed=packed,
        counters=counters,
        trigger=pdl,
        adapters=adapters,
        input_precision=precision,
    )
    programs = _device(x.device).sm_count
    if plan.path == "gluon":  # a candidate: right for any pack, skips no columns of large ones
        from fused_lora.kernels.matmul_gluon import gluon_matmul

        gluon_matmul(x, w, y, plan.matmul, programs, b=b, S=S, bias=bias, pdl=pdl)
    elif descriptors:
        given = {"b": b, "S": S, "bias": bias, "adapters": adapters}
        descriptor_matmul(x, w, y, plan.matmul, programs, pdl=pdl, **given)
    else:
        matmul(
            *(x, w, y, plan.matmul),
            b=b,
            S=S,
            bias=bias,
            mask=None if masked is None else masked.bits,
            keep_scale=1.0 if masked is None else masked.keep_scale,
            adapters=adapters,
            input_precision=precision,
        )


def _shrink_only(
    x: Tensor, a: Tensor, S: Tensor, adapters: Adapters, counters: Tensor | None
) -> None:
    """S as in `_product` with no product behind it; zeroes the counters."""
    device = _device(x.device)
    M, K = x.shape
    tiles = config.select("shrink", device, _bits(x), M, K, K, a.shape[0])
    shrink(
        *(x, a, S, tiles, min(device.sm_count, -(-M // tiles.BLOCK_M))),
        counters=counters,
        adapters=adapters,
        input_precision=_precision(x),
    )
