"""What adapter files hold beside the factors, biases, whole modules, embeddings: as PEFT means it,
all or nothing, and away again."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_layers import K, nf4
from small_models import assert_untouched, described, inputs, llama, make, plain
from torch import nn

import fused_lora
from fused_lora import apply_lora, load_adapter, save_adapter

safetensors = pytest.importorskip("safetensors.torch")
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TARGETS = ["q_proj", "v_proj", "q"]
TOKENS = torch.arange(1, 9).view(2, 4)


def trained():
    return make(target_modules=TARGETS)


def with_tensors(folder, **changed):
    """Change tensors of the file and add others."""
    tensors = safetensors.load_file(folder / WEIGHTS)
    safetensors.save_file(tensors | changed, folder / WEIGHTS)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_and_whole_modules_travel_to_peft_and_back(bias, tmp_path):
    peft = pytest.importorskip("peft")
    whole = ["lm_head"] if bias != "all" else None  # PEFT 0.18 cannot read back both
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], bias=bias, modules_to_save=whole
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert "lora" in key or "bias" in key or "lm_head" in key
            parameter.data.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    expected = theirs(TOKENS).logits
    ours = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(ours(TOKENS).logits, expected)
    save_adapter(ours, tmp_path / "ours", bias=bias, modules_to_save=whole)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS).logits, expected)
    one, two = (safetensors.load_file(folder / WEIGHTS) for folder in (tmp_path, tmp_path / "ours"))
    assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_switching_back_restores_the_biases_that_an_adapter_had_replaced(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "without")
    expected = model(inputs())
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data.add_(1)
    save_adapter(model, tmp_path / "with", bias="all", modules_to_save=["norm"])
    changed = model(inputs())
    model.lm_head.bias.data.add_(1)
    save_adapter(model, tmp_path / "other", bias="all")
    again, model = model(inputs()), trained()
    for _ in range(2):
        assert torch.equal(load_adapter(model, tmp_path / "with")(inputs()), changed)
        assert torch.equal(load_adapter(model, tmp_path / "other")(inputs()), again)
        assert torch.equal(load_adapter(model, tmp_path / "without")(inputs()), expected)


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.q, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, False)
        self.norm = nn.BatchNorm1d(4)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["head", "embed"])
def test_a_tied_whole_module_is_refused(name, tmp_path):
    model = apply_lora(Headed(), r=2, lora_alpha=4, target_modules=["q"])
    with pytest.raises(ValueError, match=f"modules_to_save has '{name}'.*{name}.weight is tied"):
        save_adapter(model, tmp_path / "a", modules_to_save=[name])
    assert not (tmp_path / "a").exists()


def test_buffers_of_whole_modules_travel_to_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        Headed(), peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["norm"])
    )
    norm = theirs.base_model.model.norm.modules_to_save["default"]
    norm(torch.randn(8, 4))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(Headed(), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", modules_to_save=["norm"])
    back = peft.PeftModel.from_pretrained(Headed(), tmp_path / "ours")
    for own in (ours.norm, back.base_model.model.norm.modules_to_save["default"]):
        for name, value in norm.state_dict().items():
            assert torch.equal(own.state_dict()[name], value)
    assert ours.norm.num_batches_tracked == 1
    with fused_lora.disable_adapters(ours):
        assert ours.norm.num_batches_tracked == 0


def bert(kind):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=37)
    config = transformers.BertConfig(num_attention_heads=2, num_labels=3, **sizes)
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def roberta():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=37)
    config = transformers.RobertaConfig(num_attention_heads=2, num_labels=3, **sizes)
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(config).eval()


def tied_llama():
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def grown_llama():
    """With other new rows in every model."""
    model = llama()
    torch.manual_seed(torch.seed() % 2**31)
    model.resize_token_embeddings(41)
    return model


PEFTS = {
    # what PEFT writes there is more than factors
    "a head whose layers are targeted": (roberta, {"target_modules": ["query", "dense"]}),
    "a head, all layers targeted": (roberta, {"target_modules": "all-linear"}),
    "biases of a head that is trained": (
        lambda: bert("BertForSequenceClassification"),
        {"target_modules": ["query"], "bias": "all"},
    ),
    "tied biases": (
        lambda: bert("BertForMaskedLM"),
        {"target_modules": ["query"], "bias": "all", "task_type": None},
    ),
    "the output layer": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "a tied output layer": (tied_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "new tokens": (grown_llama, {"target_modules": ["q_proj"]}),
    "new tokens and the output layer": (grown_llama, {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.parametrize("name", ["head", "norm", "layernorm"])
def test_modules_to_save_end_paths_at_a_dot_or_not_as_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name])
    theirs = peft.get_peft_model(llama(), config).eval()
    for key, parameter in theirs.named_parameters():
        if "modules_to_save" in key:
            parameter.data.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(TOKENS).logits
    model = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS).logits, expected)
    with fused_lora.disable_adapters(model):
        assert torch.equal(model(TOKENS).logits, llama()(TOKENS).logits)
    save_adapter(model, tmp_path / "ours", modules_to_save=[name])
    one, two = (safetensors.load_file(tmp_path / n / WEIGHTS) for n in ("theirs", "ours"))
    assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("case", PEFTS)
def test_what_peft_saves_beside_the_factors_is_loaded(case, tmp_path):
    peft = pytest.importorskip("peft")
    base, options = PEFTS[case]
    task = None if base in (llama, tied_llama, grown_llama) else "SEQ_CLS"
    config = peft.LoraConfig(**{"task_type": task, "init_lora_weights": False} | options)
    theirs = peft.get_peft_model(base(), config).eval()
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad and "lora" not in key:
            parameter.data.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True if "tokens" in case else "auto")
    expected = theirs(TOKENS).logits
    model = load_adapter(base(), tmp_path)
    torch.testing.assert_close(model(TOKENS).logits, expected)
    if "tokens" in case:
        return
    save_adapter(model, tmp_path / "ours")  # with what the file had brought
    torch.testing.assert_close(load_adapter(base(), tmp_path / "ours")(TOKENS).logits, expected)
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(TOKENS).logits, expected)
    save_adapter(model, tmp_path / "factors", bias="none", modules_to_save=[])
    keys = safetensors.load_file(tmp_path / "factors" / WEIGHTS)
    assert all(".lora_" in key for key in keys)
    if task is not None:
        with pytest.raises(ValueError, match="sglang cannot load"):
            fused_lora.export_adapter(model, tmp_path / "server", for_="sglang")


def test_disabled_adapters_leave_the_base_where_a_file_had_changed_it(tmp_path):
    model = trained()
    for parameter in (model.norm.weight, model.lm_head.weight, model.layers[0].q.bias):
        parameter.data.add_(1)
    save_adapter(model, tmp_path, bias="all", modules_to_save=["norm", "lm_head"])
    model, base = load_adapter(plain(), tmp_path), plain()
    head = model.lm_head.weight.requires_grad_()
    before, y = described(model), model(inputs())
    with fused_lora.disable_adapters(model):
        assert torch.equal(model(inputs()), base(inputs()))
        assert not model.lm_head.weight.requires_grad
        with fused_lora.disable_adapters(model):
            assert torch.equal(model(inputs()), base(inputs()))
        # of a graph that was made outside
        (inside,) = torch.autograd.grad(y.square().sum(), head)
    (outside,) = torch.autograd.grad(model(inputs()).square().sum(), head)
    assert torch.equal(inside, outside)
    with pytest.raises(KeyError), fused_lora.disable_adapters(model):
        raise KeyError
    assert_untouched(model, before)
    assert torch.equal(model(inputs()), y)
    fused_lora.merge_adapter(model)
    with fused_lora.disable_adapters(nn.Sequential(model)):
        assert torch.equal(model(inputs()), base(inputs()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_merged_quantised_base_has_its_own_bias_while_disabled(tmp_path):
    def base():
        torch.manual_seed(0)
        layer = nf4()
        layer.support_avx512bf16_for_cpu = False
        return nn.Sequential(layer).eval()

    x, source = torch.randn(3, K), apply_lora(base(), r=2, lora_alpha=4, target_modules=["0"])
    source[0].bias.data += 1
    save_adapter(source, tmp_path, bias="all")
    model = load_adapter(base(), tmp_path)
    fused_lora.merge_adapter(model, requantise=True)
    merged = model(x)
    with fused_lora.disable_adapters(model):
        assert torch.equal(model(x), base()(x))
    assert torch.equal(model(x), merged)


def test_two_values_for_one_parameter_are_refused(tmp_path):
    model = make(target_modules=["q"])
    save_adapter(model, tmp_path, bias="all")
    tied = plain()
    tied.norm.bias = tied.layers[0].q_proj.bias
    before = described(tied)
    with pytest.raises(ValueError, match=r"norm.bias has other values than .*q_proj.bias and norm"):
        load_adapter(tied, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    config |= {"modules_to_save": ["norm"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with_tensors(tmp_path, **{PREFIX + "norm.modules_to_save.bias": torch.ones(12)})
    with pytest.raises(ValueError, match=r"has two values for base_model.model.norm.bias"):
        load_adapter(tied, tmp_path)
    assert_untouched(tied, before)


def test_embeddings_are_written_where_they_can_be(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(grown_llama(), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"lm_head.lora_B.weight is \(41, 8\), the layer expects"):
        load_adapter(llama(), tmp_path)
    model = load_adapter(grown_llama(), tmp_path)
    fused_lora.merge_adapter(model)
    merged = model(TOKENS).logits
    assert torch.equal(load_adapter(model, tmp_path)(TOKENS).logits, merged)  # they are its own
    other = grown_llama()
    apply_lora(other, r=8, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    fused_lora.merge_adapter(other)
    before = described(other)
    with pytest.raises(RuntimeError, match=r"lm_head.weight is merged: call unmerge_adapter"):
        load_adapter(other, tmp_path)
    assert_untouched(other, before)


def test_packs_take_an_adapter_with_the_models_own_embeddings(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    for name, base in (("own", llama), ("grown", grown_llama)):
        theirs = peft.get_peft_model(base(), config).eval()
        theirs.save_pretrained(tmp_path / name, save_embedding_layers=True)
    expected = load_adapter(llama(), tmp_path / "own")(TOKENS).logits
    model = apply_lora(
        llama(),
        adapters={"a": tmp_path / "own"},
        target_modules=["q_proj", "lm_head"],
        total_rank=32,
    )
    load_adapter(model, tmp_path / "own", name="b")
    for name in "ab":
        with fused_lora.use_adapters(model, [name] * 2):
            torch.testing.assert_close(model(TOKENS).logits, expected)
    other = grown_llama()
    with pytest.raises(ValueError, match="embeddings all adapters of a batch share"):
        apply_lora(other, adapters={"a": tmp_path / "grown"})
    apply_lora(other, adapters={}, target_modules=["q_proj", "lm_head"], total_rank=32)
    with pytest.raises(ValueError, match="embeddings all adapters of a batch share"):
        load_adapter(other, tmp_path / "grown", name="a")


def test_an_embedding_that_the_server_would_not_load_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"vllm takes embeddings from the base.*lm_head.weight"):
        fused_lora.export_adapter(tmp_path / "a", tmp_path / "b", for_="vllm")
    fused_lora.export_adapter(tmp_path / "a", tmp_path / "b", for_="peft")
    one, two = (safetensors.load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert set(one) == set(two)
