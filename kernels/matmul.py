"""`matmul`: Y = X W + S B + bias in one pass over X and W, the adapter term riding in the same
accumulator. Forward uses it for y (X = x), backward for dX (X = dY).

The portable kernel loads by pointers and takes any stride and alignment. Its single-launch mode
computes S beside the main product; its other mode is given S by `shrink`. With tensor descriptors:
`matmul_hopper.py`, and `matmul_descriptor.py` for datacentre Blackwell and ranks over 512.
"""

import triton
import triton.language as tl

from fused_lora.kernels import adapters, dropout
from fused_lora.kernels.adapters import WINDOW_RANK
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch
from fused_lora.kernels.sums import add_product


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile: GROUP_M rows of tiles are walked column by column, so that the
    tiles running together share x and W in the L2 cache."""
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    return first + (tile % per_group) % rows, (tile % per_group) // rows


@triton.jit(do_not_specialize=["M", "adapter_count"])
def matmul_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    s_ptr,
    bias_ptr,
    scaling_ptr,
    mask_ptr,
    y_ptr,
    ids_ptr,
    owner_ptr,
    column_scaling_ptr,
    window_ptr,
    M,
    N,
    K,
    r,
    columns,
    adapter_count,
    stride_xm,
    stride_wk,
    stride_wn,
    stride_ar,
    stride_ak,
    stride_br,
    stride_bn,
    stride_sm,
    stride_mm,
    stride_ym,
    scale,
    ADAPTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALING: tl.constexpr,
    STORE_S: tl.constexpr,
    DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[m, n] = sum_k x[m, k] w[k, n] + mask[m, n] sum_j S[m, j] b[j, n] + bias[n].

    x [M, K], w [K, N], b [r, N], S [M, columns], y [M, N]. ADAPTER is "none", "given" (S is read)
    or "single" (S = scale * x A^T is computed here, a [r, K], and the first tile column stores it).
    mask (DROPOUT, "given" only) holds bits of y's shape.
    With ids, of `adapters.py`, "single" keeps the columns of a token's own adapter; "given"
    steps only through the columns that the tokens of its tile want.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    inside_m = (offs_m < M)[:, None]
    inside_n = (offs_n < N)[None, :]
    x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    w_columns = w_ptr + offs_n.to(tl.int64)[None, :] * stride_wn
    if ADAPTER != "none":
        b_columns = b_ptr + offs_n.to(tl.int64)[None, :] * stride_bn
    if ADAPTER == "given" or STORE_S:
        s_rows = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # [M, N]
    if DROPOUT:  # the masked adapter term first, the main product on top: one accumulator
        acc = _add_given(
            acc,
            s_rows,
            b_columns,
            inside_m,
            inside_n,
            r,
            stride_br,
            x_ptr,
            ids_ptr,
            window_ptr,
            offs_m,
            M,
            adapter_count,
            INPUT_PRECISION,
            BLOCK_R,
        )
        keep = dropout.load_keep(
            mask_ptr, offs_m, M, pid_n * BLOCK_N, N, stride_mm, BLOCK_M, BLOCK_N
        )
        acc = tl.where(keep != 0, acc, 0.0)

    side = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)  # [M, r]
    for k in tl.range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x = tl.load(x_rows + offs_k[None, :], mask=inside_m, other=0.0)
            w = tl.load(
                w_columns + offs_k.to(tl.int64)[:, None] * stride_wk, mask=inside_n, other=0.0
            )
        else:
            inside_k = offs_k < K
            x = tl.load(x_rows + offs_k[None, :], mask=inside_m & inside_k[None, :], other=0.0)
            w = tl.load(
                w_columns + offs_k.to(tl.int64)[:, None] * stride_wk,
                mask=inside_k[:, None] & inside_n,
                other=0.0,
            )
        if ADAPTER == "single":
            # before the products: where w and a share one buffer in turn, the ptxas of Triton 3.6
            # reads the second product's address from a register that it never wrote
            a = tl.load(
                a_ptr
                + offs_r.to(tl.int64)[None, :] * stride_ar
                + offs_k.to(tl.int64)[:, None] * stride_ak,
                mask=(offs_r < r)[None, :] & (offs_k < K)[:, None],
                other=0.0,
            ).to(x.dtype)
        acc = add_product(acc, x, w.to(x.dtype), INPUT_PRECISION)
        if ADAPTER == "single":
            side = add_product(side, x, a, INPUT_PRECISION)

    if ADAPTER == "single":
        if HAS_SCALING:
            scale *= tl.load(scaling_ptr)
        if ids_ptr is not None:
            # here, not below: there it spills in fp32 on sm_80, and without ids in bf16 here
            b = _ranks_of(b_columns, offs_r, inside_n, r, stride_br)
            side *= tl.load(column_scaling_ptr + offs_r, mask=offs_r < r, other=0.0)[None, :]
            own = adapters.owned(ids_ptr, owner_ptr, offs_m, offs_r, M, r)
            side = tl.where(own, side, 0.0)
        s = (side * scale).to(x_ptr.dtype.element_ty)
        if STORE_S:
            if pid_n == 0:
                tl.store(s_rows + offs_r[None, :], s, mask=inside_m & (offs_r < columns)[None, :])
        if ids_ptr is None:
            b = _ranks_of(b_columns, offs_r, inside_n, r, stride_br)
        acc = add_product(acc, s, b.to(s.dtype), INPUT_PRECISION)
    elif ADAPTER == "given":
        if not DROPOUT:
            acc = _add_given(
                acc,
                s_rows,
                b_columns,
                inside_m,
                inside_n,
                r,
                stride_br,
                x_ptr,
                ids_ptr,
                window_ptr,
                offs_m,
                M,
                adapter_count,
                INPUT_PRECISION,
                BLOCK_R,
            )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=inside_m & inside_n,
    )


@triton.jit
def _ranks_of(b_columns, offs_r, inside_n, r, stride_br):
    """b[offs_r, columns of the tile]."""
    return tl.load(
        b_columns + offs_r.to(tl.int64)[:, None] * stride_br,
        mask=(offs_r < r)[:, None] & inside_n,
        other=0.0,
    )


@triton.jit
def _add_given(
    acc,
    s_rows,
    b_columns,
    inside_m,
    inside_n,
    r,
    stride_br,
    x_ptr,
    ids_ptr,
    window_ptr,
    offs_m,
    M,
    adapter_count,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + S b over all r, or those ranks that the tokens want, BLOCK_R of them at a time."""
    first_rank = 0
    end_rank = r
    if window_ptr is not None:
        first, end = adapters.rank_window(ids_ptr, window_ptr, offs_m, M, adapter_count, BLOCK_R)
        first_rank = first * BLOCK_R
        end_rank = min(r, end * BLOCK_R)
    for j in tl.range(first_rank, end_rank, BLOCK_R, num_stages=1):
        offs_r = j + tl.arange(0, BLOCK_R)
        s = tl.load(s_rows + offs_r[None, :], mask=inside_m & (offs_r < r)[None, :], other=0.0)
        b = _ranks_of(b_columns, offs_r, inside_n, r, stride_br)
        acc = add_product(acc, s, b.to(x_ptr.dtype.element_ty), INPUT_PRECISION)
    return acc


def matmul(
    x,
    w,
    y,
    config,
    *,
    a=None,
    b=None,
    S=None,
    bias=None,
    scale=1.0,
    scaling=None,
    mask=None,
    single=False,
    adapters=None,
    input_precision="ieee",
):
    """Launch `matmul_kernel`: x [M, K] and y [M, N] (unit column stride), w [K, N] of any strides.

    Plain product when b is None. With b [r, N]: S is read, or, if `single`, computed as
    scale * x a^T, a [r, K], and stored to S when S is given. `adapters`: whose the tokens and the
    ranks are, if a and b pack several.
    """
    M, K = x.shape
    N = w.shape[1]
    r = 0 if b is None else b.shape[0]
    block_r = config.block_r(r, single)
    ids = owner = scaling_of_columns = window = None
    if adapters is not None and single:
        ids, owner, scaling_of_columns, _ = adapters
    elif adapters is not None and r > WINDOW_RANK:
        ids, window = adapters.ids, adapters.window
    stride_wk, stride_wn = w.stride()
    stride_ar, stride_ak = a.stride() if single else (0, 0)
    stride_br, stride_bn = b.stride() if b is not None else (0, 0)
    launch(
        matmul_kernel,
        (cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N), 1, 1),
        config,
        x_ptr=x,
        w_ptr=w,
        a_ptr=a if single else None,
        b_ptr=b,
        s_ptr=S,
        bias_ptr=bias,
        scaling_ptr=scaling if single else None,
        mask_ptr=mask,
        y_ptr=y,
        ids_ptr=ids,
        owner_ptr=owner,
        column_scaling_ptr=scaling_of_columns,
        window_ptr=window,
        M=M,
        N=N,
        K=K,
        r=r,
        columns=0 if S is None else S.shape[1],
        adapter_count=None if window is None else window.shape[0],
        stride_xm=x.stride(0),
        stride_wk=stride_wk,
        stride_wn=stride_wn,
        stride_ar=stride_ar,
        stride_ak=stride_ak,
        stride_br=stride_br,
        stride_bn=stride_bn,
        stride_sm=0 if S is None else S.stride(0),
        stride_mm=0 if mask is None else mask.stride(0),
        stride_ym=y.stride(0),
        scale=float(scale),
        ADAPTER="none" if b is None else "single" if single else "given",
        HAS_BIAS=bias is not None,
        HAS_SCALING=single and scaling is not None,
        STORE_S=single and S is not None,
        DROPOUT=mask is not None,
        EVEN_K=K % config.BLOCK_K == 0,
        INPUT_PRECISION=input_precision,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=block_r,
        GROUP_M=config.GROUP_M,
    )
