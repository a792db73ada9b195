"""`shrink` under dropout, written in Gluon: S = scale * D(x) A^T, and the mask that it draws.

x goes from memory straight into the registers in which the tensor cores take it: eight neighbouring
columns of a token a thread, which is one call of the generator and one byte of the mask. So nothing
is exchanged between threads, no shared memory is needed, and a matmul that fills it has room for
this kernel beside it. A tile is transposed, [r, tokens]: a warp has as few as eight tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents

from fused_lora.kernels import dropout
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch

draw = gluon.jit(dropout.draw.fn)

VECTOR = gl.constexpr(8)  # columns a thread loads at once: one call of the generator, one byte
WORDS = gl.constexpr(4)  # of a vector
RANKS = gl.constexpr(16)  # of a tensor core's left operand
PACK = gl.constexpr(1024)  # elements of lora_B a program packs at once


@gluon.jit
def pack_rows(source_ptr, packed_ptr, packed_columns, source):
    """packed [rows, packed_columns] = source [rows, columns] in packed's dtype, zeros behind it."""
    rows, columns, stride_row, stride_column = source
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for first in range(gl.program_id(0) * PACK, rows * packed_columns, gl.num_programs(0) * PACK):
        offs = first + gl.arange(0, PACK, layout)
        row = offs // packed_columns
        column = offs % packed_columns
        value = gl.load(
            source_ptr + row.to(gl.int64) * stride_row + column.to(gl.int64) * stride_column,
            mask=(row < rows) & (column < columns),
            other=0.0,
        )
        gl.store(packed_ptr + offs, value.to(packed_ptr.dtype.element_ty), mask=row < rows)


@gluon.jit(do_not_specialize=["M", "threshold"])
def shrink_dropout_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    scaling_ptr,
    seed_ptr,
    mask_ptr,
    source_ptr,
    packed_ptr,
    ids_ptr,
    owner_ptr,
    column_scaling_ptr,
    M,
    K,
    r,
    columns,
    threshold,
    source_rows,
    source_columns,
    stride_source_row,
    stride_source_column,
    packed_columns,
    stride_xm,
    stride_ar,
    stride_ak,
    stride_sm,
    stride_mm,
    scale,
    TRIGGER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
):
    """S[m, j] = scale * sum_k D(x)[m, k] A[j, k], as `shrink_kernel` with DROPOUT, which draws the
    same mask. x [M, K] with unit column stride, K a multiple of 8, A [r, K], S [M, columns].

    Grid (programs, rank blocks). Loads run STAGES steps ahead, in registers.
    """
    if TRIGGER:  # lets the matmul behind this launch start on the SMs that are left
        gdc_launch_dependents()
    if packed_ptr is not None:
        if gl.program_id(1) == 0:
            source = (source_rows, source_columns, stride_source_row, stride_source_column)
            pack_rows(source_ptr, packed_ptr, packed_columns, source)
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, gl.num_warps()], [16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, VECTOR)
    x_layout: gl.constexpr = gl.DotOperandLayout(1, layout, VECTOR)
    if scaling_ptr is not None:
        scale *= gl.load(scaling_ptr)
    seed = gl.load(seed_ptr)
    rank = gl.program_id(1) * BLOCK_R
    x = (M, K, stride_xm)
    a = (r, K, stride_ar, stride_ak)
    adapters = (ids_ptr, owner_ptr, column_scaling_ptr)
    PARTS: gl.constexpr = BLOCK_R // RANKS
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    for block in range(gl.program_id(0), gl.cdiv(M, BLOCK_M), gl.num_programs(0)):
        token = block * BLOCK_M
        accs = (gl.zeros((RANKS, BLOCK_M), gl.float32, layout),) * PARTS
        ahead = ()
        for stage in gl.static_range(STAGES):
            ahead = ahead + (load_words(x_ptr, token, stage * BLOCK_K, x, BLOCK_K),)
        for first in range(0, K, STAGES * BLOCK_K):
            for stage in gl.static_range(STAGES):
                k = first + stage * BLOCK_K
                words = ahead[0]
                ahead = ahead[1:] + (load_words(x_ptr, token, k + STAGES * BLOCK_K, x, BLOCK_K),)
                left = ()  # before the mask is stored: no load is moved ahead of a store
                for part in gl.static_range(PARTS):
                    first_rank = rank + part * RANKS
                    left = left + (load_factor(a_ptr, first_rank, k, a, a_layout, BLOCK_K),)
                kept = drop(words, mask_ptr, seed, threshold, token, k, x, stride_mm)
                right = operand(kept, DTYPE, x_layout)
                sums = ()
                for part in gl.static_range(PARTS):
                    sums = sums + (mma_v2(left[part].to(DTYPE), right, accs[part]),)
                accs = sums
        for part in gl.static_range(PARTS):
            first_rank = rank + part * RANKS
            sizes = (M, r, columns, stride_sm)
            store_states(accs[part], s_ptr, scale, adapters, token, first_rank, sizes)


@gluon.constexpr_function
def words_layout(columns, warps):
    """Of x^T as [vectors, WORDS, tokens]: the registers of a tensor core's right operand, in which
    the vectors of a token go round its four threads."""
    lanes = [[1, 0, 0], [2, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    tokens = [[0, 0, 8 << i] for i in range(warps.bit_length() - 1)]
    vectors = columns // VECTOR.value
    registers = [[0, 1, 0], [0, 2, 0]] + [
        [4 << i, 0, 0] for i in range((vectors // 4).bit_length() - 1)
    ]
    shape = [vectors, WORDS.value, 8 * warps]
    return gl.DistributedLinearLayout(registers, lanes, tokens, [], shape)


@gluon.jit
def load_words(x_ptr, token, k, sizes, BLOCK_K: gl.constexpr):
    """x^T of the tokens and columns from these on, two elements a word: [vectors, WORDS, tokens]"""
    M, K, stride_xm = sizes
    layout: gl.constexpr = words_layout(BLOCK_K, gl.num_warps())
    rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))
    columns: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    places: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    offs_m = (token + gl.arange(0, 8 * gl.num_warps(), rows))[None, None, :]
    vector = (k // VECTOR + gl.arange(0, BLOCK_K // VECTOR, columns))[:, None, None]
    word = gl.arange(0, WORDS, places)[None, :, None]
    pointers = x_ptr.to(gl.pointer_type(gl.uint32)) + offs_m.to(gl.int64) * (stride_xm // 2)
    inside = (offs_m < M) & (vector * VECTOR < K)
    return gl.load(pointers + (vector * WORDS + word), mask=inside, other=0)


@gluon.jit
def load_factor(a_ptr, rank, k, sizes, LAYOUT: gl.constexpr, BLOCK_K: gl.constexpr):
    """A [RANKS, BLOCK_K] of the rows and columns from these on."""
    r, K, stride_ar, stride_ak = sizes
    rows = (rank + gl.arange(0, RANKS, gl.SliceLayout(1, LAYOUT)))[:, None]
    columns = (k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT)))[None, :]
    pointers = a_ptr + rows.to(gl.int64) * stride_ar + columns.to(gl.int64) * stride_ak
    return gl.load(pointers, mask=(rows < r) & (columns < K), other=0.0)


@gluon.jit
def drop(words, mask_ptr, seed, threshold, token, k, sizes, stride_mm):
    """The words of D(x), without its 1 / (1 - p); the mask is drawn and stored."""
    M, K, _ = sizes
    layout: gl.constexpr = words.type.layout
    of_bytes: gl.constexpr = gl.SliceLayout(1, layout)
    calls = k // VECTOR + gl.arange(0, words.shape[0], gl.SliceLayout(1, of_bytes))[:, None]
    tokens = token + gl.arange(0, words.shape[2], gl.SliceLayout(0, of_bytes))[None, :]
    packed = draw(seed, calls, tokens, threshold)
    if gl.program_id(1) == 0:
        gl.store(
            mask_ptr + tokens.to(gl.int64) * stride_mm + calls,
            packed.to(gl.uint8),
            mask=(tokens < M) & (calls * VECTOR < K),
        )
    places = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    pair = packed[:, None, :] >> (2 * places)[None, :, None].to(gl.uint32)
    return words & ((pair | (pair << 15)) & 0x00010001) * 0xFFFF


@gluon.jit
def operand(words, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Words of two 16-bit elements as a tensor core's right operand [BLOCK_K, tokens]."""
    halves = gl.join((words & 0xFFFF).to(gl.uint16), (words >> 16).to(gl.uint16))
    columns = halves.permute((0, 1, 3, 2)).reshape((words.shape[0] * VECTOR, words.shape[2]))
    return gl.convert_layout(columns.to(DTYPE, bitcast=True), LAYOUT)


@gluon.jit
def store_states(acc, s_ptr, scale, adapters, token, rank, sizes):
    ids_ptr, owner_ptr, column_scaling_ptr = adapters
    M, r, columns, stride_sm = sizes
    layout: gl.constexpr = acc.type.layout
    offs_m = token + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    offs_r = rank + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    factor = scale
    if ids_ptr is not None:
        ids = gl.maximum(gl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1), -1)
        owner = gl.load(owner_ptr + offs_r, mask=offs_r < r, other=-2)
        factor = scale * gl.load(column_scaling_ptr + offs_r, mask=offs_r < r, other=0.0)[:, None]
        acc = gl.where(ids[None, :] == owner[:, None], acc, 0.0)
    gl.store(
        s_ptr + offs_m.to(gl.int64)[None, :] * stride_sm + offs_r[:, None],
        (acc * factor).to(s_ptr.dtype.element_ty),
        mask=(offs_m < M)[None, :] & (offs_r < columns)[:, None],
    )


def shrink_dropout(
    x,
    a,
    S,
    config,
    programs,
    *,
    seed,
    threshold,
    mask,
    scale=1.0,
    scaling=None,
    source=None,
    packed=None,
    trigger=False,
    adapters=None,
):
    """Launch `shrink_dropout_kernel`: x [M, K] of a 16-bit dtype (unit column stride, rows 16-byte
    aligned, K a multiple of 8), a [r, K], S [M, >= r]. `mask` receives the bits drawn from `seed`.
    config: BLOCK_M is 8 tokens a warp, num_stages the steps that loads run ahead.

    `threshold`, `scale`, `scaling`, `source`, `packed`, `trigger` and `adapters` as in `shrink`.
    """
    assert config.BLOCK_M == 8 * config.num_warps
    M, K = x.shape
    block_r = config.block_r(S.shape[1])
    ids, owner, column_scaling = adapters[:3] if adapters is not None else (None, None, None)
    source_rows, source_columns = source.shape if source is not None else (0, 0)
    stride_source_row, stride_source_column = source.stride() if source is not None else (0, 0)
    launch(
        shrink_dropout_kernel,
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
        ids_ptr=ids,
        owner_ptr=owner,
        column_scaling_ptr=column_scaling,
        M=M,
        K=K,
        r=a.shape[0],
        columns=S.shape[1],
        threshold=threshold,
        source_rows=source_rows,
        source_columns=source_columns,
        stride_source_row=stride_source_row,
        stride_source_column=stride_source_column,
        packed_columns=0 if packed is None else packed.shape[1],
        stride_xm=x.stride(0),
        stride_ar=a.stride(0),
        stride_ak=a.stride(1),
        stride_sm=S.stride(0),
        stride_mm=mask.stride(0),
        scale=float(scale),
        TRIGGER=trigger,
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_R=block_r,
        STAGES=config.num_stages,
    )
