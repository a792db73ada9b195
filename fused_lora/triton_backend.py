"""Forward and backward over the Triton kernels: allocates, asks `kernels.config`, launches.
Imported by `ops` alone, and only where triton can be imported.

Forward and dX are one computation, Y = X W + (scale * D(X) A^T) B, with other operands:
y takes (x, weight^T, lora_A, lora_B^T), dX takes (dY, weight, lora_B^T, lora_A).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_lora import dropout
from fused_lora.kernels import config
from fused_lora.kernels.decode import decode, workspace
from fused_lora.kernels.launch import describable
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.tape import INTERPRETING, Tape, play
from fused_lora.scale import Adapters, Scale, padded_rank

__all__ = [
    "INTERPRETING",
    "adapter_gradients",
    "add_adapter",
    "backward",
    "choose_backend",
    "forward",
    "plan_product",
]


class Mask(NamedTuple):
    """Dropout of one call: its bits, drawn by shrink from `seed` in forward. What is kept is scaled
    by 1 / (1 - p), a factor that S and dS carry."""

    bits: Tensor  # uint8 [M, dropout.packed_columns(K)]
    p: float
    seed: Tensor | None = None


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout_p: float,
    seed: Tensor | None,
    adapters: Adapters | None,
    for_backward: bool,
) -> list[Tensor]:
    """[y [M, N]], and `for_backward` S [M, padded r] and with dropout the packed mask."""
    x = _unit_column_stride(x)
    inputs = (x, weight, lora_A, lora_B, bias, scale.tensor, seed, *(adapters or _ONE_ADAPTER))
    options = (config.PATH, _precision(x), scale.value, dropout_p, for_backward)
    return play(_forward, inputs, options)


def _forward(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: Tensor | None,
    seed: Tensor | None,
    ids: Tensor | None,
    owner: Tensor | None,
    scalings: Tensor | None,
    window: Tensor | None,
    path: str,
    precision: str,
    scale: float,
    dropout_p: float,
    for_backward: bool,
) -> list[Tensor]:
    M, K = x.shape
    y = tape.empty((M, weight.shape[0]))
    S = tape.empty((M, padded_rank(lora_A.shape[0]))) if for_backward else None
    mask = _new_mask(tape, M, K, dropout_p, seed)
    scaled = Scale(scale / (1.0 - dropout_p), scaling)
    w, b = weight.t(), lora_B.t()
    pack = _pack(ids, owner, scalings, window)
    plan = _plan(x, w, lora_A, y, draw=mask)
    _adapted_product(
        *(tape, plan, x, w, lora_A, b, y, S, scaled, pack, precision),
        bias=bias,
        draw=mask,
    )
    if S is None:
        return [y]
    return [y, S] if mask is None else [y, S, mask.bits]


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    scale: Scale,
    dropout_p: float,
    adapters: Adapters | None,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor | None]:
    """[dX [M, K], dA [r, K], dB [N, r]], None for those that are not needed. Without a weight dX is
    that of the adapter term alone."""
    dy = _unit_column_stride(dy)
    x = _unit_column_stride(x) if needs_A and x is not None else None
    S = S if needs_B else None
    mask_bits = None if mask_bits is None else _readable_in_words(mask_bits)
    inputs = (
        *(dy, x, weight, lora_A, lora_B, S, mask_bits, scale.tensor),
        *(adapters or _ONE_ADAPTER),
    )
    options = (
        *(config.PATH, _precision(dy), scale.value, dropout_p),
        *(needs_x, needs_A, needs_B),
    )
    return play(_backward, inputs, options)


def _backward(
    tape: Tape,
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    scaling: Tensor | None,
    ids: Tensor | None,
    owner: Tensor | None,
    scalings: Tensor | None,
    window: Tensor | None,
    path: str,
    precision: str,
    scale_value: float,
    dropout_p: float,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor | None]:
    M = dy.shape[0]
    N, (r, K) = lora_B.shape[0], lora_A.shape
    device = _device(dy.device)
    scale = Scale(scale_value / (1.0 - dropout_p), scaling)
    mask = None if mask_bits is None else Mask(mask_bits, dropout_p)
    a = lora_B.t()
    pack = _pack(ids, owner, scalings, window)
    apart = weight is None and needs_x
    dS = tape.empty((M, padded_rank(r))) if needs_A or apart else None
    dx = tape.empty((M, K)) if needs_x else None
    # allocated before dX is launched: nothing that dX uses and lets go may become theirs
    dA = tape.empty(lora_A.shape, lora_A.dtype) if needs_A else None
    dB = tape.empty(lora_B.shape, lora_B.dtype) if needs_B else None
    plan = None
    if dx is not None and weight is not None:
        plan = _plan(dy, weight, a, dx, masked=mask, followed=needs_A or needs_B)
    shrinks = plan.launches == 2 if plan is not None else dS is not None

    partial = counters = None
    if needs_A or needs_B:
        masked = mask is not None and needs_A
        tiles = config.rank_grad_tiles(device, _bits(dy), M, N, K, r, masked)
        counts = tile_counts(K, N, r, tiles, needs_A, needs_B)
        splits = config.rank_grad_splits(device, sum(counts[:2]) * counts[2], M, tiles)
        if splits > 1:
            partial = tape.empty((partial_elements(counts, splits, r, tiles),), torch.float32)
            # zeroed by shrink where one runs anyway
            slots = (sum(counts[:2]) * counts[2],)
            counters = tape.empty(slots, torch.int32, zeroed=not shrinks)

    if plan is not None:
        assert weight is not None and dx is not None
        _adapted_product(
            *(tape, plan, dy, weight, a, lora_A, dx, dS, scale, pack, precision),
            masked=mask,
            counters=counters if shrinks else None,
        )
    elif dS is not None:
        _shrink_only(dy, a, dS, scale, pack, precision, counters=counters)
    if apart:
        assert dx is not None
        matmul(  # a main product without terms
            dy[:, :0],
            dx[:0],
            dx,
            config.select("matmul", device, _bits(dy), M, K, N, r),
            b=lora_A,
            S=dS,
            mask=None if mask is None else mask.bits,
            adapters=pack,
            input_precision=precision,
        )

    if needs_A or needs_B:
        rank_grad(
            tiles,
            splits,
            M,
            r,
            x=x,
            dS=dS if needs_A else None,
            dA=dA,
            dY=dy if needs_B else None,
            S=S,
            dB=dB,
            mask=mask.bits if mask is not None and needs_A else None,
            partial=partial,
            counters=counters,
            adapters=pack,
            behind=config.rank_grad_behind(plan),
            input_precision=precision,
        )
    return [dx, dA, dB]


def add_adapter(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Scale,
    dropout_p: float,
    seed: Tensor | None,
    adapters: Adapters | None,
    for_backward: bool,
) -> list[Tensor]:
    """y += S B^T in place, S = scale * D(x) A^T: the product by the library, which reads and writes
    y once. Returns what `forward` returns beside y."""
    x = _unit_column_stride(x)
    inputs = (x, lora_A, scale.tensor, seed, *(adapters or _ONE_ADAPTER))
    kept = play(_term, inputs, (_precision(x), scale.value, dropout_p))
    y.addmm_(kept[0][:, : lora_A.shape[0]], lora_B.to(y.dtype).t())
    return kept if for_backward else []


def _term(
    tape: Tape,
    x: Tensor,
    lora_A: Tensor,
    scaling: Tensor | None,
    seed: Tensor | None,
    ids: Tensor | None,
    owner: Tensor | None,
    scalings: Tensor | None,
    window: Tensor | None,
    precision: str,
    scale: float,
    dropout_p: float,
) -> list[Tensor]:
    """[S [M, padded r]] and with dropout the packed mask."""
    M, K = x.shape
    S = tape.empty((M, padded_rank(lora_A.shape[0])))
    pack = _pack(ids, owner, scalings, window)
    mask = _new_mask(tape, M, K, dropout_p, seed)
    scaled = Scale(scale / (1.0 - dropout_p), scaling)
    _shrink_only(x, lora_A, S, scaled, pack, precision, draw=mask)
    return [S] if mask is None else [S, mask.bits]


def adapter_gradients(
    dy: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask_bits: Tensor | None,
    scale: Scale,
    dropout_p: float,
    adapters: Adapters | None,
    needs_x: bool,
    needs_A: bool,
    needs_B: bool,
) -> list[Tensor | None]:
    """[dX, dA, dB] of the adapter term alone, None for those that are not needed."""
    return backward(
        *(dy, x, None, lora_A, lora_B, S, mask_bits, scale, dropout_p, adapters),
        *(needs_x, needs_A, needs_B),
    )


def _new_mask(tape: Tape, M: int, K: int, dropout_p: float, seed: Tensor | None) -> Mask | None:
    """Room for the mask that a shrink draws, None without dropout."""
    if dropout_p == 0.0:
        return None
    return Mask(tape.empty((M, dropout.packed_columns(K)), torch.uint8), dropout_p, seed)


_ONE_ADAPTER = (None, None, None, None)


def _pack(
    ids: Tensor | None, owner: Tensor | None, scalings: Tensor | None, window: Tensor | None
) -> Adapters | None:
    """The tables of a pack from the inputs of a tape, None if there is one adapter."""
    if ids is None or owner is None or scalings is None or window is None:
        return None
    return Adapters(ids, owner, scalings, window)


def choose_backend(x: Tensor, N: int, r: int) -> str:
    """ "triton" or "aten" for a layer input x [M, K] on a GPU, with N outputs and rank r."""
    device = config.device_of(x.get_device())
    return config.choose_backend(device, _bits(x), x.shape[0], N, x.shape[1], r)


def plan_product(
    device: torch.device,
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    r: int,
    *,
    drawn: bool,
    masked: bool,
    followed: bool,
    addressable: bool,
) -> config.Product:
    """How Y [M, N] = X [M, K] W + S B runs. drawn: X is dropped before the adapter; masked: the
    adapter term is masked; followed: rank_grad runs next; addressable: X, W and Y by tensor
    descriptors."""
    return config.choose_product(
        _device(device),
        8 * dtype.itemsize,
        M,
        N,
        K,
        r,
        dropout=drawn,
        masked_output=masked,
        followed=followed,
        describable=addressable,
    )


def _plan(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    y: Tensor,
    *,
    draw: Mask | None = None,
    masked: Mask | None = None,
    followed: bool = False,
) -> config.Product:
    """How `_adapted_product` runs on these operands."""
    transposed = w.stride(1) != 1
    addressable = describable(x) and describable(y) and 1 in w.stride()
    stored_w = _stored(w, transposed)
    if w.dtype == x.dtype:
        addressable = addressable and describable(stored_w)
    else:  # autocast: the copy that is made of it has rows of exactly its width
        addressable = addressable and stored_w.shape[1] * x.element_size() % 16 == 0
    M, K = x.shape
    return plan_product(
        x.device,
        x.dtype,
        M,
        w.shape[1],
        K,
        a.shape[0],
        drawn=draw is not None,
        masked=masked is not None,
        followed=followed,
        addressable=addressable,
    )


def _adapted_product(
    tape: Tape,
    plan: config.Product,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    S: Tensor | None,
    scale: Scale,
    pack: Adapters | None,
    precision: str,
    *,
    bias: Tensor | None = None,
    draw: Mask | None = None,
    masked: Mask | None = None,
    counters: Tensor | None = None,
) -> None:
    """y = x w + mask * (S b) + bias, S = scale * D(x) a^T stored when a buffer is given.

    x [M, K], w [K, N], a [r, K], b [r, N], y [M, N]. `draw` drops x before a, `masked` masks the
    adapter term; `counters` are zeroed by shrink, which the plan must have. With a `pack`, S has
    the scaling of each column and is zero where the column is not the token's.
    """
    M, r = x.shape[0], a.shape[0]
    transposed = w.stride(1) != 1
    programs = _device(x.device).sm_count
    if plan.path == "decode":
        assert plan.decode is not None
        sizes = workspace(M, w.shape[1], r, plan.decode)
        split = plan.decode.SPLITS > 1
        decode(
            x,
            w,
            a,
            b,
            y,
            plan.decode,
            bias=bias,
            S=S,
            scale=scale.value,
            scaling=scale.tensor,
            partial=tape.empty((sizes[0],), torch.float32) if split else None,
            partial_s=tape.empty((sizes[1],), torch.float32) if split else None,
            counters=tape.empty((sizes[2],), torch.int32, zeroed=True) if split else None,
            adapters=pack,
            input_precision=precision,
        )
        return
    assert plan.matmul is not None
    if plan.path == "single":
        matmul(
            x,
            w,
            y,
            plan.matmul,
            a=a,
            b=b,
            S=S,
            bias=bias,
            scale=scale.value,
            scaling=scale.tensor,
            single=True,
            adapters=pack,
            input_precision=precision,
        )
        return

    if S is None:
        S = tape.empty((M, padded_rank(r)))
    assert plan.shrink is not None
    source = packed = None
    descriptors = plan.path in ("pdl", "hopper")
    if descriptors:
        # all segments of the loop have one dtype and rows that TMA can address
        w = w.to(x.dtype)  # under autocast a copy, for the length of this call
        stored = _stored(b, transposed)
        # rows of lora_B at r = 8 are one word of TMA: it would take them one by one
        narrow = stored.shape[1] < config.MIN_RANK_BLOCK
        if narrow or stored.dtype != x.dtype or not describable(stored):
            source = stored
            packed = tape.empty((stored.shape[0], padded_rank(stored.shape[1])))
            stored = packed
        b = _stored(stored, transposed)
    if plan.path == "hopper" and draw is not None:
        from fused_lora.kernels.shrink_dropout import shrink_dropout

        shrink_dropout(
            *(x, a, S, plan.shrink, plan.shrink_programs),
            seed=draw.seed,
            threshold=dropout.threshold(draw.p),
            mask=draw.bits,
            scale=scale.value,
            scaling=scale.tensor,
            source=source,
            packed=packed,
            trigger=True,
            adapters=pack,
        )
    else:
        _shrink(
            *(x, a, S, plan.shrink, plan.shrink_programs, scale, pack, precision),
            draw=draw,
            counters=counters,
            source=source,
            packed=packed,
            trigger=descriptors,
        )
    mask = None if masked is None else masked.bits
    if plan.path == "hopper":  # Gluon, an experimental part of Triton: imported where it is used
        from fused_lora.kernels.matmul_hopper import hopper_matmul

        hopper_matmul(
            *(x, w, y, plan.matmul, programs),
            b=b,
            S=S,
            bias=bias,
            mask=mask,
            pdl=True,
        )
        return
    if descriptors:
        descriptor_matmul(
            x, w, y, plan.matmul, programs, b=b, S=S, bias=bias, pdl=True, adapters=pack
        )
        return
    matmul(
        x,
        w,
        y,
        plan.matmul,
        b=b,
        S=S,
        bias=bias,
        mask=mask,
        adapters=pack,
        input_precision=precision,
    )


def _shrink_only(
    x: Tensor,
    a: Tensor,
    S: Tensor,
    scale: Scale,
    pack: Adapters | None,
    precision: str,
    *,
    draw: Mask | None = None,
    counters: Tensor | None = None,
) -> None:
    """S = scale * D(x) a^T with no product behind it; zeroes the counters."""
    device = _device(x.device)
    M, K = x.shape
    # the tables know shrink in front of a product; alone it takes the tiles of a square one
    tiles = config.select("shrink", device, _bits(x), M, K, K, a.shape[0])
    programs = min(device.sm_count, -(-M // tiles.BLOCK_M))
    _shrink(x, a, S, tiles, programs, scale, pack, precision, draw=draw, counters=counters)


def _shrink(
    x: Tensor,
    a: Tensor,
    S: Tensor,
    tiles: config.Shrink,
    programs: int,
    scale: Scale,
    pack: Adapters | None,
    precision: str,
    *,
    draw: Mask | None,
    counters: Tensor | None,
    source: Tensor | None = None,
    packed: Tensor | None = None,
    trigger: bool = False,
) -> None:
    shrink(
        x,
        a,
        S,
        tiles,
        programs,
        scale=scale.value,
        scaling=scale.tensor,
        seed=None if draw is None else draw.seed,
        threshold=0 if draw is None else dropout.threshold(draw.p),
        mask=None if draw is None else draw.bits,
        source=source,
        packed=packed,
        counters=counters,
        trigger=trigger,
        adapters=pack,
        input_precision=precision,
    )


def _device(device: torch.device) -> config.Device:
    return config.device_of(device.index if device.type == "cuda" else None)


def _stored(matrix: Tensor, transposed: bool) -> Tensor:
    """The row-major matrix behind a view that may be its transpose, and the way back."""
    return matrix.t() if transposed else matrix


def _bits(x: Tensor) -> int:
    return 8 * x.element_size()


def _precision(x: Tensor) -> str:
    """How fp32 operands are multiplied: torch's own setting for its fp32 matrix products."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def _readable_in_words(bits: Tensor) -> Tensor:
    """The mask itself unless a hook on saved tensors has laid it out anew, so that its rows do not
    begin at 32-bit words: then a copy."""
    if bits.stride(1) == 1 and bits.stride(0) % 4 == 0 and bits.data_ptr() % 4 == 0:
        return bits
    return bits.clone(memory_format=torch.contiguous_format)


def _unit_column_stride(x: Tensor) -> Tensor:
    """x itself unless its columns are strided (an expanded gradient, a transpose): then a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
