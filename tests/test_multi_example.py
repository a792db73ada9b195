"""examples/multi_adapter.py on a tiny model: two tasks learn in one run, mixed answers are those of
the single-adapter models, and the exit status says so."""

import random
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers", reason="the example needs the extra `examples`")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import multi_adapter

        yield multi_adapter
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def tiny(example, tmp_path_factory):
    """A 2-layer BERT and two files of 200 sentences, each labelled by a word in it; the arguments
    that name them."""
    import tokenizers
    import transformers

    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    tasks = {"sentiment": ["fine", "dull"], "source": ["tweet", "page", "shop"]}
    words = [word for labels in tasks.values() for word in labels]
    words += [f"word{i}" for i in range(30)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": len(vocabulary)}
    config = transformers.BertConfig(**sizes, initializer_range=0.3)
    transformers.BertModel(config).save_pretrained(folder / "model")
    files = []
    for task, labels in tasks.items():
        lines = []
        for i in range(200):
            sentence = [labels[i % len(labels)], *rng.choices(words[5:], k=rng.randrange(3, 9))]
            lines.append(f"{labels[i % len(labels)]}\t{' '.join(sentence)}\n")
        files.append(folder / f"{task}.tsv")
        files[-1].write_text("".join(lines))
    return ["--model", str(folder / "model"), "--data", *map(str, files), "--steps", "25"]


def test_mixed_answers_are_those_of_the_single_adapter_models(example, tiny, capsys):
    assert example.main(tiny) == 0
    printed = capsys.readouterr().out
    assert "one of 4 packs" in printed and "sentiment (r=8), source (r=16)" in printed
    for line in printed.splitlines():
        if "held-out accuracy" in line:
            before, after = (
                float(part.split("%")[0])
                for part in line[:-1].split(": held-out accuracy ")[1].split(" -> ")
            )
            assert after > before


def test_exit_status_1_if_a_sentence_meets_another_adapter(example, tiny, monkeypatch):
    use = example.fused_lora.use_adapters

    def confused(model, tasks):
        return use(model, list(tasks)[::-1])

    monkeypatch.setattr(example.fused_lora, "use_adapters", confused)
    assert example.main([*tiny[:-1], "5"]) == 1


def test_sentences_are_labelled_by_their_source(example):
    files = {"tweet": "1\t0.5\tHello there. \n2\t-1\tNo\n", "page": "1_1\t0.1\tSo it is.\n"}
    expected = "tweet\tHello there.\ntweet\tNo\npage\tSo it is.\n"
    assert example.data.label_by_source(files) == expected
