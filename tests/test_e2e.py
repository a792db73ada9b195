"""examples/e2e.py on a tiny Llama and made-up restaurants: nothing leaks between the splits, only
the texts are learnt, an interrupted run ends as an uninterrupted one, all runs reach the report."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REAL_DATA = EXAMPLES.parents[1] / "shared" / "data" / "e2e"
SLOTS = {
    "Type": ["pub", "restaurant", "shop"],
    "area": ["riverside", "centre"],
    "food": ["English", "French", "Thai"],
    "price": ["low", "high"],
}
NAMES = ["Mill", "Vaults"]


@pytest.fixture(scope="module")
def e2e():
    pytest.importorskip("transformers", reason="the example needs the extra `examples`")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import e2e

        yield e2e
    finally:
        sys.path.remove(str(EXAMPLES))


def restaurants():
    """Lines of two texts for each restaurant: its slots in any order, its words after its name."""
    rng, lines = random.Random(0), []
    for name, *values in itertools.product(NAMES, *SLOTS.values()):
        slots = [f"name : {name}", *(f"{k} : {v}" for k, v in zip(SLOTS, values, strict=True))]
        for words in (values, values[::-1]):
            rng.shuffle(slots)
            lines.append(f"{' | '.join(slots)}||{name} is {' '.join(words)}")
    return lines


@pytest.fixture(scope="module")
def tiny(e2e, tmp_path_factory):
    """A 2-layer Llama and a file of restaurants; the arguments that name them."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<eos>", "<unk>", ":", "|", "is", "name", *NAMES, *SLOTS]
    words += itertools.chain(*SLOTS.values())
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(words)}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.3, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "pairs.txt").write_text("\n".join(restaurants()) + "\n", encoding="utf-8")
    arguments = ["--model", folder / "model", "--data", folder / "pairs.txt", "--cache", folder]
    return [str(argument) for argument in (*arguments, "--batch-size", 4, "--new-tokens", 8)]


@pytest.fixture
def setting(e2e, tiny, tmp_path):
    """Arguments, corpus, tokenizer and encoded training pairs of the tiny model."""
    args = e2e.parse_args([*tiny, "--steps", "6", "--lr", "1e-2", "--full-lr", "1e-2"])
    corpus = e2e.split(e2e.load_corpus(args.data))
    tokenizer = e2e.AutoTokenizer.from_pretrained(args.model)
    examples = e2e.data.encode_pairs(corpus.train, tokenizer, e2e.MAX_TOKENS)
    return args, corpus, tokenizer, sorted(examples, key=lambda example: len(example[0]))


def sides(e2e, corpus):
    sources = {pair.source for pair in corpus.train}, set(corpus.dev), set(corpus.test)
    texts = [{pair.target for pair in corpus.train}]
    texts += [set(itertools.chain(*part.values())) for part in (corpus.dev, corpus.test)]
    return sources, texts


def assert_nothing_leaks(e2e, corpus):
    sources, texts = sides(e2e, corpus)
    for one, other in itertools.combinations(range(3), 2):
        for key in (e2e.meaning, e2e.family):
            assert not {key(s) for s in sources[one]} & {key(s) for s in sources[other]}
    assert not texts[0] & (texts[1] | texts[2])


def test_no_meaning_is_in_two_splits_nor_with_another_name_or_order(e2e, tiny):
    pairs = e2e.load_corpus(Path(tiny[3]))
    corpus = e2e.split(pairs)
    assert_nothing_leaks(e2e, corpus)
    for part in (corpus.dev, corpus.test):
        families = {e2e.family(source) for source in part}
        assert len(part) == 2 * len(families)  # both names
        assert all(len(texts) == 2 for texts in part.values())  # both orders of the slots


def test_the_side_depends_on_the_pair_alone(e2e, tiny):
    pairs = e2e.load_corpus(Path(tiny[3]))
    _, expected = sides(e2e, e2e.split(pairs))
    random.Random(1).shuffle(pairs)
    assert sides(e2e, e2e.split(pairs))[1] == expected
    with pytest.raises(ValueError, match="expected some of each: give more data"):
        e2e.split(pairs[:1])


def test_a_training_text_that_is_also_held_out_is_dropped(e2e, tiny):
    pairs = e2e.load_corpus(Path(tiny[3]))
    corpus = e2e.split(pairs)
    copied = next(iter(corpus.test.values()))[0]
    again = e2e.split([*pairs, e2e.data.Pair(corpus.train[0].source, copied)])
    assert again == corpus


def test_the_real_data_do_not_leak(e2e):
    if not REAL_DATA.is_dir():
        pytest.skip("the restaurant data are not beside the repository")
    corpus = e2e.split(e2e.load_corpus(REAL_DATA))
    assert_nothing_leaks(e2e, corpus)
    assert len(corpus.train) > 6000 and min(len(corpus.dev), len(corpus.test)) > 60


def test_only_the_tokens_of_the_texts_are_learnt(e2e):
    batch = e2e.data.collate_pairs([([5, 6, 7, 0], 2), ([8, 9], 1)], torch.device("cpu"))
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))

    def model(input_ids, attention_mask, use_cache):
        return type("Output", (), {"logits": logits})

    learnt = [(0, 1, 7), (0, 2, 0), (1, 0, 9)]  # example, place before the token, token
    nll = [-logits[row, place].double().log_softmax(-1)[token] for row, place, token in learnt]
    expected = torch.stack(nll).sum().item()
    assert e2e.reference_loss(model, batch, "sum").item() == pytest.approx(expected, rel=1e-6)
    assert e2e.reference_loss(model, batch, "mean").item() == pytest.approx(expected / 3, rel=1e-6)


def test_the_held_out_loss_is_of_a_token_in_batches_of_any_size(e2e, setting, monkeypatch):
    args, _, _, examples = setting
    model = e2e.build(e2e.Cell("frozen", 0, 0.0, 0), args.model, args)
    few = [*examples[:3], (examples[3][0] * 2, examples[3][1]), *examples[4:7]]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, given in few:
            batch = e2e.data.collate_pairs([(ids, given)], torch.device("cpu"))
            total += (len(ids) - given) * e2e.reference_loss(model, batch, "mean").item()
            tokens += len(ids) - given
    for size in (1, 3, 16):
        monkeypatch.setattr(e2e, "EVAL_BATCH", size)
        found = e2e.held_out_loss(model, few, torch.device("cpu"))
        assert found == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind, r", [("q,v", 4), ("full", 0)])
def test_stopped_after_every_step_training_ends_the_same_bit_for_bit(
    e2e, setting, tmp_path, kind, r, dtype
):
    args, _, _, examples = setting
    args.dtype = dtype
    cell = e2e.Cell(kind, r, 1e-2, 0)

    def trained(checkpoint, deadline):
        model = e2e.build(cell, args.model, args)
        losses, seconds = e2e.train(cell, model, examples, args, checkpoint, deadline)
        assert len(seconds) == args.steps
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        return losses, [p.detach() for p in model.parameters()]

    expected, parameters = trained(tmp_path / "whole.pt", math.inf)
    assert expected[-1] < expected[0]
    for _ in range(args.steps):
        with pytest.raises(e2e.OutOfTime):
            trained(tmp_path / "pieces.pt", -math.inf)
    losses, resumed = trained(tmp_path / "pieces.pt", -math.inf)
    assert losses == expected
    assert all(map(torch.equal, resumed, parameters))


def test_a_write_that_fails_leaves_the_state_before(e2e, tmp_path):
    path = tmp_path / "state"
    with e2e.replaced(path) as scratch:
        scratch.write_text("whole")
    with pytest.raises(OSError, match="full"), e2e.replaced(path) as scratch:
        scratch.write_text("ha")
        raise OSError("the disk is full")
    assert path.read_text() == "whole"


def test_a_batch_generates_what_its_members_generate_alone_merged_or_not(e2e, setting):
    args, corpus, tokenizer, examples = setting
    cell, device = e2e.Cell("all", 4, 3e-2, 0), torch.device("cpu")
    model = e2e.build(cell, args.model, args)
    e2e.train(cell, model, examples, args, args.cache / "generation.pt", math.inf)
    sources = [*list(corpus.test)[:3], "name : Mill"]
    together = e2e.generate(model, tokenizer, sources, 8, device)
    alone = [e2e.generate(model, tokenizer, [source], 8, device)[0] for source in sources]
    e2e.fused_lora.merge_adapter(model)
    assert together == alone == e2e.generate(model, tokenizer, sources, 8, device)
    assert any(together) and not any("<eos>" in text for text in together)


def test_all_targets_have_about_as_many_parameters(e2e, tiny):
    args = e2e.parse_args(tiny)
    sizes = e2e.adapter_sizes(args.model)
    # two layers: q 32 -> 32, k and v 32 -> 16, o 32 -> 32, gate and up 32 -> 48, down 48 -> 32
    attention = {"q": 2 * 64, "q,v": 2 * 112, "q,k,v,o": 2 * 224}
    assert sizes == attention | {"all": 2 * (224 + 3 * 80)}
    cells = e2e.plan(args, sizes)
    ranks = {cell.kind: cell.r for cell in cells if cell.kind not in ("q,v", "frozen", "full")}
    assert ranks == {"q": 28, "q,k,v,o": 8, "all": 4}
    assert sorted({cell.r for cell in cells if cell.kind == "q,v"}) == [1, 4, 16, 64]
    assert len(set(cells)) == len(cells) == 1 + 3 * (4 + 3 + 1)
    assert all(cell.split == "test" for cell in cells)
    args.parts = ["rates"]
    assert {cell.split for cell in e2e.plan(args, sizes)} == {"dev"}


def test_both_scalings_are_2_at_the_reference_and_what_their_names_say(e2e, tiny):
    for scaling, expected in (("rslora", {1: 8.0, 16: 2.0}), ("lora", {1: 32.0, 16: 2.0})):
        args = e2e.parse_args([*tiny, "--scaling", scaling])
        for r, value in expected.items():
            model = e2e.build(e2e.Cell("q,v", r, 1e-3, 0), args.model, args)
            layers = [m for m in model.modules() if isinstance(m, e2e.fused_lora.FusedLoRALinear)]
            assert len(layers) == 4 and {layer.scaling for layer in layers} == {value}


def whole(e2e, tiny, folder, *extra):
    arguments = ["--seeds", "1", "--steps", "20", "--ranks", "1,4", "--lr", "2e-2", *extra]
    arguments += ["--parts", "ranks,targets,full,rates"]
    arguments += ["--full-lr", "1e-2", "--state", str(folder / "state")]
    args = [*tiny, *arguments, "--output", str(folder / "result.json"), "--held-out", "3"]
    return e2e.main(args)


def test_all_runs_reach_the_report_also_in_pieces(e2e, tiny, tmp_path, capsys):
    result = tmp_path / "result.json"
    assert whole(e2e, tiny, tmp_path, "--minutes", "1e-9") == 0
    assert "0 of 14 runs are done: the same command goes on" in capsys.readouterr().out
    assert not result.exists()
    assert whole(e2e, tiny, tmp_path) == 0
    printed = capsys.readouterr().out
    report = json.loads(result.read_text())
    rows = {(row["kind"], row["r"]): row for row in report["summary"]}
    assert len(report["runs"]) == 14 and len(rows) == 8
    losses = {key: row["loss"]["mean"] for key, row in rows.items()}
    assert all(loss < losses["frozen", 0] for key, loss in losses.items() if key[0] != "frozen")
    assert rows["q,v", 4]["trainable"] == 4 * 2 * 112 and rows["frozen", 0]["trainable"] == 0
    assert "q,v r=1 against q,v r=16" in printed and "frozen against q,v r=16" in printed
    assert printed.count("at learning rate") == 6
    assert not list((tmp_path / "state").rglob("*.pt*"))
    assert str(tmp_path) not in result.read_text()
    before = result.read_text()
    assert whole(e2e, tiny, tmp_path) == 0  # nothing is left to do
    assert result.read_text() == before


def test_without_data_or_with_wrong_flags_it_says_what_to_give(e2e, capsys):
    for arguments in ([], ["--data", "nowhere"]):
        with pytest.raises(SystemExit):
            e2e.main(arguments)
        assert "a line `source||target` for each pair" in capsys.readouterr().err
    for arguments, message in (
        (["--model", "nowhere"], "is no folder"),
        (["--parts", "ranks,all"], "--parts has all: expected some of"),
        (["--ranks", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            e2e.main([*arguments, "--data", str(EXAMPLES)])
        assert message in capsys.readouterr().err
