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


def launch(kernel, grid, tensors, scalars, constexprs, config, *, pdl=False) -> None:
    """Run `kernel(*tensors, *scalars, *constexprs)` on the current device and stream.

    tensors: torch tensors, None, or (tensor, block_shape) for a tensor descriptor.
    scalars: ints and floats. constexprs: hashable values, in the order of the signature.
    config: carries num_warps and num_stages. pdl: programmatic dependent launch.
    """
    arguments = []
    key = [kernel, constexprs, config.num_warps, config.num_stages, pdl]
    for tensor in tensors:
        if tensor is None:
            arguments.append(None)
            key.append(None)
        elif type(tensor) is tuple:
            base, block_shape = tensor
            arguments.append(_descriptor(base, block_shape))
            key.append((base.dtype, block_shape))
        else:
            arguments.append(tensor)
            key.append((tensor.dtype, tensor.data_ptr() % 16 == 0))
    for scalar in scalars:
        # a float's value never changes what is compiled, an int's may
        key.append(float if type(scalar) is float else scalar)
    device = driver.active.get_current_device() if not INTERPRETING else 0
    key.append(device)
    key = tuple(key)
    compiled = _plans.get(key)
    knobs = triton.knobs.runtime
    if compiled is None or knobs.launch_enter_hook is not None:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
        if pdl:
            options["launch_pdl"] = True
        compiled = kernel[grid](*arguments, *scalars, *constexprs, **options)
        if INTERPRETING:
            return
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
        *arguments,
        *scalars,
        *constexprs,
    )


def _descriptor(base: torch.Tensor, block_shape: tuple[int, ...]) -> TensorDescriptor:
    """A host-side tensor descriptor without TensorDescriptor's checks: `describable` made them."""
    if INTERPRETING:
        return TensorDescriptor.from_tensor(base, list(block_shape))
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base = base
    descriptor.shape = base.shape
    descriptor.strides = base.stride()
    descriptor.block_shape = list(block_shape)
    descriptor.padding = "zero"
    descriptor.round_f32_to_tf32 = False
    return descriptor


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
