"""The dropout mask of the adapter's input, in PyTorch: the same bits that the Triton kernels draw.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), keyed on the seed, with (column // 8, row, 0, 0) as its counter. One call serves eight
columns: its four 32-bit words are split into 16-bit halves, low half first, and an element is kept
when its half is at least round(65536 * p). So the mask depends on seed, row and column alone, never
on tile sizes, devices or the order of execution.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS_PER_CALL = 8
_LOW = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def threshold(p: float) -> int:
    """The 16-bit value under which an element is dropped, for drop probability `p` in [0, 1)."""
    return min(65535, round(p * 65536))


def draw_seed(device: torch.device) -> Tensor:
    """A 0-dim int64 seed from torch's generator of `device`: reproducible by `torch.manual_seed`,
    restored by activation checkpointing, drawn anew at each replay of a CUDA graph."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def packed_columns(columns: int) -> int:
    """Bytes a row of `columns` elements takes in the packed mask."""
    return (columns + COLUMNS_PER_CALL - 1) // COLUMNS_PER_CALL


def packed_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask as bits, uint8 [rows, ceil(columns / 8)]: bit j of byte i is column 8 i + j."""
    words = _philox(seed, rows, packed_columns(columns))
    limit = threshold(p)
    packed = torch.zeros_like(words[0], dtype=torch.uint8)
    for index, word in enumerate(words):
        for half, value in enumerate((word & 0xFFFF, word >> 16)):
            packed |= (value >= limit).to(torch.uint8) << (2 * index + half)
    return packed


def unpack(packed: Tensor, columns: int) -> Tensor:
    """bool [rows, columns] from the packed mask."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1)[:, :columns].bool()


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask that the fused layer applies for `seed`, bool [rows, columns]: True is kept."""
    return unpack(packed_mask(seed, rows, columns, p), columns)


def _philox(seed: Tensor, rows: int, calls: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four uint32 words (held in int64) [rows, calls] for counters (call, row, 0, 0)."""
    device = seed.device
    c0 = torch.arange(calls, dtype=torch.int64, device=device).expand(rows, calls)
    c1 = torch.arange(rows, dtype=torch.int64, device=device).unsqueeze(1).expand(rows, calls)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_b, low_b = _multiply(_ROUND_B, c2)
        high_a, low_a = _multiply(_ROUND_A, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    return c0, c1, c2, c3


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low = constant * (value & 0xFFFF)  # < 2^48
    high = constant * (value >> 16)  # < 2^48
    middle = (low >> 16) + (high & 0xFFFF)  # < 2^33
    return (high >> 16) + (middle >> 16), ((middle << 16) | (low & 0xFFFF)) & _LOW
