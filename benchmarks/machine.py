"""What the figures were measured on: hardware, software, commit, and the measured peaks."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from protocol import fastest_us
from roofline import ITEMSIZE, Peaks

ROOT = Path(__file__).resolve().parent.parent


def benchmark_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1) if model else platform.machine()


def file_stem(device: torch.device, date: str, what: str = "latency") -> str:
    """`latency-cpu-2026-01-31`, `latency-nvidia-h100-80gb-hbm3-2026-01-31`."""
    label = device_name(device) if device.type == "cuda" else "cpu"
    return f"{what}-{re.sub('[^a-z0-9]+', '-', label.lower()).strip('-')}-{date}"


def cache_bytes(device: torch.device) -> int:
    """Last-level cache: L2 of a GPU, the largest cache of a CPU (32 MiB where it is not told)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        int(size[:-1]) * units[size[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (size := path.read_text().strip()) and size[-1] in units
    ]
    return max(sizes, default=32 << 20)


def describe(device: torch.device, dtype: str) -> dict[str, Any]:
    """The `meta` of the result file. What a machine does not tell is None, never a guess."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # before our own
    peaks = measure_peaks(device, dtype)
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "gpu": device_name(device) if on_gpu else None,
        "sm_count": properties.multi_processor_count if properties else None,
        "l2_mb": cache_bytes(device) / 2**20 if on_gpu else None,
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "load": load,
        "llc_mb": cache_bytes(torch.device("cpu")) / 2**20,
        **_gpu_state(properties),  # right after the peaks, while the clocks are those under load
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "python": platform.python_version(),
        **commit(),
        "copy_gbs": round(peaks.copy_gbs, 1),
        "gemm_tflops": round(peaks.gemm_tflops, 3),
        "peak_dtype": dtype,
    }


def measure_peaks(device: torch.device, dtype: str) -> Peaks:
    """Best of several square matrix products, and of several copies far larger than the cache."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 256
    gemm_us = _square_product_us(size, device, dtype)
    gemm_tflops = 2 * size**3 / gemm_us / 1e6
    while not on_gpu and size < 2048 and gemm_us < 2e4:  # fp16 on many a CPU is very slow
        size *= 2
        gemm_us = _square_product_us(size, device, dtype)
        gemm_tflops = max(gemm_tflops, 2 * size**3 / gemm_us / 1e6)
    elements = max(1 << 30 if on_gpu else 1 << 26, 3 * cache_bytes(device)) // ITEMSIZE[dtype]
    source = torch.ones(elements, dtype=getattr(torch, dtype), device=device)
    target = torch.ones_like(source)
    copy_us = fastest_us(lambda: target.copy_(source), device, samples=20 if on_gpu else 5)
    copied = 2 * source.numel() * source.element_size()  # read and written
    return Peaks(gemm_tflops=gemm_tflops, copy_gbs=copied / copy_us / 1e3)


def _square_product_us(size: int, device: torch.device, dtype: str) -> float:
    left, right = (
        torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2)
    )
    return fastest_us(lambda: torch.nn.functional.linear(left, right), device, samples=30)


def peaks_line(peaks: Peaks) -> str:
    return (
        f"measured peaks: matrix product {peaks.gemm_tflops:.3g} TFLOP/s,"
        f" copy {peaks.copy_gbs:.3g} GB/s (read + write)"
    )


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """Commit, whether the sources differ from it, and a digest of how (untracked files by name);
    earlier result files do not count."""
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if head is None:
        return {"commit": None, "dirty": None, "changes": None}
    sources = ["--", ".", ":!benchmarks/results"]
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", *sources])
    if not changes:
        return {"commit": head, "dirty": None if changes is None else False, "changes": None}
    difference = _output(["git", "-C", str(ROOT), "diff", "HEAD", *sources]) or ""
    digest = hashlib.sha256((changes + difference).encode()).hexdigest()[:12]
    return {"commit": head, "dirty": True, "changes": digest}


def _gpu_state(properties: Any) -> dict[str, Any]:
    fields = {
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.sm",
        "mem_clock_mhz": "clocks.mem",
        "max_sm_clock_mhz": "clocks.max.sm",
        "power_limit_w": "power.limit",
    }
    state: dict[str, Any] = dict.fromkeys(fields)
    if properties is None:
        return state
    answer = _output(
        [
            "nvidia-smi",
            f"--id=GPU-{str(properties.uuid).removeprefix('GPU-')}",
            f"--query-gpu={','.join(fields.values())}",
            "--format=csv,noheader,nounits",
        ]
    )
    if answer:
        for name, value in zip(fields, answer.split(", "), strict=True):
            state[name] = value if name == "driver" else _number(value)
    return state


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
