"""examples/paper.py on a tiny model: one budget, runs that go on where they were stopped, a base
that is restored, and the whole path."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def paper():
    pytest.importorskip("transformers", reason="the example needs the extra `examples`")
    sys.path.insert(0, str(EXAMPLES))
    try:
        import paper

        yield paper
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def runs(paper):
    import paper_runs

    return paper_runs


@pytest.fixture(scope="module")
def tiny(paper, tmp_path_factory):
    """A 2-layer BERT as wide as r=64 needs and 200 sentences labelled by a word; arguments that
    name them."""
    import tokenizers
    import transformers

    folder, rng = tmp_path_factory.mktemp("tiny"), random.Random(0)
    words = ["fine", "dull", *(f"word{i}" for i in range(20))]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": len(vocabulary)}
    config = transformers.BertConfig(**sizes, max_position_embeddings=64, initializer_range=0.2)
    transformers.BertModel(config).save_pretrained(folder / "model")
    lines = []
    for i in range(300):
        sentence = [words[i % 2], *rng.choices(words[2:], k=rng.randrange(3, 9))]
        lines.append(f"{words[i % 2]}\t{' '.join(sentence)}\n")
    (folder / "text.tsv").write_text("".join(lines))
    return ["--model", str(folder / "model"), "--data", str(folder / "text.tsv")]


def study(paper, tiny, cache, *options, steps=2, seeds=3):
    args = paper.parse_args([*tiny, "--cache", str(cache), *options])
    sizes = {"batch_size": 4, "max_tokens": 16, "held_out": 20}
    return paper.Study(args, paper.Protocol(steps=steps, seeds=seeds, **sizes))


def test_the_budget_is_one_number_of_parameters(paper, runs, tiny, tmp_path):
    encoder = study(paper, tiny, tmp_path).encoder
    sizes = {
        sum(tensor.numel() for tensor in runs.trained(runs.build(m, encoder, 2, 0)).values())
        for m in paper.BUDGET
    }
    assert sizes == {2 * 64 + 2 + 2 * 8 * (64 + 64)} and len(paper.BUDGET) == 7


def test_runs_of_a_seed_share_the_head_and_no_adapter_begins_inside_another(
    paper, runs, tiny, tmp_path
):
    encoder = study(paper, tiny, tmp_path).encoder
    methods = paper.RANKS[8], paper.RANKS[64], paper.FULL
    small, large, full = (runs.build(method, encoder, 2, 0) for method in methods)
    assert torch.equal(small.head.weight, large.head.weight)
    assert torch.equal(small.head.weight, full.head.weight)
    A8, A64 = (
        model.encoder.encoder.layer[0].attention.self.query.lora_A for model in (small, large)
    )
    assert not torch.equal(A8, A64[:8])


@pytest.mark.parametrize("kind", ["head", "bias", "lora"])
def test_only_what_a_method_names_is_trained(paper, runs, tiny, tmp_path, kind):
    own = study(paper, tiny, tmp_path)
    method = paper.RANKS[4] if kind == "lora" else paper.Method(kind)
    job = runs.Job(method, 0, 1e-2, "test")
    before = runs.build(method, own.encoder, 2, 0).state_dict()
    model, _ = runs.train(job, own.protocol, own.encoder, 2, own.sets)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed >= {"head.weight", "head.bias"} and (len(changed) > 2) == (kind != "head")
    assert all(kind in name for name in changed if not name.startswith("head."))


def test_a_stopped_study_gives_what_one_in_one_go_gives(paper, tiny, tmp_path, monkeypatch):
    def answers(results):
        return [(run.method, run.seed, run.last_loss, run.loss, run.right) for run in results]

    jobs = [paper.Job(m, s, 1e-3, "test") for m in (paper.RANKS[8], paper.FULL) for s in (0, 1)]
    whole = study(paper, tiny, tmp_path / "a").run("all", jobs)
    train, trained = paper.train, []

    def interrupted(job, *rest, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(job)
        return train(job, *rest, **options)

    monkeypatch.setattr(paper, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(paper, tiny, tmp_path / "b").run("all", jobs)
    trained.clear()
    assert answers(study(paper, tiny, tmp_path / "b").run("all", jobs)) == answers(whole)
    assert trained == jobs[2:]
    with pytest.raises(paper.OutOfTime):
        study(paper, tiny, tmp_path / "c", "--minutes", "0").run("all", jobs)


def test_runs_of_other_settings_or_data_are_never_found(paper, tiny, tmp_path):
    job = paper.Job(paper.HEAD, 0, 1e-3, "test")
    first = study(paper, tiny, tmp_path)
    first.run("one", [job])
    assert study(paper, tiny, tmp_path).finished.result(job) is not None
    text = tmp_path / "other.tsv"
    text.write_text(Path(tiny[3]).read_text() + "fine\tfine word1\n")
    assert study(paper, [*tiny[:3], str(text)], tmp_path).finished.result(job) is None
    assert study(paper, tiny, tmp_path, steps=3).finished.result(job) is None
    assert study(paper, tiny, tmp_path, seeds=4).finished.result(job) is not None  # seeds are added


def test_dev_and_test_share_no_sentence_with_the_training_set(paper):
    examples = [paper.data.Example(f"sentence {i}", str(i % 2)) for i in range(2000)]
    rest, test = paper.data.split(examples)
    train, dev = paper.split_dev(rest)
    assert len(train) + len(dev) + len(test) == 2000 and 80 < len(dev) < 150
    assert not {e.text for e in train} & {e.text for e in dev + test}


def test_gradients_and_optimizer_state_are_those_of_what_trains(paper, tiny, tmp_path):
    own = study(paper, tiny, tmp_path)
    rows = paper.paper_costs.memory(own.encoder, 2, [paper.FULL, paper.RANKS[8]], own.sets["dev"])
    for row in rows.values():
        assert row["gradient_bytes"] == 4 * row["trainable"]
        assert row["optimizer_bytes"] == 8 * row["trainable"]
        assert row["peak_bytes"] > 12 * row["trainable"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_switch_that_does_not_restore_the_base_is_seen(
    paper, runs, tiny, tmp_path, monkeypatch, broken
):
    own = study(paper, tiny, tmp_path)
    jobs = [runs.Job(paper.RANKS[8], seed, 1e-2, "test") for seed in (0, 1)]
    own.run("two", jobs)
    models = [
        paper.paper_costs.adapted(own.encoder, job.method, own.finished.factors(job))
        for job in jobs
    ]
    layer = type(models[0].encoder.layer[0].attention.self.query)
    if broken:  # subtracts the update instead of keeping W0
        kept = layer.base_weight
        monkeypatch.setattr(
            layer,
            "base_weight",
            lambda self: self.weight - self.delta_weight() if self.merged else kept(self),
        )
    found = paper.paper_costs.switching(own.encoder, models)
    assert found["base_restored"] is not broken
    assert found["merged_again_equal"] is not broken
    assert 0 < found["adapter_bytes"] < found["model_bytes"]


def test_quick_runs_to_the_end_and_its_status_tells_of_a_base_not_restored(
    paper, tiny, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib", reason="the pictures need the extra `bench`")
    costs = paper.paper_costs
    latency = costs.latency
    monkeypatch.setattr(costs, "latency", lambda encoder, make, seconds: latency(encoder, make, 0))
    monkeypatch.setattr(costs.protocol, "input_sets", lambda *_: 2)
    monkeypatch.setattr(paper.machine, "describe", lambda *_: {"date": "2026-01-31"})
    command = [*tiny, "--quick", "--steps", "1", "--held-out", "10"]
    command += ["--cache", str(tmp_path), "--output", str(tmp_path / "out")]
    assert paper.main(command) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    stem = "paper-model-quick-2026-01-31"
    pictures = {f"{stem}-{what}.png" for what in ("accuracy", "ranks", "seeds", "costs")}
    assert written == {f"{stem}.json", *pictures}
    document = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
    assert len(document["runs"]) == 3 * len(paper.METHODS) == 3 * 14
    assert document["costs"]["switching"]["base_restored"] is True
    assert set(document["rates"]) == {"lora", "full", "bias", "head"}
    printed = capsys.readouterr().out
    assert all(finding["claim"] in printed for finding in document["findings"])

    def refuse(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(paper, "train", refuse)
    monkeypatch.setattr(paper, "draw", lambda *_: None)
    document["costs"]["switching"]["base_restored"] = False
    monkeypatch.setattr(paper.Study, "costs", lambda *_, **__: document["costs"])
    assert paper.main(command) == 1
