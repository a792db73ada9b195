"""The dropout mask of the adapter's input, in PyTorch: the same bits that the Triton kernels draw.

The generator is Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011: with seven rounds it passes all of BigCrush), keyed on the seed, with (column // 8, row, 0, 0)
as its counter. One call serves eight columns: its four 32-bit words are split into 16-bit halves,
low half first, and an element is kept when its half is at least round(65536 * p). So the mask
depends on seed, row and column alone, never on tile sizes, devices or the order of execution.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_CALLS_AT_ONCE = {"cpu": 2**15}  # pieces that stay in a CPU's cache
_CALLS_OF_A_GPU = 2**22  # about 300 MB of intermediate words

_GATHER = 0x0102040810204080
"""Times an int64 of eight bytes, each 0 or 1, it gathers them in the highest: byte j as bit j."""


def threshold(p: float) -> int:
    """The 16-bit value under which an element is dropped, for drop probability `p` in [0, 1)."""
    return min(65535, round(p * 65536))


def keep_scale(p: float) -> float:
    """What is kept is multiplied by this: the inverse of the probability with which it is, which is
    1 - p rounded to 16 bits."""
    return 65536 / (65536 - threshold(p))


def draw_seed(device: torch.device) -> Tensor:
    """A 0-dim int64 seed from torch's generator of `device`: reproducible by `torch.manual_seed`,
    restored by activation checkpointing, drawn anew at each replay of a CUDA graph."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def packed_columns(columns: int) -> int:
    """Bytes a row of `columns` elements takes in the packed mask: whole 32-bit words. Bits
    past the last column are unspecified."""
    return (columns + 31) // 32 * 4


def packed_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask as bits, uint8 [rows, packed_columns(columns)]: bit j of byte i is column
    8 i + j."""
    calls = packed_columns(columns)
    packed = torch.empty((rows, calls), dtype=torch.uint8, device=seed.device)
    at_once = _CALLS_AT_ONCE.get(seed.device.type, _CALLS_OF_A_GPU)
    height = max(1, at_once // max(1, calls))
    for first in range(0, rows, height):
        part = packed[first : first + height]
        words = torch.stack(_philox(seed, first, len(part), calls), -1).to(torch.int32)
        # eight unsigned halves a call, compared as signed ones
        halves = words.view(torch.int16).bitwise_xor_(-(2**15))
        bytes_of_0_or_1 = (halves >= threshold(p) - 2**15).view(torch.int64).squeeze(-1)
        part.copy_((bytes_of_0_or_1 * _GATHER) >> 56)
    return packed


def unpack(packed: Tensor, columns: int) -> Tensor:
    """bool [rows, columns] from the packed mask."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :columns].bool()


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask that the fused layer applies for `seed`, bool [rows, columns]: True is kept."""
    return unpack(packed_mask(seed, rows, columns, p), columns)


def _philox(seed: Tensor, first: int, rows: int, calls: int) -> list[Tensor]:
    """Four uint32 words (held in int64) [rows, calls] for counters (call, first + row, 0, 0)."""
    c0 = torch.arange(calls, device=seed.device)
    c1 = torch.arange(first, first + rows, device=seed.device).unsqueeze(1)
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=seed.device)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(7):
        # 32 x 32 bit products, whose 64 bits wrap round into int64; what stands above the low 32
        # bits of a word is cut off before it would matter, in the next product and at the end
        product_a, product_b = (c0 & _LOW) * _ROUND_A, (c2 & _LOW) * _ROUND_B
        c0, c1 = (product_b >> 32) ^ c1 ^ k0, product_b
        c2, c3 = (product_a >> 32) ^ c3 ^ k1, product_a
        k0, k1 = k0 + _KEY_A, k1 + _KEY_B
    return [word & _LOW for word in (c0, c1, c2, c3)]
