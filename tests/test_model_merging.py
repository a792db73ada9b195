"""Merging, unloading, saving and training of a whole model with LoRA layers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from small_models import OPTIONS, assert_untouched, described, inputs, make, paths, plain
from torch import nn

import fused_lora
from fused_lora import FusedLoRALinear, apply_lora, testing
from fused_lora.model import lora_layers


@pytest.mark.parametrize("keep_base", [True, "cpu"])
def test_unmerge_restores_every_base_weight_bit_for_bit(keep_base):
    model, base = make().bfloat16(), plain().bfloat16()
    parameters = dict(model.named_parameters())
    fused_lora.merge_adapter(model, keep_base)
    assert all(layer.merged for layer in lora_layers(model).values())
    merged = model.layers[0].q.weight
    assert merged is not parameters["layers.0.q.weight"]
    assert not torch.equal(merged, base.layers[0].q.weight)
    fused_lora.unmerge_adapter(model)
    for path in paths(model):
        weight = model.get_submodule(path).weight
        assert torch.equal(weight, base.get_submodule(path).weight)
        assert keep_base == "cpu" or weight is parameters[f"{path}.weight"]


def test_merged_and_unloaded_models_compute_the_same_and_unload_returns_the_base():
    model, base, x = make(), plain(), inputs()
    adapted = model(x)
    unmerged = copy.deepcopy(model)
    fused_lora.merge_adapter(model)
    torch.testing.assert_close(model(x), adapted)
    merged = model(x)
    assert fused_lora.unload(model) is model
    assert not lora_layers(model) and torch.equal(model(x), merged)
    weights = {path: layer.weight for path, layer in lora_layers(unmerged).items()}
    fused_lora.unload(unmerged)
    assert torch.equal(unmerged(x), base(x))
    assert all(unmerged.get_submodule(path).weight is w for path, w in weights.items())
    assert set(unmerged.state_dict()) == set(base.state_dict())
    apply_lora(unmerged, **OPTIONS)  # and can be adapted again


def mixed():
    model = make()
    model.layers[1].q.merge()
    return model


def let_go():
    model = make()
    model.layers[1].q.merge(keep_base=False)
    return model


def emptied():
    with torch.device("meta"):
        model = plain()
    return apply_lora(model, **OPTIONS).to_empty(device="cpu")


MERGING = {
    "some merged already": (mixed, fused_lora.merge_adapter, "layers.1.q: merged already"),
    "not initialised": (emptied, fused_lora.merge_adapter, "layers.0.q_proj: lora_A and lora_B"),
    "nothing to requantise": (
        make,
        lambda model: fused_lora.merge_adapter(model, requantise=True),
        "requantise=True is for quantised bases, Model has none",
    ),
    "none merged": (make, fused_lora.unmerge_adapter, "no LoRA layer is merged"),
    "base let go": (let_go, fused_lora.unmerge_adapter, "base weight of layers.1.q, which"),
    "base let go, off": (
        let_go,
        lambda model: fused_lora.disable_adapters(model).__enter__(),
        "disable_adapters needs the base weight of layers.1.q",
    ),
    "no layers": (plain, fused_lora.merge_adapter, "Model holds no LoRA layer: call apply_lora"),
    "no layers to unload": (plain, fused_lora.unload, "Model holds no LoRA layer"),
}


@pytest.mark.parametrize("case", MERGING)
def test_a_refused_merge_says_why_and_changes_nothing(case):
    build, call, said = MERGING[case]
    model = build()
    before, merged = described(model), [m.merged for m in lora_layers(model).values()]
    with pytest.raises((RuntimeError, ValueError), match=said):
        call(model)
    if build is not emptied:  # its values are whatever the memory held, NaN here
        assert_untouched(model, before)
    assert merged == [m.merged for m in lora_layers(model).values()]


def test_running_out_of_memory_in_a_merge_changes_nothing(monkeypatch):
    model, merge, seen = make(), FusedLoRALinear.merge, []
    before = described(model)

    def fail(layer, *options):
        seen.append(layer)
        if len(seen) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return merge(layer, *options)

    monkeypatch.setattr(FusedLoRALinear, "merge", fail)
    with pytest.raises(torch.OutOfMemoryError):
        fused_lora.merge_adapter(model)
    assert_untouched(model, before)
    assert not any(layer.merged for layer in lora_layers(model).values())


def test_copies_and_checkpoints_of_a_model_keep_its_adapters():
    model, x = make(), inputs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    other = make(seed=1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), model(x))


def test_a_base_checkpoint_loads_strictly_into_a_model_with_adapters():
    model, base = make(), plain(seed=3)
    adapter = model.shared.lora_A.detach().clone()
    assert not model.load_state_dict(base.state_dict()).missing_keys
    assert torch.equal(model.shared.weight, base.shared.weight)
    assert torch.equal(model.shared.lora_A, adapter)


def test_paths_are_the_models_own_under_compile_and_checkpointing():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = plain()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    wrapped = torch.compile(model, backend="eager")
    apply_lora(wrapped, **OPTIONS, target_modules=[r"layers.0.q", "layers.1.q"])
    assert paths(wrapped) == ["layers.0.q", "layers.1.q"]
    assert "layers.1.q.lora_A" in fused_lora.lora_state_dict(wrapped)
    fused_lora.unload(wrapped)
    assert not lora_layers(wrapped)


def test_training_moves_the_adapters_alone_and_lowers_the_loss():
    model = make(init_lora_weights=True, lora_dropout=0.1)
    fused_lora.mark_only_lora_as_trainable(model)
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, target, losses = torch.optim.AdamW(trained, lr=3e-2), torch.randn(2, 4, 5), []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(inputs()), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    named = dict(model.named_parameters())
    assert all(torch.equal(named[key], value) for key, value in frozen.items())
    assert all(named[f"{path}.lora_B"].any() for path in paths(model))


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv1d_keeps_its_weight_as_stored_and_meets_the_acceptance_rule(backend, dtype, device):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    case = testing.make_case(7, 50, 33, 3, dtype, device=device)
    found = []
    for inputs_ in (case, case.without_base()):
        conv = Conv1D(50, 33).to(device, dtype)
        conv.weight.data.copy_(inputs_.weight.t())
        conv.bias.data.copy_(inputs_.bias)
        model = nn.Sequential(conv)
        apply_lora(model, r=3, lora_alpha=16, backend=backend)
        layer = model[0]
        assert layer.fan_in_fan_out and layer.weight is conv.weight
        layer.set_adapter(inputs_.lora_A, inputs_.lora_B, lora_alpha=16)
        layer.bias.requires_grad_()
        x = inputs_.x.clone().requires_grad_()
        y = layer(x)
        leaves = (x, layer.lora_A, layer.lora_B, layer.bias)
        grads = torch.autograd.grad(y, leaves, inputs_.dy)
        ours = dict(zip(("y", "dx", "dA", "dB", "dbias"), (y, *grads), strict=True))
        right = (
            testing.eager_gradients(*inputs_.tensors()),
            testing.exact_gradients(*inputs_.tensors()),
        )
        found += testing.check(ours, *right, dtype)
        found += testing.check({"y": layer.merge()(x.detach())}, *right, dtype)
        assert layer.weight.shape == conv.weight.shape
        assert layer.unmerge().weight is conv.weight
        linear = layer.to_linear()
        assert torch.equal(linear.weight, layer.merge().weight.t())
        restored = fused_lora.unload(model)[0]
        assert type(restored) is Conv1D and restored.weight is layer.weight
        found += testing.check({"y": restored(x)}, *right, dtype)
    assert not found


def test_gpt2_takes_adapters_and_its_own_checkpoint():
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8)
    config = transformers.GPT2Config(**sizes)
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config).eval()
    checkpoint = copy.deepcopy(base.state_dict())
    tokens = torch.arange(6)[None]
    expected = base(tokens).logits
    model = apply_lora(base, r=2, lora_alpha=4)
    assert paths(model) == [
        f"transformer.h.0.{name}"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert all(layer.fan_in_fan_out for layer in lora_layers(model).values())
    torch.testing.assert_close(model(tokens).logits, expected)
    assert not model.load_state_dict(checkpoint).unexpected_keys
    model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
