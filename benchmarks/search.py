"""What tune.py looks for, and the plans it tries: around the best so far, part by part."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from candidates import Planned
from results import Case

from fused_lora.kernels import config

BITS = 16  # bf16; fp16 has the same tiles
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (5120, 5120))  # (K, N)
TOKENS = (8192, 16, 1, 64, 4096)
RANKS = (16, 64, 8, 128)
PARTS = ("matmul", "shrink", "decode", "rank_grad")  # of a plan, each with its tiles

Plan = config.Product


def _matmuls(*tiles: tuple[int, ...]) -> tuple[config.Matmul, ...]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, parts in which y is stored)"""
    return tuple(
        config.Matmul(m, n, k, 8, warps, stages, parts) for m, n, k, warps, stages, parts in tiles
    )


_POINTERS = _matmuls(
    (128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1), (64, 128, 64, 4, 3, 1),
    (128, 256, 64, 8, 3, 1),
)  # fmt: skip
MATMULS = {  # by path
    "hopper": _matmuls(
        (128, 256, 64, 8, 4, 2), (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 3, 2),
        (128, 128, 64, 8, 4, 2), (128, 128, 64, 8, 5, 2), (64, 128, 64, 4, 8, 2),
        (64, 64, 64, 4, 8, 1),
    ),
    "pdl": (
        *_matmuls(
            (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 3, 2), (128, 256, 64, 8, 4, 2),
            (256, 128, 64, 8, 3, 1), (256, 128, 64, 8, 4, 2), (128, 128, 64, 8, 4, 1),
            (128, 128, 64, 4, 4, 1), (128, 128, 128, 8, 3, 2), (64, 256, 64, 4, 4, 1),
        ),
        replace(*_matmuls((128, 256, 64, 8, 3, 1)), GROUP_M=16),
        replace(*_matmuls((128, 256, 64, 8, 3, 1)), GROUP_M=4),
    ),
    "portable": _POINTERS,
    "single": (
        *_POINTERS,
        *_matmuls(
            (64, 32, 64, 4, 8, 1), (64, 32, 128, 4, 4, 1), (64, 64, 64, 4, 6, 1),
            (64, 64, 64, 4, 9, 1), (64, 64, 128, 4, 4, 1), (64, 128, 64, 4, 5, 1),
        ),
    ),
}  # fmt: skip
SHRINKS = (
    *(config.Shrink(16, k, 4, stages, 16) for k, stages in ((128, 4), (128, 8), (256, 3))),
    *(config.Shrink(64, k, 4, stages) for k, stages in ((64, 3), (64, 5), (128, 2), (128, 4))),
    *(config.Shrink(128, 64, *rest) for rest in ((4, 3), (4, 5), (8, 5), (8, 6), (8, 7))),
    *(config.Shrink(128, 128, 8, stages) for stages in (3, 4)),
)
RANK_GRADS = tuple(
    config.RankGrad(m, c, warps, stages)
    for m, c, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3))
)
DECODES = tuple(
    config.Decode(n, k, splits, 4, stages, 64)
    for n, k, stages in (
        (64, 64, 4), (64, 64, 6), (64, 64, 8), (64, 128, 3), (64, 128, 4),
        (128, 64, 4), (128, 64, 6), (128, 128, 3),
    )
    for splits in (1, 2, 4, 8)
)  # fmt: skip
DECODES_LEFT = tuple(
    config.Decode(n, k, splits, 4, stages, 64, TOKENS_LEFT=True)
    for n, k, stages in (
        (32, 64, 9), (32, 128, 5), (64, 64, 6), (64, 64, 8), (64, 128, 4), (128, 64, 5),
    )
    for splits in (1, 2, 4)
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One entry to be found. of: "forward", "dx", timed with dA and dB, or "backend". The sizes are
    the layer's."""

    of: str
    dropout: bool
    M: int
    K: int
    N: int
    r: int

    @property
    def directions(self) -> tuple[str, ...]:
        """What the merged layer computes beside it."""
        if self.of == "backend" and not few_tokens(self.M, self.r):
            return ("fwd", "dx")
        return ("dx",) if self.of == "dx" else ("fwd",)

    @property
    def case(self) -> Case:
        return Case("+".join(self.directions), self.M, self.K, self.N, self.r, "bfloat16")

    @property
    def key(self) -> dict[str, Any]:
        """The entry's own fields. dX is a product of N columns and K rows."""
        N, K = (self.K, self.N) if self.of == "dx" else (self.N, self.K)
        sizes = {"bits": BITS, "M": config.tuned_tokens(self.M), "N": N, "K": K, "r": self.r}
        return {"of": self.of, "dropout": self.dropout, **sizes}

    @property
    def kernels(self) -> tuple:
        """What compiled kernels depend on beside their tiles: of M, decode alone has a block."""
        few = self.M if few_tokens(self.M, self.r) else None
        return self.of, self.dropout, self.r, few

    def candidate(self, plan: Plan) -> Planned:
        return Planned(name(plan), "bwd" if self.of == "dx" else "fwd", plan, self.dropout)

    def __str__(self) -> str:
        dropout = " with dropout" if self.dropout else ""
        return f"{self.of}{dropout} {self.M}x{self.K}x{self.N} r={self.r}"


def few_tokens(M: int, r: int) -> bool:
    most_tokens, most_ranks = config.MAX_DECODE[BITS]
    return most_tokens >= M and most_ranks >= r


def items(
    layers: tuple[tuple[int, int], ...], tokens: tuple[int, ...], ranks: tuple[int, ...]
) -> Iterator[Item]:
    """What to tune, the most useful first: few tokens are served, more are trained."""
    for dropout, r, M in itertools.product((False, True), ranks, tokens):
        few = few_tokens(M, r)
        if few and dropout:
            continue
        for (K, N), of in itertools.product(layers, ["forward"] if few else ["forward", "dx"]):
            yield Item(of, dropout, M, K, N, r)
        for K, N in layers if not dropout else ():
            yield Item("backend", dropout, M, K, N, r)


def rules(item: Item, device: config.Device, path: str = "auto") -> Plan:
    """What the rules choose: an unnamed GPU has no table."""
    dx = item.of == "dx"
    key = item.key
    plan = config.choose_product(
        *(path, replace(device, name=""), BITS, item.M, key["N"], key["K"], item.r),
        drawn=item.dropout and not dx,
        masked=item.dropout and dx,
        followed=dx,
        addressable=True,
    )
    return replace(plan, reason="")


# A stage of the search: other plans near the best one so far.


def paths(item: Item, device: config.Device, best: Plan) -> Iterator[Plan]:
    """With few tokens, whose kernels are small, in all their tiles."""
    for path in config.PATHS:
        plan = rules(item, device, path)
        if plan.path == path:  # else it cannot run at these sizes
            few = few_tokens(item.M, item.r)
            yield from dict.fromkeys([plan, *(tiles(item, device, plan) if few else ())])


def tiles(item: Item, device: config.Device, best: Plan) -> Iterator[Plan]:
    if best.decode is not None:
        left = DECODES_LEFT if item.M > config.FEW_TOKENS else ()
        yield from (replace(best, decode=decode) for decode in (*DECODES, *left))
    else:
        for matmul in MATMULS[best.path]:
            yield from _on_programs(replace(best, matmul=matmul), item, device)


def shrinks(item: Item, device: config.Device, best: Plan) -> Iterator[Plan]:
    own = item.dropout and item.of == "forward" and best.path == "hopper"
    grid = config.defaults()["sm_90"]["16"]["shrink_dropout"] if own else SHRINKS
    for shrink in grid if best.shrink is not None else ():
        yield from _on_programs(replace(best, shrink=shrink), item, device)


def rank_grads(item: Item, device: config.Device, best: Plan) -> Iterator[Plan]:
    for rank_grad in RANK_GRADS if item.of == "dx" else ():
        yield replace(best, rank_grad=rank_grad)


STAGES = (paths, tiles, shrinks, rank_grads)


def _on_programs(plan: Plan, item: Item, device: config.Device) -> Iterator[Plan]:
    """The plan with its shrink on as many SMs as before, those that its matmul leaves idle, all of
    them, and, drawing a mask, twice as many programs."""
    if plan.shrink is None or plan.matmul is None:
        yield plan
        return
    blocks = config.cdiv(item.r, plan.shrink.block_r(item.r))
    idle = config.idle_sms(plan.matmul, device, item.M, item.key["N"])
    counts = [plan.shrink_programs, idle // blocks, device.sm_count // blocks]
    counts += [2 * device.sm_count // blocks] * item.dropout
    most = config.cdiv(item.M, plan.shrink.BLOCK_M)
    for count in sorted({min(count, most) for count in counts if count > 0}):
        yield replace(plan, shrink_programs=count)


def name(plan: Plan) -> str:
    parts = [plan.path]
    for part in PARTS:
        values = getattr(plan, part)
        if values is not None:
            parts.append(" ".join([part, *map(str, dataclasses.astuple(values))]))
    if plan.shrink is not None:
        parts.append(f"{plan.shrink_programs} programs")
    return ", ".join(parts)


def fields(plan: Plan) -> dict[str, Any]:
    """As `config.tuned` reads a plan."""
    given = dataclasses.asdict(plan).items()
    return {name: value for name, value in given if value is not None and name != "reason"}
