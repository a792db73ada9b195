"""transformers and TRL on a tiny Llama: patched runs give the losses, gradients and tokens that
unpatched ones give."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra `peft`")

import peft
import transformers
from peft import LoraConfig, get_peft_model

from fused_lora import (
    FusedLoRALinear,
    apply_lora,
    disable_adapters,
    mark_only_lora_as_trainable,
    merge_adapter,
    testing,
)
from fused_lora.integrations import peft as fused
from fused_lora.integrations.transformers import FusedLoRACallback

pytestmark = pytest.mark.peft
STEPS, WORDS, LENGTH = 20, 40, 12
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
LAYERS = 2 * 7  # q, k, v, o, gate, up, down


def llama(**lora):
    """A two-layer Llama with grouped queries; with adapters if `lora` says which."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(**lora)) if lora else model


def sentences(count):
    """Words that count upwards from different ones: soon learnt."""
    rows = [[3 + (7 * i + j) % (WORDS - 3) for j in range(LENGTH)] for i in range(count)]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in rows]


def options(folder, **more):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    } | more


def losses(trainer):
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS
    return found


def trained(folder, callbacks=(), **more):
    """(losses, model) of Trainer on the tiny Llama with adapters."""
    arguments = transformers.TrainingArguments(**options(folder, **more))
    model = llama(**LORA)
    data = sentences(2 * STEPS)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, callbacks=list(callbacks) or None
    )
    return losses(trainer), model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_gives_the_same_losses_patched(checkpointing, tmp_path, capsys):
    more = {"gradient_checkpointing": checkpointing}
    expected, _ = trained(tmp_path, **more)
    ours, model = trained(tmp_path, [FusedLoRACallback()], **more)
    assert ours == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.2
    calls = (2 if checkpointing else 1) * LAYERS * STEPS
    assert fused.call_counts(model) == {"full": calls, "delta": 0, "peft": 0}
    assert capsys.readouterr().out.count(f"fused-lora: {LAYERS} of {LAYERS} LoRA layers") == 1


def test_trainer_in_bf16_stays_as_near_to_fp32_as_peft_does(tmp_path):
    exact, _ = trained(tmp_path)
    eager, _ = trained(tmp_path, bf16=True)
    ours, model = trained(tmp_path, [FusedLoRACallback()], bf16=True)
    as_tensors = [{"loss": torch.tensor(run)} for run in (ours, eager, exact)]
    assert not testing.check(*as_tensors, torch.bfloat16)
    assert fused.call_counts(model) == {"full": LAYERS * STEPS, "delta": 0, "peft": 0}


def test_trls_sft_trainer_gives_the_same_losses_patched(tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra `trl`")
    import datasets
    import tokenizers

    vocabulary = {f"w{i}": i for i in range(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2"
    )
    rows = [{"input_ids": row["input_ids"]} for row in sentences(2 * STEPS)]
    runs = []
    for callbacks in ([], [FusedLoRACallback()]):
        trainer = trl.SFTTrainer(
            llama(),
            trl.SFTConfig(**options(tmp_path, bf16=False, max_length=LENGTH)),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            callbacks=callbacks,
        )
        runs.append(losses(trainer))
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    counts = fused.call_counts(trainer.model)
    assert counts["full"] >= LAYERS * STEPS and counts["peft"] == counts["delta"] == 0


@pytest.mark.parametrize("merged", [False, True])
def test_generation_with_the_cache_gives_the_same_tokens(merged):
    model = llama(**LORA).eval()
    prompt = torch.tensor([[5, 6, 7], [0, 8, 9]])
    arguments = {
        "attention_mask": (prompt != 0).long(),
        "max_new_tokens": 10,
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": None,
    }
    expected = model.generate(input_ids=prompt, **arguments)
    fused.patch(model)
    if merged:
        model.merge_adapter()
    assert torch.equal(model.generate(input_ids=prompt, **arguments), expected)
    calls = {"full": 10 * LAYERS, "delta": 0, "peft": 0}
    if merged:
        calls = {"full": 0, "delta": 0, "peft": 10 * LAYERS}
    assert fused.call_counts(model) == calls


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_an_adapter_for_each_sequence_gives_the_same_tokens(beams):
    if beams > 1 and peft.__version__.startswith("0.18"):
        pytest.skip("PEFT 0.18 takes decoders of today's transformers for encoders")
    model = llama(**LORA).eval()
    model.add_adapter("other", LoraConfig(**LORA | {"r": 3}))
    prompt = torch.tensor([[5, 6, 7], [0, 8, 9], [5, 6, 7]])
    arguments = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 5, "num_beams": beams}
    arguments |= {"do_sample": False, "eos_token_id": None, "input_ids": prompt}
    arguments["adapter_names"] = ["default", "__base__", "other"]
    expected = model.generate(**arguments)
    assert not torch.equal(expected[0], expected[2])
    fused.patch(model)
    assert torch.equal(model.generate(**arguments), expected)
    counts = fused.call_counts(model)
    assert counts["full"] >= 5 * LAYERS and counts["peft"] == counts["delta"] == 0


@pytest.mark.parametrize("keep_base", [True, False])
def test_a_merged_output_layer_that_is_tied_again_keeps_its_adapter(keep_base):
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    apply_lora(model, r=4, lora_alpha=4, target_modules=["lm_head"], init_lora_weights=False)
    tokens = torch.arange(3, 11)[None]
    expected = model(tokens).logits
    merge_adapter(model, keep_base)
    assert model.lm_head.merged
    torch.testing.assert_close(model(tokens).logits, expected)
    model.resize_token_embeddings(WORDS)
    assert torch.equal(model(tokens).logits, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.merged


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_with_dropout(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = llama(**LORA, lora_dropout=0.3).train()
        fused.patch(model)
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = torch.tensor([row["input_ids"] for row in sentences(2)])
        torch.manual_seed(4)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert fused.call_counts(model)["full"] == (2 if checkpointing else 1) * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def native(lora_dropout=0.0):
    """The tiny Llama with adapters of `apply_lora`, the same every time."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    options |= {"lora_dropout": lora_dropout, "init_lora_weights": False}
    model = apply_lora(llama(), **options)
    mark_only_lora_as_trainable(model)
    return model


def test_a_native_model_generates_with_the_cache_what_it_says_without():
    model = native().eval()
    prompt = torch.tensor([[5, 6, 7], [0, 8, 9]])
    arguments = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 10, "do_sample": False}
    arguments |= {"eos_token_id": None, "input_ids": prompt}
    tokens = model.generate(**arguments, use_cache=True)
    assert tokens.shape == (2, 13)
    assert torch.equal(model.generate(**arguments, use_cache=False), tokens)
    with disable_adapters(model):
        base = model.generate(**arguments, use_cache=True)
    assert torch.equal(base, llama().eval().generate(**arguments)) and not torch.equal(base, tokens)
    merge_adapter(model)
    assert torch.equal(model.generate(**arguments, use_cache=True), tokens)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_native_model_gives_the_same_gradients(reentrant):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = native(lora_dropout=0.3).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layers = [m for m in model.modules() if isinstance(m, FusedLoRALinear)]
        assert len(layers) == LAYERS
        seen = []
        layers[0].register_forward_hook(lambda *arguments, seen=seen: seen.append(1))
        ids = torch.tensor([row["input_ids"] for row in sentences(2)])
        torch.manual_seed(4)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        calls.append(len(seen))
    assert calls == [1, 2]  # recomputed, with the same masks
    assert len(gradients[0]) == 2 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_run_that_was_all_fallback_is_named(tmp_path, capsys):
    model = llama(**LORA | {"use_dora": True})
    arguments = transformers.TrainingArguments(**options(tmp_path, max_steps=1))
    trainer = transformers.Trainer(
        model, arguments, train_dataset=sentences(2), callbacks=[FusedLoRACallback()]
    )
    with pytest.warns(UserWarning, match=r"no call of 14 ran fused:\n.*variant DoraLinear"):
        trainer.train()


@pytest.mark.parametrize("way", ["argument", "in place", "wrapped", "not at all"])
def test_a_compiled_run_is_not_taken_for_fallback(way):
    model, callback = llama(**LORA), FusedLoRACallback()
    state = transformers.TrainerState(is_world_process_zero=False, global_step=3)
    arguments = SimpleNamespace(torch_compile=way == "argument")
    callback.on_train_begin(arguments, state, None, model=model)
    if way == "in place":
        model.compile(backend="eager")
    elif way == "wrapped":
        model = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        callback.on_train_end(arguments, state, None, model=model)
    said = [w for w in said if "no call of 0 ran fused" in str(w.message)]
    assert len(said) == (way == "not at all")


def test_the_callback_reports_once_however_often_training_begins(capsys):
    callback, model = FusedLoRACallback(backend="aten", compute_dtype="peft"), llama(**LORA)
    state = transformers.TrainerState(is_world_process_zero=True)
    for _ in range(2):
        callback.on_train_begin(None, state, None, model=model)
    assert capsys.readouterr().out == f"{callback.report}\n"
    assert len(callback.report.fused) == LAYERS
    layers = [module for module in model.modules() if type(module) is fused.FusedLinear]
    assert {layer._fused_lora.backend for layer in layers} == {"aten"}
    assert {layer._fused_lora.compute_dtype for layer in layers} == {"peft"}


def test_the_callback_refuses_what_it_cannot_patch(tmp_path):
    arguments = transformers.TrainingArguments(**options(tmp_path))
    trainer = transformers.Trainer(
        llama(), arguments, train_dataset=sentences(2), callbacks=[FusedLoRACallback()]
    )
    with pytest.raises(ValueError, match="holds no PEFT LoRA layer"):
        trainer.train()
    with pytest.raises(ValueError, match="backend must be one of"):
        FusedLoRACallback(backend="cuda")
