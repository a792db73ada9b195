"""The matmul in one launch: the first column of tiles also forms S and publishes it to the others.

A candidate for narrow outputs (N = 1024), where a shrink in front cannot hide. Tiles of column 0
compute S = scale * X A^T beside their own product, store it and raise a flag for their row block;
every other tile acquires that flag after its own main product. Programs walk tiles in ascending
order and all tiles of column 0 come first, so a program never waits for a tile it has yet to
compute; all programs must be resident at once, hence at most one an SM.
"""

import triton
import triton.language as tl

from fused_lora.kernels.launch import cdiv, launch
from fused_lora.kernels.matmul import tile_of


@triton.jit(do_not_specialize=["M"])
def matmul_producer_kernel(
    x_desc,
    w_desc,
    a_desc,
    y_desc,
    b_ptr,
    s_ptr,
    flag_ptr,
    bias_ptr,
    scaling_ptr,
    M,
    N,
    K,
    r,
    columns,
    stride_br,
    stride_bn,
    stride_sm,
    scale,
    W_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[M, N] = x[M, K] w + S[M, r] b + bias with S = scale * x a.

    w is stored [N, K] and a [r, K] when W_NK (forward), else w [K, N] and a [K, r] (dX).
    flag: int32, one per row block, zero at launch.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    if HAS_SCALING:
        scale *= tl.load(scaling_ptr)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        produces = tile < tiles_m
        pid_m, pid_n = tile_of(tile - tiles_m, tiles_m, max(tiles_n - 1, 1), GROUP_M)
        pid_m = tl.where(produces, tile, pid_m)
        pid_n = tl.where(produces, 0, pid_n + 1)
        row = pid_m * BLOCK_M
        column = pid_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = column + tl.arange(0, BLOCK_N)
        s_tile = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
        inside_s = (offs_m < M)[:, None] & (offs_r < columns)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if produces:
            side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)  # [M, r]
            for step in tl.range(0, steps):
                k = step * BLOCK_K
                x = x_desc.load([row, k])
                if W_NK:
                    w = w_desc.load([column, k]).T
                    a = a_desc.load([0, k]).T
                else:
                    w = w_desc.load([k, column])
                    a = a_desc.load([k, 0])
                acc = tl.dot(x, w, acc)
                side = tl.dot(x, a, side)
            # plain stores, not TMA: the asynchronous proxy is not ordered by the flag
            tl.store(s_tile, (side * scale).to(s_ptr.dtype.element_ty), mask=inside_s)
            tl.debug_barrier()  # all threads' stores before the one that announces them
            tl.atomic_xchg(flag_ptr + pid_m, 1, sem="release")
        else:
            for step in tl.range(0, steps):
                k = step * BLOCK_K
                x = x_desc.load([row, k])
                if W_NK:
                    w = w_desc.load([column, k]).T
                else:
                    w = w_desc.load([k, column])
                acc = tl.dot(x, w, acc)
            while tl.atomic_cas(flag_ptr + pid_m, 1, 1, sem="acquire") != 1:
                pass
            tl.debug_barrier()
        s = tl.load(s_tile, mask=inside_s, other=0.0)
        b = tl.load(
            b_ptr
            + offs_r.to(tl.int64)[:, None] * stride_br
            + offs_n.to(tl.int64)[None, :] * stride_bn,
            mask=(offs_r < r)[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(s, b.to(s.dtype), acc)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        y_desc.store([row, column], acc.to(y_desc.dtype))


def producer_matmul(
    x, w, a, b, y, S, flags, config, programs, *, bias=None, scale=1.0, scaling=None
):
    """Launch `matmul_producer_kernel`: x [M, K], w [K, N] and a [r, K] in one 16-bit dtype, w and a
    as stored or transposed, b [r, N] of any strides, S [M, >= r], y [M, N], flags int32 zeros
    [cdiv(M, BLOCK_M)]. `programs` must all fit on the device at once.
    """
    M, K = x.shape
    N = w.shape[1]
    r = a.shape[0]
    block_r = config.block_r(S.shape[1], True)
    transposed = w.stride(1) != 1
    if transposed:
        block_w, block_a = (config.BLOCK_N, config.BLOCK_K), (block_r, config.BLOCK_K)
        w = w.t()
    else:
        block_w, block_a = (config.BLOCK_K, config.BLOCK_N), (config.BLOCK_K, block_r)
        a = a.t()
    launch(
        matmul_producer_kernel,
        (min(programs, cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)), 1, 1),
        (
            (x, (config.BLOCK_M, config.BLOCK_K)),
            (w, block_w),
            (a, block_a),
            (y, (config.BLOCK_M, config.BLOCK_N)),
            b,
            S,
            flags,
            bias,
            scaling,
        ),
        (M, N, K, r, S.shape[1], *b.stride(), S.stride(0)),
        (float(scale),),
        (
            transposed,
            bias is not None,
            scaling is not None,
            config.BLOCK_M,
            config.BLOCK_N,
            config.BLOCK_K,
            block_r,
            config.GROUP_M,
        ),
        config,
    )
