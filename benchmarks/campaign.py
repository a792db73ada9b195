"""One step of the measuring campaign on a GPU, in one command that ends inside ten minutes.

    python benchmarks/campaign.py STEP --output DIR [--minutes 9] [--dry-run | --compile-only]

Steps, in order: correct, plain, paths, shrink, backward, dropout, decode, host, memory, figures.
Results go to DIR/campaign-STEP.json after every group; the same command again goes on where it
stopped. What does not compile, is wrong, crashes or hangs is recorded with its reason, and the step
goes on: the measuring runs in a process of its own, which is watched and started again. Without a
GPU, --dry-run lists a step's measurements and --compile-only compiles all its kernels for sm_90.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkups
import results
import steps
import torch
import trial
from results import MERGED, MERGED_AGAIN
from trial import Group

STALL_SECONDS = 90.0  # longer than any check, compilation or round of timing takes
RESERVE_SECONDS = 20.0  # a group takes less
COMPILE_SHARE = 0.5  # of the time


class Record:
    """DIR/campaign-STEP.json: {"meta", "step", "facts", "rows", "done", "running", "notes"}."""

    def __init__(self, folder: Path, step: str) -> None:
        self.path = folder / f"campaign-{step}.json"
        self.document: dict[str, Any] = {
            "step": step, "meta": {}, "facts": {}, "rows": [], "done": [], "running": None,
            "notes": [],
        }  # fmt: skip
        if self.path.exists():
            self.document |= json.loads(self.path.read_text())

    def __getitem__(self, name: str) -> Any:
        return self.document[name]

    def save(self, **changes: Any) -> None:
        self.document |= changes
        results.write_json(self.path, self.document)

    def add(self, group: str, rows: list[dict[str, Any]]) -> None:
        """Rows of a group, in place of earlier ones of the same names."""
        names = {row["name"] for row in rows}
        kept = [r for r in self["rows"] if r["group"] != group or r["name"] not in names]
        self.save(rows=kept + [{"group": group, **row} for row in rows])

    def failed(self, group: str) -> set[str]:
        return {r["name"] for r in self["rows"] if r["group"] == group and r["ok"] is False}


def compile_groups(groups: list[Group], record: Record, seconds: float, processes: int) -> None:
    """Compile what the groups will run; what does not compile is recorded and left out."""
    import compiling
    from latency import progress_bar

    jobs = [
        (group, candidate)
        for group in groups
        if group.name not in record["facts"]
        for candidate in group.candidates
        if candidate.uses_triton
    ]
    if not jobs:
        return
    bar = progress_bar(len(jobs))
    bar.set_description_str("compiling")
    found = compiling.compile_all(
        [(group.case, candidate) for group, candidate in jobs],
        processes,
        seconds,
        lambda facts: bar.update(),
    )
    bar.close()
    facts = record["facts"]
    for (group, candidate), known in zip(jobs, found, strict=True):
        if known:
            facts.setdefault(group.name, {})[candidate.name] = known
        if "error" in known:
            note = f"does not compile: {known['error']}"
            record.add(group.name, [{"name": candidate.name, "ok": False, "note": note}])
    record.save(facts=facts)


def work(groups: list[Group], record: Record, deadline: float, device: torch.device) -> None:
    """Measure the groups that are left. Runs in the watched process."""
    budget = trial.protocol.Budget(seconds=2.0, min_samples=200, max_samples=400)
    for group in groups:
        if group.name in record["done"]:
            continue
        if time.time() + RESERVE_SECONDS > deadline:
            return

        def started(what: str, name: str = group.name) -> None:
            record.save(running={"group": name, "name": what})

        failed = record.failed(group.name)
        left = [c for c in group.candidates if c.name not in failed]
        chosen = dataclasses.replace(group, candidates=left)
        try:
            rows = trial.measure(chosen, device, budget, started=started)
        except trial.ContextLost as error:
            record.save(running={**record["running"], "reason": f"the GPU refused: {error}"})
            sys.exit(3)
        record.add(group.name, rows)
        record.save(done=[*record["done"], group.name], running=None)
        print(f"{len(record['done'])} of {len(groups)} done: {group.name}", flush=True)


def watch(command: list[str], reload: Callable[[], Record], deadline: float) -> None:
    """Run the worker until it ends by itself. One that dies or stalls is recorded as the fault of
    the candidate it was at, and started again without it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    while time.time() < deadline:
        reload().save(running=None)
        worker = subprocess.Popen(command, env=environment)
        reason = _wait(worker, reload, deadline)
        if reason is None:
            return
        record = reload()
        running = record["running"]
        reason = (running or {}).get("reason", reason)
        if running is None:  # not a candidate's fault: starting again would not help
            record.save(notes=[*record["notes"], f"the worker {reason} before it began"])
            return
        if running["name"] in ("", MERGED, MERGED_AGAIN):
            note = f"{reason} while {running['name'] or 'timing'}"
            record.save(
                notes=[*record["notes"], f"{running['group']}: {note}"],
                done=[*record["done"], running["group"]],
            )
        else:
            row = {"name": running["name"], "ok": False, "note": reason}
            record.add(running["group"], [row])


def _wait(worker: subprocess.Popen, reload: Callable[[], Record], deadline: float) -> str | None:
    """Why the worker has to be started again, None if it need not be."""
    while worker.poll() is None:
        time.sleep(0.5)
        silent = time.time() - reload().path.stat().st_mtime
        stalled = silent > STALL_SECONDS
        if stalled or time.time() > deadline + RESERVE_SECONDS:
            worker.kill()
            worker.wait()
            return f"hung: killed after {silent:.0f} s" if stalled else None
    return None if worker.returncode == 0 else f"died with exit status {worker.returncode}"


def table(record: Record, group: Group) -> str:
    """A group's rows: time over merged, over the yardstick, and what was predicted."""
    rows = {r["name"]: r for r in record["rows"] if r["group"] == group.name}
    timed = [row for row in rows.values() if row.get("p50_us") is not None]
    goal = "" if group.goal is None else f"  goal over merged: {100 * (group.goal - 1):+.1f} %"
    noise = timed[0]["noise"] if timed else None
    title = group.name + ("" if noise is None else f"  (A/A noise {100 * noise:.1f} %)") + goal
    columns = f"{'over merged':>11s} {'over ' + group.yardstick:>18s} {'predicted':>9s}"
    lines = [title, f"  {'':38s} {columns} {'p50 us':>9s} {'GB/s':>7s}"]
    for name in (c.name for c in group.everybody()):
        row = rows.get(name)
        if row is None:
            lines.append(f"  {name:38s} not measured")
        elif row.get("p50_us") is None:
            lines.append(f"  {name:38s} FAILED: {row['note']}")
        else:
            lines.append(
                f"  {name:38s} {_percent(row.get('vs_merged')):>11s}"
                f" {_percent(row.get('vs_yardstick')):>18s}"
                f" {_percent(group.predicted.get(name)):>9s} {row['p50_us']:9.1f}"
                f" {row.get('gbs') or '':>7}"
            )
    return "\n".join(lines)


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def listing(groups: list[Group]) -> str:
    """What a step would measure."""
    lines = []
    for group in groups:
        lines.append(f"{group.name}" + (f"  goal {group.goal}" if group.goal else ""))
        for candidate in group.everybody():
            predicted = group.predicted.get(candidate.name)
            note = f"  predicted {predicted} of {group.yardstick}" if predicted else ""
            lines.append(f"  {candidate.name}{note}")
    total = sum(len(group.everybody()) for group in groups)
    return "\n".join([*lines, f"{len(groups)} groups, {total} measurements"])


def facts_table(groups: list[Group], record: Record) -> str:
    import compiling

    lines = []
    for group in groups:
        for name, facts in record["facts"].get(group.name, {}).items():
            found = facts.get("error") or "; ".join(
                f"{k['name']} {k['registers']} registers, {k['shared']} B" for k in facts["kernels"]
            )
            fault = compiling.fault(facts)
            lines.append(f"{group.name}: {name}: {found}" + (f"  FAULT: {fault}" if fault else ""))
    return "\n".join(lines)


def measured_step(args: argparse.Namespace, device: Any, deadline: float) -> int:
    groups = steps.GROUPS[args.step](device)
    if args.dry_run:
        print(listing(groups))
        return 0
    record = Record(args.output, args.step)
    if args.worker:
        work(groups, record, args.deadline, torch.device("cuda"))
        return 0
    share = 1.0 if args.compile_only else COMPILE_SHARE
    compile_groups(groups, record, share * (deadline - time.time()), args.processes)
    if args.compile_only:
        print(facts_table(groups, record))
        return int(any("error" in f for g in record["facts"].values() for f in g.values()))
    record.save(meta=record["meta"] or _meta())
    options = [args.step, f"--output={args.output}", "--worker", f"--deadline={deadline}"]
    command = [sys.executable, __file__, *options]
    watch(command, lambda: Record(args.output, args.step), deadline)
    record = Record(args.output, args.step)
    print("\n\n".join(table(record, group) for group in groups))
    left = [group.name for group in groups if group.name not in record["done"]]
    print("\n".join([*record["notes"], f"{len(groups) - len(left)} of {len(groups)} groups done"]))
    print(f"written: {record.path}" + ("; run it again for the rest" if left else ""))
    return 0 if len(left) < len(groups) else 1


def _meta() -> dict[str, Any]:
    import machine

    return machine.describe(torch.device("cuda"), "bfloat16")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=[*steps.GROUPS, *checkups.STEPS])
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--minutes", type=float, default=9.0, help="end before this")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that compile in parallel"
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be measured")
    parser.add_argument("--compile-only", action="store_true", help="only compile, for sm_90")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    deadline = time.time() + 60 * args.minutes
    gpu = torch.cuda.is_available()
    if args.step in checkups.STEPS:
        if args.compile_only or not (gpu or args.dry_run):
            reason = f"{args.step} compiles nothing" if args.compile_only else "there is no GPU"
            print(f"{reason}: use --dry-run", file=sys.stderr)
            return 2
        return checkups.run(args.step, Record(args.output, args.step), deadline, args.dry_run)
    device = steps.H100
    if gpu and not args.dry_run and not args.compile_only:
        device = steps.config.device_of(torch.device("cuda:0"))
    elif not args.dry_run and not args.compile_only:
        print("there is no GPU: use --dry-run or --compile-only", file=sys.stderr)
        return 2
    return measured_step(args, device, deadline)


if __name__ == "__main__":
    sys.exit(main())
