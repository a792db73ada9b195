"""What real training code does around a linear layer: checkpointing, autocast; and that a model
trained fused follows the plain one."""

from __future__ import annotations

import both_backends
import pytest
import torch
import torch.nn.functional as F
from both_backends import trainable
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fused_lora import FusedLoRALinear, ops, testing

make, inputs = both_backends.make, both_backends.inputs
pytestmark = pytest.mark.parametrize("backend", ["aten", "triton"])


# --- activation checkpointing


def block(layer, x):
    return layer(x).sin()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(make, inputs, reentrant, dropout):
    layer, gradients = make(lora_dropout=dropout), []
    for checkpointed in (False, True):
        x = inputs()
        torch.manual_seed(5)
        if checkpointed:
            y = checkpoint(block, layer, x, use_reentrant=reentrant)
        else:
            y = block(layer, x)
        layer.zero_grad()
        torch.manual_seed(6)  # what happens between forward and recomputation does not matter
        y.square().sum().backward()
        gradients.append([y.detach(), x.grad, *(p.grad for p in trainable(layer))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "policy, runs", [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)]
)
def test_selective_checkpointing_sees_the_operator(
    make, inputs, backend, policy, runs, monkeypatch
):
    layer, x, ran = make(lora_dropout=0.5), inputs(), []
    module = ops.aten_backend if backend == "aten" else ops.triton_backend
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: ran.append(1) or forward(*args))

    def choose(context, function, *args, **kwargs):
        return policy if function is ops.forward else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(5)
    expected = torch.autograd.grad(block(layer, x).sum(), [x, *trainable(layer)])
    ran.clear()
    torch.manual_seed(5)
    y = checkpoint(
        *(block, layer, x),
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(choose),
    )
    gradients = torch.autograd.grad(y.sum(), [x, *trainable(layer)])
    assert len(ran) == runs
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


# --- autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_returns_what_nn_linear_does_and_gradients_in_the_parameters_dtype(
    make, inputs, device, dtype
):
    layer = make()
    x = inputs(requires_grad=False).bfloat16().to(dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y, expected = layer(x), layer.to_linear()(x)
        assert torch.is_autocast_enabled(device)
    assert y.dtype == expected.dtype == torch.bfloat16
    dy = torch.randn_like(y)
    dx, dA, dB = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)
    assert dx.dtype == dtype and dA.dtype == dB.dtype == torch.float32
    case = (layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling, dy)
    eager = testing.eager_gradients(x.bfloat16(), *case)
    exact = testing.exact_gradients(x.bfloat16(), *case)
    ours = {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}
    assert not testing.check(ours, eager, exact, torch.bfloat16)


def test_autocast_leaves_fp64_alone_and_fp32_outside_of_it(make, inputs, device, backend):
    layer, x = make(), inputs()
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        assert layer(x).dtype == torch.float32
    if backend == "aten":
        with torch.autocast(device, torch.bfloat16):
            assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("forward_too", [True, False])
def test_backward_may_be_called_under_autocast(make, inputs, device, forward_too):
    layer, x = make().requires_grad_(True), inputs()
    with torch.autocast(device, torch.bfloat16, enabled=forward_too):
        loss = layer(x).float().sin().sum()
    expected = torch.autograd.grad(loss, [x, *trainable(layer)], retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        ours = torch.autograd.grad(loss, [x, *trainable(layer)])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# --- training


class Plain(nn.Module):
    """The three-operation layer that everyone writes, on a twin's values."""

    def __init__(self, layer):
        super().__init__()
        self.scaling = layer.scaling
        for name, parameter in layer.named_parameters():
            twin = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            self.register_parameter(name, twin)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


@pytest.mark.parametrize(
    "optimizer, kernels", [(torch.optim.SGD, "auto"), (torch.optim.AdamW, "portable")]
)
def test_fifty_steps_give_the_losses_of_plain_pytorch(backend, device, path, optimizer, kernels):
    path(kernels)
    torch.manual_seed(0)
    fused = [FusedLoRALinear(12, 20, r=3, backend=backend)]
    fused.append(FusedLoRALinear(20, 5, r=4, backend=backend))
    x = torch.randn(24, 12, device=device)
    target = torch.randn(24, 5, device=device)
    losses = []
    for layers in (fused, [Plain(layer) for layer in fused]):
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to(device)
        stepper = optimizer(trainable(model), lr=0.01)
        losses.append([])
        for _ in range(50):
            stepper.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            stepper.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]
