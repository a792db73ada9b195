"""The adapter term alone over the Triton kernels, for `delta`: shrink and rank_grad as in
`triton_backend`, the product into the output by the library, which reads and writes it once.
Imported only where triton can be imported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_lora import dropout
from fused_lora.kernels import config
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.shrink import shrink
from fused_lora.scale import Scale, padded_rank
from fused_lora.triton_backend import _bits, _device, _precision, _unit_column_stride


def add_adapter(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Scale,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """y += S B^T in place, S = scale * D(x) A^T. Returns (S [M, padded r], packed mask or None)."""
    x = _unit_column_stride(x)
    M, K = x.shape
    r = lora_A.shape[0]
    S = x.new_empty((M, padded_rank(r)))
    mask = None
    if dropout_p > 0.0:
        mask = x.new_empty((M, dropout.packed_columns(K)), dtype=torch.uint8)
    _shrink(x, lora_A, S, scale, dropout_p, seed=seed, mask=mask)
    y.addmm_(S[:, :r], lora_B.to(y.dtype).t())
    return S, mask


def adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    scale: Scale,
    dropout_p: float,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX [M, K], dA [r, K], dB [N, r]) of the adapter term, None for those that are not needed."""
    dy = _unit_column_stride(dy)
    M = dy.shape[0]
    r, K = lora_A.shape
    N = lora_B.shape[0]
    device = _device(dy.device)
    keep_scale = 1.0 if mask is None else 1.0 / (1.0 - dropout_p)

    partial = counters = None
    if needs_A or needs_B:
        tiles = config.select("rank_grad", device, _bits(dy), M, N, K, r)
        counts = tile_counts(K, N, r, tiles, needs_A, needs_B)
        splits = config.rank_grad_splits(device, sum(counts[:2]) * counts[2], M, tiles)
        if splits > 1:
            elements = partial_elements(counts, splits, r, tiles)
            partial = dy.new_empty(elements, dtype=torch.float32)
            counters = dy.new_empty(sum(counts[:2]) * counts[2], dtype=torch.int32)

    dx = dS = None
    if needs_x or needs_A:
        dS = dy.new_empty((M, padded_rank(r)))
        _shrink(dy, lora_B.t(), dS, scale, counters=counters)
    elif counters is not None:
        counters.zero_()
    if needs_x:
        assert dS is not None
        if mask is None:
            dx = dS[:, :r] @ lora_A.to(dy.dtype)
        else:  # masked on its way out: no second pass over dX. The main product has no terms.
            dx = dy.new_empty((M, K))
            matmul(
                dy[:, :0],
                dx[:0],
                dx,
                config.select("matmul", device, _bits(dy), M, K, N, r),
                b=lora_A,
                S=dS,
                mask=mask,
                keep_scale=keep_scale,
                input_precision=_precision(dy),
            )

    dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if needs_A else None
    dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if needs_B else None
    if needs_A or needs_B:
        rank_grad(
            tiles,
            splits,
            M,
            r,
            x=_unit_column_stride(x) if needs_A and x is not None else None,
            dS=dS if needs_A else None,
            dA=dA,
            dY=dy if needs_B else None,
            S=S if needs_B else None,
            dB=dB,
            mask=mask if needs_A else None,
            keep_scale=keep_scale,
            partial=partial,
            counters=counters,
            input_precision=_precision(dy),
        )
    return dx, dA, dB


def _shrink(
    x: Tensor,
    a: Tensor,
    S: Tensor,
    scale: Scale,
    dropout_p: float = 0.0,
    *,
    seed: Tensor | None = None,
    mask: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """S = scale * D(x) a^T; draws the mask where there is dropout, zeroes the counters."""
    device = _device(x.device)
    M, K = x.shape
    tiles = config.select("shrink", device, _bits(x), M, K, K, a.shape[0])
    shrink(
        x,
        a,
        S,
        tiles,
        min(device.sm_count, -(-M // tiles.BLOCK_M)),
        scale=scale.value / (1.0 - dropout_p),
        scaling=scale.tensor,
        seed=seed,
        threshold=dropout.threshold(dropout_p),
        mask=mask,
        counters=counters,
        input_precision=_precision(x),
    )
