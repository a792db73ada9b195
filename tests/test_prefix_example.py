"""examples/prefix_and_lora.py on a tiny Llama: three runs, both parts survive being saved, and the
exit status says so."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("peft", reason="the example needs the extra `peft`")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import prefix_and_lora

        yield prefix_and_lora
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tiny(example, tmp_path_factory):
    """A 2-layer Llama and 200 sentences labelled by a word in them: arguments that name them."""
    import tokenizers
    import transformers

    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    words = ["<eos>", "<unk>", "good", "bad", *(f"word{i}" for i in range(20))]
    words += example.QUESTION.rstrip("?").split()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(words)}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    lines = []
    for i in range(200):
        label = ("good", "bad")[i % 2]
        sentence = [label, *rng.choices(words[4:24], k=rng.randrange(2, 6))]
        lines.append(f"{label}\t{' '.join(sentence)}\n")
    (folder / "sentences.tsv").write_text("".join(lines))
    arguments = ["--model", folder / "model", "--data", folder / "sentences.tsv"]
    return [*map(str, arguments), "--steps", "20", "--batch-size", "8", "--virtual-tokens", "3"]


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_both_parts_train_and_survive_being_saved(example, tiny, method, capsys):
    assert example.main([*tiny, "--method", method]) == 0
    printed = capsys.readouterr().out
    assert "max difference of the logits 0.0e+00" in printed
    assert "the base is untouched, bit for bit" in printed
    rows = [line for line in printed.splitlines() if line.count("->") == 2]
    names = [row.split("  ")[0] for row in rows]
    assert names == [method, "LoRA", f"{method} + LoRA"]
    for row in rows:
        before, after = row.split("->")[0].split()[-1], row.split("->")[1].split()[0]
        assert float(after) < float(before)


@pytest.mark.parametrize("lost", ["adapters", "base"])
def test_exit_status_1_if_a_part_is_lost_or_the_base_changes(example, tiny, lost, monkeypatch):
    if lost == "adapters":
        monkeypatch.setattr(example.fused_lora, "load_adapter", lambda *_: None)
    else:
        train = example.train

        def careless(name, model, *arguments):
            run = train(name, model, *arguments)
            with torch.no_grad():
                model.get_input_embeddings().weight[0, 0] += 1e-3
            return run

        monkeypatch.setattr(example, "train", careless)
    assert example.main([*tiny, "--steps", "2"]) == 1
