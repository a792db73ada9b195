"""How the runs of e2e.py are scored, compared and shown.

BLEU (sacrebleu), NIST (nltk) and ROUGE-L (rouge-score) are the extra `metrics`; what is not
installed is left out and `missing` says so.
"""

import importlib.util
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fused_lora

FROZEN, FULL = "frozen", "full"
REFERENCE, REFERENCE_RANK = "q,v", 16  # the adapter that all others are compared with
# The two-sided 95 % point of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def bleu(texts: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 in [0, 100], sacrebleu's default tokens and smoothing, cased."""
    import sacrebleu

    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return sacrebleu.corpus_bleu(texts, streams).score


def nist(texts: list[str], references: list[list[str]]) -> float:
    """Corpus NIST-5 (or of the longest text, if that is shorter), words and punctuation as tokens,
    cased; 0 without a token."""
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.nist_score import corpus_nist

    tokens = [[wordpunct_tokenize(text) for text in refs] for refs in references]
    ours = [wordpunct_tokenize(text) for text in texts]
    longest = min(5, max(map(len, ours)))
    return float(corpus_nist(tokens, ours, n=longest)) if longest else 0.0


def rouge_l(texts: list[str], references: list[list[str]]) -> float:
    """Mean over the texts of the best ROUGE-L F1 of any reference, in [0, 100]."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, texts, strict=True)
    best = [scorer.score_multi(refs, text)["rougeL"].fmeasure for refs, text in pairs]
    return 100 * statistics.mean(best)


METRICS: dict[str, tuple[str, Callable[[list[str], list[list[str]]], float]]] = {
    "BLEU": ("sacrebleu", bleu),
    "NIST": ("nltk", nist),
    "ROUGE-L": ("rouge_score", rouge_l),
}


def missing() -> dict[str, str]:
    """{metric: why it is left out}"""
    return {
        name: f"{module} is not installed: pip install 'fused-lora[metrics]'"
        for name, (module, _) in METRICS.items()
        if importlib.util.find_spec(module) is None
    }


def scores(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    """Every metric that is installed, of one text for each list of references."""
    absent = missing()
    measures = {name: measure for name, (_, measure) in METRICS.items() if name not in absent}
    return {name: measure(texts, references) for name, measure in measures.items()}


class Mean(NamedTuple):
    """A mean over seeds; the standard error is NaN where there is one seed."""

    value: float
    error: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:.4g}" + (f" ± {self.error:.2g}" if self.seeds > 1 else "")

    @property
    def separates(self) -> bool:
        """Whether the mean is away from zero, at the level of 95 %."""
        point = STUDENT[min(self.seeds - 1, len(STUDENT)) - 1] if self.seeds > 1 else math.inf
        return self.seeds > 1 and abs(self.value) > point * self.error


def mean(values: list[float]) -> Mean:
    """Mean and standard error of the mean, of one value for each seed."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.mean(values), error, len(values))


Records = list[dict[str, Any]]


def grouped(records: Records) -> dict[tuple[str, int], Records]:
    """The scored runs of each (kind, r), seed by seed."""
    groups: dict[tuple[str, int], Records] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["split"] == "test":
            groups.setdefault((record["kind"], record["r"]), []).append(record)
    return groups


def difference(ours: Records, theirs: Records, name: str) -> Mean | None:
    """Mean of ours - theirs, paired by seed: the same batches in the same order. What has no seed,
    the frozen base, is paired with all. None if they share no seed."""
    if len(ours) == 1 and ours[0]["kind"] == FROZEN:
        ours = [ours[0] | {"seed": record["seed"]} for record in theirs]
    other = {record["seed"]: record[name] for record in theirs}
    values = [record[name] - other[record["seed"]] for record in ours if record["seed"] in other]
    return mean(values) if values else None


def label(kind: str, r: int) -> str:
    return f"{kind} r={r}" if r else kind


def comparisons(records: Records) -> list[dict[str, Any]]:
    """Every kind of run against q,v at r = 16, by the held-out loss, and the ranks' two ends."""
    groups = grouped(records)
    ranks = sorted(r for kind, r in groups if kind == REFERENCE)
    ours = (REFERENCE, REFERENCE_RANK)
    pairs = [(key, ours) for key in groups if key != ours and ours in groups]
    if len(ranks) > 1:
        pairs.append(((REFERENCE, ranks[0]), (REFERENCE, ranks[-1])))
    compared = []
    for one, other in dict.fromkeys(pairs):
        found = difference(groups[one], groups[other], "loss")
        if found is not None:
            verdict = "lower" if found.value < 0 else "higher"
            entry = {"run": label(*one), "against": label(*other), "loss": found.value}
            entry |= {"error": found.error if found.seeds > 1 else None, "seeds": found.seeds}
            compared.append(entry | {"verdict": verdict if found.separates else "not separated"})
    return compared


def text(records: Records) -> str:
    """The tables and what separates, to print."""
    lines = []
    for record in records:
        if record["split"] == "dev":
            run = f"{label(record['kind'], record['r'])} at learning rate {record['lr']:g}"
            lines.append(f"{run}: dev loss {record['loss']:.4f}")
    names = ["loss", *(name for name in METRICS if any(name in record for record in records))]
    rows = [("run", "trainable", "seeds", *names, "s/step")]
    for key, group in grouped(records).items():
        means = [str(mean([record[name] for record in group])) for name in names]
        seconds = [r["seconds_per_step"] for r in group if r["seconds_per_step"] is not None]
        pace = f"{statistics.median(seconds):.3f}" if seconds else "-"
        rows.append((label(*key), f"{group[0]['trainable']:,}", str(len(group)), *means, pace))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if len(rows) > 1 else []:
        cells = map(str.rjust, row[1:], widths[1:])
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    for entry in comparisons(records):
        error = "" if entry["error"] is None else f" ± {entry['error']:.4f}"
        reason = {1: " (one seed says nothing)"}.get(entry["seeds"], "")
        lines.append(
            f"{entry['run']} against {entry['against']}: loss {entry['loss']:+.4f}{error}, "
            f"{entry['verdict']}{reason}"
        )
    return "\n".join(lines)


def as_json(records: Records, settings: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """What is kept: every run without its texts, the means and the comparisons."""
    summary = []
    for (kind, r), group in grouped(records).items():
        entry: dict[str, Any] = {"kind": kind, "r": r, "trainable": group[0]["trainable"]}
        for name in ("loss", *METRICS):
            if name in group[0]:
                found = mean([record[name] for record in group])
                error = found.error if found.seeds > 1 else None
                entry[name] = {"mean": found.value, "error": error, "seeds": found.seeds}
        summary.append(entry)
    runs = [{k: v for k, v in record.items() if k != "generated"} for record in records]
    return {
        "settings": settings,
        "versions": {"torch": torch.__version__, "fused_lora": fused_lora.__version__},
        "data": sizes,
        "summary": summary,
        "comparisons": comparisons(records),
        "runs": runs,
    }


def plot(records: Records, path: Path) -> str:
    """Write the ranks and the targets, by loss and by BLEU, as a picture; returns what to print."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed: pip install 'fused-lora[bench]'"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {key: group for key, group in grouped(records).items() if key[0] != FROZEN}
    ranks = sorted(key for key in groups if key[0] == REFERENCE)
    others = [key for key in groups if key[0] != REFERENCE or key[1] == REFERENCE_RANK]
    columns = [keys for keys in (ranks, others) if len(keys) > 1]
    if not columns:
        return "no picture: there is nothing to compare"
    names = [n for n in ("loss", "BLEU") if all(n in r for group in groups.values() for r in group)]
    figure, axes = pyplot.subplots(
        len(names),
        len(columns),
        figsize=(4.6 * len(columns), 3.2 * len(names)),
        squeeze=False,
        layout="constrained",
    )
    for row, name in zip(axes, names, strict=True):
        means = {key: mean([record[name] for record in group]) for key, group in groups.items()}
        for axis, keys in zip(row, columns, strict=True):
            values = [means[key].value for key in keys]
            errors = [means[key].error if means[key].seeds > 1 else 0.0 for key in keys]
            axis.errorbar(range(len(keys)), values, yerr=errors, fmt="o", capsize=3)
            axis.set_xticks(range(len(keys)), [label(*key) for key in keys], rotation=20)
            axis.set_ylabel("held-out loss" if name == "loss" else name)
            axis.grid(alpha=0.3)
            if (FULL, 0) in means and keys is ranks:
                axis.axhline(means[FULL, 0].value, ls="--", color="gray", label="full fine-tuning")
                axis.legend()
    seeds = max(len(group) for group in groups.values())
    figure.suptitle(f"Mean over {seeds} seed(s), bars: one standard error")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return f"wrote {path}"
