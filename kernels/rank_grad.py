"""`rank_grad`: dA = dS^T D(x) and dB = dY^T S, both in one launch: out = P^T Q over the M tokens.

P (x or dY) is read once. The sum over M is split over programs: each writes an fp32 partial, and
the last to arrive at a tile adds them in index order, so the result is the same bit for bit at
every run. With several adapters a rank block reads the rows between its first and its last token.
"""

import triton
import triton.language as tl

from fused_lora.kernels import adapters, dropout
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch
from fused_lora.kernels.sums import add_product

SCAN = 1024  # ids a step of the search for those rows takes


@triton.jit(do_not_specialize=["M", "rows_per_split", "tiles_B"])
def rank_grad_kernel(
    x_ptr,
    ds_ptr,
    da_ptr,
    dy_ptr,
    s_ptr,
    db_ptr,
    mask_ptr,
    partial_ptr,
    counter_ptr,
    ids_ptr,
    owner_ptr,
    M,
    K,
    N,
    r,
    rows_per_split,
    tiles_B,
    stride_xm,
    stride_dsm,
    stride_dar,
    stride_dak,
    stride_dym,
    stride_sm,
    stride_dbr,
    stride_dbn,
    stride_mm,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
    BEHIND: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCAN: tl.constexpr,
):
    """dA[j, k] = sum_m dS[m, j] D(x)[m, k] and dB[n, j] = sum_m dY[m, n] S[m, j].

    x [M, K], dS and S [M, >= r], dY [M, N]. Grid (splits; column tiles of dB, then of dA; rank
    blocks). counter: int32, one per (column tile, rank block), zero at launch. ids and owner as in
    `adapters.py`: rows of tokens that want none of a block's columns are left out (under dropout
    multiplied by the zeros of dS).
    """
    tile = tl.program_id(1)
    if WANT_B:
        if tile < tiles_B:
            _one_tile(
                dy_ptr,
                s_ptr,
                db_ptr,
                mask_ptr,
                partial_ptr,
                counter_ptr,
                ids_ptr,
                owner_ptr,
                M,
                N,
                r,
                tile,
                rows_per_split,
                stride_dym,
                stride_sm,
                stride_dbr,
                stride_dbn,
                stride_mm,
                False,
                SPLITS,
                INPUT_PRECISION,
                BLOCK_M,
                BLOCK_C,
                BLOCK_R,
                SCAN,
            )
    if WANT_A:
        if tile >= tiles_B:
            _one_tile(
                x_ptr,
                ds_ptr,
                da_ptr,
                mask_ptr,
                partial_ptr,
                counter_ptr,
                ids_ptr,
                owner_ptr,
                M,
                K,
                r,
                tile - tiles_B,
                rows_per_split,
                stride_xm,
                stride_dsm,
                stride_dar,
                stride_dak,
                stride_mm,
                DROPOUT,
                SPLITS,
                INPUT_PRECISION,
                BLOCK_M,
                BLOCK_C,
                BLOCK_R,
                SCAN,
            )
    if BEHIND:  # whatever follows this kernel counts on dX, too
        tl.extra.cuda.gdc_wait()


@triton.jit
def _one_tile(
    p_ptr,
    q_ptr,
    out_ptr,
    mask_ptr,
    partial_ptr,
    counter_ptr,
    ids_ptr,
    owner_ptr,
    M,
    C,
    r,
    tile,
    rows_per_split,
    stride_pm,
    stride_qm,
    stride_or,
    stride_oc,
    stride_mm,
    DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SCAN: tl.constexpr,
):
    """One split of out[j, c] = sum_m D(P)[m, c] Q[m, j] for one tile of columns c."""
    split = tl.program_id(0)
    offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_c = offs_c < C
    inside_r = offs_r < r
    first = split * rows_per_split
    last = min(M, first + rows_per_split)
    if ids_ptr is not None:
        low, high = adapters.id_range(owner_ptr, offs_r, r)
        first, last = adapters.token_range(ids_ptr, low, high, first, last, BLOCK_M, SCAN)
    # A masked P is made in registers. As the left operand of wgmma it would serialise the tensor
    # cores, so with dropout the product is accumulated transposed, with P on the right.
    if DROPOUT:
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)  # [r, C]
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)  # [C, r]
    for m in tl.range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        inside_p = (offs_m < M)[:, None] & inside_c[None, :]
        if ids_ptr is not None:
            if not DROPOUT:  # there it spills on Triton 3.6 for sm_86; zeros in dS select as well
                ids = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1)
                inside_p &= ((ids >= low) & (ids <= high))[:, None]
        p = tl.load(
            p_ptr + rows * stride_pm + offs_c[None, :],
            mask=inside_p,
            other=0.0,
            eviction_policy="evict_first",
        )
        q = tl.load(
            q_ptr + rows * stride_qm + offs_r[None, :],
            mask=(offs_m < M)[:, None] & inside_r[None, :],
            other=0.0,
        )
        if DROPOUT:
            keep = dropout.load_keep(
                mask_ptr, offs_m, M, tile * BLOCK_C, C, stride_mm, BLOCK_M, BLOCK_C
            )
            p = tl.where(keep != 0, p, 0.0).to(p.dtype)
            acc = add_product(acc, tl.trans(q), p, INPUT_PRECISION)
        else:
            acc = add_product(acc, tl.trans(p), q, INPUT_PRECISION)
    if DROPOUT:
        acc = tl.trans(acc)

    out = (
        out_ptr
        + offs_c.to(tl.int64)[:, None] * stride_oc
        + offs_r.to(tl.int64)[None, :] * stride_or
    )
    inside = inside_c[:, None] & inside_r[None, :]
    if SPLITS == 1:
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        # partials [column tile, rank block, split, BLOCK_C, BLOCK_R], tiles as the grid counts them
        slot = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        offs = tl.arange(0, BLOCK_C)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        base = partial_ptr + slot.to(tl.int64) * (SPLITS * BLOCK_C * BLOCK_R) + offs
        tl.store(base + split * (BLOCK_C * BLOCK_R), acc)
        tl.debug_barrier()  # all threads' stores before the one that announces them
        arrived = tl.atomic_add(counter_ptr + slot, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
            for i in tl.range(0, SPLITS):
                total += tl.load(base + i * (BLOCK_C * BLOCK_R), cache_modifier=".cg")
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def tile_counts(K, N, r, config, want_A, want_B):
    """(column tiles of dA, column tiles of dB, rank blocks)."""
    return (
        cdiv(K, config.BLOCK_C) if want_A else 0,
        cdiv(N, config.BLOCK_C) if want_B else 0,
        cdiv(r, config.block_r(r)),
    )


def partial_elements(counts, splits, r, config):
    """fp32 elements of the partial sums, 0 when M is not split."""
    tiles_A, tiles_B, rank_blocks = counts
    per_tile = config.BLOCK_C * config.block_r(r)
    return (tiles_A + tiles_B) * rank_blocks * splits * per_tile if splits > 1 else 0


def rank_grad(
    config,
    splits,
    M,
    r,
    *,
    x=None,
    dS=None,
    dA=None,
    dY=None,
    S=None,
    dB=None,
    mask=None,
    partial=None,
    counters=None,
    adapters=None,
    behind=False,
    input_precision="ieee",
):
    """Launch `rank_grad_kernel` for the gradients whose three tensors are given.

    x [M, K], dS [M, >= r] -> dA [r, K]; dY [M, N], S [M, >= r] -> dB [N, r]. `mask` holds dropout
    bits of x's shape. `partial` fp32 and `counters` int32 (zeroed) are needed when splits > 1.
    `adapters`: whose the tokens and the r columns are, if S and dS pack several.
    `behind` (PDL) starts it while the launch before it still runs, which must be a dX launched with
    `pdl`: it lets others start when dS is complete, and writes nothing that is read here. Until it
    ends, nothing that it uses may be given to this launch to write to.
    """
    want_A, want_B = dA is not None, dB is not None
    K = dA.shape[1] if want_A else 0
    N = dB.shape[0] if want_B else 0
    tiles_A, tiles_B, rank_blocks = tile_counts(K, N, r, config, want_A, want_B)
    rows_per_split = cdiv(cdiv(M, config.BLOCK_M), splits) * config.BLOCK_M
    ids, owner = adapters[:2] if adapters is not None else (None, None)
    stride_dar, stride_dak = dA.stride() if want_A else (0, 0)
    stride_dbn, stride_dbr = dB.stride() if want_B else (0, 0)
    launch(
        rank_grad_kernel,
        (splits, tiles_A + tiles_B, rank_blocks),
        config,
        pdl=behind,
        x_ptr=x,
        ds_ptr=dS,
        da_ptr=dA,
        dy_ptr=dY,
        s_ptr=S,
        db_ptr=dB,
        mask_ptr=mask,
        partial_ptr=partial,
        counter_ptr=counters,
        ids_ptr=ids,
        owner_ptr=owner,
        M=M,
        K=K,
        N=N,
        r=r,
        rows_per_split=rows_per_split,
        tiles_B=tiles_B,
        stride_xm=x.stride(0) if want_A else 0,
        stride_dsm=dS.stride(0) if want_A else 0,
        stride_dar=stride_dar,
        stride_dak=stride_dak,
        stride_dym=dY.stride(0) if want_B else 0,
        stride_sm=S.stride(0) if want_B else 0,
        stride_dbr=stride_dbr,
        stride_dbn=stride_dbn,
        stride_mm=0 if mask is None else mask.stride(0),
        WANT_A=want_A,
        WANT_B=want_B,
        DROPOUT=mask is not None,
        SPLITS=splits,
        BEHIND=behind,
        INPUT_PRECISION=input_precision,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        BLOCK_R=config.block_r(r),
        SCAN=SCAN,
    )
