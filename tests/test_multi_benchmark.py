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


def test_provider_choice_and_resuming_are_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench[0].parse_arguments(["--multi", "--providers=fused"])
    assert "no --providers, no --resume" in capsys.readouterr().err
