"""The steps of the campaign that are no comparison of kernels: correctness, host time, memory, and
the programs that make the README's figures.

compute-sanitizer --tool memcheck python benchmarks/checkups.py     every kernel, small shapes
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
TOOLS = ("memcheck", "racecheck")
HOST_GOAL_US, MEMORY_GOAL_MIB = 30.0, 24.0
PART_SECONDS = 240.0  # a part of `correct` or `figures` that takes longer hangs


def run(step: str, record: Any, deadline: float, dry_run: bool) -> int:
    """Do the parts of a step that are left and print what is known. Returns 1 if one failed.

    record: a campaign.Record; a part is a row of it.
    """
    parts = STEPS[step]()
    if dry_run:
        print("\n".join(parts))
        return 0
    finished = {row["name"] for row in record["rows"] if row["ok"]}
    for name, part in parts.items():
        left = deadline - time.time()
        if name in finished or left < 20:
            continue
        print(f"{step}: {name}", flush=True)
        try:
            row = part(record.path.parent, left)
        except Exception as error:
            row = {"ok": False, "note": f"{type(error).__name__}: {error}"}
        record.add(step, [{"name": name, **row}])
    for row in record["rows"]:
        verdict = {True: "ok", False: "FAILED", None: "n/a"}[row["ok"]]
        figures = {k: v for k, v in row.items() if k not in ("group", "name", "ok", "note")}
        print(f"  {row['name']:44s} {verdict:7s} {figures or ''} {row.get('note') or ''}")
    print(f"{len(record['rows'])} of {len(parts)} parts done; written: {record.path}")
    return int(any(row["ok"] is False for row in record["rows"]))


Part = Callable[[Path, float], dict[str, Any]]  # (folder of logs, seconds left) -> row


def _correct() -> dict[str, Part]:
    """Ordering, graphs, streams, memory; 10,000 launches; the sanitizer; then all numerics."""
    gpu = ["tests/test_gpu.py", "-m", "gpu"]
    parts: dict[str, Part] = {
        "ordering, graphs, streams": _pytest([*gpu, "-k", "not training_sizes and not thousand"]),
        "training sizes on every path": _pytest([*gpu, "-k", "training_sizes"]),
        "10,000 launches are bit-equal": _pytest([*gpu, "-k", "ten_thousand"]),
    }
    parts |= {f"compute-sanitizer {tool}": _sanitizer(tool) for tool in TOOLS}
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        runs_here = re.search(r"mark\.(kernels|gpu)|\bdevice[,)]", path.read_text())
        if runs_here and path.name != "test_gpu.py":
            chosen = "(gpu or device or kernels) and not slow"
            arguments = [f"tests/{path.name}", "-m", chosen, *workers]
            parts[path.name] = _pytest(arguments)
    return parts


def _pytest(arguments: list[str]) -> Part:
    def part(folder: Path, seconds: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            report = Path(temporary) / "junit.xml"
            options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            command = [sys.executable, "-m", "pytest", *options, *arguments]
            code = _logged(command, folder, seconds)
            if code is None:
                return _unfinished(seconds)
            counts = _counts(report)
        nothing = counts["tests"] == counts["skipped"]  # selected, or able to run here
        ok = None if nothing and code in (0, 5) else code == 0
        return {"ok": ok, **counts, "note": f"pytest {' '.join(arguments)}"}

    return part


def _counts(report: Path) -> dict[str, Any]:
    root = xml.etree.ElementTree.parse(report).getroot()
    suite = root if root.tag == "testsuite" else root[0]
    failed = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {name: int(suite.get(name, 0)) for name in ("tests", "skipped")} | {"failed": failed}


LARGE = "8192x4096x4096,8192x4096x14336,8192x14336x4096"
FEW = ",".join(f"{M}x4096x{N}" for N in (4096, 14336) for M in (1, 16, 64))
NARROW_AND_SHORT = "8192x4096x1024," + ",".join(
    f"{M}x4096x4096" for M in (2048, 1024, 512, 256, 128)
)
_FAST = "--providers=eager3,addmm,addmm_,peft,fused"  # merged is always measured


def _figures() -> dict[str, Part]:
    """The README's figures, in one file of latency.py and one of each other program."""
    everybody = "--providers=base,eager3,addmm,addmm_,torch.compile,peft,fused"
    both, forward = "--modes=fwd,fwd+bwd", "--modes=fwd"
    autotuned = "--providers=torch.compile (max-autotune),fused"
    layers = {
        "large layers": (LARGE, "--ranks=16", both, everybody),
        "large layers, other ranks": (LARGE, "--ranks=8,64", forward, _FAST),
        "few tokens": (FEW, "--ranks=16,64", forward, _FAST),
        "narrow layers and short steps": (NARROW_AND_SHORT, "--ranks=16", both, _FAST),
    }
    parts = {
        name: _latency([f"--shapes={shapes}", *options])
        for name, (shapes, *options) in layers.items()
    }
    parts["many adapters"] = _program("latency.py", ["--multi", "--quick"])
    parts["memory"] = _program("memory.py", [])
    square = [f"--shapes={LARGE.partition(',')[0]}", "--ranks=16", both, "--quick", "--no-plot"]
    parts["max-autotune"] = _program("latency.py", [*square, autotuned], "max-autotune")
    if importlib.util.find_spec("bitsandbytes"):
        parts["a 4-bit base"] = _program("latency.py", [*square, "--base=nf4"], "nf4")
    return parts


def _latency(options: list[str]) -> Part:
    """A part of the one file that the README's table is made from: begun by the first, resumed by
    the others."""

    def part(folder: Path, seconds: float) -> dict[str, Any]:
        begun = sorted(folder.glob("latency-*.json"))
        resume = [f"--resume={begun[0]}"] if begun else []
        return _program("latency.py", ["--quick", "--no-plot", *resume, *options])(folder, seconds)

    return part


def _program(name: str, options: list[str], subfolder: str = "") -> Part:
    def part(folder: Path, seconds: float) -> dict[str, Any]:
        program = str(Path(__file__).with_name(name))
        command = [sys.executable, program, *options, f"--output={folder / subfolder}"]
        code = _logged(command, folder, seconds, log="figures.log")
        if code is None:
            return _unfinished(seconds)
        return {"ok": code == 0, "note": f"{name} {' '.join(options)}"}

    return part


def _sanitizer(tool: str) -> Part:
    def part(folder: Path, seconds: float) -> dict[str, Any]:
        if not Path(SANITIZER).exists():
            return {"ok": None, "note": "compute-sanitizer is not installed"}
        command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
        # torch's caching allocator would hide an access behind the end of a tensor
        code = _logged(command, folder, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if code is None:
            return _unfinished(seconds)
        note = f"{tool} found errors, see the log" if code == 9 else f"exit status {code}"
        return {"ok": code == 0, "note": note}

    return part


def _unfinished(seconds: float) -> dict[str, Any]:
    """A part that was ended: done again next time if the step's time was the shorter."""
    if seconds > PART_SECONDS:
        return {"ok": False, "note": f"ended after {PART_SECONDS:.0f} s, see the log"}
    return {"ok": None, "note": "out of time"}


def _logged(
    command: list[str],
    folder: Path,
    seconds: float,
    environment: dict[str, str] | None = None,
    log: str = "correct.log",
) -> int | None:
    """The exit status of a command, its output in a log; None if it had to be ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / log, "a") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            return process.wait(min(seconds, PART_SECONDS))
        except subprocess.TimeoutExpired:
            return None
        finally:  # its children, too: they would disturb what comes next
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _host() -> dict[str, Part]:
    return {f"host time, {path}": _host_time(path) for path in ("hopper", "pdl", "decode", "aten")}


def _host_time(path: str) -> Part:
    def part(folder: Path, seconds: float) -> dict[str, Any]:
        import host_time

        tokens = 16 if path == "decode" else 256  # little work: the GPU must not hold up the host
        row = host_time.measure_path(path, tokens, device="cuda")
        del row["path"]
        return {"ok": row["function_no_grad_us"] <= HOST_GOAL_US, **row}

    return part


def _memory() -> dict[str, Part]:
    names = ("triton", "aten", "addmm", "eager3")
    return {f"extra memory of a step, {name}": _extra_memory(name) for name in names}


def _extra_memory(compute: str) -> Part:
    def part(folder: Path, seconds: float) -> dict[str, Any]:
        import torch
        from candidates import Layer, operands
        from protocol import peak_bytes
        from providers import Merged, random_inputs
        from results import Case

        device = torch.device("cuda")
        case = Case("fwd+bwd", 8192, 4096, 4096, 64, "bfloat16")
        inputs = random_inputs(case, device, torch.Generator(device).manual_seed(0))
        layer = Layer(compute, compute, "fwd+bwd").prepare(operands(inputs))
        frozen = Merged().build(inputs).call("fwd+bwd", inputs.dy)
        peaks = []
        for call in (layer, frozen):
            call()
            peaks.append(peak_bytes(call, device))
        extra = round((peaks[0] - peaks[1]) / 2**20, 2)
        # dX, dA and dB are results; S, dS (bf16) and the split partials (fp32) are the scratch
        return {"ok": compute != "triton" or extra <= MEMORY_GOAL_MIB, "extra_mib": extra}

    return part


STEPS: dict[str, Callable[[], dict[str, Part]]] = {
    "correct": _correct,
    "host": _host,
    "memory": _memory,
    "figures": _figures,
}


def small_shapes() -> list[str]:
    """Every path forward and backward on small ragged shapes, held to the rule; the violations."""
    import functools

    import torch

    from fused_lora import lora_linear, testing
    from fused_lora.kernels import config, tape

    found = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused = functools.partial(lora_linear, backend="triton")
    for path in config.PATHS:
        for M, dtype, p in ((16, "bfloat16", 0.0), (200, "bfloat16", 0.0), (200, "float32", 0.25)):
            config.FORCED = path
            tape.forget()
            case = testing.make_case(M, 328, 200, 16, getattr(torch, dtype), device=device)
            options = {"dropout_p": p, "seed": torch.tensor(3, device=device)} if p else {}
            found += [f"{path}: {v}" for v in testing.violations_of(fused, case, **options)]
    return found


if __name__ == "__main__":
    violations = small_shapes()
    print("\n".join(violations) or "every path is right on small shapes")
    sys.exit(bool(violations))
