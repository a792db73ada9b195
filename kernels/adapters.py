"""Several adapters in one launch: which adapter a token wants, and whose a column of S is.

Adapters are packed along the rank. A kernel that forms S or dS keeps S[m, j] where token m's
adapter owns column j and writes zero everywhere else; the matmul with S given then needs to know
nothing. Order of tokens never changes a result. It changes the speed: a row tile whose tokens want
few adapters skips the columns of the others.

Launchers take `adapters`, a tuple with the fields
    ids      int32 [M], the adapter of each token, -1 for none; what no column has counts as -1
    owner    int32 [r], the adapter of each column, -2 for free and padding columns
    scaling  fp32 [r], of each column
    window   int32 [adapters, 2], first column of each adapter and the one behind its last; r and 0
             for an adapter of rank 0, 0 and 0 where there is no adapter
"""

import triton
import triton.language as tl

WINDOW_RANK = 512  # above this total rank the matmul looks up which columns a row tile needs


@triton.jit
def owned(ids_ptr, owner_ptr, offs_m, offs_r, M, r):
    """bool [M, r]: whether column j belongs to the adapter of token m; to no id below 0."""
    ids = tl.maximum(tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1), -1)
    owner = tl.load(owner_ptr + offs_r, mask=offs_r < r, other=-2)
    return ids[:, None] == owner[None, :]


@triton.jit
def id_range(owner_ptr, offs_r, r):
    """(low, high): the adapters of these columns have ids from low to high; high < low if none."""
    owner = tl.load(owner_ptr + offs_r, mask=offs_r < r, other=-2)
    return tl.min(tl.where(owner >= 0, owner, 2147483647), 0), tl.max(owner, 0)


@triton.jit
def any_wanted(ids_ptr, owner_ptr, offs_m, offs_r, M, r):
    """Whether any of the tokens may want any of the columns."""
    low, high = id_range(owner_ptr, offs_r, r)
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1)
    return tl.max(((ids >= low) & (ids <= high)).to(tl.int32), 0) > 0


@triton.jit
def rank_window(ids_ptr, window_ptr, offs_m, M, adapters, STEP: tl.constexpr):
    """(first, end): the steps of STEP columns outside of which S is zero for all these tokens."""
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1)
    known = (ids >= 0) & (ids < adapters)
    end = tl.max(tl.load(window_ptr + 2 * ids + 1, mask=known, other=0), 0)
    first = tl.min(tl.load(window_ptr + 2 * ids, mask=known, other=2147483647), 0)
    return min(first, end) // STEP, tl.cdiv(end, STEP)


@triton.jit
def token_range(ids_ptr, low, high, first, last, STEP: tl.constexpr, SCAN: tl.constexpr):
    """The rows of [first, last) that tokens with an id in [low, high] span, from whole STEPs on."""
    last = max(first, last)
    begin = last
    end = first
    for m in tl.range(first, last, SCAN):
        offs = m + tl.arange(0, SCAN)
        ids = tl.load(ids_ptr + offs, mask=offs < last, other=-1)
        hit = (ids >= low) & (ids <= high)
        begin = min(begin, tl.min(tl.where(hit, offs, last), 0))
        end = max(end, tl.max(tl.where(hit, offs + 1, first), 0))
    return first + (begin - first) // STEP * STEP, end
