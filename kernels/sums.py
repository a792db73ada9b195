"""How a kernel adds one step's product to a running sum."""

import triton
import triton.language as tl


@triton.jit
def add_product(acc, a, b, INPUT_PRECISION: tl.constexpr):
    """acc + a b in fp32: a [m, k], b [k, n] and acc [m, n], one step of a sum longer than k.

    The product of fp32 operands is one chain of multiply-adds per element, and it starts from zero:
    a chain through all the steps would round every term to the precision of the whole sum, and the
    layer would be less exact than the libraries, which sum in blocks. Tensor cores add a 16-bit
    product to acc in place.
    """
    if a.dtype == tl.float32 and INPUT_PRECISION == "ieee":
        product = tl.dot(a, b, input_precision=INPUT_PRECISION)
        # not acc + product, which the compiler turns back into a product that starts from acc
        return tl.fma(product, 1.0, acc)
    else:
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
