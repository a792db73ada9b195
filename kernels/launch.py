"""How a kernel is launched: by Triton's jit the first time, directly after that.

`kernel[grid](...)` spends most of its host time finding out again which specialisation to run. The
answer depends on dtypes, pointer alignment, integer arguments and constexprs alone, so it is kept
under that key and the compiled kernel is run directly. Grids may differ under one key.
"""

from __future__ import annotations

import torch
import triton
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETING = triton.knobs.runtime.interpret
MAX_PLANS = 8192
# Triton 3.10 turns this off by default; a * b + c in one rounding is what every epilogue here wants
OPTIONS = {"enable_fp_fusion": True}
_plans: dict[tuple, object] = {}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def launch(kernel, grid, tensors, integers, floats, constexprs, config, *, pdl=False) -> None:
    """Run `kernel(*tensors, *integers, *floats, *constexprs)` on the current device and stream.

    tensors: torch tensors, None, (tensor, block_shape) for a tensor descriptor, or (tensor,
    block_shape, layout) for one of a Gluon kernel.
    config: carries num_warps and num_stages. pdl: programmatic dependent launch.
    """
    if INTERPRETING:
        _first_launch(kernel, grid, tensors, integers, floats, constexprs, config, pdl)
        return
    device = driver.active.get_current_device()
    kinds = [
        None
        if tensor is None
        else (tensor[0].dtype, tensor[1])
        if type(tensor) is tuple
        else (tensor.dtype, tensor.data_ptr() % 16 == 0)
        for tensor in tensors
    ]
    key = (id(kernel), device, config.num_warps, config.num_stages, pdl, integers, constexprs)
    key += tuple(kinds)
    compiled = _plans.get(key)
    if compiled is None or _profiled():
        compiled = _first_launch(kernel, grid, tensors, integers, floats, constexprs, config, pdl)
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = compiled
        return
    compiled.run(
        *grid,
        driver.active.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        None,
        None,
        None,
        *[_Descriptor(*t[:2]) if type(t) is tuple else t for t in tensors],
        *integers,
        *floats,
        *constexprs,
    )


def _first_launch(kernel, grid, tensors, integers, floats, constexprs, config, pdl):
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
    if pdl:
        options["launch_pdl"] = True
    arguments = [_checked_descriptor(*t) if type(t) is tuple else t for t in tensors]
    return kernel[grid](*arguments, *integers, *floats, *constexprs, **options)


def _checked_descriptor(tensor, block_shape, layout=None):
    if layout is None:
        return TensorDescriptor.from_tensor(tensor, list(block_shape))
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor.from_tensor(tensor, list(block_shape), layout)


def _profiled() -> bool:
    """Whether a profiler listens to launches: it gets its metadata from Triton's own path."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(hook is not None and getattr(hook, "calls", True))


class _Descriptor(TensorDescriptor):
    """A host-side tensor descriptor without TensorDescriptor's checks: the first launch made them,
    and `describable` makes those that depend on the address."""

    def __init__(self, base: torch.Tensor, block_shape: tuple[int, ...]) -> None:
        self.base = base
        self.shape = base.shape
        self.strides = base.stride()
        self.block_shape = block_shape


def describable(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can address this matrix: 16-byte aligned base and rows,
    unit column stride, rows that do not overlap."""
    row = tensor.stride(0)
    return (
        tensor.stride(1) == 1
        and row >= tensor.shape[1]
        and row * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
    )
