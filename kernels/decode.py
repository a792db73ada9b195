"""`decode`: the whole layer in one launch for few tokens (M <= 64), K split over programs.

LoRA is linear, so each split applies its own partial S: y = sum_k [x_k W_k^T + (s x_k A_k^T) B^T].
Splits write fp32 partials and the last to arrive at a tile adds them in index order.

An instruction of Hopper's tensor cores has 64 rows and 8 columns at least. So for the fewest tokens
W is the left operand and the tokens are the columns: a tile is [N, M]. With TOKENS_LEFT it is
[M, N], and the ranks are columns, too.
"""

import triton
import triton.language as tl

from fused_lora.kernels import adapters
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch
from fused_lora.kernels.sums import add_product

FP16_MAX = tl.constexpr(65504.0)


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
    TOKENS_LEFT: tl.constexpr,
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
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # as rows or columns of a tile [M, N], and of S [M, r], or of their transposes
    if TOKENS_LEFT:
        m, n, j = offs_m[:, None], offs_n[None, :], offs_r[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    else:
        m, n, j = offs_m[None, :], offs_n[:, None], offs_r[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        side = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    inside_m, inside_n = m < M, n < N
    x_rows = x_ptr + m.to(tl.int64) * stride_xm
    w_columns = w_ptr + n.to(tl.int64) * stride_wn
    a_rows = a_ptr + j.to(tl.int64) * stride_ar
    if HAS_SCALING:
        scale *= tl.load(scaling_ptr)
    # in steps of BLOCK_K: the compiler must see that columns stay aligned, or loads are narrow
    first = split * steps_per_split * BLOCK_K
    last = min(K, first + steps_per_split * BLOCK_K)
    for k in tl.range(first, last, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        if TOKENS_LEFT:
            of_x, of_w = offs_k[None, :], offs_k[:, None]
        else:
            of_x, of_w = offs_k[:, None], offs_k[None, :]
        x = tl.load(x_rows + of_x, mask=(of_x < K) & inside_m, other=0.0)
        w = tl.load(
            w_columns + of_w.to(tl.int64) * stride_wk,
            mask=(of_w < K) & inside_n,
            other=0.0,
            eviction_policy="evict_first",
        )
        a = tl.load(
            a_rows + of_w.to(tl.int64) * stride_ak,
            mask=(of_w < K) & (j < r),
            other=0.0,
            eviction_policy="evict_last",
        )
        if TOKENS_LEFT:
            a = a.to(x.dtype)  # before both products, as in the matmul's single mode
            acc = add_product(acc, x, w.to(x.dtype), INPUT_PRECISION)
            side = add_product(side, x, a, INPUT_PRECISION)
        else:
            acc = add_product(acc, w.to(x.dtype), x, INPUT_PRECISION)
            side = add_product(side, a.to(x.dtype), x, INPUT_PRECISION)
    if TOKENS_LEFT:
        of_b = offs_r[:, None]
    else:
        of_b = offs_r[None, :]
    b = tl.load(
        b_ptr + n.to(tl.int64) * stride_bn + of_b.to(tl.int64) * stride_br,
        mask=inside_n & (of_b < r),
        other=0.0,
    )
    if ids_ptr is not None:
        scale *= tl.load(column_scaling_ptr + j, mask=j < r, other=0.0)
        own = adapters.owned(ids_ptr, owner_ptr, offs_m, offs_r, M, r)
        side = tl.where(own if TOKENS_LEFT else tl.trans(own), side, 0.0)
    side *= scale
    s = side
    if SPLITS > 1 and x_ptr.dtype.element_ty == tl.float16:
        # a partial S may be beyond fp16 where the whole one is not: what is cut off goes in below
        s = tl.where(side > FP16_MAX, FP16_MAX, tl.where(side < -FP16_MAX, -FP16_MAX, side))
    s = s.to(x_ptr.dtype.element_ty)
    if SPLITS > 1 and s.dtype != tl.float32:
        # what rounding S takes off: partial S may cancel in the sum over the splits, and then their
        # rounding is large beside that of the whole S
        acc = _add_adapter(acc, (side - s).to(s.dtype), b, TOKENS_LEFT, INPUT_PRECISION)
    acc = _add_adapter(acc, s, b, TOKENS_LEFT, INPUT_PRECISION)

    if SPLITS > 1:
        # in the order of the tile
        if TOKENS_LEFT:
            offs, offs_s = m * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], m * BLOCK_R + j
        else:
            offs, offs_s = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m, j * BLOCK_M + m
        base = partial_ptr + pid_n.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M) + offs
        base_s = partial_s_ptr + offs_s
        tl.store(base + split * (BLOCK_N * BLOCK_M), acc)
        if STORE_S:
            if pid_n == 0:
                tl.store(base_s + split * (BLOCK_R * BLOCK_M), side)
        tl.debug_barrier()  # all threads' stores before the one that announces them
        arrived = tl.atomic_add(counter_ptr + pid_n, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            acc = tl.zeros_like(acc)
            for i in tl.range(0, SPLITS):
                acc += tl.load(base + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            if STORE_S:
                if pid_n == 0:
                    side = tl.zeros_like(side)
                    for i in tl.range(0, SPLITS):
                        side += tl.load(base_s + i * (BLOCK_R * BLOCK_M), cache_modifier=".cg")
                    _store_s(s_ptr, side, j, m, columns, M, stride_sm)
            _store_y(y_ptr, bias_ptr, acc, n, m, N, M, stride_ym, HAS_BIAS)
    else:
        if STORE_S:
            if pid_n == 0:
                _store_s(s_ptr, side, j, m, columns, M, stride_sm)
        _store_y(y_ptr, bias_ptr, acc, n, m, N, M, stride_ym, HAS_BIAS)


@triton.jit
def _add_adapter(acc, s, b, TOKENS_LEFT: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    if TOKENS_LEFT:
        return add_product(acc, s, b.to(s.dtype), INPUT_PRECISION)
    else:
        return add_product(acc, b.to(s.dtype), s, INPUT_PRECISION)


@triton.jit
def _store_y(y_ptr, bias_ptr, acc, n, m, N, M, stride_ym, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m.to(tl.int64) * stride_ym + n, y, mask=(n < N) & (m < M))


@triton.jit
def _store_s(s_ptr, side, j, m, columns, M, stride_sm):
    s = side.to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + m.to(tl.int64) * stride_sm + j, s, mask=(j < columns) & (m < M))


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
    ids, owner, column_scaling = adapters[:3] if adapters is not None else (None, None, None)
    launch(
        decode_kernel,
        (cdiv(N, config.BLOCK_N), config.SPLITS, 1),
        config,
        x_ptr=x,
        w_ptr=w,
        a_ptr=a,
        b_ptr=b,
        bias_ptr=bias,
        scaling_ptr=scaling,
        partial_ptr=partial,
        partial_s_ptr=partial_s,
        counter_ptr=counters,
        s_ptr=S,
        y_ptr=y,
        ids_ptr=ids,
        owner_ptr=owner,
        column_scaling_ptr=column_scaling,
        M=M,
        N=N,
        K=K,
        r=r,
        columns=0 if S is None else S.shape[1],
        steps_per_split=cdiv(cdiv(K, config.BLOCK_K), config.SPLITS),
        stride_xm=x.stride(0),
        stride_wk=w.stride(0),
        stride_wn=w.stride(1),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_br=b.stride(0),
        stride_bn=b.stride(1),
        stride_sm=0 if S is None else S.stride(0),
        stride_ym=y.stride(0),
        scale=float(scale),
        HAS_BIAS=bias is not None,
        HAS_SCALING=scaling is not None,
        STORE_S=S is not None,
        SPLITS=config.SPLITS,
        TOKENS_LEFT=config.TOKENS_LEFT,
        INPUT_PRECISION=input_precision,
        BLOCK_M=config.block_m(M),
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=config.block_r(r),
    )
