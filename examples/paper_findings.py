"""What the runs of examples/paper.py say about the paper's claims: means, standard errors, and
verdicts that never go beyond them. No training and no plotting here."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from paper_runs import Result
from torch import Tensor

from fused_lora import analysis

AGREES, DIFFERS, OPEN = "agrees", "differs", "does not separate"
MARGIN = 0.01  # one point of accuracy: "as good as" means not worse by more than this
NOISY = 0.05  # where equal things differ by more than this, a ratio of times says nothing
# Student's t, 97.5 %, by degrees of freedom; between two entries the larger value serves
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
T_975 |= {12: 2.179, 16: 2.120, 24: 2.064, 60: 2.000}
SAME_SEED, OTHER_SEED = "r=8 and r=64, same seed", "r=8 and r=64, other seeds"
TWO_SEEDS = "r=64, two seeds"

Factors = dict[str, Tensor]  # as in fused_lora.lora_state_dict


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and the ends of its 95 % interval."""

    mean: float
    error: float
    low: float
    high: float

    def text(self, unit: float = 1.0, digits: int = 3, sign: str = "") -> str:
        mean, error, low, high = (
            f"{value * unit:{form}.{digits}f}"
            for value, form in zip(
                (self.mean, self.error, self.low, self.high), (sign, "", sign, sign), strict=True
            )
        )
        return f"{mean} ± {error} (95 %: {low} to {high})"


@dataclass(frozen=True)
class Finding:
    """One claim of the paper, where it stands there, the verdict here, and the numbers for it."""

    claim: str
    where: str
    verdict: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.verdict:18} {self.claim} [{self.where}]\n{'':18} {self.evidence}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; infinite for a single value, of which none is known."""
    if len(values) < 2:
        return statistics.mean(values), math.inf
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def interval(mean: float, error: float, freedom: float) -> Estimate:
    """The 95 % interval of a mean whose error is known with so many degrees of freedom."""
    if freedom < 1:
        return Estimate(mean, math.inf, -math.inf, math.inf)
    half = T_975[max(entry for entry in T_975 if entry <= freedom)] * error
    return Estimate(mean, error, mean - half, mean + half)


def difference(first: list[Result], second: list[Result], sentences: int) -> Estimate:
    """Accuracy of `first` minus that of `second`, paired by seed.

    The error holds both what other seeds and what other sentences would change: the variance of
    the difference over seeds, plus that of each sentence's mean difference over sentences. Degrees
    of freedom of such a sum are Welch and Satterthwaite's.
    """
    pairs = [(a, b) for a in first for b in second if a.seed == b.seed]
    mean, seeds_error = mean_and_error([a.accuracy - b.accuracy for a, b in pairs])
    per_sentence = [
        statistics.mean(difference)
        for difference in zip(
            *(
                [x - y for x, y in zip(a.bits(sentences), b.bits(sentences), strict=True)]
                for a, b in pairs
            ),
            strict=True,
        )
    ]
    _, sentences_error = mean_and_error(per_sentence)
    error = math.hypot(seeds_error, sentences_error)
    parts = seeds_error**4 / (len(pairs) - 1) + sentences_error**4 / (sentences - 1)
    return interval(mean, error, error**4 / parts if parts else math.inf)


def better(claim: str, where: str, gain: Estimate, **form: Any) -> Finding:
    """The paper says that something is larger: agreed only if the whole interval lies above 0."""
    verdict = AGREES if gain.low > 0 else DIFFERS if gain.high < 0 else OPEN
    return Finding(claim, where, verdict, gain.text(**form, sign="+"))


def as_good(claim: str, where: str, gain: Estimate, **form: Any) -> Finding:
    """The paper says that something is not worse: agreed only if the whole interval lies above
    minus MARGIN. That two things do not separate is no evidence that they are equal."""
    verdict = AGREES if gain.low > -MARGIN else DIFFERS if gain.high < 0 else OPEN
    return Finding(claim, where, verdict, gain.text(**form, sign="+"))


def accuracy_findings(runs: dict[str, list[Result]], sentences: int) -> list[Finding]:
    """Sections 7.1 and 7.2, and the comparison with other methods of section 5."""
    two, eight, full = "Wq+Wv r=4", "Wq+Wv r=8", "full fine-tuning"
    four = "Wq+Wk+Wv+Wo r=2"
    claims = [
        (better, "Wq and Wv together beat Wq alone", "7.1, table 5", two, "Wq r=8"),
        (better, "Wq and Wv together beat Wk alone", "7.1, table 5", two, "Wk r=8"),
        (better, "Wq and Wv beat Wq and Wk", "7.1, table 5", two, "Wq+Wk r=4"),
        (better, "Wv alone beats Wq alone", "7.1, table 5", "Wv r=8", "Wq r=8"),
        (better, "all four at r=2 beat Wq alone", "7.1, table 5", four, "Wq r=8"),
        (as_good, "all four at r=2 are as good as Wv alone", "7.1, table 5", four, "Wv r=8"),
    ]
    claims += [
        (as_good, f"r={r} is as good as r=64", "7.2, table 6", f"Wq+Wv r={r}", "Wq+Wv r=64")
        for r in (1, 2, 4, 8)
    ]
    claims += [
        (as_good, "LoRA is as good as full fine-tuning", "5, tables 2 to 4", eight, full),
        (better, "LoRA beats training biases", "5, table 4", eight, "biases"),
        (better, "LoRA beats training the head alone", "no claim, a check", eight, "head"),
    ]
    found = []
    for rule, claim, where, first, second in claims:
        gain = difference(runs[first], runs[second], sentences)
        judged = rule(claim, where, gain, unit=100, digits=1)
        evidence = f"{first} minus {second}: {judged.evidence} points"
        found.append(Finding(claim, where, judged.verdict, evidence))
    return found


class Overlap(NamedTuple):
    """Similarity grids of one matrix (Wq, say) for pairs of runs: [pairs, layers, r1, r2]."""

    matrix: str
    pairs: list[tuple[int, int]]  # the seeds of the two runs
    grids: Tensor
    width: int  # of lora_A: Gaussian matrices share max(i, j) / width in expectation

    def shared(self, i: int, without: int | None = None) -> float:
        """The similarity of the top i directions, mean over layers and over the pairs that do not
        have the seed `without`; NaN if there is none."""
        kept = [without not in pair for pair in self.pairs]
        return self.grids[kept, :, i - 1, i - 1].mean().item()


def overlap(
    matrix: str, module: str, runs: dict[tuple[int, int], tuple[Factors, Factors]]
) -> Overlap:
    """Compare lora_A of the modules whose path ends in `module`, layer by layer, pair by pair."""

    def of(factors: Factors) -> list[Tensor]:
        return [value for key, value in factors.items() if key.endswith(f".{module}.lora_A")]

    grids = [
        torch.stack([analysis.similarity_grid(*layer) for layer in zip(of(a), of(b), strict=True)])
        for a, b in runs.values()
    ]
    width = of(next(iter(runs.values()))[0])[0].shape[1]
    return Overlap(matrix, list(runs), torch.stack(grids), width)


def jackknife(statistic: Callable[[int | None], float], seeds: Sequence[int]) -> Estimate:
    """The interval of `statistic(None)`, its error from leaving out each seed in turn, with every
    pair of runs that has it: pairs that share a seed are not independent."""
    parts = [statistic(seed) for seed in seeds]
    if any(map(math.isnan, parts)):
        return interval(statistic(None), math.inf, 0)
    spread = sum((part - statistics.mean(parts)) ** 2 for part in parts)
    error = math.sqrt(spread * (len(seeds) - 1) / len(seeds))
    return interval(statistic(None), error, len(seeds) - 1)


def subspace_findings(overlaps: dict[str, dict[str, Overlap]]) -> list[Finding]:
    """Section 7.2. Only runs of different seeds, which share no batches, speak for or against."""
    found = []
    own, other, two = (overlaps[what] for what in (SAME_SEED, OTHER_SEED, TWO_SEEDS))
    seeds = sorted({pair[0] for one in own.values() for pair in one.pairs})

    def judge(
        claim: str, where: str, first: Callable[[int | None], float], second: Callable | float
    ) -> None:
        less = second if callable(second) else lambda _: second
        gain = jackknife(lambda without: first(without) - less(without), seeds)
        judged = better(claim, where, gain)
        means = f"{first(None):.3f} against {less(None):.3f}"
        found.append(Finding(claim, where, judged.verdict, f"{means}: {judged.evidence}"))

    for name, one in other.items():
        where, top, claim = "7.2, figure 3", partial(one.shared, 1), f"{name}: r=8 and r=64 share"
        judge(f"{claim} the top direction beyond chance", where, top, 1 / one.width)
        judge(f"{claim} the top direction by more than 0.5", where, top, 0.5)
        judge(f"{claim} the top direction more than the top 8", where, top, partial(one.shared, 8))
        same = partial(own[name].shared, 1)
        judge(f"{claim} more if they saw the same batches", "no claim, a check", same, top)
    where = "7.2, figure 4"
    for name, one in two.items():
        claim = f"{name}: two seeds at r=64 share the top direction beyond chance"
        judge(claim, where, partial(one.shared, 1), 1 / one.width)
    first, second = two.values()
    claim = f"two seeds at r=64 share more of the top 8 in {first.matrix} than in {second.matrix}"
    judge(claim, where, partial(first.shared, 8), partial(second.shared, 8))
    return found


def cost_findings(costs: dict) -> list[Finding]:
    """Sections 4.1 and 4.2: latency, switching, memory, as `paper_costs.measure` returns them."""
    found = []
    for case, rows in costs["latency"].items():
        ratio, noise = rows["merged"]["over_base"], rows["noise"]
        verdict = OPEN if noise > NOISY else AGREES if abs(ratio - 1) <= noise else DIFFERS
        evidence = (
            f"merged / base {ratio:.3f}, unmerged / base {rows['unmerged']['over_base']:.3f}; "
            f"two equal models differ by {noise:.1%}"
        )
        found.append(Finding(f"merged, no added latency, {case}", "4.1", verdict, evidence))
    switch = costs["switching"]
    exact = switch["base_restored"] and switch["merged_again_equal"]
    found.append(
        Finding(
            "tasks are switched by a small file, W0 recovered exactly",
            "4.1",
            AGREES if exact and switch["adapter_bytes"] < switch["model_bytes"] else DIFFERS,
            f"adapter {switch['adapter_bytes']:,} bytes in {switch['adapter_ms']:.1f} ms, whole "
            f"model {switch['model_bytes']:,} bytes in {switch['model_ms']:.1f} ms; W0 restored "
            f"bit for bit: {'yes' if exact else 'NO'}",
        )
    )
    full, lora = costs["memory"]["full fine-tuning"], costs["memory"]["Wq+Wv r=8"]
    state = "gradient_bytes", "optimizer_bytes"
    kept, whole = (sum(row[name] for name in state) for row in (lora, full))
    found.append(
        Finding(
            "no gradients and no optimizer state for what is frozen",
            "4.2",
            AGREES if kept == 3 * 4 * lora["trainable"] else DIFFERS,
            f"LoRA {kept:,} bytes, full fine-tuning {whole:,}; the step's peak beyond weights "
            f"{lora['peak_bytes']:,} and {full['peak_bytes']:,}",
        )
    )
    return found


def summarise(runs: dict[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """By method: parameters, bytes, accuracies of the seeds, their mean and standard error."""
    summary = {}
    for name, several in runs.items():
        accuracies = [run.accuracy for run in several]
        mean, error = mean_and_error(accuracies)
        summary[name] = {
            "trainable": several[0].trainable,
            "checkpoint_bytes": several[0].checkpoint_bytes,
            "accuracies": [round(value, 5) for value in accuracies],
            "mean": round(mean, 5),
            "error": round(error, 5),
            "train_loss": round(statistics.mean(run.last_loss for run in several), 4),
            "seconds": round(statistics.median(run.seconds for run in several), 1),
        }
    return summary


def table(summary: dict[str, dict[str, Any]]) -> str:
    rows = [("trained beside the head", "parameters", "checkpoint", "accuracy, %", "SE", "loss")]
    rows += [
        (
            name,
            f"{row['trainable']:,}",
            f"{row['checkpoint_bytes']:,} B",
            f"{100 * row['mean']:.2f}",
            f"{100 * row['error']:.2f}",
            f"{row['train_loss']:.3f}",
        )
        for name, row in summary.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
