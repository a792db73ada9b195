"""Scaled fp16 training, infinities and NaN, and torch's own setting for fp32 products."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora import FusedLoRALinear, lora_linear, ops, reference, testing

M, K, N, R = 7, 33, 50, 3
both = pytest.mark.parametrize("backend", ["aten", "triton"])


class Plain(nn.Module):
    """The specification on the parameters of a fused layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer, device = self.layer, x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        tensors = (layer.weight, layer.lora_A, layer.lora_B, layer.bias)
        return reference.lora_linear(x, *tensors, scaling=layer.scaling)


@both
@pytest.mark.parametrize("base", [torch.float32, torch.float16])
def test_a_scaler_trains_in_fp16_skips_what_overflows_and_follows_plain_pytorch(
    backend, base, device
):
    """fp32 under autocast, and fp32 adapters on an fp16 base without it."""
    torch.manual_seed(0)
    options = {"r": R, "dtype": base, "adapter_dtype": torch.float32, "backend": backend}
    layer = FusedLoRALinear(K, N, init_lora_weights=False, **options).to(device)
    x = torch.randn(M, K, device=device, dtype=base)
    target = torch.randn(M, N, device=device)
    exact = losses_in_fp64(copy.deepcopy(layer), x, target)
    histories = []
    for model in (layer, Plain(copy.deepcopy(layer))):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=4)
        histories.append([])
        for step in range(12):
            before = [p.detach().clone() for p in parameters]
            with torch.autocast(device, torch.float16, enabled=base == torch.float32):
                y = model(x)
            loss = F.mse_loss(y.float(), target) * (1e8 if step == 6 else 1)  # dy leaves fp16
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            skipped = all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
            histories[-1].append((loss.item(), skipped, scaler.get_scale()))
    ours, theirs = histories
    assert [step[1:] for step in ours] == [step[1:] for step in theirs]
    assert [step[1] for step in ours] == [step == 6 for step in range(12)]
    # two runs in fp16 drift apart: ours is held to the exact run, next to plain PyTorch
    for (mine, *_), (plain, *_), loss in zip(ours, theirs, exact, strict=True):
        assert abs(mine - loss) <= 2 * abs(plain - loss) + 2**-10 * abs(loss)


def losses_in_fp64(layer, x, target):
    """Of the same steps, the seventh skipped."""
    model, x, target = Plain(layer.double()), x.double(), target.double()
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.05)
    losses = []
    for step in range(12):
        loss = F.mse_loss(model(x), target)
        losses.append(loss.item() * (1e8 if step == 6 else 1))
        optimizer.zero_grad()
        loss.backward()
        if step != 6:
            optimizer.step()
    return losses


@both
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", ["x", "weight", "lora_A", "lora_B", "bias", "dy"])
def test_infinities_and_nan_go_where_the_reference_sends_them(backend, value, place, device):
    """What is finite stays finite, what is not does not. In the kernels an infinite element may be
    NaN instead: it meets the zeros that pad the rank, or partial sums of both signs."""
    case = testing.make_case(M, N, K, R, torch.float32, device=device)
    target = getattr(case, place)
    target.view(-1)[target.numel() // 2] = value

    def layer(*tensors, **options):
        return lora_linear(*tensors, **options, backend=backend)

    ours = testing.gradients(layer, *case.tensors())
    theirs = testing.gradients(reference.lora_linear, *case.tensors())
    for name, expected in theirs.items():
        assert torch.equal(ours[name].isfinite(), expected.isfinite()), name
        assert (ours[name].isnan() >= expected.isnan()).all(), name
        if backend == "aten":
            signs = [t.nan_to_num(2.0, 1.0, -1.0)[~t.isfinite()] for t in (ours[name], expected)]
            assert torch.equal(*signs), name
    assert not all(t.isfinite().all() for t in theirs.values())


@pytest.fixture
def matmul_precision():
    """Sets torch's precision of fp32 products for the length of a test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(ops.triton_backend is None, reason="triton cannot be imported")
def test_the_kernels_multiply_fp32_as_torch_is_set_to(matmul_precision):
    x = torch.empty(0)
    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("highest", "ieee")):
        matmul_precision(setting)
        assert ops.triton_backend.precision_of(x) == expected
        assert ops.triton_backend.precision_of(x.bfloat16()) == "ieee"


@pytest.mark.gpu
@both
def test_fp32_products_round_to_tf32_if_and_only_if_torch_is_set_to(backend, matmul_precision):
    case = testing.make_case(256, 512, 384, 16, torch.float32, device="cuda", amplify=False)

    def errors():
        exact = testing.exact_gradients(*case.tensors())
        ours = testing.gradients(
            lambda *tensors, **options: lora_linear(*tensors, **options, backend=backend),
            *case.tensors(),
        )
        return [
            ((ours[name].double() - exact[name]).norm() / exact[name].norm()).item()
            for name in ("y", "dx", "dA", "dB")
        ]

    matmul_precision("highest")
    assert max(errors()) < 1e-5
    matmul_precision("high")
    assert min(errors()) > 1e-5 and max(errors()) < 1e-2
