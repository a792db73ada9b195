"""What a batch of several adapters launches, waits for and touches: shapes alone decide, and what
columns hold that belong to nobody reaches nobody."""

from functools import partial

import pytest
import torch
from multi_cases import fused, make_batch, make_ids, make_pack
from shapes import BF16, PATHS, force_path
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fused_lora import multi_lora_linear, ops
from fused_lora.kernels import decode, matmul, matmul_descriptor, rank_grad, shrink, tape
from fused_lora.scale import Adapters

pytestmark = pytest.mark.kernels

KERNELS = (shrink, matmul, matmul_descriptor, decode, rank_grad)
MULTI_PATHS = PATHS
MANY = (16,) * 33  # beyond the rank from which the matmul looks up windows


@pytest.fixture
def force(monkeypatch):
    return partial(force_path, monkeypatch)


class Watched(TorchDispatchMode):
    """Notes every operation of PyTorch, inside of ours too."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.operations.append(operation)
        own = {ops.forward: ops._forward, ops.backward: ops._backward}.get(operation)
        if own is None:
            return operation(*args, **(kwargs or {}))
        with self:
            return own(*args)


@pytest.mark.parametrize(
    ("path", "ranks"),
    [("single", (8,)), ("decode", (8, 16)), ("pdl", MANY), ("portable", MANY)],
)
def test_launches_depend_on_shapes_alone_and_nothing_waits_for_the_host(
    path, ranks, force, device, monkeypatch
):
    if path not in PATHS:
        pytest.skip("this GPU takes the portable kernel")
    taken, launched = force(path), []
    monkeypatch.setattr(ops, "_checked", lambda given: Adapters(*given))  # as a GPU has it

    def noted(launch, kernel, grid, config, **given):
        numbers = {n: v for n, v in given.items() if not isinstance(v, (torch.Tensor, tuple))}
        launched.append((kernel, grid, config, numbers))
        with _disable_current_modes():  # what the interpreter does on its own
            launch(kernel, grid, config, **given)

    for module in KERNELS:
        monkeypatch.setattr(module, "launch", partial(noted, module.launch))
    M = 16 if path in ("single", "decode") else 80
    ids = [
        make_ids(popularity, order, M, len(ranks)).to(device)
        for popularity, order in (("identical", "grouped"), ("distinct", "shuffled"))
    ]
    batch, seen = make_batch(M, 24, 40, ranks, BF16, ids[0], device), set()
    pack, x = make_pack(batch), batch.x.requires_grad_()
    for own in ids:
        tape.forget()  # or the second batch is replayed: the same by construction, and unseen
        with Watched() as watched:
            y = multi_lora_linear(x, batch.weight, pack, own, batch.bias, backend="triton")
            torch.autograd.grad(y, (x, pack.lora_A, pack.lora_B), batch.dy)
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        assert not [op for op in watched.operations if waits & set(op.tags) or "sort" in str(op)]
        assert {ops.forward, ops.backward} < set(watched.operations)
        seen.add(str(launched))
        launched.clear()
    assert len(seen) == 1 and set(taken) == {path}


@pytest.mark.parametrize("path", (*MULTI_PATHS, "aten"))
def test_what_padding_and_free_columns_hold_reaches_nobody(path, force, device):
    """An optimizer's momentum may have left values there; `fused` looks at their gradients."""
    taken = [path] if path == "aten" else force(path)
    ranks = {"single": (8,), "decode": (8, 3)}.get(path, (8, 33))
    M, backend = 16 if path in ("single", "decode") else 70, "aten" if path == "aten" else "triton"
    ids = make_ids("uniform", "shuffled", M, len(ranks))
    batch = make_batch(M, 24, 40, ranks, BF16, ids, device)
    pack = make_pack(batch, spare=16)
    run = partial(fused, batch, pack, backend=backend)
    ours, nobodys = run(), pack.owner < 0
    assert nobodys.sum() >= 16 and (ids < 0).any()
    with torch.no_grad():
        pack.lora_A[nobodys], pack.lora_B[:, nobodys] = 7.0, -3.0
    again = run()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert set(taken) == {path}
