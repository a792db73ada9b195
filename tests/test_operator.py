"""Whoever watches operators sees ours; where nobody does, calls go past torch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import lora_linear, ops, testing
from fused_lora.delta import lora_delta

OPERATORS = {"fused_lora::forward": ops.forward, "fused_lora::backward": ops.backward}


@pytest.fixture
def past(monkeypatch):
    """Names of the operators whose kernels are called past the dispatcher."""
    seen = []

    def noting(name, kernel):
        return lambda *arguments: (seen.append(name), kernel(*arguments))[1]

    for name, operator in OPERATORS.items():
        monkeypatch.setitem(ops._kernels, operator, noting(name, ops._kernels[operator]))
    return seen


def step(case):
    leaves = [case.x.requires_grad_(), case.lora_A.requires_grad_(), case.lora_B.requires_grad_()]
    y = lora_linear(case.x, case.weight, case.lora_A, case.lora_B, backend="aten")
    return torch.autograd.grad(y, leaves, case.dy)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def case():
    return testing.make_case(5, 24, 32, 4, torch.float32)


def test_unwatched_calls_go_past_the_dispatcher_and_give_the_same(case, past):
    direct = step(case)
    assert past == list(OPERATORS)
    with torch.no_grad():
        lora_linear(case.x, case.weight, case.lora_A, case.lora_B, backend="aten")
    assert past == [*OPERATORS, "fused_lora::forward"]
    with Watching():
        for expected, got in zip(direct, step(case), strict=True):
            assert torch.equal(expected, got)


def test_a_dispatch_mode_sees_both_operators(case, past):
    with Watching() as mode:
        step(case)
    assert past == [] and set(OPERATORS.values()) <= set(mode.seen)
    with FlopCounterMode(display=False) as flops:
        step(case)
    assert past == [] and flops is not None


def test_a_profiler_sees_both_operators(case, past):
    with torch.profiler.profile() as profile:
        step(case)
    assert past == [] and set(OPERATORS) <= {event.key for event in profile.key_averages()}


def test_a_trace_records_the_operator(case, past):
    def layer(x, weight, lora_A, lora_B):
        return lora_linear(x, weight, lora_A, lora_B, backend="aten")

    with torch.no_grad():
        arguments = (case.x, case.weight, case.lora_A, case.lora_B)
        symbolic = make_fx(layer)(*arguments)
        scripted = torch.jit.trace(layer, arguments, check_trace=False)
    assert past == [] and ops.forward in {node.target for node in symbolic.graph.nodes}
    assert "fused_lora::forward" in str(scripted.graph)


def test_a_tensor_subclass_gets_the_operator(case, past):
    class Named(torch.Tensor):
        pass

    with torch.no_grad():
        x = case.x.as_subclass(Named)
        lora_linear(x, case.weight, case.lora_A, case.lora_B, backend="aten")
    assert past == []


def test_a_transform_is_refused_before_a_kernel_asks_for_addresses(case, past):
    layer = torch.vmap(lora_linear, (0, None, None, None))
    x = torch.stack([case.x, case.x])
    with torch.no_grad(), pytest.raises(RuntimeError, match="do not see through the fused layer"):
        layer(x, case.weight, case.lora_A, case.lora_B)
    assert past == []


def test_meta_tensors_give_shapes_and_no_kernel_is_called(case, past):
    x, weight, lora_A, lora_B = (
        t.to("meta").requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)
    )
    y = lora_linear(x, weight, lora_A, lora_B, dropout_p=0.5)
    y.sum().backward()
    assert y.is_meta and y.shape == case.dy.shape and past == []
    assert lora_A.grad.shape == lora_A.shape and x.grad.shape == x.shape


@pytest.fixture
def autocast_on():
    """Turn autocast on for a type of device, whether there is one or not."""
    before = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
    yield lambda device_type: torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_enabled("cpu", before[1])


@pytest.mark.parametrize("on", ["cuda", "cpu"])
def test_autocast_is_asked_for_the_device_of_the_tensor(on, autocast_on):
    with FakeTensorMode():
        tensors = {name: torch.empty(1, device=name) for name in ("cuda", "cpu")}
    tensors["meta"] = torch.empty(1, device="meta")  # which has no autocast
    autocast_on(on)
    assert {name: ops.autocasts(t) for name, t in tensors.items()} == {
        "cuda": on == "cuda",
        "cpu": on == "cpu",
        "meta": False,
    }


@pytest.mark.parametrize("needs", ((True, True, True), (False, True, True), (True, False, False)))
@pytest.mark.parametrize("in_place", (False, True))
def test_flops_of_the_adapter_term_alone_are_those_of_its_products(in_place, needs):
    M, N, K, r = 8, 24, 40, 4
    x, A, B = torch.randn(M, K), torch.randn(r, K), torch.randn(N, r)
    for tensor, needed in zip((x, A, B), needs, strict=True):
        tensor.requires_grad_(needed)
    needs_x, needs_A, needs_B = needs
    with FlopCounterMode(display=False) as counter:
        y = lora_delta(torch.zeros(M, N), x, A, B, backend="aten", in_place=in_place)
    assert counter.get_total_flops() == 2 * M * r * (K + N)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    products = N * (needs_x or needs_A) + K * (needs_x + needs_A) + N * needs_B
    assert counter.get_total_flops() == 2 * M * r * products


@pytest.mark.parametrize("needs", ((True, True, True), (False, True, True), (True, False, False)))
def test_flops_are_those_of_the_products(needs):
    M, N, K, r = 8, 24, 40, 4
    x, weight, A, B = torch.randn(M, K), torch.randn(N, K), torch.randn(r, K), torch.randn(N, r)
    for tensor, needed in zip((x, A, B), needs, strict=True):
        tensor.requires_grad_(needed)
    needs_x, needs_A, needs_B = needs
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(x, weight, A, B, backend="aten")
    assert counter.get_total_flops() == 2 * M * (N * K + r * K + r * N)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    products = N * K * needs_x + r * N * (needs_x or needs_A) + r * K * needs_x
    assert counter.get_total_flops() == 2 * M * (products + r * K * needs_A + r * N * needs_B)
