"""examples/e2e_report.py: metrics and statistics against values worked out by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import e2e_report

        yield e2e_report
    finally:
        sys.path.remove(str(EXAMPLES))


def needed(module):
    return pytest.importorskip(module, reason="needs the extra `metrics`")


def record(kind="q,v", r=16, seed=0, loss=1.0, **more):
    return {"kind": kind, "r": r, "lr": 1e-3, "seed": seed, "split": "test", "loss": loss} | {
        "trainable": 5,
        "seconds_per_step": 0.5,
        **more,
    }


def test_bleu_is_the_clipped_precisions_and_the_brevity_penalty(report):
    needed("sacrebleu")
    texts = ["a b c d e", "g h i j"]
    references = [["a b c d f", "x y z"], ["g h i j k"]]
    # matches and n-grams of both texts; 9 words against the closest references' 5 + 5
    precisions = [(4 + 4) / 9, (3 + 3) / 7, (2 + 2) / 5, (1 + 1) / 3]
    expected = 100 * math.exp(1 - 10 / 9) * math.prod(precisions) ** 0.25
    assert report.bleu(texts, references) == pytest.approx(expected)
    assert report.bleu(["a b c d"], [["x y z w", "a b c d"]]) == pytest.approx(100)


def test_nist_weighs_a_match_by_its_information(report):
    needed("nltk")
    # of 8 words in the reference x is 4, y 2, z and w 1 each: 1, 2, 3 and 3 bits
    references = [["x x x x y y z w"]]
    # "y w": words 2 + 3 bits of 2 words; the pair is not in the reference; two words for eight
    beta = math.log(0.5) / math.log(1.5) ** 2
    penalty = math.exp(beta * math.log(2 / 8) ** 2)
    assert report.nist(["y w"], references) == pytest.approx(penalty * 5 / 2)


def test_rouge_l_is_the_best_reference_s_f1_of_the_longest_common_subsequence(report):
    needed("rouge_score")
    # a c d in a b c d: precision 3/3, recall 3/4; nothing in the second text
    found = report.rouge_l(["a c d", "q"], [["z", "a b c d"], ["r s"]])
    assert found == pytest.approx(100 * (2 * 0.75 / 1.75 + 0) / 2)


def test_a_metric_that_is_not_installed_is_left_out_with_a_reason(report, monkeypatch):
    monkeypatch.setitem(report.METRICS, "BLEU", ("no_such_module", report.bleu))
    assert "no_such_module is not installed: pip install" in report.missing()["BLEU"]
    assert "BLEU" not in report.scores(["a b c d e"], [["a b c d e"]])


def test_mean_error_and_student_s_t(report):
    found = report.mean([1.0, 2.0, 3.0])
    assert found[:2] == pytest.approx((2.0, 1 / math.sqrt(3))) and found.seeds == 3
    assert not found.separates  # 2 / 0.577 = 3.46 < 4.30
    assert report.mean([1.5, 2.0, 2.5]).separates  # 2 / 0.289 = 6.93
    assert not report.mean([-1.0, 1.0]).separates
    assert not report.mean([100.0]).separates  # one seed says nothing
    assert report.mean([-2.0, -2.1]).separates  # 2.05 / 0.05 = 41 > 12.71


def test_differences_are_paired_by_seed(report):
    ours = [record(r=1, seed=s, loss=s + 0.1 + 0.001 * s) for s in range(3)]
    theirs = [record(seed=s, loss=float(s)) for s in (2, 0, 1)]
    found = report.difference(ours, theirs, "loss")
    assert found.value == pytest.approx(0.101) and found.separates
    frozen = [record(kind="frozen", r=0, loss=5.0)]
    assert report.difference(frozen, theirs, "loss")[::2] == (pytest.approx(4.0), 3)
    assert report.difference(ours, [record(seed=9)], "loss") is None


def test_the_report_says_what_separates_and_keeps_no_text(report, tmp_path):
    runs = [record(r=r, seed=s, BLEU=50.0 + r) for r in (1, 16) for s in (0, 1)]
    runs[0]["generated"] = ["secret"]
    runs += [record(kind="full", r=0, seed=s, loss=0.5 + s / 1000, BLEU=60.0) for s in (0, 1)]
    runs += [record(lr=lr, loss=lr) | {"split": "dev"} for lr in (0.1, 0.2)]
    entries = {(e["run"], e["against"]): e["verdict"] for e in report.comparisons(runs)}
    assert entries == {
        ("q,v r=1", "q,v r=16"): "not separated",
        ("full", "q,v r=16"): "lower",
    }
    printed = report.text(runs)
    assert "q,v r=16 at learning rate 0.1: dev loss 0.1000" in printed
    assert "full against q,v r=16: loss -0.4995 ± 0.0005, lower" in printed
    kept = json.dumps(report.as_json(runs, {}, {}))
    assert "secret" not in kept and "NaN" not in kept
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    report.plot(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
