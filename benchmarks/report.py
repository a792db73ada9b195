"""Result file -> text table, table of the documents, picture. Reads only what the JSON holds.

python benchmarks/report.py benchmarks/results/latency-cpu-2026-01-31.json              table
python benchmarks/report.py benchmarks/results/latency-cpu-2026-01-31.json --markdown   documents
python benchmarks/report.py benchmarks/results/latency-cpu-2026-01-31.json --plot x.png
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
from results import BASELINES, FUSED, FUSED_TUNED, MERGED, Case, Row

MAX_DRAWN = 80  # cases of a picture
CPU_NOTICE = (
    "These are CPU figures of the aten path (library matrix products): no Triton kernel ran."
)
_COLUMNS = (
    f"{'provider':29s} {'over merged':>11s} {'p50 us':>10s} {'p20 us':>10s} {'p80 us':>10s}"
    f" {'host us':>10s} {'TFLOP/s':>8s} {'% floor':>8s} {'extra MiB':>10s} {'launches':>8s}"
    f" {'rel L2':>8s} {'/eager':>6s}"
)


def overhead(ratio: float | None, noise: float | None) -> str:
    """`+3.1 %`, or `~` where the difference lies inside the A/A noise."""
    if ratio is None:
        return "-"
    return "~" if abs(ratio - 1) <= (noise or 0.0) else f"{100 * (ratio - 1):+.1f} %"


def header(meta: dict[str, Any]) -> str:
    """Where the figures come from, in a few lines."""
    get = {name: "?" if value is None else value for name, value in meta.items()}.get
    if meta["device"] == "cuda":
        lines = [
            f"{get('gpu')}, {get('sm_count')} SMs, {get('l2_mb')} MiB L2, driver {get('driver')},"
            f" power limit {get('power_limit_w')} W, clocks under load: SM {get('sm_clock_mhz')} of"
            f" {get('max_sm_clock_mhz')} MHz, memory {get('mem_clock_mhz')} MHz"
        ]
    else:
        lines = [
            f"{get('cpu')}, {get('cores')} cores, {get('threads')} threads,"
            f" {get('llc_mb')} MiB last-level cache",
            CPU_NOTICE,
        ]
        if (meta["load"] or 0) > 0.2 * (meta["cores"] or 1):
            lines.append(
                f"BUSY MACHINE: load {meta['load']} when the run began; two threads that wait for"
                " each other are slowed far more than the load suggests"
            )
    state = {True: "with uncommitted changes", False: "clean", None: "state unknown"}
    lines += [
        f"torch {get('torch')}, triton {get('triton')}, peft {get('peft')},"
        f" cuda {get('cuda')}, python {get('python')}",
        f"commit {get('commit')} ({state[meta['dirty']]}), {get('date')}, {get('command')}",
        f"measured peaks, {get('peak_dtype')}: matrix product {get('gemm_tflops')} TFLOP/s,"
        f" copy {get('copy_gbs')} GB/s (read + write)",
    ]
    return "\n".join(lines)


def case_table(case: Case, group: dict[str, Row]) -> str:
    """The rows of one case and how fused compares with the fastest baseline."""
    merged = group.get(MERGED)
    title = f"{case.mode}  [{case.M}, {case.K}] -> [{case.M}, {case.N}]  r={case.r}  {case.dtype}"
    if merged is not None and merged.noise is not None:
        title += f"  (A/A noise {100 * merged.noise:.1f} %, {merged.samples} samples)"
    lines = [title, _COLUMNS, *map(_line, group.values())]
    fused, best = group.get(FUSED), results.fastest_baseline(group)
    if fused is not None and fused.p50_us is not None:
        if best is not None:
            against = overhead(fused.p50_us / best.p50_us, fused.noise)
            lines.append(f"fused against {best.provider}, the fastest baseline: {against}")
        if fused.note:
            lines.append(f"fused ran: {_short(fused.note)}")
    return "\n".join(lines)


def loss_list(rows: list[Row]) -> str:
    """Every case where fused is slower than the fastest baseline beyond the A/A noise."""
    compared = sum(
        FUSED in group
        and group[FUSED].p50_us is not None
        and results.fastest_baseline(group) is not None
        for group in results.by_case(rows).values()
    )
    lost = results.losses(rows)
    lines = [f"fused is slower than the fastest baseline on {len(lost)} of {compared} cases"]
    for fused, best in lost:
        ratio = fused.p50_us / best.p50_us
        lines.append(
            f"  {fused.case!s}: fused {fused.p50_us:.1f} us, {best.provider} {best.p50_us:.1f} us:"
            f" {100 * (ratio - 1):+.1f} % (noise {100 * (fused.noise or 0):.1f} %)"
        )
    wrong = [row for row in rows if row.ok is False]
    lines += [f"  WRONG: {row.provider}, {row.case}: {_short(row.note)}" for row in wrong]
    return "\n".join(lines)


def text(meta: dict[str, Any], rows: list[Row]) -> str:
    """All that latency.py prints, from the file alone."""
    tables = [case_table(case, group) for case, group in results.by_case(rows).items()]
    return "\n\n".join([header(meta), *tables, loss_list(rows)])


def markdown(meta: dict[str, Any], rows: list[Row], tokens: Sequence[int] = ()) -> str:
    """The table of the documents, a line for each mode and shape, of these many tokens or of any,
    and, of all, every case fused loses."""
    groups = {
        case: group
        for case, group in results.by_case(rows).items()
        if (not tokens or case.M in tokens)
        and all(name in group and group[name].p50_us is not None for name in (FUSED, MERGED))
    }
    ranks = sorted({case.r for case in groups})
    shapes: dict[tuple, dict[int, dict[str, Row]]] = {}
    for case, group in groups.items():
        shapes.setdefault((case.mode, case.M, case.K, case.N), {})[case.r] = group
    titles = [f"fused, r = {r}" for r in ranks]
    lines = [
        f"| mode | M x K -> N | merged, us | {' | '.join(titles)} | fastest baseline |",
        "|" + "---|" * (4 + len(ranks)),
    ]
    for (mode, M, K, N), by_rank in shapes.items():
        merged = [f"{group[MERGED].p50_us:.1f}" for group in by_rank.values()]
        cells = [
            overhead(by_rank[r][FUSED].vs_merged, by_rank[r][MERGED].noise) if r in by_rank else ""
            for r in ranks
        ]
        best = [results.fastest_baseline(group) for group in by_rank.values()]
        baseline = min((b for b in best if b is not None), key=lambda b: b.vs_merged, default=None)
        if baseline is not None:
            cells.append(f"{overhead(baseline.vs_merged, baseline.noise)} ({baseline.provider})")
        lines.append(f"| {mode} | {M} x {K} -> {N} | {merged[0]} | {' | '.join(cells)} |")
    dtypes = ", ".join(sorted({row.dtype for row in rows}))
    where = meta["gpu"] or f"{meta['cpu']}, {meta['threads']} threads. {CPU_NOTICE}"
    lines += [
        "",
        f"Over merged; {dtypes}, p50; `~`: inside the A/A noise of its case. Measured on {where},"
        f" torch {meta['torch']}, triton {meta['triton']}, {meta['date']}.",
        "",
        loss_list(rows).replace("\n  ", "\n* "),
    ]
    return "\n".join(lines)


def plot(meta: dict[str, Any], rows: list[Row], path: Path) -> None:
    """Time over merged, one line of dots a case, one panel a mode; grey: the A/A noise. Of more
    cases than fit, those that every provider was measured on.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    groups = results.by_case(rows)
    chosen = list(groups.values())
    if len(chosen) > MAX_DRAWN:
        most = max(map(len, chosen))
        chosen = [group for group in chosen if len(group) == most]
    modes = dict.fromkeys(case.mode for case in groups)
    panels = {mode: [g for g in chosen if next(iter(g.values())).mode == mode] for mode in modes}
    height = 2.2 + 0.34 * max(len(shown) for shown in panels.values())
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.6 * len(panels), height), squeeze=False, layout="constrained"
    )
    styles = _styles()
    for axis, (mode, shown) in zip(axes[0], panels.items(), strict=True):
        cases = [next(iter(group.values())).case for group in shown]
        for position, group in enumerate(shown):
            noise = group[MERGED].noise if MERGED in group else None
            if noise:
                span = [1 / (1 + noise), 1 + noise]
                axis.fill_betweenx([position - 0.4, position + 0.4], *span, color="0.88", lw=0)
            for name, style in styles.items():
                row = group.get(name)
                if row is not None and row.vs_merged is not None:
                    axis.plot(row.vs_merged, position, linestyle="none", **style)
        axis.axvline(1, color="0.4", linewidth=0.8, zorder=1)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, 0.96), max(high, 1.12))
        axis.set_xticks(_ticks(*axis.get_xlim()))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axis.set_yticks(range(len(cases)), [f"{c.M}x{c.K}x{c.N}  r={c.r}" for c in cases])
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.set_title(mode, fontsize=11)
        axis.set_xlabel("time over merged (p50); grey: A/A noise")
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    handles = {}
    for axis in axes[0]:
        for line in axis.get_lines():
            if not line.get_label().startswith("_"):
                handles.setdefault(line.get_label(), line)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    where = meta["gpu"] or f"{meta['cpu']}, {meta['threads']} threads: CPU, aten path"
    title = f"{where}, {rows[0].dtype}, M x K x N"
    if len(chosen) < len(groups):
        title += f"\n{len(chosen)} of {len(groups)} cases: those of every provider"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _styles() -> dict[str, dict[str, Any]]:
    colours = ("#7f7f7f", "#1f77b4", "#17becf", "#9467bd", "#8c564b", "#2ca02c", "#bcbd22")
    markers = ("o", "s", "*", "^", "v", "D", "P")
    styles = {
        name: {"label": name, "color": colour, "marker": marker, "markersize": 5, "alpha": 0.9}
        for name, colour, marker in zip(BASELINES, colours, markers, strict=True)
    }
    fused = {"color": "#d62728", "markersize": 8, "zorder": 5}
    styles[FUSED_TUNED] = {**fused, "label": FUSED_TUNED, "marker": "x"}
    styles[FUSED] = {**fused, "label": FUSED, "marker": "|", "markeredgewidth": 2.5}
    return styles


def _ticks(low: float, high: float) -> list[float]:
    """Round ratios inside the limits, as fine as the range allows."""
    if high < 1.31:
        ticks = [0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3]
    elif high < 2.6:
        ticks = [0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.3]
    else:
        ticks = [0.3, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    return [tick for tick in ticks if low <= tick <= high]


def _line(row: Row) -> str:
    if row.p50_us is None:
        reason = _short(row.note)
        return f"{row.provider:29s} {f'WRONG: {reason}' if row.ok is False else reason}"
    return (
        f"{row.provider:29s} {overhead(row.vs_merged, row.noise):>11s} {row.p50_us:10.1f}"
        f" {row.p20_us:10.1f} {row.p80_us:10.1f} {_number(row.host_p50_us, '10.1f')}"
        f" {_number(row.tflops, '8.3f')} {_number(row.pct_floor, '8.1f')}"
        f" {_number(row.extra_mib, '10.2f')} {_number(row.launches, '8d')}"
        f" {_number(row.rel_l2, '8.1e')} {_number(row.rel_l2_vs_eager, '6.2f')}"
    )


def _short(note: str | None) -> str:
    """The beginning of a note; the file holds all of it."""
    return textwrap.shorten(note or "", 110, placeholder=" ...")


def _number(value: float | None, spec: str) -> str:
    return "-".rjust(int(spec.split(".")[0].rstrip("d"))) if value is None else format(value, spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a JSON file written by latency.py")
    parser.add_argument("--markdown", action="store_true", help="print the documents' table")
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[],
        help="with --markdown, the lines of these numbers of tokens alone: 8192,64",
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the picture instead")
    args = parser.parse_args()
    meta, rows = results.load(args.file)
    if args.plot:
        plot(meta, rows, args.plot)
    else:
        print(markdown(meta, rows, args.tokens) if args.markdown else text(meta, rows))


if __name__ == "__main__":
    main()
