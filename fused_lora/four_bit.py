"""4-bit base layers of bitsandbytes in the fused product: their weight is unpacked for the call,
forward and backward, and multiplied together with the adapter. Works without bitsandbytes."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.delta import hooked
from fused_lora.functional import check_tensors, checked_options, run


def unpacks(base: nn.Module, x: Tensor) -> bool:
    """Whether `lora_linear_4bit` is the way to call `base` with x [..., in_features]: a 4-bit layer
    that nothing watches, that computes in x's dtype or under autocast, and for as many tokens as
    bitsandbytes itself would unpack the weight for."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return False
    layers = bitsandbytes.nn
    if type(base) not in (layers.Linear4bit, layers.LinearNF4, layers.LinearFP4) or hooked(base):
        return False
    state = state_of(base)
    if state is None or tuple(state.shape) != (base.out_features, base.in_features):
        return False  # or packed from a transposed weight
    computed = base.compute_dtype or x.dtype
    if computed not in _DTYPES or not (
        computed == x.dtype or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    features: int = base.in_features  # type: ignore[assignment]
    return x.numel() >= least_tokens(x.device) * features


def state_of(base: nn.Module) -> Any:
    """How the weight of a 4-bit layer is packed; None where FSDP keeps that elsewhere, or where
    bitsandbytes has repacked the weight for its own product on a CPU."""
    state = getattr(base.weight, "quant_state", None)
    return None if getattr(state, "packing_format_for_cpu", False) else state


def least_tokens(device: torch.device) -> int:
    """The number of tokens from which bitsandbytes 0.50 unpacks a weight of any shape; below, it
    may multiply by the packed one, which pays on GPUs with slow memory."""
    if device.type != "cuda":
        return 1
    return 65 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 513


def lora_linear_4bit(
    x: Tensor,
    base: Any,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor,
    dropout_p: float,
    backend: str,
) -> Tensor:
    """`fused_lora.lora_linear` with the weight and the bias of `base`, for which `unpacks` is true.
    Computed in the base's compute_dtype, returned in x's, as the base does."""
    packed, state = base.weight.data, base.weight.quant_state
    computed = x.to(base.compute_dtype or x.dtype)
    stands_for = packed.new_empty(1, dtype=computed.dtype).expand(state.shape)  # a shape to check
    check_tensors(computed, stands_for, lora_A, lora_B, base.bias, autocast=True)
    options = checked_options(computed, scaling, dropout_p, None, backend)
    unpack = functools.partial(_unpacked, state)
    y = run(computed, packed, lora_A, lora_B, base.bias, options, unpack=unpack)
    return y.to(x.dtype)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _unpacked(state: Any, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """W [N, K]. Its memory is the allocator's to use again for the next layer."""
    if state.dtype != dtype:  # at once in the dtype asked for, as the layer's own forward does
        state = copy.copy(state)
        state.dtype = dtype
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(packed, state)
