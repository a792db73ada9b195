"""explain() says what runs: backend, path, launches and the reason, for every layer of a model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, disable_adapters, explain, ops
from fused_lora.kernels import config

K, N = 64, 48


def make(**options):
    return FusedLoRALinear(K, N, r=3, **options)


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched from here on, and "memset" for every buffer that is zeroed, in order."""
    from fused_lora.kernels import decode, matmul, matmul_descriptor, rank_grad, shrink

    seen = []
    for module in (decode, matmul, matmul_descriptor, rank_grad, shrink):

        def launch(kernel, *args, _launch=module.launch, _name=module.__name__, **options):
            seen.append(_name.rpartition(".")[2])
            return _launch(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", launch)
    zero = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: seen.append("memset") or zero(tensor))
    return seen


def test_aten_says_whether_it_was_asked_for_or_why():
    title = "layer: 4096 x 64 -> 48, r=3, float32 on cpu\n  aten, 3 library products forward "
    assert explain(make(backend="aten")) == title + "(asked for)"
    double = explain(make(dtype=torch.float64))
    assert "float64 on cpu\n  aten, 3 library products forward (the kernels take fp32" in double


def test_merged_and_meta_layers_say_that_there_is_nothing_to_run():
    assert explain(make(device="meta")).endswith(
        "float32 on meta\n  on the meta device: nothing runs"
    )
    text = explain(make(backend="triton").merge())
    assert text.endswith("\n  merged: one library product, nothing to fuse")
    model = nn.Sequential(make().merge())
    with disable_adapters(model):
        assert explain(model).endswith("\n  the adapter is disabled: the base's own product")


def test_autocast_decides_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert "-> 48, r=3, bfloat16 on cpu" in explain(make())
        assert "-> 48, r=3, bfloat16 on cpu" in explain(make(), torch.ones(5, K))
    assert "-> 48, r=3, float32 on cpu" in explain(make())


def test_dropout_on_aten_is_said_in_training_alone():
    layer = make(lora_dropout=0.1)
    assert "3 library products and the dropout mask forward" in explain(layer)
    assert "3 library products forward" in explain(layer.eval())


def test_every_layer_of_a_model_is_named_and_a_model_without_layers_is_refused():
    model = nn.ModuleDict({"up": make(backend="aten"), "act": nn.GELU(), "down": make().merge()})
    lines = explain(model).splitlines()
    titles = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert titles == ["up", "down"] and len(lines) == 4
    with pytest.raises(ValueError, match="Sequential holds no LoRA layer: there is nothing to"):
        explain(nn.Sequential(nn.Linear(3, 4)))


def test_x_gives_tokens_dtype_and_device(device):
    layer = make(dtype=torch.bfloat16, backend="triton").to(device)
    x = torch.empty(2, 5, K, dtype=torch.bfloat16, device=device)
    assert explain(layer, x).startswith("layer: 10 x 64 -> 48, r=3, bfloat16 on " + str(x.device))
    assert explain(layer, x.half()).startswith("layer: 10 x 64 -> 48, r=3, float16 on ")
    assert "on the meta device" in explain(layer, x.to("meta"))
    assert explain(layer, x[:0]).startswith("layer: 0 x 64 -> 48")


def test_explain_runs_nothing_and_leaves_the_random_numbers_alone(device, launched):
    layer = make(backend="triton", lora_dropout=0.5).to(device)
    launched.clear()
    state = torch.get_rng_state()
    explain(layer)
    assert not launched and torch.equal(torch.get_rng_state(), state)
    assert layer.lora_A.grad is None


@pytest.mark.parametrize("name", ["auto", "portable", "single", "decode"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [5, 100])
def test_launches_named_are_the_launches_made(tokens, dropout, name, device, path, launched):
    path(name)
    layer = make(backend="triton", lora_dropout=dropout).to(device).requires_grad_(False)
    for training in (True, False):
        layer.train(training)
        x = torch.randn(tokens, K, device=device, requires_grad=True)
        _, *lines = explain(layer, x).splitlines()
        counted = []
        launched.clear()
        y = layer(x)
        counted.append(len(launched))
        launched.clear()
        torch.autograd.grad(y.sum(), x)
        counted.append(len(launched))
        said = [int(re.search(r"(\d+) launch", line)[1]) + ("memset" in line) for line in lines]
        assert said == counted, lines


def test_triton_lines_name_path_reason_and_tiles(device, path):
    layer = make(backend="triton").to(device)
    path("single")
    title, forward, dx = explain(layer).splitlines()
    assert title.startswith("layer: 4096 x 64 -> 48, r=3, float32 on ")
    for direction, line in (("forward", forward), ("dX", dx)):
        assert line.startswith(f"  {direction}: triton single, 1 launch (forced by FUSED_LORA_PATH")
        assert "BLOCK_M=" in line and "num_warps=" in line
    path("portable")
    assert "triton portable, 2 launches, shrink in " in explain(layer)
    dropped = make(backend="triton", lora_dropout=0.5).to(device)
    path("single")  # which cannot draw a mask
    assert "triton single" not in explain(dropped)
    assert "triton single" in explain(dropped.eval())


def test_a_path_for_hopper_is_explained_where_there_is_none(monkeypatch):
    hopper = replace(config.INTERPRETER, name="h", backend="cuda", capability=90, sm_count=132)
    monkeypatch.setattr(config, "device_of", lambda device: hopper)
    monkeypatch.setattr(ops, "why_not_triton", lambda x: None)
    layer = make(backend="triton", dtype=torch.bfloat16)
    _, forward, dx = explain(layer).splitlines()
    for line in (forward, dx):
        assert "triton hopper, 2 launches, shrink in " in line and "descriptors" in line
    assert "triton decode, 1 launch" in explain(layer, torch.empty(1, K, dtype=torch.bfloat16))


def test_a_backend_that_cannot_run_is_not_said_to_run():
    text = explain(make(backend="triton", dtype=torch.float64))
    assert "backend='triton' cannot run: the kernels take fp32, fp16 and bf16" in text
    assert "launch" not in text
