"""Forward and backward over the library's matrix products: every device and dtype, fp64 included.

Three products, the adapter accumulated into the base's result by the last one: no elementwise pass
over y or dX, which is what makes the three-operation form slow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora import dropout
from fused_lora.scale import Adapters, Scale, padded_rank


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
    """[y [M, N]], and `for_backward` S [M, padded r] and with dropout the packed mask. With
    `adapters`, lora_A and lora_B pack several, S has their own scaling and zeros where a column is
    not the token's."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    kept = add_adapter(y, x, lora_A, lora_B, scale, dropout_p, seed, adapters, for_backward)
    return [y, *kept]


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
    """y += S B^T in place, S = scale * D(x) A^T. Returns what `forward` returns beside y."""
    r = lora_A.shape[0]
    kept, dropped, keep_scale = [], x, 1.0
    if dropout_p > 0.0:
        assert seed is not None
        mask = dropout.packed_mask(seed, x.shape[0], x.shape[1], dropout_p)
        dropped, keep_scale = x * dropout.unpack(mask, x.shape[1]), dropout.keep_scale(dropout_p)
        kept = [mask]
    S = _scaled_product(dropped, lora_A.to(x.dtype).t(), scale, keep_scale)
    if adapters is not None:
        _select(S, adapters)
    y.addmm_(S, lora_B.to(x.dtype).t())
    if not for_backward:
        return []
    padding = padded_rank(r) - r
    return [F.pad(S, (0, padding)) if padding else S, *kept]


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
    adapters: Adapters | None,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor | None]:
    """[dX [M, K], dA [r, K], dB [N, r]], None for those that are not needed."""
    dx = dy @ weight.to(dy.dtype) if needs_x else None
    return adapter_gradients(
        *(dy, x, lora_A, lora_B, S, mask_bits, scale, dropout_p, adapters),
        *(needs_x, needs_A, needs_B, dx),
    )


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
    dx: Tensor | None = None,
) -> list[Tensor | None]:
    """[dX, dA, dB] of the adapter term alone; its dX is added to `dx` in place where one is given.
    None for those that are not needed."""
    r, K = lora_A.shape
    keep_scale = dropout.keep_scale(dropout_p)
    keep = None if mask_bits is None else dropout.unpack(mask_bits, K)
    dA = dB = None
    if needs_x or needs_A:
        dS = _scaled_product(dy, lora_B.to(dy.dtype), scale, 1.0)
        if adapters is not None:
            _select(dS, adapters)
    if needs_x and keep is None and dx is not None:
        dx.addmm_(dS, lora_A.to(dy.dtype))
    elif needs_x:
        term = dS @ lora_A.to(dy.dtype)
        term = term if keep is None else term * keep * keep_scale
        dx = term if dx is None else dx.add_(term)
    if needs_A:
        assert x is not None
        dA = dS.t() @ (x if keep is None else x * keep)
        dA = (dA if keep is None else dA * keep_scale).to(lora_A.dtype)
    if needs_B:
        assert S is not None
        S = S[:, :r]
        # a product with a narrow result is faster transposed; the copy back must be worth it
        dB = (S.t() @ dy).t().contiguous() if len(dy) > dy.shape[1] else dy.t() @ S
        dB = dB.to(lora_B.dtype)
    return [dx, dA, dB]


def _scaled_product(a: Tensor, b: Tensor, scale: Scale, keep_scale: float) -> Tensor:
    """scale * keep_scale * a b, the host factor folded into the product."""
    product = torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale.value * keep_scale)
    return product if scale.tensor is None else product.mul_(scale.tensor)


def _select(S: Tensor, adapters: Adapters) -> None:
    """S [M, r] times the scaling of each column, zero where the column is not the token's."""
    S.mul_(adapters.scaling)
    ids = adapters.ids.clamp(min=-1)  # no id below is NOBODY
    S.masked_fill_(ids.unsqueeze(1) != adapters.owner, 0.0)
