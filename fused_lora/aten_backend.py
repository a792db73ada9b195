"""Forward and backward over the library's matrix products: every device and dtype, fp64 included.

Three products, the adapter accumulated into the base's result by the last one: no elementwise pass
over y or dX, which is what makes the three-operation form slow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora import dropout
from fused_lora.scale import RANK_PADDING, Adapters, Scale, padded_rank


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
    adapters: Adapters | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y [M, N], S [M, padded r], packed mask or None). With `adapters`, lora_A and lora_B pack
    several, S has their own scaling and zeros where a column is not the token's."""
    r = lora_A.shape[0]
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    mask, dropped, keep_scale = None, x, 1.0
    if dropout_p > 0.0:
        assert seed is not None
        mask = dropout.packed_mask(seed, x.shape[0], x.shape[1], dropout_p)
        dropped, keep_scale = x * dropout.unpack(mask, x.shape[1]), 1.0 / (1.0 - dropout_p)
    allocate = x.new_empty if r % RANK_PADDING == 0 else x.new_zeros
    S = allocate((x.shape[0], padded_rank(r)))
    _scaled_product(dropped, lora_A.to(x.dtype).t(), scale, keep_scale, S[:, :r])
    if adapters is not None:
        _select(S[:, :r], adapters)
    y.addmm_(S[:, :r], lora_B.to(x.dtype).t())
    return y, S, mask


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
    adapters: Adapters | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX [M, K], dA [r, K], dB [N, r]), None for those that are not needed."""
    r, K = lora_A.shape
    keep_scale = 1.0 / (1.0 - dropout_p)
    keep = None if mask_bits is None else dropout.unpack(mask_bits, K)
    dx = dA = dB = None
    if needs_x or needs_A:
        dS = dy.new_empty((dy.shape[0], r))
        _scaled_product(dy, lora_B.to(dy.dtype), scale, 1.0, dS)
        if adapters is not None:
            _select(dS, adapters)
    if needs_x:
        dx = dy @ weight.to(dy.dtype)
        if keep is None:
            dx.addmm_(dS, lora_A.to(dy.dtype))
        else:
            dx += (dS @ lora_A.to(dy.dtype)) * keep * keep_scale
    if needs_A:
        assert x is not None
        dA = dS.t() @ (x if keep is None else x * keep)
        dA = (dA if keep is None else dA * keep_scale).to(lora_A.dtype)
    if needs_B:
        assert S is not None
        dB = (dy.t() @ S[:, :r]).to(lora_B.dtype)
    return dx, dA, dB


def _scaled_product(a: Tensor, b: Tensor, scale: Scale, keep_scale: float, out: Tensor) -> None:
    """out = scale * keep_scale * a b, the host factor folded into the product."""
    torch.addmm(out, a, b, beta=0, alpha=scale.value * keep_scale, out=out)
    if scale.tensor is not None:
        out.mul_(scale.tensor)


def _select(S: Tensor, adapters: Adapters) -> None:
    """S [M, r] times the scaling of each column, zero where the column is not the token's."""
    S.mul_(adapters.scaling)
    S.masked_fill_(adapters.ids.unsqueeze(1) != adapters.owner, 0.0)
