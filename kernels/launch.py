"""How a kernel is launched: by Triton's jit, noted down on the tape of the operator call.

Programmatic dependent launch (PDL) lets a kernel start while the one before it runs, once all of
that one's programs have triggered. What counts on what, on the path hopper:

    shrink     plain   reads x, A; triggers at once; writes S
    matmul     PDL     reads x, W, which were complete before shrink began; waits for shrink, each
                       program before it reads S or writes y; then triggers
    rank_grad  PDL     reads dS without a wait, for it starts when every program of dX has waited
                       for it; never reads dX; waits for dX at its end
    the next   plain   sees all of them complete
"""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_lora.kernels.tape import recording

# Triton 3.10 turns this off by default; a * b + c in one rounding is what every epilogue here wants
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel, grid, config, *, pdl=False, **given) -> None:
    """Run a kernel on the current device and stream.

    config: carries num_warps and num_stages. pdl: programmatic dependent launch.
    given: all of the kernel's arguments by name. A tuple (tensor, block_shape) becomes a tensor
    descriptor, (tensor, block_shape, layout) one of a Gluon kernel.
    """
    options = options_of(config, pdl)
    ordered = [given.pop(name) for name in kernel.arg_names]
    assert not given, f"{kernel.__name__} has no {', '.join(given)}"
    arguments = [_descriptor(*value) if type(value) is tuple else value for value in ordered]
    compiled = run(kernel, grid, arguments, options)
    tape = recording()
    if tape is not None:
        tape.add(compiled, grid, arguments)


def options_of(config, pdl):
    """How a kernel is compiled and launched."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
    if pdl:
        options["launch_pdl"] = True
    return options


def run(kernel, grid, arguments, options):
    """The launch itself: the one place to put a compilation in its stead."""
    return kernel[grid](*arguments, **options)


def _descriptor(tensor, block_shape, layout=None):
    if layout is None:
        return TensorDescriptor.from_tensor(tensor, list(block_shape))
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor.from_tensor(tensor, list(block_shape), layout)


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
