"""What the numerical tests run over: ragged sizes, a pairwise cover of them, tiles that cut them
raggedly, the paths a product can take, and buffers that show access beyond a matrix."""

import itertools
from collections import Counter
from functools import cache

import torch

from fused_lora import triton_backend
from fused_lora.kernels import config

TOKENS = (1, 7, 33, 100, 130, 2049)  # M
FEATURES = (50, 70, 500, 2049)  # K and N
RANKS = (1, 3, 8, 16, 33, 64, 128)  # r
LARGE = 2049
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (FP32, FP16, BF16)
CROSS = tuple(itertools.product(TOKENS, FEATURES, FEATURES, RANKS))
"""Every (M, K, N, r): minutes on a GPU, hours in the interpreter."""

LARGEST_TILE = 128 if triton_backend.INTERPRETING else 64
"""The interpreter pays for every step, a GPU's compiler for every element of a tile."""


def affordable(M, K, N, *_):
    """At most one large size, and not beside the largest two of the others."""
    return (M, K, N).count(LARGE) <= 1 and M * K * N <= 2**27


@cache
def pairwise(*factors, allowed=affordable):
    """Rows (one value of each factor) in which every pair of values that `allowed` leaves possible
    occurs. The first three factors are M, K and N. Greedy: the row with most new pairs, of those
    one of the least order of magnitude, of those the one whose values were used least."""
    rows = [row for row in itertools.product(*factors) if allowed(*row)]
    pairs = {row: frozenset(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = frozenset().union(*pairs.values())
    uses = Counter()

    def worth(row):
        magnitude = (row[0] * row[1] * row[2]).bit_length() // 3
        return len(pairs[row] & missing), -magnitude, -sum(uses[v] for v in enumerate(row))

    cover = []
    while missing:
        cover.append(max(rows, key=worth))
        missing -= pairs[cover[-1]]
        uses.update(enumerate(cover[-1]))
    return tuple(cover)


def tile(size):
    """The largest power of two below `size` within what a tile may have: more than one tile and a
    ragged last one, wherever the size allows it."""
    below = 1 << max(0, (size - 1).bit_length() - 1)
    return max(16, min(LARGEST_TILE, below))


def multiple_of_8(size):
    """The next size whose rows a tensor descriptor can address in a 16-bit dtype."""
    return -(-size // 8) * 8


def can_describe(device):
    """Whether the descriptor kernels run where the tests run: on Hopper, and in the interpreter."""
    return config.has_descriptors(config.device_of(0 if device == "cuda" else None))


def force_path(monkeypatch, path):
    """Send every product down `path` wherever it can run. Returns the list to which each product
    adds the path that it really took."""
    taken = []
    plan_product = triton_backend.plan_product

    def recorded(*args, **kwargs):
        plan = plan_product(*args, **kwargs)
        taken.append(plan.path)
        return plan

    monkeypatch.setattr(config, "PATH", path)
    monkeypatch.setattr(triton_backend, "plan_product", recorded)
    return taken


GUARD = 8  # elements around a matrix, which stays 16-byte aligned
SENTINEL = 77


class Output:
    """A matrix to write to, NaN (or all ones) inside a larger buffer of sentinels."""

    def __init__(self, rows, columns, dtype, device):
        shape = rows + 2 * GUARD, multiple_of_8(columns) + 2 * GUARD
        self.buffer = torch.full(shape, SENTINEL, dtype=dtype, device=device)
        self.matrix = self.buffer[GUARD : GUARD + rows, GUARD : GUARD + columns]
        self.matrix.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)

    def vector(self, shape):
        """A one-row output seen as a contiguous tensor of `shape`."""
        return self.matrix[0].view(shape)

    def assert_rim_untouched(self):
        self.matrix.fill_(SENTINEL)
        assert torch.all(self.buffer == SENTINEL)


def embedded(matrix):
    """The same values inside a wider buffer of NaN."""
    rows, columns = matrix.shape
    buffer = matrix.new_full((rows + 2, multiple_of_8(columns) + 2 * GUARD), torch.nan)
    return buffer[1 : rows + 1, GUARD : GUARD + columns].copy_(matrix)
