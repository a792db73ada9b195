"""What differentiates or batches a layer otherwise than backward does is refused in words, or is
right: never silently without the adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fused_lora import FusedLoRALinear, MultiLoRALinear
from fused_lora.delta import lora_delta

SAID = "do not see through the fused layer: use fused_lora.reference.lora_linear"


def frozen(**options):
    torch.manual_seed(0)
    return FusedLoRALinear(16, 32, r=4, init_lora_weights=False, **options).requires_grad_(False)


def packed():
    layer = MultiLoRALinear(16, 32, total_rank=16).requires_grad_(False)
    layer.pack.add("a", torch.randn(4, 16), torch.randn(32, 4))
    return lambda x: layer(x, torch.zeros(x.shape[:-1], dtype=torch.int32))


def delta():
    A, B = torch.randn(4, 16), torch.randn(32, 4)
    return lambda x: lora_delta(x.new_zeros(*x.shape[:-1], 32), x, A, B)


CALLS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
}


@pytest.mark.parametrize("make", (frozen, packed, delta))
@pytest.mark.parametrize("call", CALLS)
def test_transforms_of_a_layer_without_gradients_are_refused(call, make):
    with pytest.raises(RuntimeError, match=SAID):
        CALLS[call](make(), torch.randn(5, 16))


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_dual_numbers_are_refused(backend):
    layer, x = frozen(backend=backend), torch.randn(5, 16)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=SAID):
        layer(forward_ad.make_dual(x, x))
    layer(x)  # and nothing stays of it


@pytest.mark.parametrize("transform", (torch.func.grad, torch.func.jacrev))
def test_transforms_of_a_layer_with_gradients_are_refused(transform):
    layer = frozen().requires_grad_(True)
    with pytest.raises(RuntimeError, match=SAID):
        transform(lambda x: layer(x).sum())(torch.randn(5, 16))


def test_a_trace_is_taken_without_gradients_or_refused():
    layer, x = frozen().requires_grad_(True), torch.randn(5, 16)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record .*torch.no_grad\(\)"):
        torch.jit.trace(layer, x)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_batched_gradients_are_right_or_refused(backend):
    layer, x = frozen(backend=backend), torch.randn(5, 16, requires_grad=True)
    dys = torch.randn(3, 5, 32)

    def gradient(dy, **options):
        return torch.autograd.grad(layer(x), x, dy, **options)[0]

    try:
        batched = gradient(dys, is_grads_batched=True)
    except RuntimeError as error:
        assert "fused_lora::backward" in str(error)
    else:
        torch.testing.assert_close(batched, torch.stack([gradient(dy) for dy in dys]))


COMPILED = {
    "grad": lambda f: lambda x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
}


@pytest.mark.parametrize("compiler", ("eager", "aot_eager"))
@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("make", (frozen, packed, delta))
def test_transforms_inside_of_compiled_code_are_refused(make, transform, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[transform](make()), backend=compiler)
    with pytest.raises(RuntimeError, match=SAID):
        compiled(torch.randn(5, 16))


def test_nested_tensors_are_refused_by_name():
    x = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"x is a nested tensor.*x\.values\(\)"):
        frozen()(x)


def test_a_layer_without_inputs_gives_its_bias():
    layer, plain = FusedLoRALinear(0, 8, r=2), nn.Linear(0, 8)
    plain.bias = layer.bias
    x = torch.empty(2, 5, 0)
    assert torch.equal(layer(x), plain(x))
