"""The values that an adapter file was written over, through the life of a model: what
`disable_adapters` and the next file bring back, and what counts as the base."""

from __future__ import annotations

import copy

import pytest
import torch

import fused_lora
from fused_lora import load_adapter, save_adapter

safetensors = pytest.importorskip("safetensors.torch")
WEIGHTS = "adapter_model.safetensors"


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in ("q", "v", "head")})


def output(model, x):
    return model["head"](torch.tanh(model["v"](torch.tanh(model["q"](x)))))


def lora_net(seed=0):
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "init_lora_weights": False}
    return fused_lora.apply_lora(net(seed), **options)


def saved_net(folder, seed, **extras):
    """A folder with an adapter whose biases and head differ from any base's."""
    model = lora_net(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3)
    save_adapter(model, folder, **extras)
    return folder


ALL = {"bias": "all", "modules_to_save": ["head"]}
ROWS = torch.randn(3, 8)


@pytest.mark.parametrize("merged", [True, False])
def test_what_unload_leaves_is_the_base_of_the_next_adapter(merged, tmp_path):
    model = load_adapter(lora_net(), saved_net(tmp_path / "a", 5, **ALL))
    if merged:
        fused_lora.merge_adapter(model)
    fused_lora.unload(model)
    base = copy.deepcopy(model)
    fused_lora.apply_lora(
        model, r=4, lora_alpha=8, target_modules=["q", "v"], init_lora_weights=False
    )
    with fused_lora.disable_adapters(model):
        assert torch.equal(output(model, ROWS), output(base, ROWS))
    save_adapter(model, tmp_path / "next")
    assert all(".lora_" in key for key in safetensors.load_file(tmp_path / "next" / WEIGHTS))
    load_adapter(model, saved_net(tmp_path / "b", 6))
    assert torch.equal(model["head"].weight, base["head"].weight)


@pytest.mark.parametrize("size", [8, 6])
def test_a_module_put_in_another_ones_place_is_a_new_base(size, tmp_path):
    model = load_adapter(lora_net(), saved_net(tmp_path / "a", 5, **ALL))
    model["head"] = torch.nn.Linear(8, size)
    expected = model["head"].weight.detach().clone()
    with fused_lora.disable_adapters(model):
        assert torch.equal(model["head"].weight, expected)
        assert torch.equal(model["q"].bias, net()["q"].bias)
    load_adapter(model, saved_net(tmp_path / "b", 6))
    assert torch.equal(model["head"].weight, expected)
    assert torch.equal(model["q"].bias, net()["q"].bias)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: m.to(torch.float64)])
def test_a_model_that_is_copied_or_moved_keeps_what_a_file_was_written_over(how, tmp_path):
    model = how(load_adapter(lora_net(), saved_net(tmp_path / "a", 5, **ALL)))
    x = ROWS.to(model["head"].weight.dtype)
    with fused_lora.disable_adapters(model):
        torch.testing.assert_close(output(model, x).float(), output(net(), ROWS))


def test_while_the_extras_are_away_the_adapter_is_not_exchanged_saved_or_unloaded(tmp_path):
    a, b = saved_net(tmp_path / "a", 5, **ALL), saved_net(tmp_path / "b", 6, **ALL)
    model = load_adapter(lora_net(), a)
    before = output(model, ROWS)
    for call in (
        lambda: load_adapter(model, b),
        lambda: save_adapter(model, tmp_path / "c"),
        lambda: fused_lora.export_adapter(model, tmp_path / "c", for_="peft"),
        lambda: fused_lora.unload(model),
    ):
        with fused_lora.disable_adapters(model), fused_lora.disable_adapters(model):
            with pytest.raises(RuntimeError, match=r"inside disable_adapters .* of the block"):
                call()
            model["head"].weight.data.fill_(7)  # of the block alone
            assert torch.equal(model["q"].bias, net()["q"].bias)
        assert torch.equal(output(model, ROWS), before)
    assert not (tmp_path / "c").exists()
    with fused_lora.disable_adapters(model):
        assert torch.equal(output(model, ROWS), output(net(), ROWS))
    with fused_lora.disable_adapters(plain_lora := lora_net()):
        load_adapter(plain_lora, a)
    assert torch.equal(output(plain_lora, ROWS), before)


def test_a_file_that_is_loaded_in_inference_mode_can_be_trained_beside(tmp_path):
    folder, model = saved_net(tmp_path / "a", 5, **ALL), lora_net()
    with torch.inference_mode():
        load_adapter(model, folder)
    with fused_lora.disable_adapters(model):
        x = ROWS.clone().requires_grad_()
        output(model, x).sum().backward()
    assert x.grad.isfinite().all()


def test_what_others_do_to_the_parameters_does_not_lose_the_base(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = load_adapter(lora_net(), saved_net(tmp_path / "a", 5, **ALL))
    accelerate.cpu_offload(model["head"], torch.device("cpu"))
    accelerate.hooks.remove_hook_from_submodules(model)
    model.load_state_dict(model.state_dict(), assign=True)
    with fused_lora.disable_adapters(model):
        assert torch.equal(output(model, ROWS), output(net(), ROWS))


def test_a_copy_that_is_made_while_the_extras_are_away_can_be_used(tmp_path):
    folder = saved_net(tmp_path / "a", 5, **ALL)
    model = load_adapter(lora_net(), folder)
    with fused_lora.disable_adapters(model):
        copied = copy.deepcopy(model)
    assert torch.equal(output(copied, ROWS), output(net(), ROWS))
    save_adapter(copied, tmp_path / "b")
    load_adapter(copied, folder)
    fused_lora.unload(copied)
