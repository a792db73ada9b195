"""Which kernels run for a shape, and with which tiles: pure functions of the device and the sizes.

A table measured on the very GPU (`tuned/<gpu>.json`, per Triton minor version) answers first; else
an analytic choice among the configurations of `tuned/default.json`, which are compiled and checked
for spills on every architecture by the tests. An unknown GPU gets a default, never an error.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNED = Path(__file__).parent / "tuned"

# How forward and dX are computed. "auto" lets `_path` decide; any other name forces that path
# wherever it can run.
#   hopper    shrink, then the Gluon matmul started behind it (programmatic dependent launch)
#   pdl       the same with the descriptor matmul, which newer GPUs take
#   portable  shrink, then the pointer matmul
#   single    one launch of the pointer matmul, S recomputed in every tile
#   decode    one launch for few tokens, K split over programs
PATHS = ("hopper", "pdl", "portable", "single", "decode")
PATH = os.environ.get("FUSED_LORA_PATH", "auto")

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
    MIN_BLOCK_R: int = MIN_RANK_BLOCK  # 64 on Hopper, where the left operand has 64 rows at least

    def block_m(self, M: int) -> int:
        return _power_of_2(M)

    def block_r(self, r: int) -> int:
        return max(self.MIN_BLOCK_R, _power_of_2(r))


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
    shrink_programs: int = 0
    decode: Decode | None = None

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


@functools.cache
def device_of(index: int | None) -> Device:
    """The Device of a CUDA (or HIP) device index; None is the interpreter."""
    if index is None:
        return INTERPRETER
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
    """Measured entries of this GPU for this Triton: {(op, bits, M bucket, N, K, r): config}."""
    path = TUNED / f"{file_name(gpu)}.json"
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    if table.get("triton") != triton_minor:
        return {}
    entries = {}
    for entry in table["entries"]:
        key = (entry["op"], entry["bits"], entry["M"], entry["N"], entry["K"], entry["r"])
        kind = KINDS.get(entry["op"])
        entries[key] = kind(**entry["config"]) if kind else entry["choice"]
    return entries


def file_name(gpu: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in gpu.lower())


def bucket(M: int) -> int:
    """Token counts are tuned by power of two: the next one at or above M."""
    return 1 << max(0, M - 1).bit_length()


@functools.cache
def triton_minor() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@functools.lru_cache(maxsize=65536)
def select(op: str, device: Device, bits: int, M: int, N: int, K: int, r: int) -> Any:
    """The configuration of kernel `op` for these sizes: tuned if measured, else the default that
    the analytic rule prefers."""
    candidates = _candidates(op, device, bits, M, N, K, r)
    if op == "matmul_few":  # bound by memory: x is read again for every tile
        return min(candidates, key=lambda c: (_few_cost(c, device, N), -c.BLOCK_N))
    if op.startswith("matmul"):
        return min(candidates, key=lambda c: _waves_cost(c, device, M, N))
    if op == "decode":
        return min(candidates, key=lambda c: abs(_decode_programs(c, N) - 2 * device.sm_count))
    return candidates[0]


def _candidates(op: str, device: Device, bits: int, M: int, N: int, K: int, r: int) -> list[Any]:
    """What is measured for these sizes, alone, else the defaults."""
    found = tuned(device.name, triton_minor()).get((op, bits, bucket(M), N, K, r))
    return _defaults(op, device, bits) if found is None else [found]


def _defaults(op: str, device: Device, bits: int) -> list[Any]:
    return defaults()[target_of(device)]["16" if bits == 16 else "32"].get(op, [])


def _few_cost(config: Matmul, device: Device, N: int) -> int:
    return _cdiv(_cdiv(N, config.BLOCK_N), device.sm_count) * config.BLOCK_N


def _waves_cost(config: Matmul, device: Device, M: int, N: int) -> float:
    """Relative time of a matmul in tiles: full waves times the area of a tile. A smaller tile feeds
    the tensor cores less well; 10 % a halving, from the published persistent kernels."""
    tiles = _cdiv(M, config.BLOCK_M) * _cdiv(N, config.BLOCK_N)
    area = config.BLOCK_M * config.BLOCK_N
    penalty = 1.0 + 0.1 * max(0, (128 * 256 // area).bit_length() - 1)
    return _cdiv(tiles, device.sm_count) * area * penalty


def _decode_programs(config: Decode, N: int) -> int:
    return _cdiv(N, config.BLOCK_N) * config.SPLITS


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def choose_product(
    device: Device,
    bits: int,
    M: int,
    N: int,
    K: int,
    r: int,
    *,
    dropout: bool,
    masked_output: bool,
    followed: bool,
    describable: bool,
) -> Product:
    """How Y [M, N] = X [M, K] W + S B runs.

    bits: 16 or 32, of the dtype. dropout: a mask is drawn on X before the adapter (forward).
    masked_output: the adapter term is masked (dX of dropout). followed: rank_grad runs next (dX).
    describable: x, w and y can be addressed by tensor descriptors.
    """
    return _choose_product(
        PATH,
        device,
        bits,
        M,
        N,
        K,
        r,
        dropout,
        masked_output,
        followed,
        describable,
    )


@functools.lru_cache(maxsize=65536)
def _choose_product(
    path: str,
    device: Device,
    bits: int,
    M: int,
    N: int,
    K: int,
    r: int,
    dropout: bool,
    masked_output: bool,
    followed: bool,
    describable: bool,
) -> Product:
    hopper = device.capability == 90 and device.backend == "cuda"
    can = {
        "decode": M <= MAX_DECODE[bits][0] and r <= MAX_DECODE[bits][1],
        "single": r <= MAX_SINGLE_RANK,
        "portable": True,
        "pdl": describable and bits == 16 and has_descriptors(device) and not masked_output,
        "hopper": describable and bits == 16 and hopper and r <= MAX_HOPPER_RANK,
    }
    can["hopper"] &= r <= MAX_MASKED_RANK or not masked_output
    can["hopper"] &= K % 8 == 0 or not dropout
    if dropout or masked_output:
        can["decode"] = can["single"] = False
    path, reason = _path(path, device, bits, M, N, K, r, can)
    sizes = (device, bits, M, N, K, r)
    if path == "decode":
        return Product(path, reason, decode=select("decode", *sizes))
    if path == "single":
        few = FEW_TOKENS < M <= MAX_DECODE[bits][0] and _defaults("matmul_few", device, bits)
        op = "matmul_few" if few else "matmul_single"
        return Product(path, reason, matmul=select(op, *sizes))
    if path == "hopper":
        return _hopper(reason, sizes, dropout, followed)
    op = {"portable": "matmul", "pdl": "matmul_descriptor"}[path]
    matmul = select(op, *sizes)
    shrink, programs = select("shrink", *sizes), device.sm_count
    if path == "pdl":
        shrink, programs = idle_shrink(matmul, *sizes) or (shrink, programs)
    programs = min(programs, _cdiv(M, shrink.BLOCK_M))
    return Product(path, reason, matmul=matmul, shrink=shrink, shrink_programs=programs)


def _hopper(
    reason: str,
    sizes: tuple[Device, int, int, int, int, int],
    dropout: bool,
    followed: bool,
) -> Product:
    """The path hopper: whether its matmul has the SMs for itself, or leaves room for a shrink that
    is small enough, and for rank_grad, to run beside it. Measured on an H100 (results/LOG.md)."""
    device, _, M, _, K, r = sizes
    matmul, beside = select("matmul_hopper", *sizes), select("matmul_beside", *sizes)
    if dropout:
        shrink, programs = select("shrink_dropout", *sizes), 2 * device.sm_count
    else:
        window = idle_shrink(matmul, *sizes)
        if r <= MAX_BESIDE_RANK and (followed or window is None):
            matmul, seconds = beside, _tile_seconds(matmul, K)
            shrink, programs = _shrink_in_time("shrink_beside", device.sm_count, seconds, *sizes)
        else:
            matmul = beside if followed else matmul
            shrink, programs = window or _shrink_in_time("shrink", device.sm_count, 0.0, *sizes)
    programs = min(programs, _cdiv(M, shrink.BLOCK_M))
    return Product("hopper", reason, matmul=matmul, shrink=shrink, shrink_programs=programs)


def _path(
    forced: str, device: Device, bits: int, M: int, N: int, K: int, r: int, can: dict[str, bool]
) -> tuple[str, str]:
    if forced != "auto":
        if forced not in PATHS:
            raise ValueError(f"FUSED_LORA_PATH must be auto or one of {PATHS}: got {forced!r}")
        if can[forced]:
            return forced, f"forced by FUSED_LORA_PATH={forced}"
    measured = tuned(device.name, triton_minor()).get(("path", bits, bucket(M), N, K, r))
    if measured is not None and can[measured]:
        return measured, "measured on this GPU"
    if can["decode"]:
        few = _defaults("matmul_few", device, bits)
        tiles = max((_cdiv(N, c.BLOCK_N) for c in few), default=0)
        reason = f"M = {M} <= {MAX_DECODE[bits][0]} tokens"
        if M <= FEW_TOKENS or tiles <= device.sm_count // 2:
            return "decode", reason
        # every narrow tile forms S anew: r columns beside its own
        if can["single"] and r <= select("matmul_few", device, bits, M, N, K, r).BLOCK_N:
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


def idle_shrink(
    matmul: Matmul, device: Device, bits: int, M: int, N: int, K: int, r: int
) -> tuple[Shrink, int] | None:
    """The tiles and programs of a shrink on the SMs that a persistent matmul launched behind it
    (PDL) leaves idle in its last wave; None if it cannot do its work there in time.

    (-tiles) mod SMs are idle for one tile time: there shrink is free. One SM more would put off the
    last wave: seen on an H100, 6.7 % over the merged product on 32 SMs, 12.7 % on 33.
    """
    idle = -_cdiv(M, matmul.BLOCK_M) * _cdiv(N, matmul.BLOCK_N) % device.sm_count
    if idle == 0:
        return None
    seconds = _tile_seconds(matmul, K)
    shrink, programs = _shrink_in_time("shrink", idle, seconds, device, bits, M, N, K, r)
    if _shrink_seconds(shrink, idle, M, K, r) > seconds:
        return None
    return shrink, min(programs, _cdiv(M, shrink.BLOCK_M))


def _shrink_in_time(
    op: str, sms: int, seconds: float, device: Device, bits: int, M: int, N: int, K: int, r: int
) -> tuple[Shrink, int]:
    """The tiles of a shrink on so many SMs, and the programs for each of its rank blocks: those
    that take the least of the SMs' time and are done within `seconds`, else the fastest."""

    def cost(shrink: Shrink) -> tuple[float, float]:
        took = _shrink_seconds(shrink, sms, M, K, r)
        programs = min(sms, _cdiv(M, shrink.BLOCK_M) * _cdiv(r, shrink.block_r(r)))
        return max(took, seconds), took * programs

    shrink = min(_candidates(op, device, bits, M, N, K, r), key=cost)
    return shrink, max(1, sms // _cdiv(r, shrink.block_r(r)))


def _tile_seconds(matmul: Matmul, K: int) -> float:
    """Model: a tile runs at the GPU's 650 TFLOP/s / 132."""
    return 2 * matmul.BLOCK_M * matmul.BLOCK_N * K / (650e12 / 132)


def _shrink_seconds(shrink: Shrink, programs: int, M: int, K: int, r: int) -> float:
    """Model: an SM streams 100 GB/s, and a step takes at least the 0.25 us of its loads' latency
    (seen on an H100 in tiles of 16 and 128 rows)."""
    rounds = _cdiv(_cdiv(M, shrink.BLOCK_M) * _cdiv(r, shrink.block_r(r)), programs)
    streaming = (shrink.BLOCK_M + shrink.block_r(r)) * K * 2 / 100e9
    return rounds * max(streaming, _cdiv(K, shrink.BLOCK_K) * 0.25e-6)


def rank_grad_tiles(
    device: Device, bits: int, M: int, N: int, K: int, r: int, masked: bool
) -> RankGrad:
    """The tiles of rank_grad; with a dropout mask more warps, where a GPU has a form of its own."""
    sizes = (device, bits, M, N, K, r)
    own = masked and _candidates("rank_grad_masked", *sizes)
    return select("rank_grad_masked" if own else "rank_grad", *sizes)


def rank_grad_behind(plan: Product | None) -> bool:
    """Whether rank_grad starts while the dX of this plan still runs."""
    return plan is not None and plan.path == "hopper"


def rank_grad_splits(device: Device, column_tiles: int, M: int, config: RankGrad) -> int:
    """How many programs share the M rows of one column tile: enough to fill the device twice, and,
    so that beside a dX the work spreads evenly over its SMs, one for about 2048 rows up to eight;
    at least two row blocks each."""
    blocks = _cdiv(M, config.BLOCK_M)
    wanted = max(_cdiv(2 * device.sm_count, max(1, column_tiles)), min(8, _cdiv(M, 2048)))
    return max(1, min(wanted, _cdiv(blocks, 2)))


@functools.lru_cache(maxsize=65536)
def choose_backend(device: Device, bits: int, M: int, N: int, K: int, r: int) -> str:
    """ "triton" or "aten" for backend="auto" on a GPU.

    Where nothing is measured: triton for 16-bit dtypes on Hopper and datacentre Blackwell, whose
    kernel this library is built around; aten elsewhere, three library products.
    """
    if bits != 16:
        return "aten"
    measured = tuned(device.name, triton_minor()).get(("backend", bits, bucket(M), N, K, r))
    if measured is not None:
        return measured
    return "triton" if has_descriptors(device) else "aten"
