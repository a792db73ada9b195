"""The tuner's promises: only what beats the default enters the table, which `config` reads, and an
interrupted run loses nothing."""

import importlib
import json
import shutil
import sys
import time
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
    try:
        yield {name: importlib.import_module(name) for name in ("tune", "compiling", "candidates")}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def tune(modules, monkeypatch, tmp_path):
    """The tuner with tables in a folder of its own, and a clock of its own for every candidate:
    name -> microseconds, 100 for whom it does not know."""
    tune = modules["tune"]
    (tmp_path / "default.json").write_text((config.TUNED / "default.json").read_text())
    monkeypatch.setattr(config, "TUNED", tmp_path)
    tune.forget()
    tune.times, tune.measured = {}, []

    def measure(group, device, budget):
        tune.measured.append(group.name)
        return [
            {"name": c.name, "ok": True, "note": None, "p50_us": us, "host_p50_us": us,
             "noise": 0.01, "vs_merged": us / 100}
            for c in group.everybody() for us in [tune.times.get(c.name, 100.0)]
        ]  # fmt: skip

    monkeypatch.setattr(tune.trial, "measure", measure)
    yield tune
    monkeypatch.undo()
    tune.forget()


def run(tune, todo, deadline=LATER, faults=None):
    table = tune.Table(H100, None)
    left = tune.tune([i for i in todo if not table.has(i)], H100, table, deadline, faults or {})
    return left, table


def product(path_or_sizes=(4096, 4096), M=8192, r=16):
    N, K = path_or_sizes
    options = {"dropout": False, "masked_output": False, "describable": True}
    return config.choose_product(H100, 16, M, N, K, r, **options, followed=False)


ROWS = [("default", 100.0), ("slower", 120.0), ("faster", 99.5)]


def rows(*pairs, noise=0.01, ok=True):
    return [{"name": n, "ok": ok, "p50_us": us, "noise": noise} for n, us in pairs]


def test_the_default_stays_unless_beaten_beyond_the_noise(modules):
    best = modules["tune"].best
    assert best(rows(*ROWS), "default") == "default"
    assert best(rows(*ROWS, noise=0.001), "default") == "faster"
    assert best(rows(*ROWS, ("fastest", 50.0)), "default") == "fastest"


def test_what_is_wrong_or_was_not_timed_is_never_chosen(modules):
    best = modules["tune"].best
    assert best(rows(*ROWS) + rows(("wrong", 1.0), ok=False), "default") == "default"
    assert best(rows(("a", 5.0)) + [{"name": "default", "ok": None}], "default") == "a"
    assert best(rows(("wrong", 1.0), ok=False), "default") is None


def test_the_library_takes_what_the_tuner_wrote(tune):
    todo = list(tune.items(((4096, 4096),), (8192,), (16,)))
    whole = config.Matmul(128, 256, 64, 8, 8, 3, 1)  # y in one part
    assert whole in tune.GRIDS["matmul_hopper"]
    tune.times |= {"128 256 64 8 8 3 1 64": 90.0, "pdl": 80.0, "aten": 70.0}
    before = product()
    left, table = run(tune, todo)
    assert left == 0 and len(table.document["entries"]) == len(todo)
    after = product()
    assert before.path == "hopper" and before.matmul != whole
    assert after.path == "pdl" and after.matmul == whole  # of the descriptor matmul's grid, too
    assert after.shrink == before.shrink  # a tie: the default
    assert config.choose_backend(H100, 16, 8192, 4096, 4096, 16) == "aten"
    assert product(r=64).path == "hopper"


def test_dx_of_a_layer_is_filed_under_the_sizes_of_its_product(tune):
    todo = list(tune.items(((4096, 1024),), (8192,), (16,)))
    tune.times["single"] = 50.0
    run(tune, [item for item in todo if item.op == "path" and item.directions == ("dx",)])
    assert product((4096, 1024)).path == "single"
    assert product((1024, 4096)).path == "hopper"


def test_each_entry_is_found_once_and_every_product_of_the_layers_has_one(modules):
    tune = modules["tune"]
    todo = list(tune.items(tune.LAYERS, tune.TOKENS, tune.RANKS))
    keys = [(item.op, *item.sizes.values()) for item in todo]
    assert len(set(keys)) == len(keys)
    products = {(i.sizes["N"], i.sizes["K"]) for i in todo if i.op == "path" and i.M == 8192}
    assert products == {pair for K, N in tune.LAYERS for pair in ((N, K), (K, N))}


def test_an_interrupted_run_goes_on_where_it_stopped(tune):
    todo = list(tune.items(((4096, 4096),), (16,), (16,)))
    run(tune, todo[:1])
    assert run(tune, todo, deadline=time.time())[0] == len(todo) - 1
    assert len(tune.measured) == 1
    run(tune, todo)
    assert tune.measured == [str(item) for item in todo]


def test_a_table_of_another_triton_is_started_anew(tune):
    todo = list(tune.items(((4096, 4096),), (16,), (16,)))
    _, table = run(tune, todo)
    path = table.paths[0]
    path.write_text(json.dumps({**table.document, "triton": "2.0"}))
    assert not tune.Table(H100, None).has(todo[0])


def test_a_write_that_fails_leaves_the_table_whole(tune, monkeypatch):
    todo = list(tune.items(((4096, 4096),), (16,), (16,)))
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


def test_candidates_with_faults_are_not_measured_but_the_default_always_is(tune):
    item = next(i for i in tune.items(((4096, 4096),), (8192,), (16,)) if i.op == "shrink")
    default = config.select("shrink", H100, 16, 8192, 4096, 4096, 16)
    faults = {tune.kernel_key(item, tiles): "spills" for tiles in tune.GRIDS["shrink"][1:]}
    name, entrants = tune.contenders(item, H100, faults)
    assert default in tune.GRIDS["shrink"][1:]
    assert [tiles for _, tiles in entrants.values()] == [default, tune.GRIDS["shrink"][0]]
    assert name == next(iter(entrants))


def test_a_kernel_that_is_skipped_is_no_path(tune):
    item = next(i for i in tune.items(((4096, 4096),), (8192,), (16,)) if i.op == "path")
    assert "hopper" in tune.contenders(item, H100, {})[1]
    assert "hopper" not in tune.contenders(item, H100, {("path", "hopper"): "--skip"})[1]


@pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")),
    reason="needs Linux and a C compiler for the stub of libcuda",
)
def test_spilling_and_oversized_candidates_are_found_by_compiling_alone(modules):
    compiling, candidates = modules["compiling"], modules["candidates"]
    case = modules["tune"].Case("fwd", 256, 512, 512, 16, "bfloat16")
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
    assert "matmul_descriptor fwd+dx 8192x4096x4096 r=16" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
