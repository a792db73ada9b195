"""benchmarks/memory.py counts what a forward keeps, and what fused keeps is little."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def memory():
    """Found as `python benchmarks/memory.py` finds it: by its own folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("memory")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_saved_bytes_count_each_storage_once_and_not_what_was_given(memory):
    x = torch.randn(8, 32, requires_grad=True)
    y = torch.randn(8, 32)
    assert memory.saved_bytes(lambda: x.exp(), [x]) == 8 * 32 * 4
    assert memory.saved_bytes(lambda: x * y, [x]) == 8 * 32 * 4
    assert memory.saved_bytes(lambda: x * y, [x, y]) == 0
    assert memory.saved_bytes(lambda: (x * y[:4].repeat(2, 1)) * y, [x]) == 2 * 8 * 32 * 4


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_keeps_s_and_one_bit_an_element_beyond_the_frozen_layer(memory, dropout):
    M, width, r = 64, 64, 16
    case = memory.Case(M, width, blocks=0, r=r, dtype="bfloat16", dropout=dropout)
    names = ("frozen", "fused", "fused (fp32 adapters)", "eager3")
    rows = memory.over_frozen([memory.measure(case, name, CPU) for name in names])
    kept = {row.provider: row.saved_over_frozen_mib * 2**20 for row in rows}
    mask = M * width // 8 if dropout else 0
    assert (
        kept["fused"] == kept["fused (fp32 adapters)"] == pytest.approx(M * r * 2 + mask, abs=600)
    )
    assert kept["eager3"] > kept["fused"] or not dropout


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_on_a_quantised_base_fused_keeps_less_than_pefts_own_layer(memory, base):
    pytest.importorskip("bitsandbytes", minversion="0.50")
    pytest.importorskip("peft")
    M, width, r = 64, 128, 16
    case = memory.Case(M, width, blocks=0, r=r, dtype="bfloat16", dropout=0.5, base=base)
    names = ("frozen", "peft", "peft (fp32 adapters)", "fused", "fused (fp32 adapters)")
    rows = memory.over_frozen([memory.measure(case, name, CPU) for name in names])
    assert not any(row.note for row in rows)
    kept = {row.provider: row.saved_over_frozen_mib * 2**20 for row in rows}
    ours = pytest.approx(M * r * 2 + M * width // 8, abs=600)  # S, one bit an element
    assert kept["fused"] == kept["fused (fp32 adapters)"] == ours
    assert kept["fused"] < kept["peft"] < kept["peft (fp32 adapters)"]
    assert memory.measure(case, "eager3", CPU).note == "it takes plain weights"


def test_the_program_prints_every_provider_and_writes_the_file(
    memory, tmp_path, monkeypatch, capsys
):
    peaks = memory.machine.Peaks(gemm_tflops=1.0, copy_gbs=1.0)  # measuring them takes longer
    monkeypatch.setattr(memory.machine, "measure_peaks", lambda device, dtype: peaks)
    assert memory.main(["--quick", f"--output={tmp_path}"]) == 0
    (path,) = tmp_path.glob("memory-*.json")
    document = json.loads(path.read_text())
    fields = {field.name for field in dataclasses.fields(memory.Row)}
    assert all(set(row) == fields for row in document["rows"])
    assert {row["provider"] for row in document["rows"]} == set(memory.PROVIDERS)
    assert all(row["note"] or row["peak_mib"] > 0 for row in document["rows"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in memory.PROVIDERS)
    assert document["meta"]["command"] == "python benchmarks/memory.py --quick"
