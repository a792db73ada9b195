"""dA and dB are summed over row blocks by whoever arrives last: the counters that say who must be
zero, whatever ran before. The buffers of these tests start as all ones (conftest)."""

from functools import partial

import pytest
import torch
from shapes import BF16, force_path

from fused_lora import lora_linear
from fused_lora.kernels import config
from fused_lora.testing import check, eager_gradients, exact_gradients, make_case

pytestmark = pytest.mark.kernels

NEEDS = (("dx", "dA", "dB"), ("dx", "dA"), ("dx", "dB"), ("dA", "dB"), ("dA",), ("dB",))


def gradients(case, needs):
    tensors = {"dx": case.x, "dA": case.lora_A, "dB": case.lora_B}
    leaves = {n: t.detach().requires_grad_(n in needs) for n, t in tensors.items()}
    layer = partial(lora_linear, scaling=case.scaling, backend="triton")
    y = layer(leaves["dx"], case.weight, leaves["dA"], leaves["dB"], case.bias)
    grads = torch.autograd.grad(y, [leaves[n] for n in needs], case.dy)
    return dict(zip(needs, grads, strict=True))


@pytest.mark.parametrize("needs", NEEDS, ids="-".join)
@pytest.mark.parametrize("path", ["pdl", "single", "decode"])
def test_split_sums_start_from_zeroed_counters(path, needs, monkeypatch, device):
    force_path(monkeypatch, path)
    monkeypatch.setattr(config, "rank_grad_splits", lambda *given: 2)
    case = make_case(64, 72, 56, 8, BF16, device=device)
    eager, exact = (f(*case.tensors()) for f in (eager_gradients, exact_gradients))
    for _ in range(2):
        assert check(gradients(case, needs), eager, exact, BF16) == []
