"""Which kernels run for a shape, and with which tiles: pure functions of the device and the sizes.

A table measured on the very GPU (`tuned/<gpu>.json`, per Triton minor version) answers first, with
whole plans; else rules choose a path and among the configurations of `tuned/default.json`, which
are compiled and checked for spills on every architecture by the tests. An unknown GPU gets a
default, never an error.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TUNED = Path(__file__).parent / "tuned"

# How forward and dX are computed:
#   hopper    shrink, then the Gluon matmul started behind it (programmatic dependent launch)
#   pdl       the same with the descriptor matmul, which newer GPUs take
#   portable  shrink, then the pointer matmul
#   single    one launch of the pointer matmul, S recomputed in every tile
#   decode    one launch for few tokens, K split over programs
PATHS = ("hopper", "pdl", "portable", "single", "decode")
FORCED: str | Product = os.environ.get("FUSED_LORA_PATH") or "auto"
"""What `choose_product` is to answer: "auto", by the tables and the rules; a path, wherever it can
run; or, for the benchmarks, this very plan."""
if FORCED not in ("auto", *PATHS):
    raise ValueError(f"FUSED_LORA_PATH must be auto or one of {PATHS}: got {FORCED!r}")

MAX_SINGLE_RANK = 64
# (tokens, rank) that one tile of decode holds, by the dtype's bits: fp32 has half the registers
MAX_DECODE = {16: (64, 64), 32: (16, 16)}
MIN_RANK_BLOCK = 16  # the narrowest operand a tensor core instruction takes
MAX_HOPPER_RANK = 512  # above, `pdl` steps only through the ranks that the tokens of a tile want
MAX_MASKED_RANK = 64  # of the Hopper matmul
MAX_BESIDE_RANK = 32  # beyond, a shrink that fits beside the Hopper matmul is too slow
FEW_TOKENS = 16  # up to here decode streams W best; beyond, narrow tiles do, if they are many


@dataclass(frozen=True)
class Device:
    """What the choice depends on. capability is 10 * major + minor, 0 for the interpreter."""

    name: str
    backend: str  # "cuda", "hip" or "interpreter"
    capability: int
    sm_count: int


INTERPRETER = Device("interpreter", "interpreter", 0, 4)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return max(MIN_RANK_BLOCK, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class Shrink:
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    MAX_BLOCK_R: int = 128

    def block_r(self, columns: int) -> int:
        return min(self.MAX_BLOCK_R, _power_of_2(columns))


@dataclass(frozen=True)
class Matmul:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    STORE_PARTS: int = 1  # descriptor kernel: y leaves in this many column parts
    MAX_BLOCK_R: int = 64  # ranks a step takes when S is given

    def block_r(self, r: int, single: bool) -> int:
        return _power_of_2(r) if single else min(self.MAX_BLOCK_R, _power_of_2(r))


@dataclass(frozen=True)
class RankGrad:
    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    MAX_BLOCK_R: int = 128

    def block_r(self, r: int) -> int:
        return min(self.MAX_BLOCK_R, _power_of_2(r))


@dataclass(frozen=True)
class Decode:
    BLOCK_N: int
    BLOCK_K: int
    SPLITS: int
    num_warps: int
    num_stages: int
    MIN_ROWS: int = MIN_RANK_BLOCK  # of a left operand: 64 on Hopper
    TOKENS_LEFT: bool = False  # the left operands are x and S, else W and A

    def block_m(self, M: int) -> int:
        return max(self.MIN_ROWS if self.TOKENS_LEFT else MIN_RANK_BLOCK, _power_of_2(M))

    def block_r(self, r: int) -> int:
        return max(MIN_RANK_BLOCK if self.TOKENS_LEFT else self.MIN_ROWS, _power_of_2(r))


KINDS = {
    "shrink": Shrink,
    "shrink_beside": Shrink,
    "shrink_dropout": Shrink,
    "matmul": Matmul,
    "matmul_descriptor": Matmul,
    "matmul_single": Matmul,
    "matmul_few": Matmul,
    "matmul_hopper": Matmul,
    "matmul_beside": Matmul,
    "rank_grad": RankGrad,
    "rank_grad_masked": RankGrad,
    "decode": Decode,
}


@dataclass(frozen=True)
class Product:
    """How one product Y = X W + S B runs: a path of PATHS, its configurations, and why."""

    path: str
    reason: str
    matmul: Matmul | None = None
    shrink: Shrink | None = None
    shrink_programs: int = 0  # of each of its rank blocks
    decode: Decode | None = None
    rank_grad: RankGrad | None = None  # of the rank_grad that follows, if it was measured with it

    @property
    def chained(self) -> bool:
        """Whether the matmul starts while shrink runs, and reads by tensor descriptors."""
        return self.path in ("hopper", "pdl")

    @property
    def launches(self) -> int:
        """Kernel launches of this product, without the memset of `memsets`."""
        return 1 if self.path in ("single", "decode") else 2

    @property
    def memsets(self) -> int:
        """Counters that are zeroed by a launch of their own."""
        return int(self.decode is not None and self.decode.SPLITS > 1)


def device_of(device: torch.device) -> Device:
    """The Device of a CUDA (or HIP) device with its index; the interpreter for any other."""
    return _device(device.index) if device.type == "cuda" else INTERPRETER


@functools.cache
def _device(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    backend = "hip" if torch.version.hip else "cuda"
    return Device(
        properties.name,
        backend,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
    )


def target_of(device: Device) -> str:
    """The architecture whose defaults serve this device: its own or the next lower one."""
    if device.backend != "cuda":
        return {"hip": "gfx942", "interpreter": "interpreter"}[device.backend]
    known = [int(name[3:]) for name in defaults() if name.startswith("sm_")]
    return f"sm_{max((c for c in known if c <= device.capability), default=min(known))}"


def has_descriptors(device: Device) -> bool:
    """Whether the descriptor matmul pays: tensor memory accelerator with wgmma or tcgen05. Consumer
    Blackwell (sm_120) has neither of the latter and takes the portable kernel. The interpreter
    runs it when a path is forced."""
    return device is INTERPRETER or (device.backend == "cuda" and 90 <= device.capability < 120)


@functools.cache
def defaults() -> dict[str, dict[str, dict[str, list[Any]]]]:
    """{target: {"16" or "32" (bits of the dtype): {op: [configuration, ...]}}}."""
    table = json.loads((TUNED / "default.json").read_text())["targets"]
    return {
        target: {
            bits: {op: [KINDS[op](**entry) for entry in entries] for op, entries in ops.items()}
            for bits, ops in by_bits.items()
        }
        for target, by_bits in table.items()
    }


@functools.cache
def tuned(gpu: str, triton_minor: str) -> dict[tuple, Any]:
    """What was measured on this GPU with this Triton: {("forward" or "dx", dropout, bits, M, N, K,
    r): Product} of products, {("backend", bits, M, N, K, r): "triton" or "aten"} of layers; M is
    `tuned_tokens`."""
    path = TUNED / f"{file_name(gpu)}.json"
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    if table.get("triton") != triton_minor:
        return {}
    found: dict[tuple, Any] = {}
    for entry in table["entries"]:
        sizes = tuple(entry[name] for name in ("bits", "M", "N", "K", "r"))
        if entry["of"] == "backend":
            found[("backend", *sizes)] = entry["choice"]
        elif entry["plan"] is not None:  # else nothing beat the rules
            found[(entry["of"], entry["dropout"], *sizes)] = _product(entry["plan"])
    return found


def _product(plan: dict[str, Any]) -> Product:
    kinds = {"matmul": Matmul, "shrink": Shrink, "decode": Decode, "rank_grad": RankGrad}
    tiles = {name: kind(**plan[name]) for name, kind in kinds.items() if name in plan}
    return Product(**{**plan, **tiles}, reason="measured on this GPU")


def file_name(gpu: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in gpu.lower())


def tuned_tokens(M: int) -> int:
    """The M under which M tokens are tuned. As long as W is what costs, the next power of two; more
    tokens are tuned exactly, for what the last wave leaves to shrink depends on each of them."""
    return 1 << max(0, M - 1).bit_length() if M <= MAX_DECODE[16][0] else M


@functools.cache
def triton_minor() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def select(op: str, device: Device, bits: int, M: int, N: int) -> Any:
    """The default configuration of kernel `op` that the rules prefer for [M, N] outputs."""
    candidates = _defaults(op, device, bits)
    if op == "matmul_few":  # bound by memory: x is read again for every tile
        return min(candidates, key=lambda c: (_few_cost(c, device, N), -c.BLOCK_N))
    if op.startswith("matmul"):
        return min(candidates, key=lambda c: _waves_cost(c, device, M, N))
    if op == "decode":
        return min(candidates, key=lambda c: abs(_decode_programs(c, N) - 2 * device.sm_count))
    return candidates[0]


def _defaults(op: str, device: Device, bits: int) -> list[Any]:
    return defaults()[target_of(device)]["16" if bits == 16 else "32"].get(op, [])


def _few_cost(config: Matmul, device: Device, N: int) -> int:
    return cdiv(cdiv(N, config.BLOCK_N), device.sm_count) * config.BLOCK_N


def _waves_cost(config: Matmul, device: Device, M: int, N: int) -> float:
    """Relative time of a matmul in tiles: full waves times the area of a tile. A smaller tile feeds
    the tensor cores less well; 10 % a halving, from the published persistent kernels."""
    tiles = cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N)
    area = config.BLOCK_M * config.BLOCK_N
    penalty = 1.0 + 0.1 * max(0, (128 * 256 // area).bit_length() - 1)
    return cdiv(tiles, device.sm_count) * area * penalty


def _decode_programs(config: Decode, N: int) -> int:
    return cdiv(N, config.BLOCK_N) * config.SPLITS


@functools.lru_cache(maxsize=65536)
def choose_product(
    forced: str | Product,
    device: Device,
    bits: int,
    M: int,
    N: int,
    K: int,
    r: int,
    *,
    drawn: bool,
    masked: bool,
    followed: bool,
    addressable: bool,
) -> Product:
    """How Y [M, N] = X [M, K] W + S B runs.

    forced: as FORCED. bits: 16 or 32, of the dtype. drawn: a mask is drawn on X before the adapter
    (forward). masked: the adapter term is masked (dX of dropout). followed: rank_grad runs next
    (dX). addressable: X, W and Y by tensor descriptors.
    """
    if isinstance(forced, Product):
        return forced
    hopper = device.capability == 90 and device.backend == "cuda"
    can = {
        "decode": M <= MAX_DECODE[bits][0] and r <= MAX_DECODE[bits][1],
        "single": r <= MAX_SINGLE_RANK,
        "portable": True,
        "pdl": addressable and bits == 16 and has_descriptors(device) and not masked,
        "hopper": addressable and bits == 16 and hopper and r <= MAX_HOPPER_RANK,
    }
    can["hopper"] &= r <= MAX_MASKED_RANK or not masked
    can["hopper"] &= K % 8 == 0 or not drawn
    if drawn or masked:
        can["decode"] = can["single"] = False
    if forced == "auto":
        of = "dx" if followed or masked else "forward"
        key = (of, drawn or masked, bits, tuned_tokens(M), N, K, r)
        measured = tuned(device.name, triton_minor()).get(key)
        if measured is not None and can[measured.path]:
            return measured
    path, reason = _path(forced, device, bits, M, N, r, can)
    if path == "decode":
        return Product(path, reason, decode=select("decode", device, bits, M, N))
    if path == "single":
        few = FEW_TOKENS < M <= MAX_DECODE[bits][0] and _defaults("matmul_few", device, bits)
        op = "matmul_few" if few else "matmul_single"
        return Product(path, reason, matmul=select(op, device, bits, M, N))
    if path == "hopper":
        return _hopper(reason, device, bits, M, N, K, r, drawn=drawn, followed=followed)
    op = {"portable": "matmul", "pdl": "matmul_descriptor"}[path]
    matmul = select(op, device, bits, M, N)
    shrink, programs = select("shrink", device, bits, M, N), device.sm_count
    if path == "pdl":
        shrink, programs = idle_shrink(matmul, device, bits, M, N, K, r) or (shrink, programs)
    programs = min(programs, cdiv(M, shrink.BLOCK_M))
    return Product(path, reason, matmul=matmul, shrink=shrink, shrink_programs=programs)


def _hopper(
    reason: str,
    device: Device,
    bits: int,
    M: int,
    N: int,
    K: int,
    r: int,
    *,
    drawn: bool,
    followed: bool,
) -> Product:
    """The path hopper: whether its matmul has the SMs for itself, or leaves room for a shrink that
    is small enough, and for rank_grad, to run beside it. Measured on an H100 (results/LOG.md)."""
    matmul = select("matmul_hopper", device, bits, M, N)
    beside = select("matmul_beside", device, bits, M, N)
    work = (device, bits, M, K, r)
    if drawn:
        shrink, programs = select("shrink_dropout", device, bits, M, N), 2 * device.sm_count
    else:
        window = idle_shrink(matmul, device, bits, M, N, K, r)
        if r <= MAX_BESIDE_RANK and (followed or window is None):
            matmul, seconds = beside, _tile_seconds(matmul, K)
            shrink, programs = _shrink_in_time("shrink_beside", device.sm_count, seconds, *work)
        else:
            matmul = beside if followed else matmul
            shrink, programs = window or _shrink_in_time("shrink", device.sm_count, 0.0, *work)
    programs = min(programs, cdiv(M, shrink.BLOCK_M))
    return Product("hopper", reason, matmul=matmul, shrink=shrink, shrink_programs=programs)


def _path(
    forced: str, device: Device, bits: int, M: int, N: int, r: int, can: dict[str, bool]
) -> tuple[str, str]:
    """The path that is forced, if it can run, else what the rules prefer, and why."""
    if forced == "auto":
        return _preferred(device, bits, M, N, r, can)
    if can[forced]:
        return forced, f"forced by FUSED_LORA_PATH={forced}"
    path, reason = _preferred(device, bits, M, N, r, can)
    return path, f"{reason}; FUSED_LORA_PATH={forced} cannot run here"


def _preferred(
    device: Device, bits: int, M: int, N: int, r: int, can: dict[str, bool]
) -> tuple[str, str]:
    if can["decode"]:
        few = _defaults("matmul_few", device, bits)
        tiles = max((cdiv(N, c.BLOCK_N) for c in few), default=0)
        reason = f"M = {M} <= {MAX_DECODE[bits][0]} tokens"
        if M <= FEW_TOKENS or tiles <= device.sm_count // 2:
            return "decode", reason
        # every narrow tile forms S anew: r columns beside its own
        if can["single"] and r <= select("matmul_few", device, bits, M, N).BLOCK_N:
            return "single", f"{reason}, {tiles} narrow tiles"
        if not can["hopper"]:
            return "decode", reason
    if can["hopper"]:
        return "hopper", "descriptors, shrink hidden behind or beside the matmul"
    if can["pdl"] and device.backend == "cuda":
        return "pdl", "descriptors, shrink hidden behind the matmul"
    if can["single"] and r <= MIN_RANK_BLOCK:
        return "single", f"r = {r} <= {MIN_RANK_BLOCK}: S is recomputed per tile"
    return "portable", "pointer loads, S from shrink"


def idle_sms(matmul: Matmul, device: Device, M: int, N: int) -> int:
    """How many SMs a persistent matmul leaves idle in its last wave, for one tile time: there a
    shrink launched before it (PDL) is free. One SM more would put off the last wave: seen on an
    H100, 6.7 % over the merged product on 32 SMs, 12.7 % on 33."""
    return -cdiv(M, matmul.BLOCK_M) * cdiv(N, matmul.BLOCK_N) % device.sm_count


def idle_shrink(
    matmul: Matmul, device: Device, bits: int, M: int, N: int, K: int, r: int
) -> tuple[Shrink, int] | None:
    """The tiles and programs of a shrink on the SMs that this matmul leaves idle; None if it cannot
    do its work there in time."""
    idle = idle_sms(matmul, device, M, N)
    if idle == 0:
        return None
    seconds = _tile_seconds(matmul, K)
    shrink, programs = _shrink_in_time("shrink", idle, seconds, device, bits, M, K, r)
    if _shrink_seconds(shrink, idle, M, K, r) > seconds:
        return None
    return shrink, min(programs, cdiv(M, shrink.BLOCK_M))


def _shrink_in_time(
    op: str, sms: int, seconds: float, device: Device, bits: int, M: int, K: int, r: int
) -> tuple[Shrink, int]:
    """The tiles of a shrink on so many SMs, and the programs for each of its rank blocks: those
    that take the least of the SMs' time and are done within `seconds`, else the fastest."""

    def cost(shrink: Shrink) -> tuple[float, float]:
        took = _shrink_seconds(shrink, sms, M, K, r)
        programs = min(sms, cdiv(M, shrink.BLOCK_M) * cdiv(r, shrink.block_r(r)))
        return max(took, seconds), took * programs

    shrink = min(_defaults(op, device, bits), key=cost)
    return shrink, max(1, sms // cdiv(r, shrink.block_r(r)))


def _tile_seconds(matmul: Matmul, K: int) -> float:
    """Model: a tile runs at the GPU's 650 TFLOP/s / 132."""
    return 2 * matmul.BLOCK_M * matmul.BLOCK_N * K / (650e12 / 132)


def _shrink_seconds(shrink: Shrink, programs: int, M: int, K: int, r: int) -> float:
    """Model: an SM streams 100 GB/s, and a step takes at least the 0.25 us of its loads' latency
    (seen on an H100 in tiles of 16 and 128 rows)."""
    rounds = cdiv(cdiv(M, shrink.BLOCK_M) * cdiv(r, shrink.block_r(r)), programs)
    streaming = (shrink.BLOCK_M + shrink.block_r(r)) * K * 2 / 100e9
    return rounds * max(streaming, cdiv(K, shrink.BLOCK_K) * 0.25e-6)


def rank_grad_tiles(plan: Product | None, device: Device, bits: int, masked: bool) -> RankGrad:
    """The tiles of rank_grad: what was measured behind the dX of this plan, else the defaults; with
    a dropout mask more warps, where a GPU has a form of its own."""
    if plan is not None and plan.rank_grad is not None:
        return plan.rank_grad
    own = masked and _defaults("rank_grad_masked", device, bits)
    return own[0] if own else _defaults("rank_grad", device, bits)[0]


def rank_grad_behind(plan: Product | None) -> bool:
    """Whether rank_grad starts while the dX of this plan still runs."""
    return plan is not None and plan.path == "hopper"


def rank_grad_splits(device: Device, column_tiles: int, M: int, config: RankGrad) -> int:
    """How many programs share the M rows of one column tile: enough to fill the device twice, and,
    so that beside a dX the work spreads evenly over its SMs, one for about 2048 rows up to eight;
    at least two row blocks each."""
    blocks = cdiv(M, config.BLOCK_M)
    wanted = max(cdiv(2 * device.sm_count, max(1, column_tiles)), min(8, cdiv(M, 2048)))
    return max(1, min(wanted, cdiv(blocks, 2)))


@functools.lru_cache(maxsize=65536)
def choose_backend(device: Device, bits: int, M: int, N: int, K: int, r: int) -> tuple[str, str]:
    """ "triton" or "aten" for backend="auto" on a GPU, and why.

    Where nothing is measured: triton for 16-bit dtypes on Hopper and datacentre Blackwell, whose
    kernel this library is built around; aten elsewhere, three library products.
    """
    if bits != 16:
        return "aten", "auto: the kernels are built around 16-bit dtypes"
    measured = tuned(device.name, triton_minor()).get(("backend", bits, tuned_tokens(M), N, K, r))
    if measured is not None:
        return measured, "auto: the faster one as measured on this GPU"
    if has_descriptors(device):
        return "triton", "auto: the kernels are built around this architecture"
    return "aten", "auto: the kernels are built around Hopper, nothing is measured on this GPU"
