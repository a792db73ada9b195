"""Adapters of this library beside a prefix or a prompt of PEFT on the same model: both train, both
are saved and loaded, the base stays; and the orders of the calls that bring them together."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft", reason="needs the extra `peft`")
transformers = pytest.importorskip("transformers", reason="needs the extra `examples`")

import fused_lora

pytestmark = pytest.mark.peft
METHODS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def tiny():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def batch():
    ids = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def with_prompt(base, method):
    torch.manual_seed(1)
    return peft.get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", num_virtual_tokens=3))


def with_lora(base):
    torch.manual_seed(2)
    fused_lora.apply_lora(base, **LORA)


def prompt_first(method):
    base = tiny()
    model = with_prompt(base, method)
    with_lora(base)
    return base, model


def lora_first(method):
    base = tiny()
    with_lora(base)
    model = with_prompt(base, method)
    fused_lora.mark_only_lora_as_trainable(base)
    return base, model


def train(model, steps):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def base_tensors(base):
    """Every tensor of the base by its name, adapters left out."""
    return {k: v.clone() for k, v in base.state_dict().items() if "lora_" not in k}


@pytest.mark.parametrize("method", METHODS)
def test_both_get_gradients_and_learn_and_the_base_stays_bit_for_bit(method):
    base, model = prompt_first(method)
    before = base_tensors(base)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = train(model, 20)
    assert losses[-1] < 0.7 * losses[0]
    kinds = {"lora_A": 0, "lora_B": 0, "prompt_encoder": 0}
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in kinds if kind in name), None)
        if kind is None:
            assert not parameter.requires_grad and parameter.grad is None, name
            continue
        kinds[kind] += 1
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
        assert not torch.equal(parameter, start[name]), name
    assert kinds == {"lora_A": 6, "lora_B": 6, "prompt_encoder": 1}
    after = base_tensors(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", METHODS)
def test_each_of_the_two_does_something_of_its_own(method):
    base, model = prompt_first(method)
    train(model, 3)
    both = logits(model)
    with fused_lora.disable_adapters(base):
        prompt_alone = logits(model)
    lora_alone, plain = logits(base), logits(tiny())
    for one, other in ((both, prompt_alone), (lora_alone, plain)):
        assert not torch.allclose(one[:, -9:], other[:, -9:], atol=1e-3)
    assert not torch.allclose(both[:, -9:], lora_alone, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_both_orders_of_the_calls_train_alike(method):
    (_, one), (_, other) = prompt_first(method), lora_first(method)
    assert train(one, 3) == train(other, 3)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_put_on_last_freezes_the_adapters_until_they_are_marked(method):
    base = tiny()
    with_lora(base)
    model = with_prompt(base, method)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    prompt = [p for p in model.prompt_encoder.parameters() if p.requires_grad]
    fused_lora.mark_only_lora_as_trainable(base)
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert len(trained) == 12 and all("lora_" in name for name in trained)
    assert prompt and all(parameter.requires_grad for parameter in prompt)


@pytest.mark.parametrize("lora_is_first", [False, True], ids=["prompt first", "lora first"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_apart_they_give_the_same_logits(method, lora_is_first, tmp_path):
    pytest.importorskip("safetensors", reason="needs the extra `adapters`")
    base, model = prompt_first(method)
    train(model, 5)
    expected = logits(model)
    model.save_pretrained(tmp_path / "prompt")
    fused_lora.save_adapter(base, tmp_path / "lora")

    fresh = tiny()
    if lora_is_first:
        fused_lora.load_adapter(fresh, tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "prompt").eval()
    if not lora_is_first:
        fused_lora.load_adapter(fresh, tmp_path / "lora")
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(fresh), logits(base))


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_loaded_prompt_loaded_adapters_train_on(method, tmp_path):
    pytest.importorskip("safetensors", reason="needs the extra `adapters`")
    base, model = prompt_first(method)
    losses = train(model, 5)
    model.save_pretrained(tmp_path / "prompt")
    fused_lora.save_adapter(base, tmp_path / "lora")

    fresh = tiny()
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "prompt").eval()
    fused_lora.load_adapter(fresh, tmp_path / "lora")
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert len(trained) == 12 and all("lora_" in name for name in trained)
    more = train(again, 5)
    assert more[0] < losses[-1] < losses[0] and more[-1] < more[0]
