"""The matmul for Hopper (sm_90), written in Gluon: Y = X W + S B, persistent.

The scheme is that of `matmul_descriptor.py`: the K loop goes on over S and b, S comes from the
`shrink` launched just before. What plain Triton leaves to its compiler is written out here: a ring
of slots in shared memory, filled by TMA and announced by mbarriers, and asynchronous wgmma with one
step in flight. So the next tile's loads run during the epilogue, the adapter's steps multiply only
as many columns as there are ranks, and registers and shared memory are left for a small `shrink`
before it or `rank_grad` behind it to run on the same SMs at the same time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_lora.kernels import matmul
from fused_lora.kernels.launch import cdiv, launch

# Newer Triton has both copies under new names and raises under the old ones
RENAMED = hasattr(tma, "async_load")
tma_load = tma.async_load if RENAMED else tma.async_copy_global_to_shared
tma_store = tma.async_store if RENAMED else tma.async_copy_shared_to_global
tile_of = gluon.jit(matmul.tile_of.fn)

BLOCK_M = gl.constexpr(128)  # two warpgroups of 64 rows
BLOCK_K = gl.constexpr(64)
# 128 bytes, BLOCK_K 16-bit elements, are one row of the pattern that TMA and wgmma share
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def corner_of(tile, sizes, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    tiles_m, tiles_n, _, _ = sizes
    pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    return pid_m * BLOCK_M, pid_n * BLOCK_N


@gluon.jit
def next_slot(slot, phase, STAGES: gl.constexpr):
    """The place after this one in the ring; the phase flips with every turn."""
    wraps = slot == STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def load_pair(left, right, row, column, k, ring, slot, pred, W_NK: gl.constexpr):
    """Start the TMA loads of one step; `full` of the slot completes when all bytes have landed."""
    x_ring, w_ring, full = ring
    bar = full.index(slot)
    mbarrier.expect(bar, left.block_type.nbytes + right.block_type.nbytes, pred=pred)
    tma_load(left, [row, k], bar, x_ring.index(slot), pred=pred)
    if W_NK:
        tma_load(right, [column, k], bar, w_ring.index(slot), pred=pred)
    else:
        tma_load(right, [k, column], bar, w_ring.index(slot), pred=pred)


@gluon.jit
def load_step(
    descs,
    ring,
    slot,
    position,
    sizes,
    W_NK: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Load the step at `position` into a free slot, unless this program's tiles are through, and
    return the position after it: the next step, or the first one of the program's next tile."""
    x_desc, w_desc, s_desc, b_desc = descs
    tile, row, column, step = position
    tiles_m, tiles_n, main_steps, steps = sizes
    tiles = tiles_m * tiles_n
    pred = tile < tiles
    if step < main_steps:
        load_pair(x_desc, w_desc, row, column, step * BLOCK_K, ring, slot, pred, W_NK)
    else:
        if PDL:
            gdc_wait()  # from the second time on it returns at once
            gdc_launch_dependents()  # S is complete: what needs it, and not y, may start
        if s_desc is not None:
            k = (step - main_steps) * BLOCK_K
            load_pair(s_desc, b_desc, row, column, k, ring, slot, pred, W_NK)
    step += 1
    if step == steps:
        step = 0
        tile += gl.num_programs(0)
        row, column = corner_of(min(tile, tiles - 1), sizes, BLOCK_N, GROUP_M)
    return tile, row, column, step


@gluon.jit
def columns_of(
    operand, FIRST: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr, W_NK: gl.constexpr
):
    """The first DEPTH rows of a slot of w, or of b, as [K, N], and COLUMNS of its columns."""
    if W_NK:
        operand = operand.permute((1, 0))
    if DEPTH != BLOCK_K:
        operand = operand.slice(0, DEPTH, dim=0)
    if operand.shape[1] != COLUMNS:
        operand = operand.slice(FIRST, COLUMNS, dim=1)
    return operand


@gluon.jit
def multiply_step(acc, ring, slot, phase, DEPTH: gl.constexpr, W_NK: gl.constexpr):
    """acc += the first DEPTH columns of the step in this slot: on return they are in flight, and
    the step before is finished."""
    x_ring, w_ring, full = ring
    mbarrier.wait(full.index(slot), phase)
    x = x_ring.index(slot)
    if DEPTH != BLOCK_K:
        x = x.slice(0, DEPTH, dim=1)
    w = columns_of(w_ring.index(slot), 0, acc.shape[1], DEPTH, W_NK)
    acc = warpgroup_mma(x, w, acc, is_async=True)
    return warpgroup_mma_wait(1, (acc,))


@gluon.constexpr_function
def depth_of(columns):
    """How many of the columns that are left a step takes."""
    return min(columns, 64)


@gluon.jit
def add_masked(
    part,
    ring,
    slot,
    mask,
    row,
    column,
    FIRST_COLUMN: gl.constexpr,
    RANK: gl.constexpr,
    W_NK: gl.constexpr,
):
    """part + keep_scale * mask * (S b) of these columns of a tile; S and b are in the slot."""
    ROWS: gl.constexpr = part.shape[0]
    COLUMNS: gl.constexpr = part.shape[1]
    x_ring, w_ring, _ = ring
    mask_ptr, stride_mm, keep_scale, M, N = mask
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 16])
    s = x_ring.index(slot)
    if RANK != BLOCK_K:
        s = s.slice(0, RANK, dim=1)
    b = columns_of(w_ring.index(slot), FIRST_COLUMN, COLUMNS, RANK, W_NK)
    term = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    term = warpgroup_mma_wait(0, (warpgroup_mma(s, b, term, is_async=True),))
    # one byte of the mask holds eight columns
    term = term.reshape((ROWS, COLUMNS // 8, 8))
    bits: gl.constexpr = term.type.layout
    of_bytes: gl.constexpr = gl.SliceLayout(2, bits)
    offs_m = row + gl.arange(0, ROWS, gl.SliceLayout(1, of_bytes))
    offs_byte = column // 8 + FIRST_COLUMN // 8
    offs_byte += gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, of_bytes))
    packed = gl.load(
        mask_ptr + offs_m.to(gl.int64)[:, None] * stride_mm + offs_byte[None, :],
        mask=(offs_m < M)[:, None] & (offs_byte * 8 < N)[None, :],
        other=0,
    )
    shifts = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, bits)))
    keep = (packed.to(gl.int32)[:, :, None] >> shifts[None, None, :]) & 1
    term = gl.where(keep != 0, term * keep_scale, 0.0).reshape((ROWS, COLUMNS))
    return part + gl.convert_layout(term, part.type.layout)


@gluon.jit
def store_part(y_desc, y_smem, row, column, part):
    tma.store_wait(0)  # the store before this one has read y_smem
    y_smem.store(part.to(y_desc.dtype))
    fence_async_shared()
    tma_store(y_desc, [row, column], y_smem)


@gluon.jit
def store_tile(
    acc,
    out,
    y_smem,
    ring,
    slot,
    mask,
    row,
    column,
    MASKED_RANK: gl.constexpr,
    W_NK: gl.constexpr,
):
    """y = acc + bias, or with MASKED_RANK acc + the masked term of the adapter, in one column part
    or two as the block of y_desc says."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    y_desc, bias_ptr, N = out
    if bias_ptr is not None:
        offs_n = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc.type.layout))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(gl.float32)[None, :]
    if y_smem.shape[1] == COLUMNS:
        store_part(y_desc, y_smem, row, column, acc)
    else:
        PART: gl.constexpr = COLUMNS // 2
        low, high = acc.reshape((ROWS, 2, PART)).permute((0, 2, 1)).split()
        if MASKED_RANK > 0:
            low = add_masked(low, ring, slot, mask, row, column, 0, MASKED_RANK, W_NK)
        store_part(y_desc, y_smem, row, column, low)
        if MASKED_RANK > 0:
            high = add_masked(high, ring, slot, mask, row, column, PART, MASKED_RANK, W_NK)
        store_part(y_desc, y_smem, row, column + PART, high)


@gluon.jit(do_not_specialize=["M"])
def matmul_hopper_kernel(
    x_desc,
    w_desc,
    s_desc,
    b_desc,
    y_desc,
    bias_ptr,
    mask_ptr,
    M,
    N,
    K,
    stride_mm,
    keep_scale,
    W_NK: gl.constexpr,
    RANK: gl.constexpr,
    MASKED: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """y[M, N] = x[M, K] w + s[M, r] b + bias; RANK, r rounded up, is 0 without an adapter. MASKED:
    y[M, N] = x[M, K] w + keep_scale * mask * (s[M, r] b), mask holds bits of y's shape, r <= 64.

    w is stored [N, K] and b [N, r] when W_NK (forward), else [K, N] and [r, N] (dX). Grid: at most
    one program an SM and no more than there are tiles. All 8 warps multiply and load: step
    n + STAGES - 1 goes where step n - 1 has been. Gluon puts the barrier between a read that both
    warpgroups have finished and the next load.
    """
    main_steps = gl.cdiv(K, BLOCK_K)
    steps = main_steps + (RANK + BLOCK_K - 1) // BLOCK_K
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), main_steps, steps)
    descs = (x_desc, w_desc, s_desc, b_desc)
    out = (y_desc, bias_ptr, N)
    mask = (mask_ptr, stride_mm, keep_scale, M, N)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_shape, LAYOUT)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_shape, LAYOUT)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_shape, LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    ring = (x_ring, w_ring, full)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    row, column = corner_of(gl.program_id(0), sizes, BLOCK_N, GROUP_M)
    position = (gl.program_id(0), row, column, gl.to_tensor(0))
    for ahead in range(STAGES - 1):
        position = load_step(descs, ring, ahead, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
    before = gl.to_tensor(STAGES - 1)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), sizes[0] * sizes[1], gl.num_programs(0)):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        for _ in range(main_steps):
            acc = multiply_step(acc, ring, slot, phase, BLOCK_K, W_NK)
            position = load_step(descs, ring, before, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
            before = slot
            slot, phase = next_slot(slot, phase, STAGES)
        if not MASKED:
            for first in gl.static_range(0, RANK, BLOCK_K):
                acc = multiply_step(acc, ring, slot, phase, depth_of(RANK - first), W_NK)
                position = load_step(
                    descs, ring, before, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M
                )
                before = slot
                slot, phase = next_slot(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, (acc,))
        row, column = corner_of(tile, sizes, BLOCK_N, GROUP_M)
        if MASKED:
            position = load_step(descs, ring, before, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
            mbarrier.wait(full.index(slot), phase)
            store_tile(acc, out, y_smem, ring, slot, mask, row, column, RANK, W_NK)
            before = slot
            slot, phase = next_slot(slot, phase, STAGES)
        else:
            store_tile(acc, out, y_smem, ring, slot, mask, row, column, 0, W_NK)
    tma.store_wait(0)


def hopper_matmul(
    x, w, y, config, programs, *, b=None, S=None, bias=None, mask=None, keep_scale=1.0, pdl=False
):
    """Launch `matmul_hopper_kernel`. x [M, K], w [K, N] and b [r, N] as stored row-major or as the
    transpose of a row-major matrix (both alike), S [M, >= r], y [M, N], one 16-bit dtype. `mask`
    holds dropout bits of y's shape: the adapter's term is masked (r <= 64, y in two parts).

    config: BLOCK_M 128, BLOCK_K 64, num_warps 8; num_stages is the number of slots. With `pdl`,
    which needs b, the launch before this one on the stream must be the `shrink` that writes S,
    launched with `trigger` and itself without PDL: only then are x and w complete before this one
    starts.
    """
    assert (config.BLOCK_M, config.BLOCK_K, config.num_warps) == (128, 64, 8)
    assert b is not None or not pdl
    M, K = x.shape
    N = w.shape[1]
    transposed = w.stride(1) != 1
    block_x = (config.BLOCK_M, config.BLOCK_K)
    rank = 0 if b is None else b.shape[0]
    assert mask is None or (rank <= 64 and config.STORE_PARTS == 2 and bias is None)
    if transposed:
        w, b = w.t(), None if b is None else b.t()
        block_w = (config.BLOCK_N, config.BLOCK_K)
    else:
        block_w = (config.BLOCK_K, config.BLOCK_N)
    launch(
        matmul_hopper_kernel,
        (min(programs, cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)), 1, 1),
        (
            (x, block_x, LAYOUT),
            (w, block_w, LAYOUT),
            None if b is None else (S, block_x, LAYOUT),
            None if b is None else (b, block_w, LAYOUT),
            (y, (config.BLOCK_M, config.BLOCK_N // config.STORE_PARTS), LAYOUT),
            bias,
            mask,
        ),
        (M, N, K, 0 if mask is None else mask.stride(0)),
        (float(keep_scale),),
        (
            transposed,
            _whole_slices(rank),
            mask is not None,
            pdl,
            config.BLOCK_N,
            config.GROUP_M,
            config.num_stages,
        ),
        config,
        pdl=pdl,
    )


def _whole_slices(rank):
    """The rank rounded up so that its last step has 16, 32 or 64 columns, which Gluon can slice."""
    whole, rest = rank // 64 * 64, rank % 64
    return whole + (max(16, 1 << (rest - 1).bit_length()) if rest else 0)
