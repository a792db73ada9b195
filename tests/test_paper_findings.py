"""The statistics and verdicts of examples/paper.py: they claim no more than the runs support."""

import math
import random
import statistics
import sys
from itertools import combinations, permutations
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def paper():
    pytest.importorskip("transformers", reason="the example needs the extra `examples`")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import paper

        yield paper
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def findings(paper):
    import paper_findings

    return paper_findings


@pytest.fixture(scope="module")
def runs(paper):
    import paper_runs

    return paper_runs


def result(runs, seed, bits):
    """A Result with these answers, a string of one 0 or 1 a sentence."""
    return runs.Result(
        "m", seed, 1e-3, "test", 1, 4, 1.0, 1.0, 1.0, bits.count("1") / len(bits),
        f"{int(bits, 2):x}", 1.0,
    )  # fmt: skip


def test_mean_standard_error_and_interval_are_those_of_student(findings):
    mean, error = findings.mean_and_error([0.80, 0.82, 0.81, 0.83, 0.84])
    assert mean == pytest.approx(0.82) and error == pytest.approx(math.sqrt(0.00025 / 5))
    estimate = findings.interval(mean, error, 4)
    assert estimate.high - mean == pytest.approx(2.776 * error) == mean - estimate.low
    assert findings.interval(0.0, 1.0, 11.9).high == 2.262  # never less than the exact value
    assert findings.interval(0.0, 1.0, math.inf).high == 2.0
    assert math.isinf(findings.interval(0.8, *findings.mean_and_error([0.8])[1:], 0).high)


def test_a_difference_is_paired_by_seed_and_knows_the_sentences(findings, runs):
    first = [result(runs, 1, "1110"), result(runs, 0, "1111"), result(runs, 2, "1100")]
    second = [result(runs, 0, "1011"), result(runs, 1, "1010"), result(runs, 2, "1000")]
    estimate = findings.difference(first, second, 4)
    # every seed gains one sentence in four, always the second: no error from seeds, one from texts
    assert estimate.mean == pytest.approx(0.25)
    assert estimate.error == pytest.approx(statistics.stdev([0, 1, 0, 0]) / 2)
    assert estimate.low == pytest.approx(0.25 - 3.182 * estimate.error)
    gains = [result(runs, seed, bits) for seed, bits in enumerate(("1111", "1110", "1100"))]
    losses = [result(runs, seed, "1100") for seed in range(3)]
    estimate = findings.difference(gains, losses, 4)
    seeds, texts = 0.25 / math.sqrt(3), statistics.stdev([0, 0, 2 / 3, 1 / 3]) / 2
    assert estimate.error == pytest.approx(math.hypot(seeds, texts))
    freedom = (seeds**2 + texts**2) ** 2 / (seeds**4 / 2 + texts**4 / 3)
    assert 4 < freedom < 5 and estimate.high == pytest.approx(0.25 + 2.776 * estimate.error)


def test_answers_survive_the_file_with_leading_zeros(runs):
    assert result(runs, 0, "0010").bits(4) == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("low", "high", "better", "as_good"),
    [
        (0.001, 0.02, "agrees", "agrees"),
        (-0.001, 0.02, "does not separate", "agrees"),
        (-0.02, 0.001, "does not separate", "does not separate"),
        (-0.005, -0.001, "differs", "agrees"),
        (-0.03, -0.011, "differs", "differs"),
        (-math.inf, math.inf, "does not separate", "does not separate"),
        (math.nan, math.nan, "does not separate", "does not separate"),
    ],
)
def test_no_claim_is_agreed_unless_the_whole_interval_supports_it(
    findings, low, high, better, as_good
):
    estimate = findings.Estimate((low + high) / 2, 0.01, low, high)
    assert findings.better("c", "w", estimate).verdict == better
    assert findings.as_good("c", "w", estimate).verdict == as_good


def test_methods_that_are_alike_do_not_separate(findings, paper, runs):
    rng = random.Random(0)
    coins = {
        str(method): [
            result(runs, seed, "".join(rng.choice("0111") for _ in range(200))) for seed in range(5)
        ]
        for method in paper.METHODS
    }
    found = findings.accuracy_findings(coins, 200)
    assert len(found) == 13
    assert {finding.verdict for finding in found} == {findings.OPEN}


def of_pairs(findings, values):
    """An Overlap of one layer and r=1, {pair of seeds: similarity}."""
    grids = torch.tensor(list(values.values())).reshape(-1, 1, 1, 1)
    return findings.Overlap("Wq", list(values), grids, 10)


def test_pairs_of_seeds_are_not_counted_as_independent(findings):
    own = of_pairs(findings, {(s, s): value for s, value in enumerate((1.0, 2.0, 3.0, 4.0))})
    estimate = findings.jackknife(lambda without: own.shared(1, without), range(4))
    assert estimate.mean == 2.5 and estimate.error == pytest.approx(math.sqrt(5 / 3) / 2)
    # one seed differs from all others: 0.5 by hand, 0.22 as if the pairs were independent
    pairs = {(a, b): float(a == 0) for a in range(4) for b in range(a + 1, 4)}
    two = of_pairs(findings, pairs)
    estimate = findings.jackknife(lambda without: two.shared(1, without), range(4))
    assert estimate.mean == 0.5 and estimate.error == pytest.approx(0.5)
    alone = of_pairs(findings, {(0, 1): 1.0})
    assert math.isinf(findings.jackknife(lambda without: alone.shared(1, without), (0, 1)).error)


def test_what_runs_share_by_their_batches_alone_does_not_speak_for_the_paper(findings):
    """Runs of one seed are alike, those of different seeds are Gaussian to each other."""
    generator = torch.Generator().manual_seed(0)

    def factors(r, seed):
        own = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(r, 64, generator=generator)
        return {f"layer.{name}.lora_A": noise + 5 * own for name in ("query", "value")}

    small, large = ([factors(r, seed) for seed in range(4)] for r in (8, 16))
    pairs = {
        findings.SAME_SEED: {(a, a): (small[a], large[a]) for a in range(4)},
        findings.OTHER_SEED: {(a, b): (small[a], large[b]) for a, b in permutations(range(4), 2)},
        findings.TWO_SEEDS: {(a, b): (large[a], large[b]) for a, b in combinations(range(4), 2)},
    }
    modules = {"Wq": "query", "Wv": "value"}
    found = findings.subspace_findings(
        {
            what: {name: findings.overlap(name, module, runs) for name, module in modules.items()}
            for what, runs in pairs.items()
        }
    )
    assert len(found) == 11
    for finding in found:
        assert (finding.verdict == findings.AGREES) == ("same batches" in finding.claim), finding
