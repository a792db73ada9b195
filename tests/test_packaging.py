"""The wheel carries everything and nothing else, and works where it is installed: outside of the
repository, without triton, and beside the published package that is named like our folder."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"packages": ("fused_lora", "kernels"), "files": ("pyproject.toml", "README.md", "LICENSE")}


def run(command, cwd, **environment):
    """stdout of a Python command that must succeed, away from this process's import path."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    process = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def published(name):
    """Whether the distribution `name` is installed here."""
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves folders behind."""
    if not (published("pip") and published("setuptools")):
        pytest.skip("building a wheel needs pip and setuptools")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in OURS["packages"]:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for file in OURS["files"]:
        shutil.copy(ROOT / file, source)
    pip = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", str(output), "."], source)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("target")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run([*pip, "--target", str(target), str(wheel)], target)
    return target


def test_the_wheel_holds_every_source_file_and_table_and_nothing_else(wheel):
    sources = (ROOT / "fused_lora").rglob("*.py")
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    expected |= {f"fused_lora/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    tables = {path.name for path in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert "default.json" in tables
    expected |= {f"fused_lora/kernels/tuned/{name}" for name in tables} | {"fused_lora/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        top_level = archive.read(next(n for n in names if n.endswith("top_level.txt"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert top_level.split() == ["fused_lora"]
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_asks_for_torch_triton_and_numpy_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    required = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    names = {line.partition(">")[0].partition(";")[0] for line in required}
    assert names == {"torch", "triton", "numpy"}
    assert ["sys_platform" in line for line in required if line.startswith("triton")] == [True]
    assert fields["Requires-Python"] == ">=3.10"
    extras = {"test", "bench", "adapters", "quantized", "peft", "trl", "examples", "metrics"}
    assert set(fields.get_all("Provides-Extra")) == extras


INSTALLED = """
import importlib.util, sys
from pathlib import Path
import torch, fused_lora
from fused_lora.kernels import config

target = Path(sys.argv[1])
for module in (fused_lora, config):
    assert target in Path(module.__file__).parents, module.__file__
assert {"sm_80", "sm_90"} <= set(config.defaults())
layer = fused_lora.FusedLoRALinear(33, 50, r=3, init_lora_weights=False)
x = torch.randn(7, 33)
y = layer(x)
expected = fused_lora.reference.lora_linear(
    x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=layer.scaling
)
torch.testing.assert_close(y, expected)
y.sum().backward()
assert layer.lora_A.grad.any() and layer.lora_B.grad.any()
spec = importlib.util.find_spec("kernels")
print(fused_lora.__version__, None if spec is None else spec.origin, "triton" in sys.modules)
"""

WITHOUT_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("triton", ["present", "absent"])
def test_the_installed_wheel_works_outside_the_repository(wheel, installed, tmp_path, triton):
    if triton == "present" and not published("triton"):
        pytest.skip("triton is not installed")
    prelude = WITHOUT_TRITON if triton == "absent" else ""
    code = [prelude + INSTALLED, str(installed)]
    printed = run(["-c", *code], tmp_path, PYTHONPATH=str(installed)).split()
    version, kernels, has_triton = printed
    assert version == wheel.name.split("-")[1]
    assert has_triton == str(triton == "present")
    assert str(ROOT) not in kernels and str(installed) not in kernels
    assert kernels == "None" or published("kernels"), "the name belongs to a published package"


def test_the_wheels_kernels_run(installed, tmp_path):
    if not published("triton"):
        pytest.skip("triton is not installed")
    code = """
import os, torch
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import fused_lora
device = "cuda" if torch.cuda.is_available() else "cpu"
layer = fused_lora.FusedLoRALinear(33, 50, r=3, init_lora_weights=False, backend="triton")
aten = fused_lora.FusedLoRALinear(33, 50, r=3, backend="aten")
aten.load_state_dict(layer.state_dict())
x = torch.randn(100, 33, device=device)
torch.testing.assert_close(layer.to(device)(x), aten.to(device)(x), rtol=1e-4, atol=1e-4)
print(fused_lora.__file__)
"""
    assert str(installed) in run(["-c", code], tmp_path, PYTHONPATH=str(installed))


def test_transformers_imports_from_the_repository_root():
    if not published("transformers"):
        pytest.skip("transformers is not installed")
    code = (
        "import transformers, transformers.integrations.hub_kernels\n"
        "from transformers import BertConfig, BertModel\n"
        "sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=11)\n"
        "print(type(BertModel(BertConfig(num_hidden_layers=1, **sizes))).__name__)"
    )
    assert run(["-c", code], ROOT).split()[-1] == "BertModel"
