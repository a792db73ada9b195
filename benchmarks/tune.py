"""Fills kernels/tuned/<gpu>.json: the fastest plan and backend for each size, on this GPU.

    python benchmarks/tune.py --output DIR [--minutes 9] [--tokens 8192,16] [--ranks 16,64]

A forward, and a backward with all its gradients, are timed whole, for what runs beside or behind
what decides: first the paths, then tiles, shrink and rank_grad, each around the best so far, and in
the end the best once more against the plan of the rules. Candidates are compiled in parallel before
and left out if they spill or do not fit; the rest are checked by the acceptance rule and timed side
by side (graphs, cold L2, interleaved). The rules stay unless something beats them beyond the noise.
The table is written after every size, so an interrupted run, or one that `--minutes` ends, goes on
where it stopped. A copy goes to DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import compiling
import protocol
import results
import search
import steps
import torch
import trial
from candidates import Candidate, Layer
from cases import positive_list
from latency import progress_bar
from search import Item, Plan

from fused_lora.kernels import config, tape

STAGE = protocol.Budget(seconds=0.5, min_samples=50, max_samples=200)
FINAL = protocol.Budget(seconds=1.0, min_samples=200, max_samples=400)
RESERVE_SECONDS = 30.0  # until a size has shown how long it takes
COMPILE_SHARE = 0.4  # of the time
Row = dict[str, Any]


def fastest(rows: list[Row], incumbent: str, by: str = "p50_us") -> str | None:
    """The fastest accepted candidate; the incumbent, if nothing beats it beyond the A/A noise. None
    if nothing could be timed."""
    times = {r["name"]: r[by] for r in rows if r["ok"] and r.get(by) is not None}
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    noise = max((r.get("noise") or 0.0) for r in rows)
    if incumbent in times and times[incumbent] <= times[best] * (1 + noise):
        return incumbent
    return best


@dataclass(frozen=True)
class Found:
    """choice: a plan, None where nothing beat that of the rules, or a backend. rows: what was
    measured last, by name; chosen, default: two of these names."""

    choice: Plan | str | None
    chosen: str
    default: str
    rows: dict[str, Row]


class Tuner:
    """Finds entries on one GPU. faults: {(Item.kernels, path, part, tiles): why left out}; skip:
    paths that are not to be run; note: told of what is not accepted."""

    def __init__(
        self,
        device: config.Device,
        faults: dict[tuple, str],
        skip: Iterable[str] = (),
        note: Callable[[str], object] = print,
    ) -> None:
        self.device, self.faults, self.skip, self.note = device, faults, set(skip), note

    def find(self, item: Item) -> Found | None:
        """None if nothing could be timed, or the rules would take a path that is not to be run."""
        if search.rules(item, self.device).path in self.skip:
            return None
        return self._backend(item) if item.of == "backend" else self._plan(item)

    def _backend(self, item: Item) -> Found | None:
        mode = "fwd" if item.directions == ("fwd",) else "fwd+bwd"
        entrants = [Layer(backend, backend, mode) for backend in ("triton", "aten")]
        sizes = (item.M, item.N, item.K, item.r)
        default, _ = config.choose_backend(replace(self.device, name=""), search.BITS, *sizes)
        rows = self._measure(item, entrants, STAGE)
        # a backend costs what it costs a caller without graphs: host time where that is longer
        chosen = fastest(list(rows.values()), default, "host_p50_us")
        return None if chosen is None else Found(chosen, chosen, default, rows)

    def _plan(self, item: Item) -> Found | None:
        default = best = search.rules(item, self.device)
        for stage in search.STAGES:
            around = [p for p in stage(item, self.device, best) if self._worth(item, p)]
            best, _ = self._best(item, [default, best, *around], best, STAGE)
        best, rows = self._best(item, [default, best], default, FINAL)
        if not any(row["ok"] for row in rows.values()):
            return None
        choice = None if best == default else best
        return Found(choice, search.name(best), search.name(default), rows)

    def _best(
        self, item: Item, plans: Sequence[Plan], incumbent: Plan, budget: protocol.Budget
    ) -> tuple[Plan, dict[str, Row]]:
        """The incumbent, unless one of these plans beats it; what was measured."""
        by_name = {search.name(plan): plan for plan in plans}
        rows = self._measure(item, [item.candidate(plan) for plan in by_name.values()], budget)
        chosen = fastest(list(rows.values()), search.name(incumbent))
        return incumbent if chosen is None else by_name[chosen], rows

    def _worth(self, item: Item, plan: Plan) -> bool:
        parts = ((item.kernels, plan.path, part, getattr(plan, part)) for part in search.PARTS)
        return plan.path not in self.skip and self.faults.keys().isdisjoint(parts)

    def _measure(
        self, item: Item, candidates: list[Candidate], budget: protocol.Budget
    ) -> dict[str, Row]:
        group = trial.Group(str(item), item.case, item.directions, candidates)
        rows = trial.measure(group, torch.device("cuda"), budget)
        for row in rows:
            if row["ok"] is False:
                self.note(f"{item}: {row['name']}: {row['note']}")
        names = {candidate.name for candidate in candidates}
        return {row["name"]: row for row in rows if row["name"] in names}


class Table:
    """The GPU's file, in the form that `config.tuned` reads. Entries also say what they are worth:
    p50_us, of the default too, over the merged layer, and the A/A noise."""

    def __init__(self, device: config.Device, copies: Path | None) -> None:
        file = f"{config.file_name(device.name)}.json"
        self.paths = [config.TUNED / file] + ([copies / file] if copies else [])
        self.document: dict[str, Any] = {
            "measured": True, "gpu": device.name, "triton": config.triton_minor(),
            "torch": torch.__version__, "entries": [],
        }  # fmt: skip
        if self.paths[0].exists():
            earlier = json.loads(self.paths[0].read_text())
            if earlier["triton"] == self.document["triton"]:
                self.document["entries"] = earlier["entries"]

    def has(self, item: Item) -> bool:
        key = item.key.items()
        return any(key <= entry.items() for entry in self.document["entries"])

    def add(self, item: Item, found: Found) -> None:
        chosen, default = found.rows[found.chosen], found.rows.get(found.default, {})
        choice: dict[str, Any] = {"choice": found.choice}
        if item.of != "backend":
            choice = {"plan": found.choice and search.fields(found.choice)}
        worth = {name: chosen.get(name) for name in ("p50_us", "vs_merged", "noise")}
        entry = {**item.key, **choice, **worth, "default_us": default.get("p50_us")}
        self.document["entries"].append(entry)
        for path in self.paths:
            results.write_json(path, self.document)
        forget()


def forget() -> None:
    """Let the next call see the table as it is now."""
    for cached in (config.tuned, config.choose_product, config.choose_backend):
        cached.cache_clear()
    tape.forget()


def to_compile(todo: list[Item], device: config.Device) -> dict[tuple, compiling.Job]:
    """{as Tuner.faults: job}: the tiles that the stages try around the rules' plan. Compiled for
    the first layer: the others' sizes are multiples of the same powers of two, so their kernels are
    the same. What is tried around another path compiles when it is."""
    jobs: dict[tuple, compiling.Job] = {}
    for item in todo:
        if item.of == "backend" or any(key[0] == item.kernels for key in jobs):
            continue
        around = search.rules(item, device)
        for plan in itertools.chain.from_iterable(s(item, device, around) for s in search.STAGES):
            for part in search.PARTS:
                values = getattr(plan, part)
                if values is not None and values != getattr(around, part):
                    key = (item.kernels, plan.path, part, values)
                    jobs.setdefault(key, (item.case, item.candidate(plan)))
    return jobs


def static_faults(
    todo: list[Item], device: config.Device, seconds: float, processes: int
) -> dict[tuple, str]:
    """{as Tuner.faults: why it is left out}."""
    jobs = to_compile(todo, device)
    bar = progress_bar(len(jobs))
    bar.set_description_str("compiling")
    facts = compiling.compile_all(
        list(jobs.values()), processes, seconds, lambda facts: bar.update()
    )
    bar.close()
    found = {key: compiling.fault(known) for key, known in zip(jobs, facts, strict=True)}
    return {key: why for key, why in found.items() if why}


def tune(todo: list[Item], tuner: Tuner, table: Table, deadline: float) -> int:
    """Measure what is left and write it down. Returns how many items remain."""
    bar = progress_bar(len(todo))
    tuner.note = bar.write
    longest = RESERVE_SECONDS
    for done, item in enumerate(todo):
        began = time.time()
        if began + longest > deadline:
            bar.close()
            return len(todo) - done
        bar.set_description_str(str(item))
        found = tuner.find(item)
        if found is None:
            bar.write(f"{item}: nothing could be timed")
        else:
            table.add(item, found)
        longest = max(longest, time.time() - began)
        bar.update()
    bar.close()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for a copy of the table")
    parser.add_argument("--minutes", type=float, default=9.0, help="end before this")
    parser.add_argument(
        "--tokens", type=positive_list, default=search.TOKENS, help="numbers of tokens: 8192,16"
    )
    parser.add_argument("--ranks", type=positive_list, default=search.RANKS, help="ranks: 16,64")
    parser.add_argument(
        "--skip",
        type=lambda text: text.split(","),
        default=[],
        help="paths that crash or hang, e.g. hopper,decode",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that compile in parallel"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be tuned")
    args = parser.parse_args(arguments)
    unknown = set(args.skip) - set(config.PATHS)
    if unknown:
        parser.error(f"--skip takes paths of {config.PATHS}: got {', '.join(sorted(unknown))}")
    deadline = time.time() + 60 * args.minutes
    todo = list(search.items(search.LAYERS, args.tokens, args.ranks))
    if args.dry_run:
        for item in todo:
            around = 2 if item.of == "backend" else search.rules(item, steps.H100)
            if isinstance(around, Plan):
                around = sum(len(list(stage(item, steps.H100, around))) for stage in search.STAGES)
            print(f"{item}: {around} candidates")
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("tune.py needs a Hopper GPU: without one, use --dry-run", file=sys.stderr)
        return 2
    device = config.device_of(torch.device("cuda:0"))
    table = Table(device, args.output)
    todo = [item for item in todo if not table.has(item)]
    seconds = COMPILE_SHARE * (deadline - time.time())
    faults = static_faults(todo, device, seconds, args.processes)
    left = tune(todo, Tuner(device, faults, args.skip), table, deadline)
    print(f"{len(faults)} candidates left out by static facts; written: {table.paths[0]}")
    print(f"{left} entries are left: run it again" if left else "complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
