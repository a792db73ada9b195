"""The specification: LoRA in plain PyTorch, any dtype and device. Imports nothing of this package
but the dropout mask, so that it can be read on its own and trusted.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, equation 3:
h = W0 x + (alpha / r) B A x, dropout on the adapter's input only.
"""

from __future__ import annotations

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
    The adapters are cast to x's dtype, as autocast training does. D(x) is x * mask divided by
    1 - dropout_p; `mask` (bool, x's shape) fixes it, else it is drawn from `seed` exactly as the
    fused layer draws it. `backend` has no effect: it is there so that the signatures are alike.
    """
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    dropped = x
    if dropout_p > 0.0:
        if mask is None:
            seed = dropout.draw_seed(x.device) if seed is None else seed
            rows = x.numel() // max(x.shape[-1], 1)
            mask = dropout.keep_mask(seed, rows, x.shape[-1], dropout_p).view(x.shape)
        dropped = x * mask / (1.0 - dropout_p)
    return y + (dropped @ lora_A.to(x.dtype).t()) @ lora_B.to(x.dtype).t() * scaling
