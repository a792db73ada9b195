"""What `mark_only_lora_as_trainable` trains beside the factors, and that it is saved with them."""

from __future__ import annotations

import pytest
import torch
from small_models import make, plain
from torch import nn

import fused_lora
from fused_lora import load_adapter, mark_only_lora_as_trainable, save_adapter

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(1, 9).view(2, 4)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 37}
SMALL |= {"num_attention_heads": 2, "num_labels": 3, "pad_token_id": 0}


def classifier(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def saved(folder):
    return safetensors.load_file(folder / WEIGHTS)


@pytest.mark.parametrize("kind", ["Roberta", "Bert", "Llama"])
def test_a_classifiers_head_is_trained_whole_and_saved_as_peft_does(kind, tmp_path):
    peft = pytest.importorskip("peft")
    name = "score" if kind == "Llama" else "classifier"
    options = {"r": 2, "lora_alpha": 2, "init_lora_weights": False}
    model = fused_lora.apply_lora(classifier(kind), **options)
    head = model.get_submodule(name)
    assert not any(isinstance(m, fused_lora.FusedLoRALinear) for m in head.modules())
    mark_only_lora_as_trainable(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    every = {key for key, _ in model.named_parameters()}
    assert trained == {key for key in every if ".lora_" in key or key.startswith(f"{name}.")}
    for parameter in head.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    save_adapter(model, tmp_path)
    expected = model(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(classifier(kind), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, expected)
    loaded = load_adapter(classifier(kind), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_head_is_frozen_if_it_is_told_so_or_has_an_adapter(compiled):
    model = classifier("Roberta")
    given = torch.compile(model, backend="eager") if compiled else model
    fused_lora.apply_lora(given, r=2, lora_alpha=2)
    mark_only_lora_as_trainable(given)
    head = list(model.classifier.parameters())
    assert len(head) == 4 and all(parameter.requires_grad for parameter in head)
    mark_only_lora_as_trainable(given, modules_to_save=[])
    assert not any(parameter.requires_grad for parameter in head)
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["dense"]}
    adapted = fused_lora.apply_lora(classifier("Roberta"), **options)
    mark_only_lora_as_trainable(adapted)
    assert not adapted.classifier.out_proj.weight.requires_grad


def test_a_head_that_is_no_module_is_no_head():
    class ForSequenceClassification(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def score(self):
            return 1

    mark_only_lora_as_trainable(
        fused_lora.apply_lora(ForSequenceClassification(), r=2, lora_alpha=2)
    )


def test_marking_anew_does_not_forget_what_the_adapter_has(tmp_path):
    model = make(target_modules=["q_proj", "v_proj"])
    mark_only_lora_as_trainable(model, "lora_only", ["lm_head"])
    mark_only_lora_as_trainable(model, modules_to_save=["norm"])
    save_adapter(model, tmp_path)
    prefix = "base_model.model."
    keys = set(saved(tmp_path))
    assert {f"{prefix}{key}.weight" for key in ("lm_head", "norm")} <= keys
    assert f"{prefix}layers.0.q_proj.base_layer.bias" in keys
    save_adapter(model, tmp_path, bias="none", modules_to_save=[])
    assert all(".lora_" in key for key in saved(tmp_path))


def test_marking_what_cannot_be_trained_freezes_nothing():
    model = make(target_modules=["q_proj"]).requires_grad_()
    for name, reason in (("nope", "the model has none"), ("layers.0", "it holds the LoRA layer")):
        with pytest.raises(ValueError, match=reason):
            mark_only_lora_as_trainable(model, modules_to_save=[name])
        assert all(parameter.requires_grad for parameter in model.parameters())
    model.norm.weight = nn.Parameter(torch.ones(12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"norm.weight: torch.int8 cannot be trained"):
        mark_only_lora_as_trainable(model, modules_to_save=["norm"])
    assert model.lm_head.weight.requires_grad


def test_what_a_model_with_packs_trains_besides_is_warned_of():
    model = fused_lora.apply_lora(plain(), adapters={"a": {}}, r=2, lora_alpha=2)
    with pytest.warns(UserWarning, match="of a model with packs are not saved by save_adapter"):
        mark_only_lora_as_trainable(model, modules_to_save=["norm"])
    assert model.norm.weight.requires_grad
