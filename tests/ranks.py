"""Run functions on several processes of one gloo group, on CPU tensors: what test_distributed uses.

`python ranks.py WORLD FOLDER MODULE:FUNCTION...` imports once, forks the ranks; each function gets
a group of its own, so one that fails leaves the others alone; one that hangs is cut off.
"""

import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

GROUP_TIMEOUT = datetime.timedelta(seconds=40)


def run(functions, world, folder, seconds):
    """{function: None, or what went wrong} for functions of modules beside this one."""
    names = [f"{function.__module__}:{function.__name__}" for function in functions]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, str(world), str(folder), *names],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    outcomes = {}
    for function, name in zip(functions, names, strict=True):
        reports = [folder / f"{name}.{rank}" for rank in range(world)]
        words = [json.loads(path.read_text()) for path in reports if path.exists()]
        outcomes[function] = "\n".join(word for word in words if word) or None
        if len(words) < world:
            tail = (folder / "output").read_text()[-4000:]
            outcomes[function] = f"{outcomes[function] or ''}\nnot finished in {seconds} s:\n{tail}"
    return outcomes


def main(rank, world, folder, names):
    import torch.distributed as dist

    for name in names:
        error = None
        dist.init_process_group(
            *("gloo", f"file://{folder}/{name}.store"),
            rank=rank,
            world_size=world,
            timeout=GROUP_TIMEOUT,
        )
        try:
            torch.manual_seed(0)
            module, _, function = name.partition(":")
            getattr(importlib.import_module(module), function)()
            dist.barrier()  # leaving early would cut off the others
        except Exception:
            error = f"rank {rank}: {traceback.format_exc()}"
        Path(folder, f"{name}.{rank}").write_text(json.dumps(error))
        dist.destroy_process_group()


if __name__ == "__main__":
    import interpreter
    import torch

    torch.set_num_threads(1)
    interpreter.install()
    world, folder, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for name in names:
        importlib.import_module(name.partition(":")[0])
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            main(rank, world, folder, names)
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)
