"""Fills kernels/tuned/<gpu>.json: the fastest tiles, path and backend for each size, on this GPU.

    python benchmarks/tune.py --output DIR [--minutes 9] [--tokens 8192,16] [--ranks 16,64]

Candidates are compiled in parallel first and left out if they spill or do not fit; the rest are
checked by the acceptance rule and timed side by side (graphs, cold L2, interleaved). The table is
written after every size, so an interrupted run, or one that `--minutes` ends, goes on where it
stopped. A copy goes to DIR. The default keeps its place unless something beats it beyond the noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import compiling
import protocol
import results
import steps
import torch
import trial
from candidates import BOTH, Candidate, Layer, Product, RankGrad, Shrink
from candidates import Path as Run
from cases import positive_list
from latency import progress_bar
from results import Case

from fused_lora.kernels import config, tape

BITS = 16  # bf16; fp16 has the same tiles
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (5120, 5120))  # (K, N)
TOKENS = (8192, 16, 1, 64, 4096)
RANKS = (16, 64, 8, 128)
BUDGET = protocol.Budget(seconds=0.5, min_samples=50, max_samples=200)
RESERVE_SECONDS = 25.0  # no size takes longer
COMPILE_SHARE = 0.4  # of the time


def _matmuls(*tiles: tuple[int, ...]) -> tuple[config.Matmul, ...]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, parts in which y is stored)"""
    return tuple(
        config.Matmul(m, n, k, 8, warps, stages, parts) for m, n, k, warps, stages, parts in tiles
    )


GRIDS: dict[str, tuple[Any, ...]] = {
    "shrink": tuple(
        config.Shrink(m, k, warps, stages)
        for m, k, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (3, 4, 5))
    )
    + (config.Shrink(16, 128, 4, 4, 16), config.Shrink(16, 256, 4, 3, 16)),
    "matmul_descriptor": (
        *_matmuls(
            (128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 3, 2), (128, 256, 64, 8, 4, 2),
            (256, 128, 64, 8, 3, 1), (256, 128, 64, 8, 4, 2), (128, 128, 64, 8, 4, 1),
            (128, 128, 64, 4, 4, 1), (128, 128, 128, 8, 3, 2), (64, 256, 64, 4, 4, 1),
        ),
        replace(*_matmuls((128, 256, 64, 8, 3, 1)), GROUP_M=16),
        replace(*_matmuls((128, 256, 64, 8, 3, 1)), GROUP_M=4),
    ),
    "matmul_hopper": _matmuls(
        (128, 256, 64, 8, 4, 2), (128, 256, 64, 8, 3, 1), (128, 128, 64, 8, 4, 2),
        (128, 128, 64, 8, 5, 2), (64, 128, 64, 4, 8, 2), (64, 64, 64, 4, 8, 1),
    ),
    "matmul_single": _matmuls(
        (128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1), (64, 128, 64, 4, 3, 1),
        (128, 256, 64, 8, 3, 1),
    ),
    "matmul": _matmuls(
        (128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1), (64, 128, 64, 4, 3, 1),
        (128, 256, 64, 8, 3, 1),
    ),
    "rank_grad": tuple(
        config.RankGrad(m, c, warps, stages)
        for m, c, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3))
    ),
    "decode": tuple(
        config.Decode(n, k, splits, 4, 3 if k == 128 else 4, 64)
        for n, k, splits in itertools.product((64, 128), (64, 128), (1, 2, 4, 8))
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One entry to be found. op: of GRIDS, or "path" or "backend"; sizes are the layer's."""

    op: str
    M: int
    K: int
    N: int
    r: int
    directions: tuple[str, ...]

    @property
    def case(self) -> Case:
        return Case("+".join(self.directions), self.M, self.K, self.N, self.r, "bfloat16")

    @property
    def sizes(self) -> dict[str, int]:
        """As `config` looks them up: a product dX has the layer's N and K exchanged."""
        N, K = (self.K, self.N) if self.directions == ("dx",) else (self.N, self.K)
        return {"bits": BITS, "M": config.bucket(self.M), "N": N, "K": K, "r": self.r}

    def __str__(self) -> str:
        return f"{self.op} {self.case}"


def items(
    layers: tuple[tuple[int, int], ...], tokens: tuple[int, ...], ranks: tuple[int, ...]
) -> Iterator[Item]:
    """What to tune, the most useful first. A square layer's products are one entry for y and dX;
    dX of another layer is left to the layer whose y has those sizes, if there is one."""
    most_tokens, most_ranks = config.MAX_DECODE[BITS]
    for r, M in itertools.product(ranks, tokens):
        few = most_tokens >= M and most_ranks >= r
        ops = ["decode", "path"] if few else ["shrink", "matmul_descriptor", "matmul_hopper"]
        if not few:
            ops += ["matmul_single"] * (r <= config.MIN_RANK_BLOCK) + ["matmul", "path"]
        for K, N in layers:
            sides: list[tuple[str, ...]] = [BOTH] if K == N and not few else [("fwd",)]
            if not few and (N, K) not in layers:
                sides.append(("dx",))
            for directions, op in itertools.product(sides, ops):
                yield Item(op, M, K, N, r, directions)
            if not few:
                yield Item("rank_grad", M, K, N, r, BOTH)
            yield Item("backend", M, K, N, r, ("fwd",) if few else BOTH)


def candidate(item: Item, tiles: Any, device: config.Device) -> Candidate:
    """The candidate of an op that runs with these tiles."""
    name = " ".join(map(str, astuple(tiles)))
    if item.op == "shrink":
        programs = min(device.sm_count, -(-item.M // tiles.BLOCK_M))
        return Shrink(name, item.directions, tiles, programs)
    if item.op == "rank_grad":
        return RankGrad(name, tiles)
    if item.op == "decode":
        return Run(name, item.directions, config.Product("decode", "", decode=tiles))
    if item.op == "matmul_single":
        return Run(name, item.directions, config.Product("single", "", matmul=tiles))
    return Product(name, item.directions, item.op, tiles, adapter=True)


def contenders(
    item: Item, device: config.Device, faults: dict[tuple, str]
) -> tuple[str, dict[str, tuple[Candidate, Any]]]:
    """(name of the default, {name: (candidate, what the table would say)})."""
    if item.op == "backend":
        mode = "fwd" if item.directions == ("fwd",) else "fwd+bwd"
        names = ("triton", "aten")
        default = config.choose_backend(replace(device, name=""), BITS, *_sizes(item))
        return default, {name: (Layer(name, name, mode), name) for name in names}
    if item.op == "path":
        plans = {}
        for path in config.PATHS:
            if ("path", path) in faults:
                continue
            try:
                plans[path] = steps.plan_of(path, device, item.case, item.directions[0])
            except AssertionError:  # it cannot run at these sizes
                continue
        default = next(p for p in ("decode", "hopper", "pdl") if p in plans)
        return default, {p: (Run(p, item.directions, plan), p) for p, plan in plans.items()}
    # an unnamed GPU has no table: its choice is the default
    default = config.select(item.op, replace(device, name=""), BITS, *_sizes(item))
    grid = dict.fromkeys((default, *GRIDS[item.op]))
    made = [(candidate(item, tiles, device), tiles) for tiles in grid]
    return made[0][0].name, {
        c.name: (c, tiles)
        for c, tiles in made
        if tiles == default or kernel_key(item, tiles) not in faults
    }


def _sizes(item: Item) -> tuple[int, int, int, int]:
    sizes = item.sizes
    return item.M, sizes["N"], sizes["K"], item.r


def best(rows: list[dict[str, Any]], default: str, by: str = "p50_us") -> str | None:
    """The fastest accepted candidate; the default, if nothing beats it beyond the A/A noise. None
    if nothing could be timed."""
    times = {r["name"]: r[by] for r in rows if r["ok"] and r.get(by) is not None}
    if not times:
        return None
    fastest = min(times, key=times.__getitem__)
    noise = max((r.get("noise") or 0.0) for r in rows)
    if default in times and times[default] <= times[fastest] * (1 + noise):
        return default
    return fastest


class Table:
    """The GPU's file, in the form that `config.tuned` reads. Entries also say what they are worth:
    p50_us, of the default too, over the merged layer, and the A/A noise."""

    def __init__(self, device: config.Device, copies: Path | None) -> None:
        name = f"{config.file_name(device.name)}.json"
        self.paths = [config.TUNED / name] + ([copies / name] if copies else [])
        self.document: dict[str, Any] = {
            "measured": True, "gpu": device.name, "triton": config.triton_minor(),
            "torch": torch.__version__, "entries": [],
        }  # fmt: skip
        if self.paths[0].exists():
            earlier = json.loads(self.paths[0].read_text())
            if earlier["triton"] == self.document["triton"]:
                self.document["entries"] = earlier["entries"]

    def has(self, item: Item) -> bool:
        wanted = {"op": item.op, **item.sizes}
        return any(wanted.items() <= entry.items() for entry in self.document["entries"])

    def add(self, item: Item, choice: Any, rows: list[dict[str, Any]], default: str) -> None:
        by_name = {row["name"]: row for row in rows}
        chosen = by_name[choice if isinstance(choice, str) else " ".join(map(str, astuple(choice)))]
        found = {"choice": choice} if isinstance(choice, str) else {"config": vars(choice)}
        entry = {
            "op": item.op, **item.sizes, **found,
            **{name: chosen.get(name) for name in ("p50_us", "vs_merged", "noise")},
            "default_us": by_name.get(default, {}).get("p50_us"),
        }  # fmt: skip
        self.document["entries"].append(entry)
        for path in self.paths:
            results.write_json(path, self.document)
        forget()


def forget() -> None:
    """Let the next call see the table as it is now."""
    for cached in (config.tuned, config.select, config._choose_product, config.choose_backend):
        cached.cache_clear()
    tape.forget()


def kernel_key(item: Item, tiles: Any) -> tuple:
    """What the compiled kernel depends on: of M, decode alone has a block."""
    return item.op, tiles, item.r, item.M if item.op == "decode" else None


def static_faults(
    todo: list[Item], device: config.Device, seconds: float, processes: int
) -> dict[tuple, str]:
    """{kernel_key: why it is left out}. Compiled for the first layer: the others' sizes are
    multiples of the same powers of two, so their kernels are the same."""
    jobs: dict[tuple, compiling.Job] = {}
    for item in todo:
        for tiles in GRIDS.get(item.op, ()):
            both = replace(item, directions=BOTH)
            jobs.setdefault(kernel_key(item, tiles), (item.case, candidate(both, tiles, device)))
    bar = progress_bar(len(jobs))
    bar.set_description_str("compiling")
    facts = compiling.compile_all(
        list(jobs.values()), processes, seconds, lambda facts: bar.update()
    )
    bar.close()
    found = {key: compiling.fault(known) for key, known in zip(jobs, facts, strict=True)}
    return {key: why for key, why in found.items() if why}


def tune(
    todo: list[Item],
    device: config.Device,
    table: Table,
    deadline: float,
    faults: dict[tuple, str],
) -> int:
    """Measure what is left and write it down. Returns how many items remain."""
    bar = progress_bar(len(todo))
    for done, item in enumerate(todo):
        if time.time() + RESERVE_SECONDS > deadline:
            bar.close()
            return len(todo) - done
        bar.set_description_str(str(item))
        default, entrants = contenders(item, device, faults)
        group = trial.Group(
            str(item), item.case, item.directions, [c for c, _ in entrants.values()]
        )
        rows = trial.measure(group, torch.device("cuda"), BUDGET)
        for row in rows:
            if row["ok"] is False:
                bar.write(f"{item}: {row['name']}: {row['note']}")
        mine = [row for row in rows if row["name"] in entrants]
        # a backend costs what it costs a caller without graphs: host time where that is longer
        winner = best(mine, default, "host_p50_us" if item.op == "backend" else "p50_us")
        if winner is None:
            bar.write(f"{item}: nothing could be timed")
        else:
            table.add(item, entrants[winner][1], mine, default)
        bar.update()
    bar.close()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for a copy of the table")
    parser.add_argument("--minutes", type=float, default=9.0, help="end before this")
    parser.add_argument("--tokens", type=positive_list, default=TOKENS, help="powers of two")
    parser.add_argument("--ranks", type=positive_list, default=RANKS)
    parser.add_argument(
        "--skip",
        type=lambda text: text.split(","),
        default=[],
        help="kernels that crash or hang, e.g. matmul_hopper,decode",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--dry-run", action="store_true", help="only list what would be tuned")
    args = parser.parse_args(arguments)
    deadline = time.time() + 60 * args.minutes
    todo = [i for i in items(LAYERS, args.tokens, args.ranks) if i.op not in args.skip]
    if args.dry_run:
        for item in todo:
            print(f"{item}: {len(GRIDS.get(item.op, ())) or 'the'} candidates")
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("tune.py needs a Hopper GPU: without one, use --dry-run", file=sys.stderr)
        return 2
    device = config.device_of(0)
    table = Table(device, args.output)
    todo = [item for item in todo if not table.has(item)]
    seconds = COMPILE_SHARE * (deadline - time.time())
    faults = static_faults(todo, device, seconds, args.processes)
    skipped = {("path", op.removeprefix("matmul_")): "--skip" for op in args.skip}
    left = tune(todo, device, table, deadline, faults | skipped)
    print(f"{len(faults)} candidates left out by static facts; written: {table.paths[0]}")
    print(f"{left} entries are left: run it again" if left else "complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
