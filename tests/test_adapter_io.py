"""Adapter files: what is saved is what PEFT reads, and the other way; loading switches tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from small_models import Model, inputs, llama, make, paths, plain
from torch import nn

import fused_lora
from fused_lora import apply_lora, load_adapter, save_adapter
from fused_lora.model import lora_layers

load_file = pytest.importorskip("safetensors.torch").load_file
WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "q"]


def trained(seed=0, base_seed=0, **options):
    """A model with random adapters on the base of `base_seed`."""
    model = make(seed=base_seed, target_modules=TARGETS, **options)
    generator = torch.Generator().manual_seed(100 + seed)
    for layer in lora_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data.normal_(generator=generator)
    return model


TOKENS = torch.arange(1, 9).view(2, 4)

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "rank_pattern": {r"layers\.0\..*q_proj": 5, "v_proj": 2},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 1.5},
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_peft_loads_what_was_saved_with_identical_logits(case, tmp_path):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], **OPTIONS[case]}
    model = apply_lora(llama(), r=4, lora_alpha=6, init_lora_weights=False, **options)
    expected = model(TOKENS).logits
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert not torch.allclose(expected, llama()(TOKENS).logits)
    torch.testing.assert_close(theirs(TOKENS).logits, expected)
    theirs.save_pretrained(tmp_path / "back")
    back = load_adapter(llama(), tmp_path / "back")
    assert torch.equal(back(TOKENS).logits, expected)
    config = json.loads((tmp_path / "adapter_config.json").read_bytes())
    assert config["task_type"] == "CAUSAL_LM"
    if case == "plain":
        assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]


def test_a_layer_under_two_names_is_warned_of(tmp_path):
    """PEFT adapts the first of its places alone."""
    model = make(target_modules=["shared", "q"])
    with pytest.warns(UserWarning, match="shared is used under several names"):
        save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="shared is used under several names"):
        other = load_adapter(plain(), tmp_path)
    assert torch.equal(other(inputs()), model(inputs()))


def test_a_named_adapter_is_kept_as_peft_keeps_it(tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(trained(), tmp_path, name="task")
    assert {path.name for path in tmp_path.iterdir()} == {"task"}
    wrapped = peft.PeftModel.from_pretrained(plain(), tmp_path / "task", adapter_name="task")
    wrapped.save_pretrained(tmp_path / "peft")
    ours = load_adapter(plain(), tmp_path / "peft", name="task")
    assert torch.equal(ours(inputs()), trained()(inputs()))


@pytest.mark.parametrize("keep_base", [None, True, "cpu"])
@pytest.mark.parametrize("r", [3, 5])
def test_loading_into_a_live_model_switches_tasks(keep_base, r, tmp_path):
    model, other = trained(), trained(seed=1, r=r, use_rslora=True, lora_dropout=0.1)
    save_adapter(other, tmp_path / "other")
    save_adapter(model, tmp_path / "first")
    x = inputs()
    before = model(x)
    if keep_base is not None:
        fused_lora.merge_adapter(model, keep_base)
        fused_lora.merge_adapter(other)
        merged = model(x)
    factor = model.layers[0].q.lora_A
    assert load_adapter(model, tmp_path / "other") is model
    assert torch.equal(model.eval()(x), other.eval()(x))
    layer = model.layers[0].q
    assert layer.merged == (keep_base is not None)
    assert (layer.lora_A is factor) == (r == 3)
    assert (layer.r, layer.use_rslora, layer.lora_dropout) == (r, True, 0.1)
    load_adapter(model, tmp_path / "first")
    assert torch.equal(model(x), before if keep_base is None else merged)
    if keep_base is not None:
        fused_lora.unmerge_adapter(model)
        assert torch.equal(layer.weight, plain().layers[0].q.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_adapter_dtype_survives_bit_for_bit(dtype, tmp_path):
    model = trained(adapter_dtype=dtype)
    save_adapter(model, tmp_path)
    loaded = load_adapter(plain(), tmp_path)
    for path, layer in lora_layers(model).items():
        twin = loaded.get_submodule(path)
        assert twin.lora_A.dtype == dtype
        assert torch.equal(twin.lora_A, layer.lora_A) and torch.equal(twin.lora_B, layer.lora_B)


class Suffixes(nn.Module):
    """Paths that are the ends of other paths, and names that an expression would misread."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.enc = nn.ModuleDict({"q": nn.Linear(4, 4), "axq": nn.Linear(4, 4)})
        self.h = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(12))

    def forward(self, x):
        for block in self.h:
            x = x + block["q"](x)
        return self.enc["axq"](self.enc["q"](self.q(x)))


@pytest.mark.parametrize("targets", [["h.1.q"], "q", r"(enc\.)?q|h\.1\.q", r"enc\.a.q|h\.1?1\.q"])
def test_paths_that_end_other_paths_keep_their_own_rank_and_target(targets, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = apply_lora(
        Suffixes(), r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False
    )
    for n, layer in enumerate(lora_layers(model).values()):
        r, alpha = (5, 9) if n == 0 else (2, 4)  # the path that ends the others is the odd one
        A, B = torch.randn(r, 4), torch.randn(4, r)
        layer.set_adapter(A, B, lora_alpha=alpha, use_rslora=n % 2 == 1)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(Suffixes(), tmp_path)
    torch.manual_seed(0)
    ours, x = load_adapter(Suffixes(), tmp_path), torch.randn(3, 4)
    torch.testing.assert_close(ours(x), model(x))
    torch.testing.assert_close(theirs(x), model(x))
    assert paths(ours) == paths(model)


@pytest.mark.parametrize("pattern", ["alpha_pattern", "rank_pattern"])
def test_a_pattern_survives_the_order_in_which_files_hold_it(pattern, tmp_path):
    """Paths of which one ends the other, the odd ones out, and first in the file the shorter."""
    peft = pytest.importorskip("peft")
    values = {r"^tower\.q": 9, "^q": 3}
    options = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", pattern: values}

    def base():
        torch.manual_seed(0)
        tower = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in ("k", "v", "q")))
        return nn.Sequential(OrderedDict(tower=tower, q=nn.Linear(4, 4)))

    model, x = apply_lora(base(), **options, init_lora_weights=False), torch.randn(3, 4)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(base(), tmp_path)(x), model(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path)(x), model(x))


def test_gpt2_adapters_travel_to_peft_and_back(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8)

    def base():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()

    model = apply_lora(base(), r=2, lora_alpha=4, init_lora_weights=False)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_bytes())["fan_in_fan_out"] is True
    expected = model(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, expected)
    assert torch.equal(load_adapter(base(), tmp_path)(TOKENS).logits, expected)


def test_what_cannot_be_saved_is_refused_and_the_last_save_stays(tmp_path):
    model = trained()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"bias must be one of none, lora_only, all: got 'some'"):
        save_adapter(model, tmp_path, bias="some")
    with pytest.raises(ValueError, match=r"modules_to_save has 'nope'.*the model has none"):
        save_adapter(model, tmp_path, modules_to_save=["nope"])
    with pytest.raises(ValueError, match=r"'layers'.*it holds the LoRA layer layers.0.q_proj"):
        save_adapter(model, tmp_path, modules_to_save=["layers"])
    with pytest.raises(ValueError, match=r"'../x' is not a valid adapter name"):
        save_adapter(model, tmp_path, name="../x")
    with pytest.raises(ValueError, match=r"holds no LoRA layer"):
        save_adapter(plain(), tmp_path)
    model.layers[1].q.lora_B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.q.lora_B.weight holds NaN or infinity"):
        save_adapter(model, tmp_path)
    with torch.device("meta"):
        empty = Model()
    with pytest.raises(ValueError, match=r"q_proj.lora_A is not initialised"):
        save_adapter(apply_lora(empty, r=2, lora_alpha=4), tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_library_works_without_safetensors_and_says_what_adapters_need(tmp_path):
    code = """
import sys
sys.modules["safetensors"] = None
import fused_lora, torch
model = fused_lora.apply_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), r=2, lora_alpha=4)
try:
    fused_lora.save_adapter(model, sys.argv[1])
except ImportError as error:
    print(error)
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'fused-lora[adapters]'" in done.stdout


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
import torch
from fused_lora import apply_lora, load_adapter, save_adapter
from fused_lora.model import lora_layers

folder = sys.argv[1]

def make():
    torch.manual_seed(0)
    return apply_lora(torch.nn.Sequential(torch.nn.Linear(64, 64)), r=8, lora_alpha=8)

def fill(model, number):
    for layer in lora_layers(model).values():
        layer.lora_A.data.fill_(number)
        layer.lora_B.data.fill_(-number)

torch.set_num_threads(1)
model, last, rng = make(), 1, random.Random(0)
fill(model, last)
save_adapter(model, folder)
for _ in range(60):
    saved, announce = os.pipe()
    child = os.fork()
    if child == 0:
        for number in range(last + 1, last + 10_000):
            fill(model, number)
            save_adapter(model, folder)
            os.write(announce, b".")
    assert os.read(saved, 1) == b"."  # one save is complete
    time.sleep(rng.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved), os.close(announce)
    (layer,) = lora_layers(load_adapter(make(), folder)).values()
    numbers = {*layer.lora_A.unique().tolist(), *(-layer.lora_B).unique().tolist()}
    assert len(numbers) == 1, f"factors of different saves: {numbers}"
    assert min(numbers) > last, (numbers, last)
    last = int(min(numbers))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")
def test_killed_at_random_moments_a_save_leaves_the_last_complete_adapter(tmp_path):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
