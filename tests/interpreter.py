"""What Triton's CPU interpreter lacks, for tests alone: bf16 arithmetic and the PDL intrinsics.

The interpreter keeps bf16 as raw 16-bit integers: `tl.dot` would multiply bit patterns, and
fp32 -> bf16 truncates instead of rounding to nearest even. `install` mends both and makes the PDL
intrinsics no-ops, which is what they mean where programs run one after the other. Products of
16-bit operands are summed in fp64 and rounded once: in numpy's fp32 products the last bit of an
element depends on its place in the tile, on a GPU it does not.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl
    handle = interpreter.TensorHandle

    def values(operand):
        bf16 = operand.dtype.scalar == tl.bfloat16
        return (widen(operand.data) if bf16 else operand.data).astype(np.float64)

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar not in (tl.bfloat16, tl.float16):
            return dot(self, a, b, acc, input_precision, max_num_imprecise_acc)
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.matmul(values(a), values(b)).astype(acc.data.dtype)
        return handle(product + acc.data, acc.dtype.scalar)

    def cast_impl(self, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return handle(narrow(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widen(source.data), tl.float32)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    tl.extra.cuda.gdc_wait = lambda: None
    tl.extra.cuda.gdc_launch_dependents = lambda: None
