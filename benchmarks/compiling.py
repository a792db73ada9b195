"""Compiles candidates in worker processes without touching a GPU: warms Triton's disk cache for the
process that will run them, and tells the static facts by which hopeless ones are left out.

A worker calls the real launchers over the driver that does nothing (host_time.py), so what it
compiles is, to the cache key, what an H100 or H200 will run.
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


_compiled: list[Any] = []  # kernels launched since the list was emptied
_folder: tempfile.TemporaryDirectory | None = None


class _Recorder:
    """Stands in for the tape of an operator call: notes the kernels that are launched."""

    def add(self, compiled: Any, grid: Any, arguments: Any) -> None:
        _compiled.append(compiled)


def _start() -> None:
    global _folder
    sys.path.insert(0, str(Path(__file__).parent))
    import host_time

    _folder = tempfile.TemporaryDirectory()
    host_time.build_stub(Path(_folder.name))  # before anything can load the real driver
    host_time.use_stub()
    import torch

    torch.set_num_threads(1)
    from fused_lora.kernels import launch

    launch.recording = _Recorder


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
