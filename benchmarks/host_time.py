"""Host time of one call, without a GPU: the real launch path over a driver that does nothing.

    python benchmarks/host_time.py [--output FILE.json]

CPU tensors stand in for CUDA ones and `stub_cuda.c` for libcuda; kernels are compiled for an H100
and never run. What is missing against a GPU are the driver's own microseconds in a launch. Needs a
C compiler. On a GPU, `latency.py` reports the real host time.
"""

import argparse
import ctypes
import datetime
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPETITIONS, CALLS = 9, 1000
LAYERS = 160  # of one shape, as a large model has


def build_stub(folder: Path) -> ctypes.CDLL:
    """Compile the stub against Triton's own cuda.h and make Triton find it as libcuda."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("host_time.py needs a C compiler to build its stub of libcuda: none was found")
    import importlib.util

    triton_root = Path(importlib.util.find_spec("triton").origin).parent
    include = triton_root / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    source = Path(__file__).with_name("stub_cuda.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}", source,
         "-o", library],
        check=True,
    )  # fmt: skip
    (folder / "libcuda.so").symlink_to(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def use_stub() -> None:
    """Make Triton launch on the stub, and the library take CPU tensors for an H100's."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from fused_lora import ops
    from fused_lora.kernels import config

    class StubDriver(CudaDriver):
        def __init__(self):
            self.utils = CudaUtils()
            self.launcher_cls = CudaLauncher
            self.get_device_capability = lambda device=0: (9, 0)
            self.get_current_stream = lambda device: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(StubDriver())
    h100 = config.Device("stub", "cuda", 90, 132)
    config.device_of = lambda device: h100
    ops.why_not_triton = lambda x: None


def microseconds(call) -> float:
    """Median over repetitions of the mean time of a call."""
    for _ in range(CALLS // 5):
        call()
    means = []
    for _ in range(REPETITIONS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        means.append((time.thread_time() - start) / CALLS * 1e6)
    return statistics.median(means)


def measure_path(path: str, tokens: int, device: str = "cpu") -> dict:
    """Microseconds of the module's forward with gradients recorded, of one layer and of LAYERS in
    turn, and of the function without; of the operator, called through torch's dispatcher, and of
    the allocations and launches alone that it replays.

    path: one of config.PATHS, or "aten", which has nothing to replay.
    """
    import torch

    from fused_lora import FusedLoRALinear, lora_linear, ops
    from fused_lora.kernels import config, tape

    backend = "aten" if path == "aten" else "triton"
    config.FORCED = "auto" if path == "aten" else path
    options = {"dtype": torch.bfloat16, "device": device}
    layers = [
        FusedLoRALinear(512, 512, bias=False, r=16, backend=backend, **options)
        for _ in range(LAYERS)
    ]
    layer, turn = layers[0], itertools.cycle(layers)
    x = torch.randn(tokens, 512, requires_grad=True, **options)
    tensors = (layer.weight, layer.lora_A, layer.lora_B)
    row = {"path": path, "module_forward_us": microseconds(lambda: layer(x))}
    row["deep_model_forward_us"] = microseconds(lambda: next(turn)(x))
    with torch.no_grad():
        row["function_no_grad_us"] = microseconds(lambda: lora_linear(x, *tensors, backend=backend))
        if path == "aten":
            return row
        tape.forget()
        given = dict(zip(("x", "weight", "lora_A", "lora_B"), (x, *tensors), strict=True))
        given |= {"scaling": 1.0, "dropout_p": 0.0, "backend": backend, "for_backward": False}
        given["adapters"] = []
        arguments = [given.get(a.name) for a in ops.forward._schema.arguments]
        row["operator_us"] = microseconds(lambda: ops.forward(*arguments))
        (recorded,) = tape._tapes.values()
        addresses = [t.data_ptr() for t in (x, *tensors)]
        row["replay_us"] = microseconds(lambda: recorded.replay(x, addresses.copy()))
    return row


def measure() -> dict:
    import machine
    import torch
    import triton

    torch.set_num_threads(1)
    meta = {
        "what": "host time over a stubbed driver: no GPU, nothing runs",
        "command": "python benchmarks/host_time.py",
        "date": datetime.date.today().isoformat(),
        "cpu": machine.device_name(torch.device("cpu")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **machine.commit(),
    }
    rows = [
        measure_path(path, tokens)
        for path, tokens in (("hopper", 256), ("pdl", 256), ("decode", 16), ("portable", 256))
    ]
    return {"meta": meta, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        build_stub(Path(folder))
        use_stub()
        result = measure()
    for row in result["rows"]:
        print(
            "  ".join(f"{k}={v:.1f}" if isinstance(v, float) else f"{v:10}" for k, v in row.items())
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
