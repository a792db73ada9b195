"""`decode`: the whole layer in one launch for few tokens (M <= 64), K split over programs.

LoRA is linear, so each split applies its own partial S: y = sum_k [x_k W_k^T + (s x_k A_k^T) B^T].
Splits write fp32 partials and the last to arrive at a tile adds them in index order. W streams
through as the left operand and the tokens are the right one: a tile is transposed, [N, M].
"""

import triton
import triton.language as tl

from fused_lora.kernels import adapters
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch
from fused_lora.kernels.sums import add_product


@triton.jit(do_not_specialize=["M", "steps_per_split"])
def decode_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    scaling_ptr,
    partial_ptr,
    partial_s_ptr,
    counter_ptr,
    s_ptr,
    y_ptr,
    ids_ptr,
    owner_ptr,
    column_scaling_ptr,
    M,
    N,
    K,
    r,
    columns,
    steps_per_split,
    stride_xm,
    stride_wk,
    stride_wn,
    stride_ar,
    stride_ak,
    stride_br,
    stride_bn,
    stride_sm,
    stride_ym,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_SCALING: tl.constexpr,
    STORE_S: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[m, n] = sum_k x[m, k] w[k, n] + sum_j S[m, j] b[j, n] + bias[n], S = scale * x A^T.

    x [M, K] with M <= BLOCK_M, w [K, N], a [r, K], b [r, N], y [M, N], S [M, columns]. Grid
    (tiles of N, splits of K). counter: int32, one per tile, zero at launch. With ids, of
    `adapters.py`, S has the columns of a token's own adapter and zeros in the others.
    """
    pid_n = tl.program_id(0)
    split = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    inside_n = offs_n < N
    inside_m = offs_m < M
    x_rows = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm
    w_columns = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn
    a_rows = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar
    if HAS_SCALING:
        scale *= tl.load(scaling_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # [N, M]
    side = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)  # [r, M]
    # in steps of BLOCK_K: the compiler must see that columns stay aligned, or loads are narrow
    first = split * steps_per_split * BLOCK_K
    last = min(K, first + steps_per_split * BLOCK_K)
    for k in tl.range(first, last, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        inside_k = offs_k < K
        columns_k = offs_k.to(tl.int64)[None, :]
        x = tl.load(x_rows + offs_k[:, None], mask=inside_k[:, None] & inside_m[None, :], other=0.0)
        w = tl.load(
            w_columns + columns_k * stride_wk,
            mask=inside_n[:, None] & inside_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        a = tl.load(
            a_rows + columns_k * stride_ak,
            mask=(offs_r < r)[:, None] & inside_k[None, :],
            other=0.0,
            eviction_policy="evict_last",
        )
        acc = add_product(acc, w.to(x.dtype), x, INPUT_PRECISION)
        side = add_product(side, a.to(x.dtype), x, INPUT_PRECISION)
    b = tl.load(
        b_ptr + offs_n.to(tl.int64)[:, None] * stride_bn + offs_r.to(tl.int64)[None, :] * stride_br,
        mask=inside_n[:, None] & (offs_r < r)[None, :],
        other=0.0,
    )
    if ids_ptr is not None:
        scale *= tl.load(column_scaling_ptr + offs_r, mask=offs_r < r, other=0.0)[:, None]
        own = adapters.owned(ids_ptr, owner_ptr, offs_m, offs_r, M, r)
        side = tl.where(tl.trans(own), side, 0.0)
    side *= scale
    s = side.to(x_ptr.dtype.element_ty)
    acc = add_product(acc, b.to(s.dtype), s, INPUT_PRECISION)
    if SPLITS > 1 and s.dtype != tl.float32:
        # what rounding S took off: partial S may cancel in the sum over the splits, and then their
        # rounding is large beside that of the whole S
        acc = add_product(acc, b.to(s.dtype), (side - s).to(s.dtype), INPUT_PRECISION)

    if SPLITS > 1:
        offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + offs_m[None, :]
        base = partial_ptr + pid_n.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M) + offs
        tl.store(base + split * (BLOCK_N * BLOCK_M), acc)
        offs_s = offs_r[:, None] * BLOCK_M + offs_m[None, :]
        if STORE_S:
            if pid_n == 0:
                tl.store(partial_s_ptr + split * (BLOCK_R * BLOCK_M) + offs_s, side)
        tl.debug_barrier()  # all threads' stores before the one that announces them
        arrived = tl.atomic_add(counter_ptr + pid_n, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for i in tl.range(0, SPLITS):
                acc += tl.load(base + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            if STORE_S:
                if pid_n == 0:
                    side = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
                    for i in tl.range(0, SPLITS):
                        side += tl.load(
                            partial_s_ptr + i * (BLOCK_R * BLOCK_M) + offs_s, cache_modifier=".cg"
                        )
                    _store_s(s_ptr, side, offs_r, offs_m, columns, M, stride_sm)
            _store_y(y_ptr, bias_ptr, acc, offs_n, offs_m, inside_n, inside_m, stride_ym, HAS_BIAS)
    else:
        if STORE_S:
            if pid_n == 0:
                _store_s(s_ptr, side, offs_r, offs_m, columns, M, stride_sm)
        _store_y(y_ptr, bias_ptr, acc, offs_n, offs_m, inside_n, inside_m, stride_ym, HAS_BIAS)


@triton.jit
def _store_y(
    y_ptr,
    bias_ptr,
    acc,
    offs_n,
    offs_m,
    inside_n,
    inside_m,
    stride_ym,
    HAS_BIAS: tl.constexpr,
):
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=inside_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + offs_m.to(tl.int64)[None, :] * stride_ym + offs_n[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=inside_n[:, None] & inside_m[None, :],
    )


@triton.jit
def _store_s(s_ptr, side, offs_r, offs_m, columns, M, stride_sm):
    tl.store(
        s_ptr + offs_m.to(tl.int64)[None, :] * stride_sm + offs_r[:, None],
        side.to(s_ptr.dtype.element_ty),
        mask=(offs_r < columns)[:, None] & (offs_m < M)[None, :],
    )


def workspace(M, N, r, config):
    """(fp32 elements of the partial y, of the partial S, int32 counters) that a launch needs."""
    if config.SPLITS == 1:
        return 0, 0, 0
    tiles, block_m = cdiv(N, config.BLOCK_N), config.block_m(M)
    return (
        tiles * config.SPLITS * config.BLOCK_N * block_m,
        config.SPLITS * config.block_r(r) * block_m,
        tiles,
    )


def decode(
    x,
    w,
    a,
    b,
    y,
    config,
    *,
    bias=None,
    S=None,
    scale=1.0,
    scaling=None,
    partial=None,
    partial_s=None,
    counters=None,
    adapters=None,
    input_precision="ieee",
):
    """Launch `decode_kernel`: x [M, K] (unit column stride), w [K, N], a [r, K], b [r, N],
    y [M, N].

    S [M, >= r] is stored when given. `partial`, `partial_s` and zeroed `counters` have the sizes of
    `workspace` and are needed when config.SPLITS > 1. `adapters`: whose the tokens and the ranks
    are, if a and b pack several.
    """
    M, K = x.shape
    N = w.shape[1]
    r = a.shape[0]
    launch(
        decode_kernel,
        (cdiv(N, config.BLOCK_N), config.SPLITS, 1),
        (
            *(x, w, a, b, bias, scaling, partial, partial_s, counters, S, y),
            *(adapters[:3] if adapters is not None else (None, None, None)),
        ),
        (
            M,
            N,
            K,
            r,
            0 if S is None else S.shape[1],
            cdiv(cdiv(K, config.BLOCK_K), config.SPLITS),
            x.stride(0),
            *w.stride(),
            *a.stride(),
            *b.stride(),
            0 if S is None else S.stride(0),
            y.stride(0),
        ),
        (float(scale),),
        (
            bias is not None,
            scaling is not None,
            S is not None,
            config.SPLITS,
            input_precision,
            config.block_m(M),
            config.BLOCK_N,
            config.BLOCK_K,
            config.block_r(r),
        ),
        config,
    )
