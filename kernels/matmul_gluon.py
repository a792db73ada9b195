"""The descriptor matmul once more, in Gluon for Hopper (sm_90 only): a candidate, not measured yet.

The scheme is that of `matmul_descriptor.py`: persistent, the K loop goes on over S and b, S comes
from the `shrink` launched just before. What plain Triton leaves to its compiler is written out
here: a ring of slots in shared memory, filled by TMA and handed over by mbarriers, and asynchronous
wgmma with one step in flight. So the next tile's loads run during the epilogue, and a warp of its
own can do the loading, which plain Triton cannot arrange for this loop on sm_90.

So far this is only compiled, by Triton 3.6 and 3.9: no result of it has been seen on a GPU.
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
from triton.language.extra.cuda import gdc_wait

from fused_lora.kernels import matmul
from fused_lora.kernels.launch import cdiv, launch

# Triton 3.9 has both copies under new names and raises under the old ones
RENAMED = hasattr(tma, "async_load")
tma_load = tma.async_load if RENAMED else tma.async_copy_global_to_shared
tma_store = tma.async_store if RENAMED else tma.async_copy_shared_to_global
tile_of = gluon.jit(matmul.tile_of.fn)

BLOCK_M = gl.constexpr(128)  # two warpgroups of 64 rows
HALF = gl.constexpr(64)
BLOCK_K = gl.constexpr(64)
# 128 bytes, BLOCK_K 16-bit elements, are one row of the pattern that TMA and wgmma share
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def corner_of(tile, sizes, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    tiles_m, tiles_n, _, _, _ = sizes
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
    x_ring, w_ring, full, _ = ring
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
    tiles_m, tiles_n, main_steps, steps, _ = sizes
    tiles = tiles_m * tiles_n
    pred = tile < tiles
    if step < main_steps:
        load_pair(x_desc, w_desc, row, column, step * BLOCK_K, ring, slot, pred, W_NK)
    else:
        if PDL:
            gdc_wait()  # from the second time on it returns at once
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
def multiply_step(
    acc, ring, slot, phase, FIRST_ROW: gl.constexpr, DEPTH: gl.constexpr, W_NK: gl.constexpr
):
    """acc += the first DEPTH columns of the step in this slot: on return they are in flight, and the
    step before is finished."""
    x_ring, w_ring, full, _ = ring
    mbarrier.wait(full.index(slot), phase)
    x = x_ring.index(slot).slice(FIRST_ROW, acc.shape[0])
    w = w_ring.index(slot)
    if W_NK:
        w = w.permute((1, 0))
    if DEPTH != BLOCK_K:
        x = x.slice(0, DEPTH, dim=1)
        w = w.slice(0, DEPTH, dim=0)
    acc = warpgroup_mma(x, w, acc, is_async=True)
    return warpgroup_mma_wait(1, (acc,))


@gluon.jit
def store_part(y_desc, y_smem, row, column, part):
    tma.store_wait(0)  # the store before this one has read y_smem
    y_smem.store(part.to(y_desc.dtype))
    fence_async_shared()
    tma_store(y_desc, [row, column], y_smem)


@gluon.jit
def store_tile(acc, y_desc, y_smem, bias_ptr, row, column, N):
    """y = acc + bias, in one column part or two as the block of y_desc says."""
    ROWS: gl.constexpr = acc.shape[0]
    COLUMNS: gl.constexpr = acc.shape[1]
    if bias_ptr is not None:
        offs_n = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc.type.layout))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        acc += bias.to(gl.float32)[None, :]
    if y_smem.shape[1] == COLUMNS:
        store_part(y_desc, y_smem, row, column, acc)
    else:
        low, high = acc.reshape((ROWS, 2, COLUMNS // 2)).permute((0, 2, 1)).split()
        store_part(y_desc, y_smem, row, column, low)
        store_part(y_desc, y_smem, row, column + COLUMNS // 2, high)


@gluon.jit
def loader(
    descs,
    ring,
    sizes,
    W_NK: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The loading warp of the specialised form: fills a slot once both multipliers have left it.

    It alone waits for shrink: y is stored only after S and b have come through the ring."""
    tiles_m, tiles_n, _, steps, _ = sizes
    x_ring, _, _, empty = ring
    tiles = gl.cdiv(tiles_m * tiles_n - gl.program_id(0), gl.num_programs(0))
    row, column = corner_of(gl.program_id(0), sizes, BLOCK_N, GROUP_M)
    position = (gl.program_id(0), row, column, gl.to_tensor(0))
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for _ in range(tiles * steps):
        # A new barrier counts as past its phase 1, so the first turn of the ring does not wait.
        mbarrier.wait(empty.index(slot), phase ^ 1)
        position = load_step(descs, ring, slot, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
        slot, phase = next_slot(slot, phase, x_ring.shape[0])


@gluon.jit
def multiplier(
    y_desc,
    y_smem,
    bias_ptr,
    ring,
    sizes,
    FIRST_ROW: gl.constexpr,
    RANK: gl.constexpr,
    W_NK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """One of the two warpgroups of the specialised form that multiply: 64 rows of every tile."""
    tiles_m, tiles_n, main_steps, _, N = sizes
    x_ring, _, _, empty = ring
    REST: gl.constexpr = RANK % BLOCK_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    before = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros((HALF, BLOCK_N), gl.float32, layout)
        for step in range(main_steps + RANK // BLOCK_K):
            acc = multiply_step(acc, ring, slot, phase, FIRST_ROW, BLOCK_K, W_NK)
            mbarrier.arrive(empty.index(before), pred=step > 0)
            before = slot
            slot, phase = next_slot(slot, phase, x_ring.shape[0])
        if REST > 0:
            acc = multiply_step(acc, ring, slot, phase, FIRST_ROW, REST, W_NK)
            mbarrier.arrive(empty.index(before))
            before = slot
            slot, phase = next_slot(slot, phase, x_ring.shape[0])
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(before))
        row, column = corner_of(tile, sizes, BLOCK_N, GROUP_M)
        store_tile(acc, y_desc, y_smem, bias_ptr, row + FIRST_ROW, column, N)
    tma.store_wait(0)


@gluon.jit
def pipelined(
    descs,
    y_desc,
    y_smem,
    bias_ptr,
    ring,
    sizes,
    RANK: gl.constexpr,
    W_NK: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """The other form: 8 warps multiply and load, step n + STAGES - 1 where step n - 1 has been.

    Gluon puts the barrier between a read that both warpgroups have finished and the next load."""
    tiles_m, tiles_n, main_steps, _, N = sizes
    STAGES: gl.constexpr = ring[0].shape[0]
    REST: gl.constexpr = RANK % BLOCK_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    row, column = corner_of(gl.program_id(0), sizes, BLOCK_N, GROUP_M)
    position = (gl.program_id(0), row, column, gl.to_tensor(0))
    for ahead in range(STAGES - 1):
        position = load_step(descs, ring, ahead, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
    before = gl.to_tensor(STAGES - 1)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        for _ in range(main_steps + RANK // BLOCK_K):
            acc = multiply_step(acc, ring, slot, phase, 0, BLOCK_K, W_NK)
            position = load_step(descs, ring, before, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
            before = slot
            slot, phase = next_slot(slot, phase, STAGES)
        if REST > 0:
            acc = multiply_step(acc, ring, slot, phase, 0, REST, W_NK)
            position = load_step(descs, ring, before, position, sizes, W_NK, PDL, BLOCK_N, GROUP_M)
            before = slot
            slot, phase = next_slot(slot, phase, STAGES)
        acc = warpgroup_mma_wait(0, (acc,))
        row, column = corner_of(tile, sizes, BLOCK_N, GROUP_M)
        store_tile(acc, y_desc, y_smem, bias_ptr, row, column, N)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def matmul_gluon_kernel(
    x_desc,
    w_desc,
    s_desc,
    b_desc,
    y_desc,
    bias_ptr,
    M,
    N,
    K,
    W_NK: gl.constexpr,
    RANK: gl.constexpr,
    PDL: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    SPECIALIZED: gl.constexpr,
):
    """y[M, N] = x[M, K] w + s[M, r] b + bias; RANK, r rounded up to 16, is 0 without an adapter.

    w is stored [N, K] and b [N, r] when W_NK (forward), else [K, N] and [r, N] (dX). Grid: at most
    one program an SM and no more than there are tiles. SPECIALIZED: the 4 warps launched multiply
    the upper 64 rows of each tile, 4 more warps the lower, and one warp loads.
    """
    main_steps = gl.cdiv(K, BLOCK_K)
    steps = main_steps + (RANK + BLOCK_K - 1) // BLOCK_K
    sizes = (gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), main_steps, steps, N)
    descs = (x_desc, w_desc, s_desc, b_desc)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_shape, LAYOUT)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_shape, LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    if SPECIALIZED:
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(empty.index(slot), count=2)
        fence_async_shared()
        ring = (x_ring, w_ring, full, empty)
        y_smem = gl.allocate_shared_memory(y_desc.dtype, [2] + y_desc.block_shape, LAYOUT)
        upper = y_smem.index(0)
        lower = y_smem.index(1)
        gl.warp_specialize(
            [
                (
                    multiplier,
                    (y_desc, upper, bias_ptr, ring, sizes, 0, RANK, W_NK, BLOCK_N, GROUP_M),
                ),
                (
                    multiplier,
                    (y_desc, lower, bias_ptr, ring, sizes, HALF, RANK, W_NK, BLOCK_N, GROUP_M),
                ),
                (loader, (descs, ring, sizes, W_NK, PDL, BLOCK_N, GROUP_M)),
            ],
            [4, 1],
            [240, 24],  # registers a thread; the default partition gets 240 too
        )
    else:
        fence_async_shared()
        ring = (x_ring, w_ring, full, None)
        y_smem = gl.allocate_shared_memory(y_desc.dtype, y_desc.block_shape, LAYOUT)
        pipelined(
            descs, y_desc, y_smem, bias_ptr, ring, sizes, RANK, W_NK, PDL, BLOCK_N, GROUP_M
        )


def _whole_slices(rank):
    """The rank rounded up so that its last step has 16, 32 or 64 columns, which Gluon can slice."""
    whole, rest = rank // 64 * 64, rank % 64
    return whole + (max(16, 1 << (rest - 1).bit_length()) if rest else 0)


def gluon_matmul(x, w, y, config, programs, *, b=None, S=None, bias=None, pdl=False):
    """Launch `matmul_gluon_kernel`; the arguments are those of `descriptor_matmul`.

    config: num_warps chooses the form, 4 specialised or 8 pipelined; num_stages is the number of
    slots; BLOCK_M is 128 and BLOCK_K 64. `pdl` needs b.
    """
    assert config.num_warps in (4, 8) and (config.BLOCK_M, config.BLOCK_K) == (128, 64)
    assert b is not None or not pdl
    M, K = x.shape
    N = w.shape[1]
    transposed = w.stride(1) != 1
    specialized = config.num_warps == 4
    block_x = (config.BLOCK_M, config.BLOCK_K)
    if transposed:
        w, b = w.t(), None if b is None else b.t()
        block_w = (config.BLOCK_N, config.BLOCK_K)
    else:
        block_w = (config.BLOCK_K, config.BLOCK_N)
    block_y = (64 if specialized else 128, config.BLOCK_N // config.STORE_PARTS)
    rank = 0 if b is None else b.shape[1 if transposed else 0]
    launch(
        matmul_gluon_kernel,
        (min(programs, cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)), 1, 1),
        (
            (x, block_x, LAYOUT),
            (w, block_w, LAYOUT),
            None if b is None else (S, block_x, LAYOUT),
            None if b is None else (b, block_w, LAYOUT),
            (y, block_y, LAYOUT),
            bias,
        ),
        (M, N, K),
        (),
        (
            transposed,
            _whole_slices(rank),
            pdl,
            config.BLOCK_N,
            config.GROUP_M,
            config.num_stages,
            specialized,
        ),
        config,
        pdl=pdl,
    )
