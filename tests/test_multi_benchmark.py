"""`latency.py --multi`: what is wrong is not timed, and the file holds what was printed."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """latency.py and multi.py, imported from their own folder as the program imports them."""
    sys.path.insert(0, str(FOLDER))
    try:
        import latency
        import multi

        yield latency, multi
    finally:
        sys.path.remove(str(FOLDER))


def test_a_run_checks_times_and_writes_every_provider(bench, tmp_path, monkeypatch, capsys):
    latency, multi = bench
    monkeypatch.setitem(multi.SHAPES, ("cpu", True), ([(9, 40, 24)], (3,)))
    monkeypatch.setitem(multi.SHAPES, ("cuda", True), ([(9, 40, 24)], (3,)))
    tiny = latency.Budget(seconds=0.0, min_samples=3, max_samples=3)
    monkeypatch.setattr(latency, "BUDGETS", dict.fromkeys(latency.BUDGETS, tiny))
    monkeypatch.setattr(latency.machine, "measure_peaks", lambda *_: latency.Peaks(1.0, 1.0))
    options = ["--quick", "--ranks=5", "--modes=fwd+bwd", f"--output={tmp_path}"]
    assert latency.main(["--multi", *options]) == 0
    (path,) = tmp_path.glob("multi-*.json")
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert len(rows) == 5 * len(multi.PROVIDERS)
    for row in rows:
        assert row["ok"] is True and 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["adapters"] == 3 and row["r"] == 5 and row["vs_merged"] > 0
    kinds = {(row["popularity"], row["order"]) for row in rows}
    assert kinds == {
        ("identical", "grouped"),
        *((p, o) for p in ("zipf", "distinct") for o in ("grouped", "shuffled")),
    }
    printed = capsys.readouterr().out
    assert "3 adapters zipf shuffled" in printed and document["meta"]["command"] in printed
    assert torch.cuda.is_available() or "CPU figures" in printed


@pytest.mark.parametrize("mode", ("fwd", "fwd+bwd"))
def test_a_wrong_provider_prints_wrong_and_carries_no_time(bench, mode, monkeypatch):
    latency, multi = bench
    right = multi._BUILDERS[multi.FUSED]

    def last_token_without_adapter(x, batch):
        ids = batch.ids.clone()
        ids[-1] = -1
        return right(x, multi.replace(batch, ids=ids))

    monkeypatch.setitem(multi._BUILDERS, multi.FUSED, last_token_without_adapter)
    case = multi.MultiCase(multi.Case(mode, 9, 40, 24, 5, "float32"), 3, "distinct", "grouped")
    budget = latency.Budget(seconds=0.0, min_samples=3, max_samples=3)
    rows = multi.measure_case(case, torch.device("cpu"), budget, 0)
    verdicts = {row.provider: row.ok for row in rows}
    assert [name for name, ok in verdicts.items() if not ok] == [multi.FUSED]
    assert rows[-1].p50_us is None and "WRONG: y" in multi.case_table(case, rows)


def test_an_adapter_that_hides_under_the_base_is_found(bench, monkeypatch):
    """What fp32 rounds away beside x W^T is seen where W is zero."""
    multi = bench[1]
    right = multi._BUILDERS[multi.FUSED]

    def rounded(x, batch):
        forward, leaves, unpack = right(x, batch)
        base = multi.F.linear(x, batch.weight)
        return lambda: base + ((forward() - base) * 2**16).round() / 2**16, leaves, unpack

    case = multi.MultiCase(multi.Case("fwd", 9, 40, 24, 5, "float32"), 3, "distinct", "grouped")
    batch = multi.random_batch(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    judge = multi.Judge(batch, "fwd")
    assert judge.verdict(multi.FUSED).ok
    monkeypatch.setitem(multi._BUILDERS, multi.FUSED, rounded)
    assert not judge.verdict(multi.FUSED).ok
    judge.batches.pop(), judge.expected.pop()
    assert judge.verdict(multi.FUSED).ok


def test_the_rows_that_fused_loses_are_listed(bench):
    multi = bench[1]

    def row(M, provider, p50):
        shape = {"mode": "fwd", "M": M, "K": 8, "N": 8, "r": 4, "dtype": "float32", "adapters": 2}
        order = {"popularity": "zipf", "order": "grouped", "noise": 0.02, "ok": True}
        return multi.MultiRow(**shape, **order, provider=provider, p50_us=p50)

    times = {1: (100.0, 90.0, 99.0), 2: (100.0, None, 120.0)}  # fused, loop, masked
    rows = [
        row(M, name, p50)
        for M, each in times.items()
        for name, p50 in zip((multi.FUSED, multi.LOOP, multi.MASKED), each, strict=True)
    ]
    said = multi.loss_list(rows)
    assert said.startswith("fused is slower than a baseline on 1 of")
    assert "fwd 1 8 8 4 2 zipf grouped: loop over adapters is 11.1 % faster" in said


def test_provider_choice_and_resuming_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench[0].parse_arguments(["--multi", "--providers=fused"])
    assert "no --providers, no --resume" in capsys.readouterr().err
