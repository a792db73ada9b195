"""The pictures of examples/paper.py. Raises ImportError where matplotlib is not installed."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from paper_findings import Overlap

from fused_lora import analysis

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#555555"  # of Okabe and Ito: safe for every eye
BASELINE_STYLE = {"full fine-tuning": ("-", ORANGE), "biases": ("--", GREY), "head": (":", GREY)}


def accuracy(
    summary: dict[str, dict[str, Any]], columns: list[str], ranks: dict[int, str], path: Path
) -> None:
    """Left: which matrices under one budget; right: the rank. Dots are seeds, bars standard
    errors."""
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.0), sharey=True, layout="constrained", width_ratios=(7, 5)
    )
    for axis, names in ((left, columns), (right, list(ranks.values()))):
        for position, name in enumerate(names):
            row = summary[name]
            dots = [100 * value for value in row["accuracies"]]
            axis.plot([position] * len(dots), dots, "o", ms=4, color=BLUE, alpha=0.3, mew=0)
            axis.errorbar(
                position + 0.14,
                100 * row["mean"],
                yerr=100 * row["error"],
                fmt="s",
                ms=5,
                capsize=3,
                color=BLUE,
            )
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    for name, (style, colour) in BASELINE_STYLE.items():
        row = summary[name]
        for axis in (left, right):
            axis.axhline(
                100 * row["mean"], ls=style, lw=1.3, color=colour, label=_counted(name, row)
            )
            low, high = (100 * (row["mean"] + sign * row["error"]) for sign in (-1, 1))
            axis.axhspan(low, high, color=colour, alpha=0.12, lw=0)
    labels = [name.replace("+Wv+Wo", "\n+Wv+Wo").replace(" r=", "\nr=") for name in columns]
    left.set_xticks(range(len(columns)), labels)
    left.set_title("one budget, different matrices", fontsize=11)
    left.set_ylabel("held-out accuracy, per cent")
    right.set_xticks(range(len(ranks)), [f"r={r}" for r in ranks])
    right.set_title("Wq and Wv, different ranks", fontsize=11)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def _counted(name: str, row: dict[str, Any]) -> str:
    return f"{name} ({row['trainable']:,} parameters)"


def heat_maps(overlaps: dict[str, Overlap], title: str, path: Path) -> None:
    """One row for each of `overlaps`, one column a layer, the mean over the pairs; last column:
    Gaussian matrices of the same sizes."""
    first = next(iter(overlaps.values()))
    _, layers, rows, columns = first.grids.shape
    control = analysis.random_baseline(first.width, rows, columns, samples=len(first.pairs))
    tall = 1.75 if rows == columns else 1.2
    figure, axes = pyplot.subplots(
        len(overlaps),
        layers + 1,
        figsize=(1.45 * (layers + 1) + 0.9, tall * len(overlaps) + 0.8),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, (label, one) in zip(axes, overlaps.items(), strict=True):
        grids = [*one.grids.mean(0), control]
        for axis, grid in zip(line, grids, strict=True):
            image = axis.imshow(
                grid.numpy(),
                vmin=0,
                vmax=1,
                cmap="viridis",
                aspect="auto",
                extent=(0.5, columns + 0.5, rows + 0.5, 0.5),
                interpolation="nearest",
            )
            axis.set_xticks([1, columns // 2, columns])
            axis.set_yticks([1, rows // 2, rows])
            axis.tick_params(labelsize=8, length=2)
        line[0].set_ylabel(f"{label}\ni", fontsize=9)
    names = [*(f"layer {number}" for number in range(1, layers + 1)), "Gaussian"]
    for name, top, bottom in zip(names, axes[0], axes[-1], strict=True):
        top.set_title(name, fontsize=9)
        bottom.set_xlabel("j", fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01).ax.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def costs(measured: dict[str, Any], path: Path) -> None:
    """Left: time of a forward pass over that of the base; right: bytes of a training step."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    names = ("base", "merged", "merged (A/A)", "unmerged")
    for offset, (case, rows) in enumerate(measured["latency"].items()):
        base = rows["base"]["p50_us"]
        middle = [rows[name]["p50_us"] / base for name in names]
        below = [(rows[name]["p50_us"] - rows[name]["p20_us"]) / base for name in names]
        above = [(rows[name]["p80_us"] - rows[name]["p50_us"]) / base for name in names]
        left.errorbar(
            [position + 0.2 * offset - 0.1 for position in range(len(names))],
            middle,
            yerr=[below, above],
            fmt="os"[offset % 2],
            ms=6,
            capsize=3,
            color=(BLUE, ORANGE)[offset % 2],
            label=case,
        )
    left.axhline(1, color="0.6", lw=0.8)
    left.set_xlim(-0.5, len(names) - 0.5)
    left.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    left.set_ylabel("time over base, p50 (p20 to p80)")
    left.set_title("one forward pass", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    rows = measured["memory"]
    mib = {
        part: [row[f"{part}_bytes"] / 2**20 for row in rows.values()]
        for part in ("gradient", "optimizer", "peak")
    }
    places = range(len(rows))
    state = mib["gradient"], mib["optimizer"]
    right.barh(places, mib["peak"], height=0.7, color="0.85", label="peak beyond weights")
    right.barh(places, state[0], height=0.4, color=BLUE, label="gradients")
    right.barh(places, state[1], height=0.4, left=state[0], color=ORANGE, label="optimizer state")
    right.set_yticks(places, list(rows))
    right.invert_yaxis()
    right.set_xlabel("MiB, one training step")
    right.set_title("memory", fontsize=11)
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
