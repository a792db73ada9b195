"""The tuner's promises: only what beats the default enters the table, which `config` reads, and an
interrupted run loses nothing."""

import importlib
import json
import re
import shutil
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fused_lora.kernels import config

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
H100 = config.Device("NVIDIA H100 80GB HBM3", "cuda", 90, 132)
LATER = time.time() + 1e6


@pytest.fixture(scope="module")
def modules():
    """benchmarks/ as `python benchmarks/tune.py` finds it."""
    sys.path.insert(0, str(FOLDER))
    names = ("tune", "search", "compiling", "candidates")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def search(modules):
    return modules["search"]


@pytest.fixture
def tune(modules, monkeypatch, tmp_path):
    """The tuner with tables in a folder of its own, and a clock of its own for every candidate:
    100 microseconds, less what `tune.gains` gives for each pattern found in its name."""
    tune = modules["tune"]
    (tmp_path / "default.json").write_text((config.TUNED / "default.json").read_text())
    monkeypatch.setattr(config, "TUNED", tmp_path)
    tune.forget()
    tune.gains, tune.measured = {}, []

    def measure(group, device, budget):
        tune.measured.append((group.name, [c.name for c in group.candidates]))
        return [
            {"name": c.name, "ok": True, "note": None, "p50_us": us, "host_p50_us": us,
             "noise": 0.01, "vs_merged": us / 100}
            for c in group.everybody()
            for us in [100.0 - sum(g for p, g in tune.gains.items() if re.search(p, c.name))]
        ]  # fmt: skip

    monkeypatch.setattr(tune.trial, "measure", measure)
    yield tune
    monkeypatch.undo()
    tune.forget()


def run(tune, todo, deadline=LATER, faults=None, skip=()):
    table = tune.Table(H100, None)
    tuner = tune.Tuner(H100, faults or {}, skip)
    left = tune.tune([i for i in todo if not table.has(i)], tuner, table, deadline)
    return left, table


def product(path_or_sizes=(4096, 4096), M=8192, r=16, **options):
    N, K = path_or_sizes
    options = {"drawn": False, "masked": False, "followed": False, "addressable": True, **options}
    return config.choose_product("auto", H100, 16, M, N, K, r, **options)


def measured(tune, item):
    """The names of each group that was measured for an item."""
    return [names for name, names in tune.measured if name == str(item)]


ROWS = [("default", 100.0), ("slower", 120.0), ("faster", 99.5)]


def rows(*pairs, noise=0.01, ok=True):
    return [{"name": n, "ok": ok, "p50_us": us, "noise": noise} for n, us in pairs]


def test_the_default_stays_unless_beaten_beyond_the_noise(modules):
    fastest = modules["tune"].fastest
    assert fastest(rows(*ROWS), "default") == "default"
    assert fastest(rows(*ROWS, noise=0.001), "default") == "faster"
    assert fastest(rows(*ROWS, ("fastest", 50.0)), "default") == "fastest"


def test_what_is_wrong_or_was_not_timed_is_never_chosen(modules):
    fastest = modules["tune"].fastest
    assert fastest(rows(*ROWS) + rows(("wrong", 1.0), ok=False), "default") == "default"
    assert fastest(rows(("a", 5.0)) + [{"name": "default", "ok": None}], "default") == "a"
    assert fastest(rows(("wrong", 1.0), ok=False), "default") is None


SQUARE = ((4096, 4096),)


def test_the_library_takes_what_the_tuner_wrote(tune, search):
    todo = list(search.items(SQUARE, (8192,), (16,)))
    # a path, then its tiles, then their shrink, then what follows; together they are the fastest
    tune.gains |= {"^pdl": 5, "matmul 256 128 64 8 8 4 2": 5, "shrink 64 128 4 2": 5}
    tune.gains |= {" 99 programs": 90, ", 32 programs": 3, "rank_grad 128 64 8 3": 5, "aten": 40}
    before = product(), product(followed=True), product(drawn=True)
    left, table = run(tune, todo)
    assert left == 0 and len(table.document["entries"]) == len(todo) == 5
    forward, dx = product(), product(followed=True)
    assert before[0].path == before[1].path == "hopper"
    assert forward.path == dx.path == "pdl"
    assert forward.matmul == dx.matmul == config.Matmul(256, 128, 64, 8, 8, 4, 2)
    assert forward.shrink == dx.shrink == config.Shrink(64, 128, 4, 2)
    assert forward.shrink_programs == 32
    assert forward.rank_grad is None and dx.rank_grad == config.RankGrad(128, 64, 8, 3)
    assert config.choose_backend(H100, 16, 8192, 4096, 4096, 16)[0] == "aten"
    # other sizes keep to the rules
    assert product(r=64).path == product(M=8000).path == "hopper"


def test_what_is_written_is_worth_it_in_a_last_comparison_with_the_rules(tune, search):
    item = next(search.items(SQUARE, (8192,), (16,)))
    tune.gains |= {"^pdl": 5}
    _, table = run(tune, [item])
    last = measured(tune, item)[-1]
    rules = search.name(search.rules(item, H100))
    assert len(last) == 2 and last[0] == rules and last[1].startswith("pdl")
    (entry,) = table.document["entries"]
    assert entry["p50_us"] == 95 and entry["default_us"] == 100 and entry["plan"]["path"] == "pdl"


def test_a_gain_within_the_noise_leaves_the_rules(tune, search):
    item = next(search.items(SQUARE, (8192,), (16,)))
    tune.gains |= {"^pdl": 0.9}
    _, table = run(tune, [item])
    assert table.document["entries"][0]["plan"] is None
    assert product().path == "hopper"


def test_a_lucky_candidate_is_found_out(tune, search, monkeypatch):
    """Fast among many, no faster than the rules when they are measured again."""
    item = next(search.items(SQUARE, (8192,), (16,)))
    tune.gains |= {"^pdl": 5}
    measure = tune.trial.measure

    def sober(group, device, budget):
        if budget is tune.FINAL:
            tune.gains.clear()
        return measure(group, device, budget)

    monkeypatch.setattr(tune.trial, "measure", sober)
    _, table = run(tune, [item])
    assert table.document["entries"][0]["plan"] is None


def test_dx_of_a_layer_is_filed_under_the_sizes_of_its_product(tune, search):
    todo = [i for i in search.items(((4096, 1024),), (8192,), (16,)) if i.of == "dx"]
    tune.gains["^single"] = 50.0
    run(tune, todo[:1])
    assert product((4096, 1024), followed=True).path == "single"
    assert product((1024, 4096), followed=True).path == "hopper"
    assert product((4096, 1024)).path == "hopper"


def test_each_entry_is_found_once_and_every_product_of_the_layers_has_one(search):
    todo = list(search.items(search.LAYERS, search.TOKENS, search.RANKS))
    keys = [tuple(item.key.items()) for item in todo]
    assert len(set(keys)) == len(keys)
    for dropout in (False, True):
        for of in ("forward", "dx"):
            layers = {(i.K, i.N) for i in todo if (i.of, i.M, i.dropout) == (of, 8192, dropout)}
            assert layers == set(search.LAYERS)


def test_plans_of_a_stage_are_distinct_and_run_where_they_are_tried(search):
    for item in search.items(search.LAYERS, (8192, 64, 16), (16, 64)):
        if item.of == "backend":
            continue
        best = search.rules(item, H100)
        for stage in search.STAGES:
            plans = list(stage(item, H100, best))
            assert len({search.name(plan) for plan in plans}) == len(set(plans)) == len(plans)
            for plan in plans:
                if plan.shrink is not None:
                    blocks = -(-item.M // plan.shrink.BLOCK_M)
                    assert 1 <= plan.shrink_programs <= blocks
                assert (plan.decode is None) != (plan.matmul is None)
                masked = item.dropout and plan.path in ("decode", "single")
                assert not masked, plan


def test_plans_are_read_back_as_they_were_written(search):
    for item in search.items(SQUARE, (8192, 16), (16,)):
        if item.of != "backend":
            best = search.rules(item, H100)
            for plan in [p for stage in search.STAGES for p in stage(item, H100, best)]:
                back = config._product(json.loads(json.dumps(search.fields(plan))))
                assert replace(back, reason="") == plan


def test_an_interrupted_run_goes_on_where_it_stopped(tune, search):
    todo = list(search.items(SQUARE, (16,), (16,)))
    run(tune, todo[:1])
    done = len(tune.measured)
    assert run(tune, todo, deadline=time.time())[0] == len(todo) - 1
    assert len(tune.measured) == done
    run(tune, todo)
    assert list(dict.fromkeys(name for name, _ in tune.measured)) == [str(i) for i in todo]
    assert {name for name, _ in tune.measured[done:]} == {str(i) for i in todo[1:]}


def test_a_table_of_another_triton_is_started_anew(tune, search):
    todo = list(search.items(SQUARE, (16,), (16,)))
    _, table = run(tune, todo)
    path = table.paths[0]
    path.write_text(json.dumps({**table.document, "triton": "2.0"}))
    assert not tune.Table(H100, None).has(todo[0])


def test_a_write_that_fails_leaves_the_table_whole(tune, search, monkeypatch):
    todo = list(search.items(SQUARE, (16,), (16,)))
    _, table = run(tune, todo[:1])
    content = table.paths[0].read_text()

    def half(document, file, **options):
        file.write('{"entries": [')
        raise OSError("disk full")

    monkeypatch.setattr(tune.results.json, "dump", half)
    with pytest.raises(OSError, match="disk full"):
        run(tune, todo)
    assert table.paths[0].read_text() == content
    assert sorted(p.name for p in config.TUNED.iterdir()) == ["default.json", table.paths[0].name]


def test_plans_with_faults_are_not_measured_but_the_rules_always_are(tune, search):
    item = next(search.items(SQUARE, (8192,), (16,)))
    rules = search.rules(item, H100)
    faults = {(item.kernels, "hopper", "shrink", tiles): "spills" for tiles in search.SHRINKS[1:]}
    assert rules.shrink in search.SHRINKS[1:]
    run(tune, [item], faults=faults)
    shrinks = {re.search(r"shrink [\d ]+", n)[0] for n in measured(tune, item)[2]}
    first = " ".join(map(str, astuple(search.SHRINKS[0])))
    assert shrinks == {f"shrink {first}", re.search(r"shrink [\d ]+", search.name(rules))[0]}


def test_what_is_compiled_before_is_what_the_stages_try(tune, search):
    todo = [i for i in search.items(SQUARE, (8192,), (16,)) if i.of != "backend"]
    jobs = tune.to_compile(todo, H100)
    for item in todo:
        around = search.rules(item, H100)
        for stage in search.STAGES:
            for plan in stage(item, H100, around):
                for part in search.PARTS:
                    tiles = getattr(plan, part)
                    if tiles is not None and tiles != getattr(around, part):
                        job = jobs[item.kernels, plan.path, part, tiles]
                        assert getattr(job[1].plan, part) == tiles
                        assert job[1].dropout == item.dropout


def test_a_path_that_is_skipped_is_never_run(tune, search):
    todo = list(search.items(SQUARE, (8192, 16), (16,)))
    run(tune, todo, skip=["pdl", "decode"])
    assert not any("pdl" in n or "decode" in n for _, names in tune.measured for n in names)
    assert measured(tune, todo[0]) and not measured(tune, next(i for i in todo if i.M == 16))


@pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")),
    reason="needs Linux and a C compiler for the stub of libcuda",
)
def test_spilling_and_oversized_candidates_are_found_by_compiling_alone(modules):
    compiling, candidates = modules["compiling"], modules["candidates"]
    case = modules["search"].Case("fwd", 256, 512, 512, 16, "bfloat16")
    jobs = [
        (case, candidates.Shrink("fits", ("fwd",), config.Shrink(64, 64, 4, 2), 4)),
        (case, candidates.Shrink("too large", ("fwd",), config.Shrink(128, 128, 4, 8), 4)),
        (case, candidates.Shrink("spills", ("fwd",), config.Shrink(256, 256, 4, 1), 4)),
    ]
    found = compiling.compile_all(jobs, processes=1, seconds=120)
    fits, large, spills = map(compiling.fault, found)
    assert fits is None and found[0]["kernels"][0]["name"] == "shrink_kernel"
    assert "shared memory" in large
    assert "spills" in spills


def test_without_a_gpu_the_plan_can_be_listed(tune, capsys):
    assert tune.main(["--dry-run", "--tokens=8192", "--ranks=16"]) == 0
    out = capsys.readouterr().out
    assert "forward 8192x4096x4096 r=16: " in out and "dx with dropout" in out
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
