"""The specification: LoRA in plain PyTorch, any dtype and device. Imports nothing of this package
but the dropout mask, so that it can be read on its own and trusted.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3:
h = W0 x + (alpha / r) B A x, dropout on the adapter's input only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora import dropout


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Return `x W^T + bias + scaling * (D(x) A^T) B^T` in the three-operation form everyone writes.

    Shapes: x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N]; result [..., N].
    The adapters are cast to x's dtype, as autocast training does. D(x) is x * mask over the keep
    probability, 1 - dropout_p rounded to 16 bits as the mask is drawn. `mask` (bool, x's shape)
    fixes it, else it is drawn from `seed` exactly as the fused layer draws it. `backend` has no
    effect: it is there so that the signatures are alike.
    """
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    dropped = _dropped(x, dropout_p, seed, mask)
    return y + (dropped @ lora_A.to(x.dtype).t()) @ lora_B.to(x.dtype).t() * scaling


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[tuple[Tensor, Tensor, float]],
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The `lora_linear` of adapter adapter_ids[m] = (lora_A, lora_B, scaling) for each token m, the
    base alone for -1. Every adapter is computed for all tokens. adapter_ids: x.shape[:-1]."""
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    dropped = _dropped(x, dropout_p, seed, None)
    for index, (lora_A, lora_B, scaling) in enumerate(adapters):
        update = (dropped @ lora_A.to(x.dtype).t()) @ lora_B.to(x.dtype).t() * scaling
        y = y + torch.where((adapter_ids == index).unsqueeze(-1), update, 0.0)
    return y


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None, mask: Tensor | None) -> Tensor:
    if dropout_p == 0.0:
        return x
    if mask is None:
        seed = dropout.draw_seed(x.device) if seed is None else seed
        rows = x.numel() // max(x.shape[-1], 1)
        mask = dropout.keep_mask(seed, rows, x.shape[-1], dropout_p).view(x.shape)
    return x * mask * dropout.keep_scale(dropout_p)
