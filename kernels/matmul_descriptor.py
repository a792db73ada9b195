"""The matmul for datacentre Blackwell and ranks over 512: tensor descriptors (TMA), persistent, the
adapter in the K loop.

Y = X W + S B is one sum of products, so the K loop simply goes on: its last ceil(r / BLOCK_K)
steps take their tiles from S and B instead of X and W, through the same pipeline. S comes from the
`shrink` launched just before. With programmatic dependent launch (PDL) the first tile of each
program multiplies X and W while shrink still runs, and waits only before it needs S.
"""

import triton
import triton.language as tl

from fused_lora.kernels import adapters
from fused_lora.kernels.adapters import WINDOW_RANK
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch
from fused_lora.kernels.matmul import tile_of


@triton.jit(do_not_specialize=["M", "adapter_count"])
def matmul_descriptor_kernel(
    x_desc,
    w_desc,
    s_desc,
    b_desc,
    y_desc,
    bias_ptr,
    ids_ptr,
    window_ptr,
    M,
    N,
    K,
    adapter_count,
    SEGMENTS: tl.constexpr,
    W_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_PARTS: tl.constexpr,
):
    """y[M, N] = x[M, K] w + s[M, r] b + bias; SEGMENTS 1 leaves the adapter out.

    w is stored [N, K] and b [N, r] when W_NK (forward), else [K, N] and [r, N] (dX). Grid: at most
    one program an SM and no more than there are tiles. Every program waits before it stores. With
    a window, of `adapters.py`, a tile steps only through the ranks that its tokens want.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    main_steps = tl.cdiv(K, BLOCK_K)
    steps = main_steps + RANK_STEPS
    start = tl.program_id(0)
    for tile in tl.range(start, tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M
        column = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        rank_start = 0
        if window_ptr is not None:
            offs_m = row + tl.arange(0, BLOCK_M)
            rank_start, rank_end = adapters.rank_window(
                ids_ptr, window_ptr, offs_m, M, adapter_count, BLOCK_K
            )
            steps = main_steps + rank_end - rank_start
        first = 0
        if PDL:
            # Split, not peeled and no wait inside the loop: the other two forms make ptxas
            # serialise the tensor cores (3.6) or lose the software pipeline (3.9).
            first = tl.where(tile == start, main_steps, 0)
            for step in tl.range(0, first):
                x = x_desc.load([row, step * BLOCK_K])
                if W_NK:
                    w = w_desc.load([column, step * BLOCK_K]).T
                else:
                    w = w_desc.load([step * BLOCK_K, column])
                acc = tl.dot(x, w, acc)
            tl.extra.cuda.gdc_wait()
            # shrink is complete: what needs its results, and not y, may start (rank_grad)
            tl.extra.cuda.gdc_launch_dependents()
        for step in tl.range(first, steps):
            left = x_desc
            right = w_desc
            k = step * BLOCK_K
            if SEGMENTS == 2:
                if step >= main_steps:
                    left = s_desc
                    right = b_desc
                    k = (step - main_steps + rank_start) * BLOCK_K
            x = left.load([row, k])
            if W_NK:
                w = right.load([column, k]).T
            else:
                w = right.load([k, column])
            acc = tl.dot(x, w, acc)
        if HAS_BIAS:
            offs_n = column + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if STORE_PARTS == 1:
            y_desc.store([row, column], acc.to(y_desc.dtype))
        else:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            low, high = tl.split(halves)
            y_desc.store([row, column], low.to(y_desc.dtype))
            y_desc.store([row, column + BLOCK_N // 2], high.to(y_desc.dtype))


def descriptor_matmul(
    x, w, y, config, programs, *, b=None, S=None, bias=None, adapters=None, pdl=False
):
    """Launch `matmul_descriptor_kernel`. x [M, K], w [K, N] and b [r, N] as stored row-major or as
    the transpose of a row-major matrix (both alike), S [M, >= r], y [M, N], one 16-bit dtype.

    `adapters`: whose the tokens and the ranks are, if S and b pack several.
    With `pdl` the launch before this one on the stream must be the `shrink` that writes S, launched
    with `trigger` and itself without PDL: only then are x and w complete before this one starts.
    """
    M, K = x.shape
    N = w.shape[1]
    transposed = w.stride(1) != 1
    block_x = (config.BLOCK_M, config.BLOCK_K)
    if transposed:
        w, b = w.t(), None if b is None else b.t()
        block_w = (config.BLOCK_N, config.BLOCK_K)
    else:
        block_w = (config.BLOCK_K, config.BLOCK_N)
    rank = 0 if b is None else b.shape[1 if transposed else 0]
    ids = window = None
    if adapters is not None and rank > WINDOW_RANK:
        ids, window = adapters.ids, adapters.window
    launch(
        matmul_descriptor_kernel,
        (min(programs, cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)), 1, 1),
        config,
        pdl=pdl,
        x_desc=(x, block_x),
        w_desc=(w, block_w),
        s_desc=None if b is None else (S, block_x),
        b_desc=None if b is None else (b, block_w),
        y_desc=(y, (config.BLOCK_M, config.BLOCK_N // config.STORE_PARTS)),
        bias_ptr=bias,
        ids_ptr=ids,
        window_ptr=window,
        M=M,
        N=N,
        K=K,
        adapter_count=None if window is None else window.shape[0],
        SEGMENTS=1 if b is None else 2,
        W_NK=transposed,
        HAS_BIAS=bias is not None,
        RANK_STEPS=cdiv(rank, config.BLOCK_K),
        PDL=pdl,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_M=config.GROUP_M,
        STORE_PARTS=config.STORE_PARTS,
    )
