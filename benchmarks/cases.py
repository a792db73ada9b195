"""Which layers are measured: the full matrix of the protocol, the short one, and the user's own."""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

from four_bit import NF4
from results import BASELINES, FUSED, MERGED, MERGED_AGAIN, PLAIN, Case, Row

MODES = ("fwd", "fwd+bwd")
DTYPES = ("float32", "bfloat16", "float16")
DROPOUT, DROPOUT_SEED = 0.05, 7  # where dropout is measured: the mask is fixed, to be checked


@dataclass(frozen=True)
class Plan:
    """Cases measured with every provider, and cases measured with a reduced set after them."""

    core: list[Case]
    rest: list[Case]


@dataclass(frozen=True)
class _Matrix:
    tokens: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]  # (K, N)
    ranks: tuple[int, ...]

    def shapes(self) -> list[tuple[int, int, int]]:
        return [(M, K, N) for (K, N), M in itertools.product(self.layers, self.tokens)]


_FULL = {
    "cuda": _Matrix(
        tokens=(1, 16, 64, 512, 4096, 8192, 16384),
        layers=(
            (4096, 4096),
            (4096, 1024),
            (4096, 14336),
            (14336, 4096),
            (5120, 5120),
            (4095, 4097),
        ),
        ranks=(8, 16, 64, 128),
    ),
    "cpu": _Matrix(
        tokens=(64, 1024),
        layers=((1024, 1024), (1024, 4096), (4096, 1024), (999, 1001)),
        ranks=(16, 64),
    ),
}
_CORE = {
    "cuda": _Matrix((16, 8192), ((4096, 4096), (4096, 14336), (14336, 4096)), (16, 64)),
    "cpu": _Matrix((64, 1024), ((1024, 1024), (4096, 1024)), (16,)),
}
_QUICK = {
    "cuda": _Matrix((16, 8192), ((4096, 4096), (4096, 1024)), (16,)),
    "cpu": _Matrix((512,), ((1024, 1024), (1024, 4096)), (16,)),
}


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose cases; shared by latency.py and roofline.py."""
    parser.add_argument("--quick", action="store_true", help="a short run: a few shapes, r = 16")
    parser.add_argument("--shapes", type=_shapes, help='"MxKxN,..." instead of the matrix')
    parser.add_argument("--ranks", type=positive_list, help='"8,16,..." instead of the matrix')
    parser.add_argument("--modes", type=_modes, default=MODES, help=f"of {','.join(MODES)}")
    parser.add_argument("--base", choices=(PLAIN, NF4), default=PLAIN, help="the frozen weight")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU"
    )


def chosen_cases(args: argparse.Namespace, device_type: str) -> Plan:
    """The cases the options ask for. Shapes given by hand or by --quick are all core, and a
    quantised base has no others."""
    dtype = args.dtype or ("bfloat16" if device_type == "cuda" else "float32")
    quick, full, core = (table[device_type] for table in (_QUICK, _FULL, _CORE))

    def cases(shapes: list[tuple[int, int, int]], ranks: tuple[int, ...]) -> list[Case]:
        return [
            Case(mode, M, K, N, r, dtype, args.base)
            for (M, K, N), r, mode in itertools.product(shapes, args.ranks or ranks, args.modes)
        ]

    if args.shapes or args.quick:
        return Plan(core=cases(args.shapes or quick.shapes(), quick.ranks), rest=[])
    first = cases(core.shapes(), core.ranks)
    if args.base != PLAIN:
        return Plan(core=first, rest=[])
    return Plan(
        core=first,
        rest=[case for case in cases(full.shapes(), full.ranks) if case not in first],
    )


def reduced_providers(case: Case, measured: list[Row]) -> list[str]:
    """For a case outside the core: merged, the two fastest baselines of its regime, and fused.

    The regime is the mode and, among the core's token counts, the nearest; the baselines are
    ranked by the geometric mean of their time over merged.
    """
    same_mode = [
        row
        for row in measured
        if row.mode == case.mode and row.provider in BASELINES and row.vs_merged is not None
    ]
    nearest = min((abs(math.log(row.M / case.M)) for row in same_mode), default=0.0)
    ratios: dict[str, list[float]] = {}
    for row in same_mode:
        if abs(math.log(row.M / case.M)) == nearest:
            ratios.setdefault(row.provider, []).append(math.log(row.vs_merged))
    ranking = sorted(ratios, key=lambda name: sum(ratios[name]) / len(ratios[name]))
    return [MERGED, MERGED_AGAIN, *(ranking or BASELINES)[:2], FUSED]


def _shapes(text: str) -> list[tuple[int, int, int]]:
    try:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        shapes = []
    if not shapes or any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(f'got "{text}", expected "MxKxN,MxKxN,..."')
    return shapes


def positive_list(text: str) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f'got "{text}", expected "8,16,..."')
    return tuple(int(part) for part in text.split(","))


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if not set(modes) <= set(MODES):
        raise argparse.ArgumentTypeError(f'got "{text}", expected some of {",".join(MODES)}')
    return modes
