"""The dropout mask inside a kernel: drawing it and reading it back, one bit an element.

The scheme is that of `fused_lora.dropout` (Philox4x32-7, counter (column // 8, row, 0, 0), eight
16-bit decisions a call), so that both draw the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def draw_bytes(seed, rows, first_byte, threshold, BYTES: tl.constexpr):
    """Mask bytes [rows, BYTES] of columns 8 * first_byte onwards; bit j of a byte is column j."""
    calls = first_byte + tl.arange(0, BYTES)
    c0 = tl.broadcast_to(calls[None, :], (rows.shape[0], BYTES)).to(tl.uint32)
    c1 = tl.broadcast_to(rows[:, None], (rows.shape[0], BYTES)).to(tl.uint32)
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, n_rounds=7)
    bits = _keep(w0, threshold) | (_keep(w1, threshold) << 2)
    bits |= (_keep(w2, threshold) << 4) | (_keep(w3, threshold) << 6)
    return bits.to(tl.uint8)


@triton.jit
def _keep(word, threshold):
    """Two decisions of one 32-bit word: bit 0 from the low half, bit 1 from the high half."""
    low = ((word & 0xFFFF) >= threshold).to(tl.uint32)
    high = ((word >> 16) >= threshold).to(tl.uint32)
    return low | (high << 1)


@triton.jit
def expand(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS / 8] bytes -> [ROWS, COLUMNS] of 0 and 1."""
    shifts = tl.arange(0, 8).to(tl.uint8)
    bits = (packed[:, :, None] >> shifts[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS))


@triton.jit
def load_keep(
    mask_ptr, offs_m, M, column, columns, stride_mm, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Read the mask of rows `offs_m` and COLS columns from `column` (multiples of 32) onwards, as 0
    and 1 [ROWS, COLS]. In words: what is narrower is not loaded ahead of its use."""
    offs_word = column // 32 + tl.arange(0, COLS // 32)
    inside = (offs_m < M)[:, None] & (offs_word * 32 < columns)[None, :]
    rows = mask_ptr.to(tl.pointer_type(tl.int32)) + offs_m.to(tl.int64)[:, None] * (stride_mm // 4)
    words = tl.load(rows + offs_word[None, :], mask=inside, other=0)
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLS))
