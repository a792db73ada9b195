"""Compiles candidates in worker processes without touching a GPU: warms Triton's disk cache for the
process that will run them, and tells the static facts by which hopeless ones are left out.

A worker calls the real launchers on CPU tensors, with every launch replaced by its compilation, for
the architecture of an H100 or H200: what it compiles is, to the cache key, what they will run.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from results import Case

SHARED_LIMIT = 232_448  # bytes a block may have on sm_90
# A worker sees no GPU, and compiles kernels even where the caller interprets them.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}

Job = tuple[Case, Any]  # and a candidates.Candidate
Facts = dict[str, Any]  # {"error": str} or {"kernels": [{name, shared, registers, stack}]}


def compile_all(
    jobs: list[Job],
    processes: int,
    seconds: float,
    done: Callable[[Facts], object] = lambda facts: None,
) -> list[Facts]:
    """Facts of each job; {} of what was not compiled within the time, or whose worker died."""
    facts: list[Facts] = [{} for _ in jobs]
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start)
    try:
        futures: dict[Future, int] = {pool.submit(_compile, *job): i for i, job in enumerate(jobs)}
        pending: Iterable[Future] = futures
        while pending and time.monotonic() < end:
            finished, pending = wait(
                pending, timeout=end - time.monotonic(), return_when=FIRST_COMPLETED
            )
            for future in finished:
                if future.exception() is None:
                    facts[futures[future]] = future.result()
                done(facts[futures[future]])
    finally:
        workers = list(pool._processes.values()) if pool._processes else []
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return facts


def fault(facts: Facts) -> str | None:
    """Why a candidate cannot be fast or cannot run: for what its facts say, None if nothing."""
    if "error" in facts:
        return facts["error"]
    for kernel in facts.get("kernels", ()):
        if kernel["shared"] > SHARED_LIMIT:
            return f"{kernel['name']} needs {kernel['shared']} bytes of shared memory"
        if kernel["stack"] > 0:
            return f"{kernel['name']} spills: {kernel['stack']} bytes of stack"
    return None


_compiled: list[Any] = []  # kernels compiled since the list was emptied


class _Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def _start() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from fused_lora import ops, triton_backend
    from fused_lora.kernels import config, launch, tape

    torch.set_num_threads(1)
    driver.set_active(_Target(GPUTarget("cuda", 90, 32)))
    h100 = config.Device("compiling", "cuda", 90, 132)
    config.device_of = lambda device: h100
    ops.why_not_triton = lambda x: None
    launch.run = _compile_only
    tape.recording = launch.recording = lambda: None
    tape.play = triton_backend.play = _play


def _compile_only(kernel: Any, grid: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    _compiled.append(kernel.warmup(*arguments, grid=grid, **options))
    return _compiled[-1]


def _play(function: Any, inputs: Any, options: Any) -> Any:
    from fused_lora.kernels.tape import Tape

    return function(Tape(inputs), *inputs, *options)


def _compile(case: Case, candidate: Any) -> Facts:
    import candidates

    _compiled.clear()
    try:
        candidate.prepare(candidates.blank(case))()
        return {"kernels": [_kernel_facts(kernel) for kernel in _compiled]}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[-1][:300]}"}


def _kernel_facts(kernel: Any) -> Facts:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "name": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "registers": int(found[1]),
        "stack": int(found[2]),
    }
