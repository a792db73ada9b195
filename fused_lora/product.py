"""One product Y = X W + S B with S = scale * D(X) A^T: which kernels it takes, and their launches.

Forward and dX are both of this form: y takes (x, weight^T, lora_A, lora_B^T) for X, W, A and B, dX
takes (dY, weight, lora_B^T, lora_A). So is a shrink alone, which forms S and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_lora import dropout
from fused_lora.kernels import config
from fused_lora.kernels.decode import decode, workspace
from fused_lora.kernels.launch import describable
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.tape import Tape
from fused_lora.scale import Adapters, Scale, padded_rank


class Mask(NamedTuple):
    """Dropout of one call: its bits, drawn by shrink from `seed` in forward. What is kept is scaled
    by `dropout.keep_scale`, a factor that S and dS carry."""

    bits: Tensor  # uint8 [M, dropout.packed_columns(K)]
    p: float
    seed: Tensor | None = None


def new_mask(tape: Tape, M: int, K: int, dropout_p: float, seed: Tensor | None) -> Mask | None:
    """Room for the mask that a shrink draws, None without dropout."""
    if dropout_p == 0.0:
        return None
    return Mask(tape.empty((M, dropout.packed_columns(K)), torch.uint8), dropout_p, seed)


def plan_for(
    forced: str | config.Product,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    y: Tensor,
    *,
    draw: Mask | None = None,
    masked: Mask | None = None,
    followed: bool = False,
) -> config.Product:
    """How `adapted_product` runs on these operands; forced: as `config.FORCED`, followed: by
    rank_grad."""
    transposed = w.stride(1) != 1
    addressable = describable(x) and describable(y) and 1 in w.stride()
    stored_w = _stored(w, transposed)
    if w.dtype == x.dtype:
        addressable = addressable and describable(stored_w)
    else:  # autocast: the copy that is made of it has rows of exactly its width
        addressable = addressable and stored_w.shape[1] * x.element_size() % 16 == 0
    M, K = x.shape
    return config.choose_product(
        forced,
        config.device_of(x.device),
        bits_of(x),
        M,
        w.shape[1],
        K,
        a.shape[0],
        drawn=draw is not None,
        masked=masked is not None,
        followed=followed,
        addressable=addressable,
    )


def adapted_product(
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

    x [M, K], w [K, N], a [r, K], b [r, N], y [M, N]:

                 x    w    a    b    y
        forward  x    W^T  A    B^T  y
        dX       dY   W    B^T  A    dX

    W^T and B^T are views of [N, K] and [N, r], whose rows TMA reads (`transposed`). `draw` drops x
    before a, `masked` masks the adapter term; `counters` are zeroed by shrink, which the plan must
    have. With a `pack`, S has the scaling of each column and is zero where the column is not the
    token's.
    """
    if plan.path == "decode":
        assert plan.decode is not None
        sizes = workspace(x.shape[0], w.shape[1], a.shape[0], plan.decode)
        split = plan.decode.SPLITS > 1
        decode(
            *(x, w, a, b, y, plan.decode),
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
            *(x, w, y, plan.matmul),
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
        S = tape.empty((x.shape[0], padded_rank(a.shape[0])))
    source = packed = None
    if plan.chained:
        w = w.to(x.dtype)  # under autocast a copy, for the length of this call
        b, source, packed = _addressable(tape, b, like=x, transposed=w.stride(1) != 1)
    assert plan.shrink is not None
    _shrink(
        *(x, a, S, plan.shrink, plan.shrink_programs, scale, pack, precision),
        draw=draw,
        counters=counters,
        source=source,
        packed=packed,
        trigger=plan.chained,
        in_registers=plan.path == "hopper",
    )
    mask = None if masked is None else masked.bits
    programs = config.device_of(x.device).sm_count
    if plan.path == "hopper":  # Gluon, an experimental part of Triton: imported where it is used
        from fused_lora.kernels.matmul_hopper import hopper_matmul

        hopper_matmul(x, w, y, plan.matmul, programs, b=b, S=S, bias=bias, mask=mask, pdl=True)
    elif plan.path == "pdl":
        options = {"b": b, "S": S, "bias": bias, "adapters": pack}
        descriptor_matmul(x, w, y, plan.matmul, programs, pdl=True, **options)
    else:
        options = {"b": b, "S": S, "bias": bias, "mask": mask, "adapters": pack}
        matmul(x, w, y, plan.matmul, input_precision=precision, **options)


def _addressable(
    tape: Tape, b: Tensor, *, like: Tensor, transposed: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(b [r, N], source, packed): all segments of the loop over K have one dtype and rows that TMA
    can address. A b that is not so is read from `packed`, where shrink copies `source`, the
    row-major matrix behind it."""
    stored = _stored(b, transposed)
    # rows of lora_B at r = 8 are one word of TMA: it would take them one by one
    narrow = stored.shape[1] < config.MIN_RANK_BLOCK
    if not narrow and stored.dtype == like.dtype and describable(stored):
        return b, None, None
    packed = tape.empty((stored.shape[0], padded_rank(stored.shape[1])))
    return _stored(packed, transposed), stored, packed


def adapter_alone(
    x: Tensor,
    b: Tensor,
    y: Tensor,
    S: Tensor,
    pack: Adapters | None,
    precision: str,
    *,
    masked: Mask | None = None,
) -> None:
    """y = mask * (S b), a product whose main part has no terms; x is what S was made of."""
    matmul(
        *(x[:, :0], y[:0], y),
        config.select("matmul", config.device_of(x.device), bits_of(x), *y.shape),
        b=b,
        S=S,
        mask=None if masked is None else masked.bits,
        adapters=pack,
        input_precision=precision,
    )


def shrink_alone(
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
    device = config.device_of(x.device)
    tiles = config.select("shrink", device, bits_of(x), *S.shape)
    programs = min(device.sm_count, config.cdiv(x.shape[0], tiles.BLOCK_M))
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
    in_registers: bool = False,
) -> None:
    """Launch a shrink; `in_registers`, the one that draws a mask without shared memory."""
    options: dict[str, Any] = {
        "scale": scale.value,
        "scaling": scale.tensor,
        "seed": None if draw is None else draw.seed,
        "threshold": 0 if draw is None else dropout.threshold(draw.p),
        "mask": None if draw is None else draw.bits,
        "source": source,
        "packed": packed,
        "trigger": trigger,
        "adapters": pack,
    }
    if in_registers and draw is not None:  # in Gluon, imported where it is used
        from fused_lora.kernels.shrink_dropout import shrink_dropout

        shrink_dropout(x, a, S, tiles, programs, **options)
    else:
        options |= {"counters": counters, "input_precision": precision}
        shrink(x, a, S, tiles, programs, **options)


def _stored(matrix: Tensor, transposed: bool) -> Tensor:
    """The row-major matrix behind a view that may be its transpose, and the way back."""
    return matrix.t() if transposed else matrix


def bits_of(x: Tensor) -> int:
    return 8 * x.element_size()


def precision_of(x: Tensor) -> str:
    """How fp32 operands are multiplied: torch's own setting for its fp32 matrix products."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
