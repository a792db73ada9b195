"""The campaign's promises: every step can be listed, nothing wrong is timed, and what fails, dies
or hangs costs its own row and nothing else."""

import functools
import importlib
import json
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fused_lora import product, testing, triton_backend
from fused_lora.kernels import config

TILES = (config.Shrink, config.Matmul, config.RankGrad)
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
NAMES = ("campaign", "candidates", "checkups", "protocol", "results", "steps", "trial")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(FOLDER))


@pytest.fixture
def group(bench):
    """Two candidates for y of a tiny layer, one of them wrong."""
    case = bench.results.Case("fwd", M=9, K=40, N=24, r=4, dtype="float32")

    class Wrong(bench.candidates.Layer):
        def _function(self, inputs):
            return lambda x, weight, lora_A, lora_B: x @ weight.t()  # the adapter is missing

    layer = bench.candidates.Layer("good", "aten", "fwd")
    wrong = Wrong("wrong", "aten", "fwd")
    return bench.trial.Group("tiny", case, ("fwd",), [layer, wrong], {"good": 1.5}, goal=1.2)


def measure(bench, group, **options):
    rows = bench.trial.measure(group, CPU, bench.trial.QUICK, **options)
    return {row["name"]: row for row in rows}


def test_every_step_lists_distinct_measurements_and_predicts_only_those(bench):
    total = 0
    for build in bench.steps.GROUPS.values():
        groups = build(bench.steps.H100)
        assert len({group.name for group in groups}) == len(groups)
        for group in groups:
            names = [candidate.name for candidate in group.everybody()]
            assert len(set(names)) == len(names)
            assert {*group.predicted, group.yardstick} <= set(names)
            total += len(names)
    assert total > 300


def test_the_window_of_shrink_brackets_the_idle_sms(bench):
    """64 x 16 tiles on 132 SMs leave 32 idle: one SM more must show the predicted jump."""
    window = next(g for g in bench.steps.shrink(bench.steps.H100) if "window" in g.name)
    programs = [c.plan.shrink_programs for c in window.candidates if "pdl" in c.name]
    assert {24, 32, 33, 64, 132} <= set(programs)
    assert window.predicted["pdl 32 SMs"] < window.predicted["pdl 33 SMs"]


@pytest.mark.parametrize("step", ["plain", "dropout", "correct", "host", "memory", "figures"])
def test_a_dry_run_needs_no_gpu_and_writes_nothing(bench, step, capsys, tmp_path):
    assert bench.campaign.main([step, f"--output={tmp_path / 'out'}", "--dry-run"]) == 0
    assert capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("step", ["plain", "correct", "host", "memory", "figures"])
def test_without_a_gpu_it_says_so(bench, step, capsys, tmp_path):
    assert bench.campaign.main([step, f"--output={tmp_path / 'out'}"]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    if step in bench.checkups.STEPS:
        assert bench.campaign.main([step, f"--output={tmp_path}", "--compile-only"]) == 2
        assert "compiles nothing" in capsys.readouterr().err


def test_a_wrong_candidate_is_never_timed(bench, group):
    told = []
    rows = measure(bench, group, started=told.append)
    assert rows["good"]["ok"] is True and rows["good"]["p50_us"] > 0
    assert rows["good"]["vs_merged"] == rows["good"]["vs_yardstick"] > 0
    assert rows["wrong"]["ok"] is False and "y:" in rows["wrong"]["note"]
    assert "p50_us" not in rows["wrong"]
    assert told == ["merged", "merged (A/A)", "good", "wrong", ""]


def test_a_candidate_that_cannot_be_timed_is_left_out(bench, group, monkeypatch):
    real = bench.protocol.measure

    def fails_with_good(calls, *arguments):
        if "good" in calls:
            raise RuntimeError("operation not permitted when stream is capturing")
        return real(calls, *arguments)

    monkeypatch.setattr(bench.protocol, "measure", fails_with_good)
    rows = measure(bench, group)
    assert rows["good"]["ok"] is False and "not permitted" in rows["good"]["note"]
    assert rows["merged"]["p50_us"] > 0


@pytest.mark.kernels
def test_candidates_compute_what_the_library_computes(bench):
    """Every kind of candidate that the interpreter can run, both directions, by the rule."""
    Planned, tiles = bench.candidates.Planned, config.defaults()["interpreter"]["16"]
    both = bench.candidates.BOTH
    case = bench.results.Case("fwd", M=20, K=64, N=48, r=8, dtype="float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = bench.trial.Judge(case, torch.device(device), torch.Generator(device).manual_seed(0))
    matmul, shrink = tiles["matmul"][0], tiles["shrink"][0]
    plan = config.Product("portable", "", matmul=matmul, shrink=shrink, shrink_programs=2)
    made = [
        bench.candidates.Merged("merged", both),
        bench.candidates.Product("plain", both, "matmul", matmul, adapter=False),
        bench.candidates.Product("S given", both, "matmul", matmul, adapter=True),
        bench.candidates.Shrink("shrink", both, shrink, 2),
        bench.candidates.RankGrad("rank_grad", tiles["rank_grad"][0]),
        *(
            Planned(f"{of}, portable, dropout {p}", of, plan, p)
            for of in ("fwd", "dx", "bwd")
            for p in (False, True)
        ),
        *(
            Planned(f"{of}, {other.path}", of, other)
            for of in ("fwd", "bwd")
            for other in (
                config.Product("single", "", matmul=matmul, rank_grad=tiles["rank_grad"][0]),
                config.Product("decode", "", decode=tiles["decode"][0]),
            )
        ),
        bench.candidates.Layer("dropout", "aten", "fwd+bwd", dropout=True),
        bench.candidates.Layer("addmm", "addmm", "fwd+bwd"),
    ]
    for candidate in made:
        verdict = judge.judge(
            lambda inputs, c=candidate: c.prepare(bench.candidates.operands(inputs))(),
            candidate.rule,
        )
        assert verdict.ok, f"{candidate.name}: {verdict.note}"


@pytest.mark.kernels
def test_a_plan_is_run_with_all_its_parts(bench, monkeypatch):
    """Forward and backward launch the tiles of the plan that is timed, rank_grad's among them."""
    tiles = config.defaults()["interpreter"]["16"]
    shrink, own = config.Shrink(16, 16, 4, 1), config.RankGrad(32, 32, 4, 1)
    plan = config.Product("portable", "", tiles["matmul"][0], shrink, 3, rank_grad=own)
    launched = []

    def spy(kernel, *args, **options):
        launched.extend(a for a in args if isinstance(a, TILES))
        if kernel.__name__ == "shrink":
            launched.append(args[4])
        return kernel(*args, **options)

    for module, name in ((product, "shrink"), (product, "matmul"), (triton_backend, "rank_grad")):
        monkeypatch.setattr(module, name, functools.partial(spy, getattr(module, name)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = testing.make_case(70, 64, 48, 8, torch.float32, device=device)
    for of, expected in (("fwd", [shrink, 3, plan.matmul]), ("bwd", [shrink, 3, plan.matmul, own])):
        launched.clear()
        bench.candidates.Planned(of, of, plan).prepare(bench.candidates.operands(inputs))()
        assert launched == expected


def test_a_measured_group_is_not_measured_again(bench, group, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.protocol, "Budget", lambda **options: bench.trial.QUICK)
    record = bench.campaign.Record(tmp_path, "plain")
    later = time.time() + 1e6
    bench.campaign.work([group], record, time.time(), CPU)
    assert record["done"] == []  # no time left
    bench.campaign.work([group], record, later, CPU)
    again = bench.campaign.Record(tmp_path, "plain")
    assert again["done"] == ["tiny"] and len(again["rows"]) == 4
    monkeypatch.setattr(bench.trial, "measure", None)
    bench.campaign.work([group], again, later, CPU)
    text = bench.campaign.table(again, group)
    assert "+50.0 %" in text and "goal over merged: +20.0 %" in text and "wrong" in text


def test_what_does_not_compile_is_recorded_and_left_out(bench, group, monkeypatch, tmp_path):
    import compiling

    kernel = bench.candidates.Layer("kernel", "triton", "fwd")
    group.candidates.append(kernel)
    found = [{"error": "CompilationError: no"}]
    monkeypatch.setattr(compiling, "compile_all", lambda jobs, *rest: found[: len(jobs)])
    record = bench.campaign.Record(tmp_path, "plain")
    bench.campaign.compile_groups([group], record, 1.0, 1)
    assert record.failed("tiny") == {"kernel"}
    (row,) = bench.campaign.Record(tmp_path, "plain")["rows"]
    assert row["note"] == "does not compile: CompilationError: no"


WORKER = """
    import json, os, sys, time
    path, how = sys.argv[1:]
    document = json.load(open(path))
    if not any(row["name"] == "bad" for row in document["rows"]):
        document["running"] = {"group": "g", "name": "bad"}
        json.dump(document, open(path + ".new", "w"))
        os.replace(path + ".new", path)
        time.sleep(60) if how == "hang" else sys.exit(5)
"""


@pytest.mark.parametrize("how, note", [("hang", "hung: killed"), ("die", "exit status 5")])
def test_a_worker_that_dies_or_hangs_goes_on_without_its_candidate(
    bench, monkeypatch, tmp_path, how, note
):
    monkeypatch.setattr(bench.campaign, "STALL_SECONDS", 1.0)
    path = tmp_path / "campaign-paths.json"
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(path), how]
    began = time.time()
    bench.campaign.watch(command, lambda: bench.campaign.Record(tmp_path, "paths"), began + 60)
    assert time.time() - began < 30
    (row,) = json.loads(path.read_text())["rows"]
    assert row["group"] == "g" and row["name"] == "bad" and note in row["note"]


def test_a_candidate_is_not_blamed_for_the_end_of_the_time(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.campaign, "RESERVE_SECONDS", 0.5)
    path = tmp_path / "campaign-paths.json"
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(path), "hang"]
    load = lambda: bench.campaign.Record(tmp_path, "paths")  # noqa: E731
    bench.campaign.watch(command, load, time.time() + 1)
    assert load()["running"]["name"] == "bad" and load()["rows"] == []


def test_a_worker_that_never_starts_is_not_tried_for_ever(bench, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    load = lambda: bench.campaign.Record(tmp_path, "paths")  # noqa: E731
    bench.campaign.watch(command, load, time.time() + 60)
    assert load()["notes"] == ["the worker died with exit status 7 before it began"]


def test_parts_of_a_checkup_are_done_once_and_a_failure_is_a_row(bench, monkeypatch, tmp_path):
    calls = []

    def good(folder, seconds):
        calls.append("good")
        return {"ok": True, "extra_mib": 1.5}

    def broken(folder, seconds):
        raise RuntimeError("planted")

    monkeypatch.setitem(bench.checkups.STEPS, "memory", lambda: {"good": good, "broken": broken})
    for _ in range(2):
        record = bench.campaign.Record(tmp_path, "memory")
        assert bench.checkups.run("memory", record, time.time() + 100, False) == 1
    assert calls == ["good"]
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["good"]["extra_mib"] == 1.5 and "planted" in rows["broken"]["note"]


@pytest.mark.parametrize(
    ("body", "code", "ok"),
    [
        ("def test(): pass", 0, True),
        ("def test(): assert 0", 1, False),
        ("import pytest\ndef test(): pytest.skip('no GPU')", 0, None),
        ("", 5, None),
        ("import nothing_of_this_name", 2, False),
    ],
)
def test_a_checkup_whose_tests_were_all_skipped_says_nothing(bench, tmp_path, body, code, ok):
    (tmp_path / "test_it.py").write_text(body)
    part = bench.checkups._pytest([str(tmp_path / "test_it.py"), "--rootdir", str(tmp_path)])
    assert part(tmp_path, 60.0)["ok"] is ok


def test_the_parts_of_the_figures_go_into_one_file(bench, tmp_path):
    for tokens in (7, 9):
        options = [f"--shapes={tokens}x33x20", "--ranks=3", "--modes=fwd", "--dtype=float32"]
        part = bench.checkups._latency([*options, "--providers=eager3,fused"])
        assert part(tmp_path, 200.0)["ok"] is True
    (path,) = tmp_path.glob("latency-*.json")
    meta, rows = bench.results.load(path)
    assert [row.M for row in rows if row.provider == "fused"] == [7, 9]
    assert all(row.p50_us > 0 for row in rows) and "7x33x20" in meta["command"]
    assert bench.checkups._latency(["--shapes=nonsense"])(tmp_path, 200.0)["ok"] is False
    assert "nonsense" in (tmp_path / "figures.log").read_text()


def test_failed_tests_are_named(bench, tmp_path):
    text = '<testsuites><testsuite tests="3" skipped="1"><testcase name="a"><failure/></testcase>'
    (tmp_path / "j.xml").write_text(text + '<testcase name="b"/></testsuite></testsuites>')
    expected = {"tests": 3, "skipped": 1, "failed": ["a"]}
    assert bench.checkups._counts(tmp_path / "j.xml") == expected
