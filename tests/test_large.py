"""Offsets beyond 2^31 elements: a row stride so large that 32-bit arithmetic would wrap.

The memory is reserved, not touched: only the few pages that hold the rows cost anything.
"""

import pytest
import torch

from fused_lora.kernels import config, decode, matmul, rank_grad, shrink
from fused_lora.testing import check

pytestmark = pytest.mark.kernels

ROWS, WIDTH, STRIDE = 3, 40, 2**30 + 8  # the third row starts beyond 2^31


@pytest.fixture(scope="module")
def storage(device):
    try:
        return torch.empty(2 * STRIDE + WIDTH, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"cannot reserve the memory: {error}")


@pytest.fixture
def far(storage):
    """fp16 [3, 40] whose rows lie 2^30 + 8 elements apart."""
    rows = storage.as_strided((ROWS, WIDTH), (STRIDE, 1))
    generator = torch.Generator().manual_seed(0)
    return rows.copy_(torch.randn(ROWS, WIDTH, generator=generator))


def near(far):
    return far.double().cpu()


def tiles(op):
    return config.defaults()["interpreter"]["16"][op][0]


def close(got, exact):
    """By the rule, next to the exact values rounded once."""
    assert check({"out": got.cpu()}, {"out": exact.half()}, {"out": exact}, torch.float16) == []


def test_shrink_reads_far_rows_of_x(far, device):
    A, S = torch.randn(8, WIDTH, device=device).half(), torch.empty(ROWS, 16, device=device).half()
    shrink.shrink(far, A, S, tiles("shrink"), 1)
    close(S[:, :8], near(far) @ A.double().cpu().t())


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_reads_far_rows_of_x_and_w_and_writes_far_rows_of_y(far, device, transposed):
    w = far.t() if transposed else far  # [WIDTH, 3] or [3, WIDTH]
    x = torch.randn(5, w.shape[0], device=device).half()
    y = torch.empty(5, w.shape[1], device=device).half()
    matmul.matmul(x, w, y, tiles("matmul"))
    close(y, x.double().cpu() @ w.double().cpu())
    square = torch.randn(WIDTH, WIDTH, device=device).half()
    expected = near(far) @ square.double().cpu()
    matmul.matmul(far, square, far, tiles("matmul"))  # one tile a row block: read before written
    close(far, expected)


def test_rank_grad_reads_far_rows_of_x(far, device):
    dS, dA = torch.randn(ROWS, 16, device=device).half(), torch.empty(8, WIDTH, device=device)
    rank_grad.rank_grad(tiles("rank_grad"), 1, ROWS, 8, x=far, dS=dS, dA=dA)
    close(dA, dS[:, :8].double().cpu().t() @ near(far))


def test_decode_reads_far_rows_of_x_and_w(far, device):
    A, B = torch.randn(8, WIDTH, device=device).half(), torch.randn(8, ROWS, device=device).half()
    y = torch.empty(ROWS, ROWS, device=device).half()
    one = config.Decode(64, 64, 1, 4, 1)
    decode.decode(far, far.t(), A, B, y, one)
    x, A64, B64 = near(far), A.double().cpu(), B.double().cpu()
    expected = x @ x.t() + (x @ A64.t()).half().double() @ B64
    close(y, expected)
