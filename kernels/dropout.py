"""The dropout mask inside a kernel: drawing it and reading it back, one bit an element.

The scheme is that of `fused_lora.dropout` (Philox4x32-7, counter (column // 8, row, 0, 0), eight
16-bit decisions a call), so that both draw the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def draw(seed, calls, rows, threshold):
    """Mask bytes, in uint32, of rows and calls (columns 8 * call onwards), broadcast against each
    other; bit j of a byte is column j. It serves in Gluon, too, which lacks some functions of
    Triton's language: only operators here."""
    c0 = calls.to(tl.uint32)
    c1 = rows.to(tl.uint32)
    zero = (c0 ^ c1) & 0
    c0 |= zero
    c1 |= zero
    c2 = zero
    c3 = zero
    key_a = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_b = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        # one instruction for both halves of a product, unlike umulhi and a product
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ key_a
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ key_b
        c3 = a.to(tl.uint32)
        key_a += 0x9E3779B9
        key_b += 0xBB67AE85
    # of each word first the low half, then the high one, compared where it stands
    limit = threshold.to(tl.uint32) << 16
    bits = ((c0 << 16) >= limit).to(tl.uint32) | ((c0 >= limit).to(tl.uint32) << 1)
    bits |= (((c1 << 16) >= limit).to(tl.uint32) << 2) | ((c1 >= limit).to(tl.uint32) << 3)
    bits |= (((c2 << 16) >= limit).to(tl.uint32) << 4) | ((c2 >= limit).to(tl.uint32) << 5)
    return bits | (((c3 << 16) >= limit).to(tl.uint32) << 6) | ((c3 >= limit).to(tl.uint32) << 7)


@triton.jit
def expand(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS / 8] bytes or [ROWS, COLUMNS / 32] words -> [ROWS, COLUMNS] of 0 and 1."""
    shifts = tl.arange(0, COLUMNS // packed.shape[1]).to(packed.dtype)
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
    return expand(tl.load(rows + offs_word[None, :], mask=inside, other=0), ROWS, COLS)
