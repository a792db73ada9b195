"""Planting a bug: a copy of a module of kernels or launchers, with one edit, takes the original's
place for the length of a test."""

import importlib.util
from pathlib import Path

from shapes import PATHS

from fused_lora import ops, product, triton_backend
from fused_lora.kernels import decode, matmul, matmul_descriptor, rank_grad, shrink

if "hopper" in PATHS:
    from fused_lora.kernels import matmul_hopper, shrink_dropout
else:  # their language does not run here; the bugs below are skipped
    matmul_hopper = shrink_dropout = None

LAUNCHERS = {  # who launches the kernels of a module, and by which name
    shrink: (product, "shrink"),
    matmul: (product, "matmul"),
    matmul_descriptor: (product, "descriptor_matmul"),
    matmul_hopper: (matmul_hopper, "hopper_matmul"),  # these two are imported where they are used
    shrink_dropout: (shrink_dropout, "shrink_dropout"),
    decode: (product, "decode"),
    rank_grad: (triton_backend, "rank_grad"),
    product: (triton_backend, "adapted_product"),
    triton_backend: (ops, "triton_backend"),
}


def plant(monkeypatch, folder, module, old, new):
    """Let the layer run on a copy of `module` in which `old` reads `new`."""
    source = Path(module.__file__).read_text()
    assert old in source, "the source has changed: plant this bug anew"
    name = f"{Path(module.__file__).stem}_with_a_bug"
    copy = folder / f"{name}.py"
    copy.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, copy)
    edited = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(edited)
    room, launcher = LAUNCHERS[module]
    monkeypatch.setattr(room, launcher, getattr(edited, launcher, edited))
