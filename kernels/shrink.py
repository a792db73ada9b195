"""`shrink`: S = scale * D(x) A^T, the rank-r half of the layer. Memory bound: reads x once.

The same kernel forms dS = scale * dY B in backward. It runs first, so it also does the small duties
that must be done before what follows: it draws the dropout mask, packs the other factor for the
descriptor matmul and zeroes the counters of rank_grad. With several adapters in the batch it is
here that a token gets the columns of its own adapter and zeros in all others.
"""

import triton
import triton.language as tl

from fused_lora.kernels import adapters, dropout
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch
from fused_lora.kernels.sums import add_product

PACK_ROWS, PACK_COLUMNS = 64, 64


@triton.jit(do_not_specialize=["M", "threshold", "counters"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    scaling_ptr,
    seed_ptr,
    mask_ptr,
    source_ptr,
    packed_ptr,
    counter_ptr,
    ids_ptr,
    owner_ptr,
    column_scaling_ptr,
    M,
    K,
    r,
    columns,
    source_rows,
    source_columns,
    packed_columns,
    counters,
    threshold,
    stride_xm,
    stride_ar,
    stride_ak,
    stride_sm,
    stride_mm,
    stride_source_row,
    stride_source_column,
    scale,
    HAS_SCALING: tl.constexpr,
    DROPOUT: tl.constexpr,
    PACK: tl.constexpr,
    ZERO: tl.constexpr,
    TRIGGER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PACK_M: tl.constexpr,
    PACK_N: tl.constexpr,
):
    """S[m, j] = scale * sum_k D(x)[m, k] A[j, k].

    x [M, K], A [r, K] (any strides), S [M, columns] with columns >= r, the rest written as zeros.
    With ids, of `adapters.py`: S[m, j] times the scaling of column j if it is the token's.
    Grid (programs, rank blocks); every program walks row blocks program, program + programs, ...
    """
    if TRIGGER:  # lets the matmul behind this launch start on the SMs that are left
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    pid_r = tl.program_id(1)
    programs = tl.num_programs(0)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if ZERO:
        if pid_r == 0:
            for start in tl.range(pid * BLOCK_M, counters, programs * BLOCK_M):
                offs = start + tl.arange(0, BLOCK_M)
                tl.store(counter_ptr + offs, tl.zeros((BLOCK_M,), tl.int32), mask=offs < counters)
    if PACK:
        if pid_r == 0:
            _pack(
                source_ptr,
                packed_ptr,
                source_rows,
                source_columns,
                packed_columns,
                stride_source_row,
                stride_source_column,
                pid,
                programs,
                PACK_M,
                PACK_N,
            )
    if HAS_SCALING:
        scale *= tl.load(scaling_ptr)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for block in tl.range(pid, tl.cdiv(M, BLOCK_M), programs):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        x_rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)  # [M, r]
        columns_k = K
        if ids_ptr is not None:
            if not DROPOUT:  # a tile that nobody wants is zero: x is not read
                wanted = adapters.any_wanted(ids_ptr, owner_ptr, offs_m, offs_r, M, r)
                columns_k = tl.where(wanted, K, 0)
        for k in tl.range(0, columns_k, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            inside_k = offs_k < K
            x = tl.load(
                x_rows + offs_k[None, :],
                mask=(offs_m < M)[:, None] & inside_k[None, :],
                other=0.0,
                eviction_policy="evict_first",  # keep the matmul's operands in L2
            )
            a = tl.load(
                a_ptr
                + offs_r.to(tl.int64)[None, :] * stride_ar
                + offs_k.to(tl.int64)[:, None] * stride_ak,
                mask=(offs_r < r)[None, :] & inside_k[:, None],
                other=0.0,
            )
            if DROPOUT:
                calls = k // 8 + tl.arange(0, BLOCK_K // 8)
                packed = dropout.draw(seed, calls[None, :], offs_m[:, None], threshold)
                packed = packed.to(tl.uint8)
                if pid_r == 0:
                    tl.store(
                        mask_ptr + offs_m.to(tl.int64)[:, None] * stride_mm + calls[None, :],
                        packed,
                        mask=(offs_m < M)[:, None] & (calls * 8 < K)[None, :],
                    )
                x = tl.where(dropout.expand(packed, BLOCK_M, BLOCK_K) != 0, x, 0.0).to(x.dtype)
            acc = add_product(acc, x, a.to(x.dtype), INPUT_PRECISION)
        factor = scale
        if ids_ptr is not None:  # looked up after the loop: a mask alive in it would spill
            factor = scale * tl.load(column_scaling_ptr + offs_r, mask=offs_r < r, other=0.0)[None]
            own = adapters.owned(ids_ptr, owner_ptr, offs_m, offs_r, M, r)
            acc = tl.where(own, acc, 0.0)
        tl.store(
            s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :],
            (acc * factor).to(s_ptr.dtype.element_ty),
            mask=(offs_m < M)[:, None] & (offs_r < columns)[None, :],
        )


@triton.jit
def _pack(
    source_ptr,
    packed_ptr,
    rows,
    columns,
    packed_columns,
    stride_row,
    stride_column,
    pid,
    programs,
    PACK_M: tl.constexpr,
    PACK_N: tl.constexpr,
):
    """packed [rows, packed_columns] = source [rows, columns] in packed's dtype, zeros behind it."""
    across = tl.cdiv(packed_columns, PACK_N)
    for tile in tl.range(pid, tl.cdiv(rows, PACK_M) * across, programs):
        offs_m = (tile // across) * PACK_M + tl.arange(0, PACK_M)
        offs_n = (tile % across) * PACK_N + tl.arange(0, PACK_N)
        value = tl.load(
            source_ptr
            + offs_m.to(tl.int64)[:, None] * stride_row
            + offs_n.to(tl.int64)[None, :] * stride_column,
            mask=(offs_m < rows)[:, None] & (offs_n < columns)[None, :],
            other=0.0,
        )
        tl.store(
            packed_ptr + offs_m.to(tl.int64)[:, None] * packed_columns + offs_n[None, :],
            value.to(packed_ptr.dtype.element_ty),
            mask=(offs_m < rows)[:, None] & (offs_n < packed_columns)[None, :],
        )


def shrink(
    x,
    a,
    S,
    config,
    programs,
    *,
    scale=1.0,
    scaling=None,
    seed=None,
    threshold=0,
    mask=None,
    source=None,
    packed=None,
    counters=None,
    trigger=False,
    adapters=None,
    input_precision="ieee",
):
    """Launch `shrink_kernel`: x [M, K] (unit column stride), a [r, K], S [M, >= r].

    `scaling` is a 0-dim fp32 tensor multiplied into `scale` on the device. `seed` and `threshold`
    switch dropout on, `mask` receives its bits. `source` is copied to `packed`;
    `counters` int32 are zeroed. `trigger` lets a dependent launch (PDL) start early.
    `adapters`: whose the tokens and the rows of a are, if a packs several.
    """
    M, K = x.shape
    r = a.shape[0]
    block_r = config.block_r(S.shape[1])
    if adapters is not None and seed is not None:
        block_r = min(block_r, 32)  # more columns beside the mask would spill
    ids, owner, column_scaling = adapters[:3] if adapters is not None else (None, None, None)
    source_rows, source_columns = source.shape if source is not None else (0, 0)
    stride_source_row, stride_source_column = source.stride() if source is not None else (0, 0)
    launch(
        shrink_kernel,
        (max(1, programs), cdiv(S.shape[1], block_r), 1),
        config,
        x_ptr=x,
        a_ptr=a,
        s_ptr=S,
        scaling_ptr=scaling,
        seed_ptr=seed,
        mask_ptr=mask,
        source_ptr=source,
        packed_ptr=packed,
        counter_ptr=counters,
        ids_ptr=ids,
        owner_ptr=owner,
        column_scaling_ptr=column_scaling,
        M=M,
        K=K,
        r=r,
        columns=S.shape[1],
        source_rows=source_rows,
        source_columns=source_columns,
        packed_columns=0 if packed is None else packed.shape[1],
        counters=0 if counters is None else counters.numel(),
        threshold=threshold,
        stride_xm=x.stride(0),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_sm=S.stride(0),
        stride_mm=0 if mask is None else mask.stride(0),
        stride_source_row=stride_source_row,
        stride_source_column=stride_source_column,
        scale=float(scale),
        HAS_SCALING=scaling is not None,
        DROPOUT=seed is not None,
        PACK=packed is not None,
        ZERO=counters is not None,
        TRIGGER=trigger,
        INPUT_PRECISION=input_precision,
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=block_r,
        PACK_M=PACK_ROWS,
        PACK_N=PACK_COLUMNS,
    )
