"""Base layers of `--base nf4`: bitsandbytes' 4-bit layer, and weights that it holds exactly."""

from __future__ import annotations

from torch import Tensor, nn

NF4 = "nf4"


def frozen_linear(weight: Tensor) -> nn.Module:
    """A Linear4bit without bias around a packed copy of weight [N, K], computing in its dtype."""
    layers = _bitsandbytes().nn
    layer = layers.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=False,
        quant_type=NF4,
        device="meta",
    )
    layer.weight = layers.Params4bit(
        weight.cpu(),
        requires_grad=False,
        compress_statistics=False,
        quant_type=NF4,
        module=layer,
    )
    return layer.to(weight.device)  # which packs it


def representable(weight: Tensor) -> Tensor:
    """weight rounded to the levels of NF4, so that packing it loses nothing more. Twice: the first
    time the largest value of a block, which scales the others, is rounded to the dtype."""
    functional = _bitsandbytes().functional
    for _ in range(2):
        packed, state = functional.quantize_4bit(weight, quant_type=NF4)
        weight = functional.dequantize_4bit(packed, state)
    return weight


def _bitsandbytes():
    try:
        import bitsandbytes
    except ImportError:
        raise SystemExit("--base nf4 needs bitsandbytes: pip install bitsandbytes") from None
    return bitsandbytes
