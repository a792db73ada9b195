"""Times the fused LoRA layer against merged weights and every baseline a user could train with.

    python benchmarks/latency.py --quick
    python benchmarks/latency.py --base nf4      on a 4-bit base of bitsandbytes
    python benchmarks/latency.py --multi         many adapters in one batch

On a GPU the kernels are measured; without one the same program measures the aten path on the CPU
and says so. Protocol, fields and units: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import multi
import protocol
import report
import results
import roofline
import torch
from cases import add_case_options, chosen_cases, reduced_providers
from checks import Judge, Verdict
from four_bit import NF4
from protocol import Budget, Samples
from providers import Fused, Inputs, Provider, all_providers, everybody, random_inputs
from results import BASE, MERGED, MERGED_AGAIN, PLAIN, Case, Row
from roofline import Peaks

RESULTS = Path(__file__).resolve().parent / "results"
BUDGETS = {  # (device, --quick) -> sampling time of one case
    ("cuda", False): Budget(seconds=4.0, min_samples=200, max_samples=400),
    ("cuda", True): Budget(seconds=2.0, min_samples=200, max_samples=200),
    ("cpu", False): Budget(seconds=20.0, min_samples=30, max_samples=400),
    ("cpu", True): Budget(seconds=10.0, min_samples=20, max_samples=200),
}


def measure_case(
    case: Case,
    providers: list[Provider],
    device: torch.device,
    budget: Budget,
    peaks: Peaks,
    seed: int,
    progress: Any,
) -> list[Row]:
    """Check every provider, time the accepted ones together, and make their rows."""
    generator = torch.Generator(device).manual_seed(seed)
    judge = Judge(case, device, generator)
    first = random_inputs(case, device, generator)
    count = protocol.input_sets(_operand_bytes(case, first), machine.cache_bytes(device))
    sets = [first, *(random_inputs(case, device, generator) for _ in range(count - 1))]
    verdicts, calls = {}, {}
    with torch.set_grad_enabled(case.mode != "fwd"):
        for provider in providers:
            progress.set_description_str(f"{case}: checking {provider.name}")
            verdict = verdicts[provider.name] = judge.verdict(provider)
            if verdict.ok:
                calls[provider.name] = [provider.build(s).call(case.mode, s.dy) for s in sets]
            progress.update()
        del judge
        progress.set_description_str(f"{case}: timing")
        samples = protocol.measure(calls, device, budget, seed)
        peak_bytes = {name: protocol.peak_bytes(c[0], device) for name, c in calls.items()}
        launches = {name: protocol.launches(c[0], device) for name, c in calls.items()}
        progress.update()
    notes = {p.name: p.explanation for p in providers if isinstance(p, Fused)}
    return [
        _row(case, name, verdict, notes.get(name), samples, peak_bytes, launches, peaks, seed)
        for name, verdict in verdicts.items()
    ]


def _row(
    case: Case,
    provider: str,
    verdict: Verdict,
    note: str | None,
    samples: dict[str, Samples],
    peak_bytes: dict[str, int],
    launches: dict[str, int | None],
    peaks: Peaks,
    seed: int,
) -> Row:
    shape = {"mode": case.mode, "M": case.M, "K": case.K, "N": case.N, "r": case.r}
    row: dict[str, Any] = {**shape, "dtype": case.dtype, "base": case.base, "provider": provider}
    if not verdict.ok:
        return Row(**row, ok=verdict.ok, note=verdict.note)
    mine, merged, again = (samples.get(name) for name in (provider, MERGED, MERGED_AGAIN))
    p20, p50, p80 = protocol.percentiles(mine.device_us)
    if merged is not None:
        merged_p50 = protocol.percentiles(merged.device_us)[1]
        row["vs_merged"] = round(p50 / merged_p50, 4)
        row["extra_mib"] = round((peak_bytes[provider] - peak_bytes[MERGED]) / 2**20, 3)
        if again is not None:
            row["noise"] = round(protocol.noise(merged.device_us, again.device_us, seed), 4)
    has_adapter = provider not in (BASE, MERGED, MERGED_AGAIN)
    return Row(
        **row,
        p20_us=round(p20, 3),
        p50_us=round(p50, 3),
        p80_us=round(p80, 3),
        samples=len(mine.device_us),
        host_p50_us=round(protocol.percentiles(mine.host_us)[1], 3),
        tflops=round(roofline.total_flops(case, has_adapter) / p50 / 1e6, 4),
        pct_floor=round(100 * roofline.floor_us(case, has_adapter, peaks) / p50, 2),
        launches=launches[provider],
        rel_l2=verdict.rel_l2,
        rel_l2_vs_eager=verdict.rel_l2_vs_eager,
        ok=True,
        note=note,
    )


def _operand_bytes(case: Case, inputs: Inputs) -> int:
    """What even a forward without adapter reads."""
    weight = inputs.weight
    return inputs.x.nbytes + (weight.numel() // 2 if case.base == NF4 else weight.nbytes)


class PlainProgress:
    """The part of tqdm used here, for machines without it: a line for each step."""

    def set_description_str(self, description: str) -> None:
        print(description, file=sys.stderr, flush=True)

    def write(self, text: str) -> None:
        print(text, flush=True)

    def update(self) -> None: ...

    def close(self) -> None: ...


def progress_bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return PlainProgress()
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log needs no animation
    return tqdm(total=total, dynamic_ncols=True, file=sys.stderr, mininterval=interval)


def selected(names: list[str], base: str) -> list[Provider]:
    """Fresh providers of these names; merged and its A/A twin are always measured."""
    return [p for p in all_providers(base) if p.name in {*names, MERGED, MERGED_AGAIN}]


def resume(path: Path, meta: dict[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """The finished rows of an interrupted run, if it ran on the same machine and code."""
    try:
        earlier, rows = results.load(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--resume: {path} is no result file of this program: {error!r}") from None
    fixed = ("device", "gpu", "cpu", "torch", "triton", "commit", "dirty", "changes")
    differing = [name for name in (*fixed, "peak_dtype") if earlier.get(name) != meta[name]]
    if differing:
        raise SystemExit(f"--resume: {path} was measured with another {', '.join(differing)}")
    if earlier["command"] != meta["command"]:
        earlier["command"] += f" ; {meta['command']}"
    return earlier, rows


def free_name(folder: Path, stem: str) -> Path:
    """A JSON file of this name, numbered from 2 on where there is one: a run loses no other's."""
    names = itertools.chain((stem,), (f"{stem}-{i}" for i in itertools.count(2)))
    return next(p for p in (folder / f"{name}.json" for name in names) if not p.exists())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_options(parser)
    parser.add_argument(
        "--providers", help=f"comma-separated, of: {', '.join(results.PROVIDERS)}; default all"
    )
    parser.add_argument("--multi", action="store_true", help="many adapters in one batch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and PNG")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on with this result file")
    parser.add_argument("--no-plot", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.multi and (args.providers or args.resume or args.base == NF4):
        parser.error(
            "--multi measures all its providers in one go, on a plain base: no --providers, no "
            "--resume, no --base"
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:  # now, not after the first case
        parser.error(f"--output: cannot write to {args.output}: {error}")
    args.providers = args.providers.split(",") if args.providers else None
    known = [provider.name for provider in all_providers(args.base)]
    unknown = sorted(set(args.providers or ()) - set(known))
    if unknown:
        parser.error(
            f"--providers: got {', '.join(unknown)}, expected some of {', '.join(known)} (--base "
            f"{args.base})"
        )
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write JSON and PNG. Returns 1 if a provider was wrong, else 0."""
    args = parse_arguments(arguments)
    device = machine.benchmark_device()
    budget = BUDGETS[device.type, args.quick]
    plan = chosen_cases(args, device.type)
    print("measuring the machine's peaks ...", file=sys.stderr, flush=True)
    meta = machine.describe(device, (plan.core or plan.rest)[0].dtype)
    meta["command"] = f"python benchmarks/latency.py {_reported(arguments)}".strip()
    if args.multi:
        print(report.header(meta), flush=True)
        total = len(multi.cases(args, device.type))
        return multi.run(args, device, budget, meta, progress_bar(total))
    what = "latency" if args.base == PLAIN else f"latency-{args.base}"
    path = args.resume or free_name(args.output, machine.file_stem(device, meta["date"], what))
    rows: list[Row] = []
    if args.resume:
        meta, rows = resume(path, meta)
    peaks = Peaks(meta["gemm_tflops"], meta["copy_gbs"])
    print(report.header(meta), flush=True)
    done = set(results.by_case(rows))
    todo = [case for case in plan.core + plan.rest if case not in done]
    everyone = args.providers or everybody(device, meta["peak_dtype"], args.base)
    progress = progress_bar(
        sum(len(everyone) + 1 for case in todo if case in plan.core)
        + sum(6 for case in todo if case not in plan.core)
    )
    try:
        for case in todo:
            names = everyone
            if case in plan.rest and not args.providers:
                names = reduced_providers(case, rows)
            rows += measure_case(
                case, selected(names, case.base), device, budget, peaks, args.seed, progress
            )
            results.save(path, meta, rows)
            progress.write("\n" + report.case_table(case, results.by_case(rows)[case]))
    except KeyboardInterrupt:
        print(f"\nstopped; --resume {path} goes on" if rows else "\nstopped", file=sys.stderr)
        return 130
    finally:
        progress.close()
    print("\n" + report.loss_list(rows))
    print(f"\nwritten: {path}")
    if not args.no_plot:
        picture = path.with_suffix(".png")
        try:
            report.plot(meta, rows, picture)
            print(f"written: {picture}")
        except ImportError:
            print("plot: n/a (matplotlib is not installed)")
    return 1 if any(row.ok is False for row in rows) else 0


def _reported(arguments: list[str] | None) -> str:
    """The options that shape the figures; where the files go is nobody's business."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--output", "--resume"):
        places.add_argument(option)
    places.add_argument("--no-plot", action="store_true")
    return shlex.join(places.parse_known_args(arguments)[1])


if __name__ == "__main__":
    sys.exit(main())
