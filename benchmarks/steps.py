"""What each step of the campaign measures, and what is predicted for it (docs: results/LOG.md).

Predictions are arithmetic: a discrete-event model of an H100 (132 SMs, 650 TFLOP/s, 100 GB/s
streamed by an SM), made before anything ran on a GPU. They stand here so that they cannot be
adjusted afterwards without anyone seeing it.
"""

from __future__ import annotations

from dataclasses import replace

from candidates import Candidate, Layer, Planned, Product, RankGrad, Shrink
from results import Case
from trial import Group

from fused_lora.kernels import config

H100 = config.Device("no GPU: sizes of an H100", "cuda", 90, 132)
SQUARE, UP, DOWN = (8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096)  # M, K, N
NARROW = (8192, 4096, 1024)
FWD, DX = ("fwd",), ("dx",)
PLAIN = "plain"  # our product without adapter, the yardstick of the model

# time over our own plain product, forward: {shape: {path: {rank: ratio}}}
MODEL = {
    SQUARE: {
        "pdl": {16: 1.020, 64: 1.020, 128: 1.035},
        "single": {16: 1.115, 64: 1.26},
    },
    UP: {
        "pdl": {16: 1.017, 64: 1.017},
        "single": {16: 1.115, 64: 1.26},
    },
    DOWN: {
        "pdl": {16: 1.006, 64: 1.006},
        "single": {16: 1.115, 64: 1.26},
    },
    NARROW: {
        "pdl": {16: 1.25, 64: 1.25},
        "single": {16: 1.115, 64: 1.26},
    },
}
PLAIN_GAP = 1.025  # our plain product over the library's, from published kernels
GLUON_GAP = 1.0
DECODE = {4096: 1.03, 14336: 1.013}  # by N, K = 4096, r = 16
# of dX, at SQUARE: after it, and behind it (PDL) on the same SMs
RANK_GRAD_SHARE = 0.131
RESIDENT_SHARE = {16: 0.041, 64: 0.051}


def _case(mode: str, shape: tuple[int, int, int], r: int) -> Case:
    M, K, N = shape
    return Case(mode, M, K, N, r, "bfloat16")


def _tiles(op: str) -> list:
    return config.defaults()["sm_90"]["16"][op]


def plan_of(
    path: str, device: config.Device, case: Case, direction: str = "fwd", followed: bool = False
) -> config.Product:
    """The library's own plan for a path, as if FUSED_LORA_PATH named it."""
    N, K = (case.N, case.K) if direction == "fwd" else (case.K, case.N)
    sizes = (case.M, N, K, case.r)
    options = {"drawn": False, "masked": False, "followed": followed, "addressable": True}
    plan = config.choose_product(path, device, 16, *sizes, **options)
    assert plan.path == path, f"{case} cannot take {path}: {plan.reason}"
    return plan


def _forms() -> dict[str, tuple[str, config.Matmul]]:
    """Our forms of the plain product: {name: (op, tiles)}."""
    wide = config.Matmul(128, 256, 64, 8, 8, 3)
    alone, beside = _tiles("matmul_hopper"), _tiles("matmul_beside")
    return {
        "descriptor 128x256": ("matmul_descriptor", wide),
        "descriptor 128x256, y in halves": ("matmul_descriptor", replace(wide, STORE_PARTS=2)),
        "descriptor 128x256, 4 stages, halves": (
            "matmul_descriptor",
            replace(wide, num_stages=4, STORE_PARTS=2),
        ),
        "descriptor 128x128": ("matmul_descriptor", _tiles("matmul_descriptor")[1]),
        "hopper 128x256": ("matmul_hopper", alone[0]),
        "hopper 128x256, room beside it": ("matmul_hopper", beside[0]),
        "hopper 128x128": ("matmul_hopper", alone[1]),
        "pointers 128x128": ("matmul", _tiles("matmul")[0]),
    }


def plain(device: config.Device) -> list[Group]:
    """Our product without adapter against the library's: below 97 % of it, find out why first."""
    groups = []
    shapes = [SQUARE, UP, DOWN, NARROW, (2048, 4096, 4096), (8192, 5120, 5120)]
    for shape, direction in [*((s, "fwd") for s in shapes), *((s, "dx") for s in shapes[:3])]:
        case = _case(direction, shape, 16)
        groups.append(
            Group(
                f"plain {case}",
                case,
                (direction,),
                [
                    Product(name, (direction,), op, tiles, adapter=False)
                    for name, (op, tiles) in _forms().items()
                ],
                {"descriptor 128x256": PLAIN_GAP, "hopper 128x256": GLUON_GAP},
                goal=1.03,
            )
        )
    return groups


def paths(device: config.Device) -> list[Group]:
    """Every way to add the adapter, side by side; keep one per regime."""
    groups = []
    goals = {16: 1.03, 64: 1.05}
    cases = [(SQUARE, 16, "fwd"), (SQUARE, 64, "fwd"), (NARROW, 16, "fwd"), (NARROW, 64, "fwd")]
    cases += [(UP, 16, "fwd"), (DOWN, 16, "fwd"), (SQUARE, 16, "dx"), (UP, 64, "fwd")]
    cases += [(DOWN, 64, "fwd"), (SQUARE, 128, "fwd")]
    for shape, r, direction in cases:
        case, directions = _case(direction, shape, r), (direction,)
        model = MODEL[shape]
        names = [name for name in ("pdl", "single") if r in model[name]]
        plans = {name: plan_of(name, device, case, direction) for name in names}
        for name, followed in (("hopper", False), ("hopper, room beside it", True)):
            plans[name] = plan_of("hopper", device, case, direction, followed)
        halves = replace(plans["pdl"].matmul, STORE_PARTS=2)
        plans["pdl, y in halves"] = replace(plans["pdl"], matmul=halves)
        tiles = plans["pdl"].matmul
        candidates: list[Candidate] = [
            Product(PLAIN, directions, "matmul_descriptor", tiles, adapter=False),
            Product("S given", directions, "matmul_descriptor", tiles, adapter=True),
            *(Planned(name, direction, plan) for name, plan in plans.items()),
        ]
        if direction == "fwd":
            candidates += [Layer(name, name, "fwd") for name in ("aten", "addmm")]
        groups.append(
            Group(
                f"paths {case}",
                case,
                directions,
                candidates,
                {name: model[name][r] for name in names},
                yardstick=PLAIN,
                goal=1.12 if shape == NARROW else goals.get(r),
            )
        )
    return groups


def shrink(device: config.Device) -> list[Group]:
    """How many SMs shrink should get, behind or beside the product, and what it draws alone."""
    groups = []
    M, K, _ = SQUARE
    default = _tiles("shrink")[0]
    smaller = replace(default, BLOCK_M=64)
    for r in (16, 64):
        case = _case("fwd", SQUARE, r)
        programs = [1, 8, 32, M // default.BLOCK_M]
        groups.append(
            Group(
                f"shrink alone {case}",
                case,
                FWD,
                [
                    *(Shrink(f"{n} programs", FWD, default, n) for n in programs),
                    Shrink("128 programs of 64 rows", FWD, smaller, 128),
                    Shrink("32 programs of 64 rows", FWD, smaller, 32),
                ],
                {"1 programs": 32.0, "8 programs": 4.0, "64 programs": 1.0},
                yardstick="32 programs",
                bytes=2 * M * K,
            )
        )
        pdl = plan_of("pdl", device, case)
        assert pdl.matmul is not None
        tiles = -(-M // pdl.matmul.BLOCK_M) * -(-case.N // pdl.matmul.BLOCK_N)
        free = -tiles % device.sm_count
        counts = sorted({8, 16, max(1, free - 8), free, free + 1, free + 16, M // default.BLOCK_M})
        window = {f"pdl {n} SMs": 1.020 if 16 <= n <= free else 1.07 for n in counts if n >= 16}
        candidates: list[Candidate] = [
            Product(PLAIN, FWD, "matmul_descriptor", pdl.matmul, adapter=False)
        ]
        candidates += [
            Planned(f"pdl {n} SMs", "fwd", replace(pdl, shrink_programs=n)) for n in counts
        ]
        every = replace(pdl, shrink=smaller, shrink_programs=device.sm_count)
        candidates.append(Planned("pdl all SMs, 64 rows", "fwd", every))
        groups.append(
            Group(
                f"shrink window {case}",
                case,
                FWD,
                candidates,
                window,
                yardstick=PLAIN,
            )
        )
    return groups


def backward(device: config.Device) -> list[Group]:
    """rank_grad alone, dX, and the whole training step with and without dropout."""
    groups = []
    default = _tiles("rank_grad")[0]
    forms = {
        "64x64": default,
        "64x128": replace(default, BLOCK_C=128),
        "128x64": replace(default, BLOCK_M=128),
        "128x128": config.RankGrad(128, 128, 8, 2),
        "64x128, 8 warps": config.RankGrad(64, 128, 8, 3),
        "64x128, 2 stages": replace(default, BLOCK_C=128, num_stages=2),
    }
    for shape, r in ((SQUARE, 16), (SQUARE, 64), (UP, 16), (DOWN, 16)):
        case = _case("dx", shape, r)
        ranks = [RankGrad(f"rank_grad {name}", tiles) for name, tiles in forms.items()]
        first = {"rank_grad 64x64": RANK_GRAD_SHARE} if (shape, r) == (SQUARE, 16) else {}
        M, K, N = shape
        groups.append(Group(f"rank_grad {case}", case, DX, ranks, first, bytes=2 * M * (K + N)))
    for shape, r in ((SQUARE, 16), (SQUARE, 64), (UP, 16), (DOWN, 16)):
        case = _case("dx", shape, r)
        plan = plan_of("hopper", device, case, "dx", followed=True)
        assert plan.matmul is not None
        deeper = replace(default, num_stages=3)
        candidates: list[Candidate] = [
            Product(PLAIN, DX, "matmul_hopper", plan.matmul, adapter=False),
            Planned("behind", "bwd", plan),
            Planned("behind, 3 stages", "bwd", replace(plan, rank_grad=deeper)),
        ]
        first = {}
        if shape == SQUARE:
            pdl = MODEL[SQUARE]["pdl"][r]
            first = {"behind": pdl + RESIDENT_SHARE[r]}
        first = {name: round(ratio, 3) for name, ratio in first.items()}
        groups.append(Group(f"backward {case}", case, DX, candidates, first, yardstick=PLAIN))
    step = (2 * MODEL[SQUARE]["pdl"][16] * PLAIN_GAP + RANK_GRAD_SHARE) / 2
    for shape, r in ((SQUARE, 16), (UP, 16), (DOWN, 16), (SQUARE, 64)):
        case = _case("fwd+bwd", shape, r)
        layers = [
            *(Layer(path, "triton", "fwd+bwd", path) for path in ("hopper", "pdl")),
            *(Layer(name, name, "fwd+bwd") for name in ("aten", "addmm", "eager3")),
            Layer("dropout", "triton", "fwd+bwd", dropout=True),
        ]
        first = {"hopper": round(step, 3)} if (shape, r) == (SQUARE, 16) else {}
        goal = 1.07 if r == 16 else None
        groups.append(Group(f"step {case}", case, ("fwd", "dx"), layers, first, goal=goal))
    return groups


def dropout(device: config.Device) -> list[Group]:
    """The training step with dropout, as the README quotes it."""
    groups = []
    for shape in (SQUARE, UP, DOWN):
        case = _case("fwd+bwd", shape, 16)
        layers = [
            Layer("no dropout", "triton", "fwd+bwd"),
            Layer("dropout", "triton", "fwd+bwd", dropout=True),
            Layer("aten", "aten", "fwd+bwd"),
        ]
        groups.append(Group(f"step {case}", case, ("fwd", "dx"), layers, {}, goal=1.14))
    return groups


def decode(device: config.Device) -> list[Group]:
    """Few tokens: how W is cut into tiles and splits."""
    groups = []
    for r in (16, 64):
        for N in (4096, 14336):
            for M in (1, 16, 64):
                case = _case("fwd", (M, 4096, N), r)
                plan = plan_of("decode", device, case)
                candidates: list[Candidate] = [
                    Planned(
                        f"BLOCK_N {block} SPLITS {splits}",
                        "fwd",
                        replace(plan, decode=config.Decode(block, 128, splits, 4, 3, 64)),
                    )
                    for block in (64, 128)
                    for splits in (1, 2, 4, 8)
                ]
                candidates += [Planned("pdl", "fwd", plan_of("pdl", device, case))]
                candidates += [Layer(name, name, "fwd") for name in ("aten", "addmm")]
                best = "BLOCK_N 64 SPLITS 2" if N == 4096 else "BLOCK_N 64 SPLITS 1"
                predicted = {best: DECODE[N]} if r == 16 else {}
                goal = 1.05 if r == 16 else 1.08
                groups.append(Group(f"decode {case}", case, FWD, candidates, predicted, goal=goal))
    return groups


GROUPS = {
    "plain": plain,
    "paths": paths,
    "shrink": shrink,
    "backward": backward,
    "dropout": dropout,
    "decode": decode,
}
