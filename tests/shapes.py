"""What the numerical tests run over: ragged sizes, a pairwise cover of them, tiles that cut them
raggedly, the paths a product can take, and buffers that show access beyond a matrix."""

import itertools
from collections import Counter, defaultdict
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
    bits = defaultdict(lambda: 1 << len(bits))  # one for every pair
    pairs = {row: sum(bits[p] for p in itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = (1 << len(bits)) - 1
    uses = Counter()

    def cost(row):
        magnitude = (row[0] * row[1] * row[2]).bit_length() // 3
        return magnitude, sum(uses[value] for value in enumerate(row))

    cover = []
    while missing:
        new = {row: (mask & missing).bit_count() for row, mask in pairs.items()}
        most = max(new.values())
        cover.append(min((row for row in rows if new[row] == most), key=cost))
        missing &= ~pairs[cover[-1]]
        uses.update(enumerate(cover[-1]))
    return tuple(cover)


COVER = pairwise(TOKENS, FEATURES, FEATURES, RANKS, DTYPES)
TWO_RANK_BLOCKS = ((33, 70, 50, 200, FP32), (33, 64, 96, 200, BF16))  # K, N whole tiles, too
MODES = ("plain", "given", "masked", "single")  # of the portable matmul
MATMUL_COVER = pairwise(
    *(TOKENS, FEATURES, FEATURES, RANKS, DTYPES, MODES),
    allowed=lambda *row: (
        affordable(*row) and (row[-1] != "single" or row[3] <= config.MAX_SINGLE_RANK)
    ),
)
MATMUL_COVER += tuple((*row, mode) for row in TWO_RANK_BLOCKS for mode in MODES[:3])
DESCRIPTOR_COVER = pairwise(  # S given or not, PDL or not, y in one part or two
    TOKENS, FEATURES, FEATURES, RANKS, (FP16, BF16), ("plain", "given"), (False, True), (1, 2)
)
HOPPER_COVER = pairwise(  # S given, and masked; PDL or not; rows and columns of a tile
    *(TOKENS, FEATURES, FEATURES, RANKS, (FP16, BF16)),
    *(("plain", "given", "masked"), (False, True), ((128, 256), (128, 128), (64, 128), (64, 64))),
)
GRAD_COVER = pairwise(  # what is wanted, splits, masked or not
    TOKENS, FEATURES, FEATURES, RANKS, DTYPES, ("A", "B", "AB"), (1, 3), (False, True)
)
GRAD_COVER += tuple((*row, "AB", 2, True) for row in TWO_RANK_BLOCKS)
DECODE_COVER = pairwise(  # splits, S stored or not
    (1, 7, 33, 64), FEATURES, FEATURES, (1, 3, 8, 16, 33, 64), DTYPES, (1, 2, 4), (False, True)
)
HERE = config.device_of(torch.device("cpu" if triton_backend.INTERPRETING else "cuda:0"))
DESCRIPTOR_PATHS = ("hopper", "pdl")


def runs_here(path):
    """Whether the machine that runs the tests can take this path. The interpreter takes all but
    Gluon, in which `hopper` is written."""
    if path == "hopper":
        return HERE.capability == 90
    return path not in DESCRIPTOR_PATHS or config.has_descriptors(HERE)


PATHS = tuple(filter(runs_here, config.PATHS))


def takes(path, M, r, dtype):
    """Whether the path can run a layer of this size, K and N multiples of 8."""
    bits = 8 * dtype.itemsize
    if path in DESCRIPTOR_PATHS and bits != 16:
        return False
    if path == "decode":
        most_tokens, most_ranks = config.MAX_DECODE[bits]
        return most_tokens >= M and r <= most_ranks
    return path != "single" or r <= config.MAX_SINGLE_RANK


def in_reach(M, K, N, r, dtype, path):
    """What the interpreter computes in about a second."""
    return affordable(M, K, N) and M * K * N <= 2**25 and takes(path, M, r, dtype)


PATH_COVER = pairwise(TOKENS, FEATURES, FEATURES, RANKS, DTYPES, PATHS, allowed=in_reach)
PATHS_AND_DTYPES = [(p, dtype) for p in PATHS for dtype in DTYPES if takes(p, 16, 16, dtype)]


def tile(size):
    """The largest power of two below `size` within what a tile may have: more than one tile and a
    ragged last one, wherever the size allows it."""
    below = 1 << max(0, (size - 1).bit_length() - 1)
    return max(16, min(LARGEST_TILE, below))


def multiple_of_8(size):
    """The next size whose rows a tensor descriptor can address in a 16-bit dtype."""
    return -(-size // 8) * 8


def force_path(monkeypatch, path):
    """Send every product down `path` wherever it can run. Returns the list to which each product
    adds the path that it really took."""
    taken = []
    choose_product = config.choose_product

    def recorded(*args, **kwargs):
        plan = choose_product(*args, **kwargs)
        taken.append(plan.path)
        return plan

    monkeypatch.setattr(config, "FORCED", path)
    monkeypatch.setattr(config, "choose_product", recorded)
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
