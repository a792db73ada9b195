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
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch

# Newer Triton has both copies under new names and raises under the old ones
RENAMED = hasattr(tma, "async_load")
tma_load = tma.async_load if RENAMED else tma.async_copy_global_to_shared
tma_store = tma.async_store if RENAMED else tma.async_copy_shared_to_global
tile_of = gluon.jit(matmul.tile_of.fn)

ROWS = gl.constexpr(16)  # of a tile that a warp has; a warpgroup is four warps
BLOCK_K = gl.constexpr(64)
# 128 bytes, BLOCK_K 16-bit elements, are one row of the pattern that TMA and wgmma share
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def corner_of(tile, sizes, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    tiles_m, tiles_n, _, _ = sizes
    pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    return pid_m * (ROWS * gl.num_warps()), pid_n * BLOCK_N


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
def accumulator(columns, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def depth_of(columns):
    """How many of the columns that are left a step takes."""
    return min(columns, 64)


@gluon.constexpr_function
def mask_layout(columns, warps):
    """Of [16 warps, columns / 32] words in the threads that have those rows of an accumulator: each
    has all words of two rows."""
    registers = [[0, 1 << i] for i in range((columns // 32).bit_length() - 1)] + [[8, 0]]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    rows = [[ROWS.value << i, 0] for i in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        registers, lanes, rows, [], [ROWS.value * warps, columns // 32]
    )


@gluon.jit
def mask_words(mask, row, column, COLUMNS: gl.constexpr):
    """The words of the dropout mask [rows of a tile, COLUMNS / 32] from this row and column on."""
    mask_ptr, stride_mm, M, N = mask
    layout: gl.constexpr = mask_layout(COLUMNS, gl.num_warps())
    offs_m = row + gl.arange(0, ROWS * gl.num_warps(), gl.SliceLayout(1, layout))
    offs_word = column // 32 + gl.arange(0, COLUMNS // 32, gl.SliceLayout(0, layout))
    return gl.load(
        mask_ptr.to(gl.pointer_type(gl.int32))
        + offs_m.to(gl.int64)[:, None] * (stride_mm // 4)
        + offs_word[None, :],
        mask=(offs_m < M)[:, None] & (offs_word * 32 < N)[None, :],
        other=0,
    )


@gluon.jit
def add_masked(
    part, words, ring, slot, FIRST: gl.constexpr, RANK: gl.constexpr, W_NK: gl.constexpr
):
    """part + mask * (S b) of these columns of a tile; S and b are in the slot."""
    HEIGHT: gl.constexpr = part.shape[0]
    COLUMNS: gl.constexpr = part.shape[1]
    x_ring, w_ring, _ = ring
    layout: gl.constexpr = accumulator(COLUMNS, gl.num_warps())
    s = x_ring.index(slot)
    if RANK != BLOCK_K:
        s = s.slice(0, RANK, dim=1)
    b = columns_of(w_ring.index(slot), FIRST, COLUMNS, RANK, W_NK)
    term = gl.zeros((HEIGHT, COLUMNS), gl.float32, layout)
    term = warpgroup_mma_wait(0, (warpgroup_mma(s, b, term, is_async=True),))
    term = term.reshape((HEIGHT, COLUMNS // 32, 32))
    bits: gl.constexpr = term.type.layout
    words = gl.convert_layout(words, gl.SliceLayout(2, bits))
    column = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, bits)))[None, None, :]
    # in two shifts: the first one is of the thread, the second one known to the compiler
    keep = ((words[:, :, None] >> (column & 6)) >> (column & 25)) & 1
    term = gl.where(keep != 0, term, 0.0).reshape((HEIGHT, COLUMNS))
    return part + gl.convert_layout(term, part.type.layout)


@gluon.jit
def halves(part):
    """Its columns in two tensors."""
    HEIGHT: gl.constexpr = part.shape[0]
    COLUMNS: gl.constexpr = part.shape[1]
    return part.reshape((HEIGHT, 2, COLUMNS // 2)).permute((0, 2, 1)).split()


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
    words,
    row,
    column,
    MASKED_RANK: gl.constexpr,
    W_NK: gl.constexpr,
):
    """y = acc + bias, or with MASKED_RANK acc + the masked term of the adapter, in one column part,
    two or four as the block of y_desc says."""
    COLUMNS: gl.constexpr = acc.shape[1]
    PART: gl.constexpr = y_smem.shape[1]
    y_desc, bias_ptr, N = out
    if bias_ptr is not None:
        offs_n = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc.type.layout))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(gl.float32)[None, :]
    parts = (acc,)
    if COLUMNS // PART >= 2:
        parts = halves(acc)
    if COLUMNS // PART == 4:
        parts = halves(parts[0]) + halves(parts[1])
    for i in gl.static_range(COLUMNS // PART):
        part = parts[i]
        if MASKED_RANK > 0:
            part = add_masked(part, words[i], ring, slot, i * PART, MASKED_RANK, W_NK)
        store_part(y_desc, y_smem, row, column + i * PART, part)


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
    W_NK: gl.constexpr,
    RANK: gl.constexpr,
    MASKED: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """y[M, N] = x[M, K] w + s[M, r] b + bias; RANK, r rounded up, is 0 without an adapter. MASKED:
    y[M, N] = x[M, K] w + mask * (s[M, r] b), mask holds bits of y's shape, r <= 64.

    w is stored [N, K] and b [N, r] when W_NK (forward), else [K, N] and [r, N] (dX). Grid: at most
    one program an SM and no more than there are tiles. All warps multiply and load: step
    n + STAGES - 1 goes where step n - 1 has been. Gluon puts the barrier between a read that all
    warpgroups have finished and the next load.
    """
    HEIGHT: gl.constexpr = ROWS * gl.num_warps()
    main_steps = gl.cdiv(K, BLOCK_K)
    steps = main_steps + (RANK + BLOCK_K - 1) // BLOCK_K
    sizes = (gl.cdiv(M, HEIGHT), gl.cdiv(N, BLOCK_N), main_steps, steps)
    descs = (x_desc, w_desc, s_desc, b_desc)
    out = (y_desc, bias_ptr, N)
    mask = (mask_ptr, stride_mm, M, N)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_shape, LAYOUT)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_shape, LAYOUT)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_shape, LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    fence_async_shared()
    ring = (x_ring, w_ring, full)
    layout: gl.constexpr = accumulator(BLOCK_N, gl.num_warps())
    row, column = corner_of(gl.program_id(0), sizes, BLOCK_N, GROUP_M)
    position = (gl.program_id(0), row, column, gl.to_tensor(0))
    for ahead in range(STAGES - 1):
        position = load_step(descs, ring, ahead, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
    before = gl.to_tensor(STAGES - 1)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), sizes[0] * sizes[1], gl.num_programs(0)):
        acc = gl.zeros((HEIGHT, BLOCK_N), gl.float32, layout)
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
        row, column = corner_of(tile, sizes, BLOCK_N, GROUP_M)
        words = ()
        if MASKED:
            for part in gl.static_range(BLOCK_N // y_smem.shape[1]):
                first = column + part * y_smem.shape[1]
                words = words + (mask_words(mask, row, first, y_smem.shape[1]),)
        acc = warpgroup_mma_wait(0, (acc,))
        if MASKED:
            position = load_step(descs, ring, before, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
            mbarrier.wait(full.index(slot), phase)
            store_tile(acc, out, y_smem, ring, slot, words, row, column, RANK, W_NK)
            before = slot
            slot, phase = next_slot(slot, phase, STAGES)
        else:
            store_tile(acc, out, y_smem, ring, slot, words, row, column, 0, W_NK)
    tma.store_wait(0)


def hopper_matmul(x, w, y, config, programs, *, b=None, S=None, bias=None, mask=None, pdl=False):
    """Launch `matmul_hopper_kernel`. x [M, K], w [K, N] and b [r, N] as stored row-major or as the
    transpose of a row-major matrix (both alike), S [M, >= r], y [M, N], one 16-bit dtype. `mask`
    holds dropout bits of y's shape: the adapter's term is masked (r <= 64, no bias).

    config: BLOCK_M is 16 rows a warp, num_warps 4 or 8, BLOCK_K 64; num_stages is the number of
    slots. With `pdl`, which needs b, the launch before this one on the stream must be the `shrink`
    that writes S, launched with `trigger` and itself without PDL: only then are x and w complete
    before this one starts.
    """
    assert (config.BLOCK_M, config.BLOCK_K) == (16 * config.num_warps, 64)
    assert b is not None or not pdl
    M, K = x.shape
    N = w.shape[1]
    transposed = w.stride(1) != 1
    block_x = (config.BLOCK_M, config.BLOCK_K)
    rank = 0 if b is None else b.shape[0]
    assert mask is None or (rank <= 64 and bias is None)
    # masked parts are narrow: beside the accumulator there is little room in the registers
    part = config.BLOCK_N // config.STORE_PARTS if mask is None else 64
    if transposed:
        w, b = w.t(), None if b is None else b.t()
        block_w = (config.BLOCK_N, config.BLOCK_K)
    else:
        block_w = (config.BLOCK_K, config.BLOCK_N)
    launch(
        matmul_hopper_kernel,
        (min(programs, cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)), 1, 1),
        config,
        pdl=pdl,
        x_desc=(x, block_x, LAYOUT),
        w_desc=(w, block_w, LAYOUT),
        s_desc=None if b is None else (S, block_x, LAYOUT),
        b_desc=None if b is None else (b, block_w, LAYOUT),
        y_desc=(y, (config.BLOCK_M, part), LAYOUT),
        bias_ptr=bias,
        mask_ptr=mask,
        M=M,
        N=N,
        K=K,
        stride_mm=0 if mask is None else mask.stride(0),
        W_NK=transposed,
        RANK=_whole_slices(rank),
        MASKED=mask is not None,
        PDL=pdl,
        BLOCK_N=config.BLOCK_N,
        GROUP_M=config.GROUP_M,
        STAGES=config.num_stages,
    )


def _whole_slices(rank):
    """The rank rounded up so that its last step has 16, 32 or 64 columns, which Gluon can slice."""
    whole, rest = rank // 64 * 64, rank % 64
    return whole + (max(16, 1 << (rest - 1).bit_length()) if rest else 0)
