"""Where tests run: on a CUDA GPU when there is one, else in Triton's CPU interpreter."""

import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
# a graph compiled with another version of the library would be taken from there: an operator's
# fake implementation is not part of the key
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves the helpers unimportable

import interpreter
import pytest

torch.set_num_threads(1)  # the suite runs on several processes


def pytest_configure(config):
    if not HAS_GPU:
        interpreter.install()
    if importlib.util.find_spec("peft") and metadata.version("peft").startswith("0.18"):
        from peft.tuners.lora import torchao

        # with a torchao as new as ours it asks that for a name it no longer has, at every layer
        torchao.is_torchao_available = lambda: False


@pytest.hookimpl(tryfirst=True)  # before items are chosen by marker
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs a CUDA GPU, there is none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device():
    """Where the kernels run: "cuda", or "cpu" under the interpreter."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Every uninitialised buffer of the library starts as NaN (floats) or as all ones (integers):
    an element that a kernel forgets to write shows, and so does a counter nobody zeroed. No launch
    recorded by another test is replayed."""
    from fused_lora.kernels import tape

    tape.forget()
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k))
    )
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def path(monkeypatch):
    """Force one path of `fused_lora.kernels.config.PATHS` for the length of a test."""
    from fused_lora.kernels import config

    return lambda name: monkeypatch.setattr(config, "FORCED", name)
