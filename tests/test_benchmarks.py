"""The benchmark's promises: nothing wrong is timed, nothing is invented, the file holds it all."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
CPU = torch.device("cpu")


# type -> fields of a row, of the meta data
ROW_FIELDS = {
    str: "mode dtype base provider note",
    int: "M K N r samples launches",
    float: "p20_us p50_us p80_us vs_merged noise host_p50_us tflops pct_floor extra_mib rel_l2 "
    "rel_l2_vs_eager",
    bool: "ok",
}
META_FIELDS = {
    str: "date device gpu cpu driver cuda torch triton peft python commit changes peak_dtype "
    "command",
    int: "sm_count cores threads",
    float: "l2_mb llc_mb load sm_clock_mhz mem_clock_mhz max_sm_clock_mhz power_limit_w copy_gbs "
    "gemm_tflops",
    bool: "dirty",
}
NULL_IN_A_TIMED_ROW = {"note", "launches", "rel_l2_vs_eager"}


def types(fields):
    return {name: kind for kind, names in fields.items() for name in names.split()}


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, found as `python benchmarks/latency.py` finds them: by their own
    folder, and not by the repository root, where a folder named kernels lies."""
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads waiting for each other crawl beside other tests
    try:
        importlib.import_module("latency")  # imports the others, also from their folder
        mine = {n: m for n, m in sys.modules.items() if n in {p.stem for p in FOLDER.glob("*.py")}}
        yield SimpleNamespace(**mine)
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One real run of the program on a tiny ragged layer, torch.compile left out."""
    folder = tmp_path_factory.mktemp("results")
    process = subprocess.run(
        [
            *(sys.executable, "benchmarks/latency.py", "--quick", "--shapes=7x33x20", "--ranks=3"),
            *("--dtype=float32", "--providers=base,eager3,addmm,peft,fused,fused (tuned)"),
            f"--output={folder}",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    (path,) = folder.glob("latency-*.json")
    return SimpleNamespace(stdout=process.stdout, path=path, document=json.loads(path.read_text()))


def measure(bench, providers, mode="fwd+bwd", dtype="float32", **layer):
    sizes = {"M": 9, "K": 40, "N": 24, "r": 4} | layer
    case = bench.results.Case(mode, dtype=dtype, **sizes)
    providers = [bench.providers.Merged(), bench.providers.Merged("merged (A/A)"), *providers]
    budget = bench.protocol.Budget(seconds=0.0, min_samples=5, max_samples=5)
    peaks = bench.roofline.Peaks(gemm_tflops=0.1, copy_gbs=10.0)
    silent = bench.latency.PlainProgress()
    silent.set_description_str = lambda description: None
    rows = bench.latency.measure_case(case, providers, CPU, budget, peaks, 0, silent)
    return {row.provider: row for row in rows}, bench.report.case_table(
        case, {row.provider: row for row in rows}
    )


def row(bench, provider, p50, *, M=8, noise=0.01, mode="fwd", merged=100.0):
    shape = {"mode": mode, "M": M, "K": 64, "N": 64, "r": 8, "dtype": "float32"}
    times = {"p20_us": p50, "p50_us": p50, "p80_us": p50, "host_p50_us": p50, "samples": 9}
    return bench.results.Row(
        **shape, provider=provider, **times, vs_merged=p50 / merged, noise=noise, ok=True
    )


def scaled_wrong(x, weight, lora_A, lora_B, scaling):
    return x @ weight.t() + 1.05 * scaling * (x @ lora_A.t()) @ lora_B.t()


def adapter_missing(x, weight, lora_A, lora_B, scaling):
    return x @ weight.t() + 0 * (x @ lora_A.t()) @ lora_B.t()


def gradient_lost(x, weight, lora_A, lora_B, scaling):
    return x @ weight.t() + scaling * (x.detach() @ lora_A.t()) @ lora_B.t()


def raises(x, weight, lora_A, lora_B, scaling):
    raise IndexError("planted")


@pytest.mark.parametrize("bug", [scaled_wrong, adapter_missing, gradient_lost, raises])
def test_a_wrong_provider_prints_wrong_and_carries_no_time(bench, bug):
    rows, table = measure(bench, [bench.providers.Function("planted", bug)])
    assert rows["merged"].ok is True and rows["merged"].p50_us > 0
    planted = dataclasses.asdict(rows["planted"])
    assert planted["ok"] is False and planted["note"]
    for name in ("p20_us", "p50_us", "p80_us", "host_p50_us", "vs_merged", "tflops", "pct_floor"):
        assert planted[name] is None
    (line,) = [line for line in table.splitlines() if line.startswith("planted")]
    assert "WRONG" in line and "us" not in line.split()
    assert "WRONG: planted" in bench.report.loss_list(list(rows.values()))


def test_a_merge_with_the_wrong_scaling_is_wrong(bench):
    class Unscaled(bench.providers.Merged):
        def build(self, inputs):
            return super().build(dataclasses.replace(inputs, scaling=1.0))

    rows, _ = measure(bench, [Unscaled("unscaled")])
    assert rows["merged"].ok is True
    assert rows["unscaled"].ok is False and rows["unscaled"].p50_us is None


def test_correct_providers_are_accepted_and_timed_in_both_modes(bench):
    for mode in ("fwd", "fwd+bwd"):
        chosen = [p for p in bench.providers.all_providers() if "torch.compile" not in p.name]
        rows, _ = measure(bench, chosen[3:], mode)
        for name in ("merged", "merged (A/A)", "eager3", "addmm", "fused"):
            assert rows[name].ok is True and rows[name].p50_us > 0, (mode, name, rows[name].note)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_on_a_4_bit_base_are_held_to_the_rule_on_a_weight_that_it_holds(bench, dtype):
    pytest.importorskip("bitsandbytes", minversion="0.50", reason="needs the extra `quantized`")
    chosen = bench.providers.all_providers("nf4")
    sizes = {"K": 128, "N": 64, "base": "nf4"}
    rows, _ = measure(
        bench, [p for p in chosen if "merged" not in p.name], "fwd+bwd", dtype, **sizes
    )
    for name, measured in rows.items():
        assert measured.ok is not False, (name, measured.note)
        assert measured.ok or name.startswith("peft"), (name, measured.note)
    assert rows["fused"].note.startswith("unpacked for the call")

    class Unquantised(bench.providers.FourBitBase):
        def build(self, inputs):
            return super().build(dataclasses.replace(inputs, weight=1.01 * inputs.weight))

    rows, _ = measure(bench, [Unquantised()], "fwd+bwd", dtype, **sizes)
    assert rows["base"].ok is False


def test_a_missing_library_or_compiler_is_reported_as_not_available(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    compiled = bench.providers.Compiled("torch.compile", mode="default")
    rows, table = measure(bench, [bench.providers.Peft("peft"), compiled])
    assert rows["peft"].note == "n/a (not installed)"
    assert rows["torch.compile"].note == "n/a (no C++ compiler)"
    for name in ("peft", "torch.compile"):
        assert rows[name].ok is None and rows[name].p50_us is None
    assert "n/a (not installed)" in table and "WRONG" not in table


def test_the_file_follows_the_schema_field_by_field(run):
    meta, rows = run.document["meta"], run.document["rows"]
    meta_types, row_types = types(META_FIELDS), types(ROW_FIELDS)
    assert set(run.document) == {"meta", "rows"} and set(meta) == set(meta_types)
    for name, kind in meta_types.items():
        assert meta[name] is None or type(meta[name]) is kind, name
    for name in ("date", "device", "cpu", "torch", "copy_gbs", "gemm_tflops", "command"):
        assert meta[name], name
    for entry in rows:
        assert set(entry) == set(row_types)
        timed = entry["ok"] is True
        for name, kind in row_types.items():
            absent = entry[name] is None
            assert not (absent and timed) or name in NULL_IN_A_TIMED_ROW, (name, entry)
            assert absent or type(entry[name]) is kind, (name, entry)
        if timed:
            assert 0 < entry["p20_us"] <= entry["p50_us"] <= entry["p80_us"]
            assert entry["samples"] >= 20 and entry["noise"] >= 0
        else:
            assert entry["note"] and entry["p50_us"] is None


def test_every_case_has_an_a_a_row_and_its_ratio_lies_inside_the_noise(run):
    again = [entry for entry in run.document["rows"] if entry["provider"] == "merged (A/A)"]
    assert [entry["mode"] for entry in again] == ["fwd", "fwd+bwd"]
    for entry in again:
        assert abs(entry["vs_merged"] - 1) <= entry["noise"] + 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_cpu_run_says_so_and_claims_no_launches_and_no_tuned_kernel(run):
    assert "CPU figures" in run.stdout and run.path.name.startswith("latency-cpu-")
    for entry in run.document["rows"]:
        assert entry["launches"] is None
        assert entry["host_p50_us"] == entry["p50_us"]
        if entry["provider"] == "fused (tuned)":
            assert entry["ok"] is None and entry["note"] == "n/a (needs a CUDA GPU)"


def test_the_report_regenerates_the_printed_table_from_the_file(bench, run):
    meta, rows = bench.results.load(run.path)
    for part in bench.report.text(meta, rows).split("\n\n"):
        assert part in run.stdout
    assert "| fwd+bwd | 7 x 33 -> 20 |" in bench.report.markdown(meta, rows)
    if importlib.util.find_spec("matplotlib"):
        assert run.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_who_cannot_differ_is_compared_only_if_asked_for(bench):
    everybody = bench.providers.everybody
    cuda = torch.device("cuda")
    plain = list(bench.results.PROVIDERS[:-1])  # the last is for quantised bases
    assert everybody(cuda, "bfloat16") == plain
    assert set(plain) - set(everybody(CPU, "float32")) == {"fused (tuned)", "peft (fp32 adapters)"}
    assert "fused (delta)" in everybody(CPU, "float32", "nf4")


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_documents_show_the_reports_of_the_files_they_name(document, bench):
    text = (ROOT / document).read_text()
    names = set(re.findall(r"benchmarks/results/(latency-nvidia-\S+?\.json)", text))
    chosen = re.findall(r"--markdown --tokens ([\d,]+)", text)
    tokens = [int(part) for part in chosen[0].split(",")] if chosen else ()
    assert len(names) == (1 if chosen else 2)
    for name in names:
        assert bench.report.markdown(*bench.results.load(FOLDER / "results" / name), tokens) in text


def test_losses_are_exactly_the_rows_slower_than_the_fastest_baseline_beyond_noise(bench):
    def group(M, fused, noise=0.01):
        times = {"merged": 100.0, "eager3": 120.0, "addmm": 110.0, "fused": fused}
        return [row(bench, name, p50, M=M, noise=noise) for name, p50 in times.items()]

    rows = [*group(1, 105.0), *group(2, 110.5), *group(3, 115.0), *group(4, 115.0, noise=0.06)]
    lost = bench.results.losses(rows)
    assert [(fused.M, best.provider) for fused, best in lost] == [(3, "addmm")]
    text = bench.report.loss_list(rows)
    assert "on 1 of 4 cases" in text and "3x64x64" in text and "+4.5 %" in text
    assert text.splitlines()[1].strip() in bench.report.markdown(
        {"gpu": "X", "torch": "2", "triton": "3", "date": "d"}, rows
    )
    tables = bench.results.by_case(rows)
    within = next(group for case, group in tables.items() if case.M == 2)
    assert bench.report.case_table(within["fused"].case, within).endswith("baseline: ~")


def test_floor_equals_the_hand_computed_flops_and_bytes(bench):
    def work(mode, adapter):
        case = bench.results.Case(mode, M=2, K=3, N=4, r=1, dtype="float32")
        phases = bench.roofline.phases(case, adapter)
        return sum(p.flops for p in phases), sum(p.bytes for p in phases)

    assert work("fwd", False) == (48, 4 * (6 + 12 + 8))
    assert work("fwd", True) == (48 + 28, 4 * (6 + 12 + 8 + 7))
    assert work("fwd+bwd", False) == (96, 4 * (26 + 26))
    assert work("fwd+bwd", True) == (96 + 3 * 28, 4 * (26 + 7 + 26 + 6 + 2 * 7))
    case = bench.results.Case("fwd", M=2, K=3, N=4, r=1, dtype="float32")
    assert bench.roofline.adapter_flops_share(case) == pytest.approx(1 / 4 + 1 / 3)
    compute, memory = bench.roofline.Peaks(1e-6, 1.0), bench.roofline.Peaks(1.0, 1e-3)
    assert bench.roofline.floor_us(case, False, compute) == pytest.approx(48.0)
    assert bench.roofline.floor_us(case, False, memory) == pytest.approx(104.0)


def test_outside_the_core_the_two_fastest_baselines_of_the_regime_run(bench):
    times = {"eager3": 130.0, "addmm": 105.0, "peft": 150.0, "torch.compile": 110.0}
    rows = [row(bench, name, p50, M=16) for name, p50 in times.items()]
    rows += [row(bench, name, 260.0 - p50, M=8192) for name, p50 in times.items()]
    case = bench.results.Case("fwd", M=64, K=64, N=64, r=8, dtype="float32")
    always = ["merged", "merged (A/A)"]
    near_16 = bench.cases.reduced_providers(case, rows)
    assert near_16 == [*always, "addmm", "torch.compile", "fused"]
    near_8192 = bench.cases.reduced_providers(dataclasses.replace(case, M=4096), rows)
    assert near_8192 == [*always, "peft", "eager3", "fused"]


def test_the_gpu_matrix_is_the_protocols(bench):
    plan = bench.cases.chosen_cases(bench.latency.parse_arguments([]), "cuda")
    assert len(plan.core) == 24
    assert len(set(plan.core) | set(plan.rest)) == len(plan.core) + len(plan.rest) == 7 * 6 * 4 * 2
    packed = bench.cases.chosen_cases(bench.latency.parse_arguments(["--base", "nf4"]), "cuda")
    assert not packed.rest and {case.base for case in packed.core} == {"nf4"}
    assert [dataclasses.replace(case, base="plain") for case in packed.core] == plan.core


def test_input_sets_exceed_the_cache_three_times(bench):
    for per_set in (3 << 20, 5 << 20, 33 << 20, 500 << 20):
        assert bench.protocol.input_sets(per_set, 50 << 20) * per_set >= 150 << 20
    assert bench.protocol.input_sets(100, 50 << 20) == bench.protocol.MAX_SETS


def test_memory_peak_counts_what_was_live_at_once(bench):
    def call():
        kept = torch.empty(1 << 18)  # 1 MiB
        torch.empty(1 << 20).fill_(0)  # 4 MiB, freed
        torch.empty(1 << 19).fill_(0)  # 2 MiB, freed
        return kept

    assert bench.protocol.peak_bytes(call, CPU) == 5 << 20


def test_every_round_times_every_provider_once_in_changing_order(bench):
    budget = bench.protocol.Budget(seconds=0.0, min_samples=20, max_samples=50)
    rounds = list(bench.protocol._rounds(["a", "b", "c"], budget, random.Random(0)))
    assert len(rounds) == 20 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_noise_is_small_for_equal_and_large_for_unequal_samples(bench):
    samples = np.random.default_rng(0).normal(100, 1, 200)
    again = np.random.default_rng(1).normal(100, 1, 200)
    assert 0 < bench.protocol.noise(samples, again, 0) < 0.01
    assert bench.protocol.noise(samples, 1.5 * again, 0) > 0.45


def test_a_failed_write_leaves_the_earlier_file_whole(bench, tmp_path):
    path = tmp_path / "latency-cpu-x.json"
    good = [row(bench, "merged", 100.0)]
    bench.results.save(path, {"device": "cpu"}, good)
    with pytest.raises(ValueError):
        bench.results.save(path, {"device": math.nan}, good)
    assert bench.results.load(path) == ({"device": "cpu"}, good)
    assert list(tmp_path.iterdir()) == [path]


def test_resuming_on_other_code_is_refused(bench, run):
    meta, rows = bench.results.load(run.path)
    assert bench.latency.resume(run.path, meta) == (meta, rows)
    with pytest.raises(SystemExit, match="another torch"):
        bench.latency.resume(run.path, {**meta, "torch": "0.1"})


def test_a_file_that_cannot_be_resumed_is_named(bench, tmp_path):
    broken, foreign = tmp_path / "broken.json", tmp_path / "foreign.json"
    broken.write_text("{")
    foreign.write_text("[]")
    for path in (tmp_path / "missing.json", broken, foreign):
        with pytest.raises(SystemExit, match=path.name):
            bench.latency.resume(path, {})


def test_a_run_takes_a_name_that_no_other_has(bench, tmp_path):
    names = []
    for _ in range(3):
        path = bench.latency.free_name(tmp_path, "latency-cpu")
        path.write_text("{}")
        names.append(path.name)
    assert names == ["latency-cpu.json", "latency-cpu-2.json", "latency-cpu-3.json"]


def test_where_nothing_can_be_written_nothing_is_measured(bench, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        bench.latency.parse_arguments([f"--output={tmp_path / 'file'}"])
    assert "cannot write to" in capsys.readouterr().err


def test_an_unknown_provider_or_shape_is_refused_with_the_allowed_set(bench, capsys):
    for arguments, expected in (
        (["--providers", "fast"], "merged (A/A)"),
        (["--shapes", "1x2"], "MxKxN"),
        (["--modes", "bwd"], "fwd,fwd+bwd"),
        (["--base", "nf4", "--multi"], "on a plain base"),
    ):
        with pytest.raises(SystemExit):
            bench.latency.parse_arguments(arguments)
        assert expected in capsys.readouterr().err
