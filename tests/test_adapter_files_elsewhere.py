"""Adapter files as other programs write them, and models as other programs wrap them."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import assert_untouched, described, inputs, make, paths, plain
from torch import nn

import fused_lora
from fused_lora import load_adapter, save_adapter
from fused_lora.targets import match_pattern

pytest.importorskip("safetensors")
peft = pytest.importorskip("peft", reason="needs the extra `peft`")


class Inside(nn.Module):
    """Layers where PEFT looks for their numbers: two names deep."""

    def __init__(self):
        super().__init__()
        self.model = plain()

    def forward(self, x):
        return self.model(x)


def theirs(base=plain, **options):
    """PEFT's model over a plain one, with adapters that are not zero."""
    config = {"r": 3, "target_modules": ["q_proj", "v_proj"]} | options
    model = peft.get_peft_model(base(), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator)
    return model


def edited(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | fields))


CONFIGS = {
    "every field at its default": {},
    "one layer": {"layers_to_transform": [1]},
    "the layer 0": {"layers_to_transform": 0},
    "layers by pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "no layers named": {"layers_to_transform": []},
    "expressions": {
        "target_modules": r".*\.(q_proj|v_proj)",
        "rank_pattern": {r"^(?!.*lm_head).*\.0\..*$": 2, r"(model\.)?layers\.(1|2)\.q_.*": 5},
        "alpha_pattern": {r"layers\.[01]\.(q|v)_proj": 7},
    },
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_saves_is_loaded(case, tmp_path):
    model = theirs(Inside, **CONFIGS[case])
    model.save_pretrained(tmp_path)
    ours = load_adapter(Inside(), tmp_path)
    torch.testing.assert_close(ours(inputs()), model(inputs()))
    layers = [name for name, m in model.named_modules() if hasattr(m, "base_layer")]
    assert paths(ours) == sorted(name.removeprefix("base_model.model.") for name in layers)


@pytest.mark.parametrize("layers", [[0], [1]])
def test_layers_to_transform_of_nested_blocks_are_loaded(layers, tmp_path):
    """Where a path has several numbers, versions of PEFT differ in which is the layer's."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=31)

    def base():
        torch.manual_seed(0)
        config = transformers.T5Config(decoder_start_token_id=0, **sizes)
        return transformers.T5ForConditionalGeneration(config).eval()

    model = theirs(base, target_modules=["q", "wo", "lm_head"], layers_to_transform=layers)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(1, 9).view(2, 4)
    given = {"input_ids": tokens, "decoder_input_ids": tokens}
    ours = load_adapter(base(), tmp_path)
    torch.testing.assert_close(ours(**given).logits, model(**given).logits)


@pytest.mark.parametrize("init", ["eva", "orthogonal", "mica"])
def test_an_initialisation_that_left_the_base_alone_is_loaded(init, tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    edited(tmp_path, init_lora_weights=init, eva_config={"rho": 2.0} if init == "eva" else None)
    torch.testing.assert_close(load_adapter(plain(), tmp_path)(inputs()), model(inputs()))


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused(init, tmp_path):
    theirs().save_pretrained(tmp_path)
    fields = {f"{init}_config": {"scale": "stable"}} if init in ("corda", "lora_ga") else {}
    edited(tmp_path, init_lora_weights=init, **fields)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{init}', which changes the base"):
        load_adapter(plain(), tmp_path)


def test_a_layer_that_the_configuration_names_and_the_file_lacks_is_missed(tmp_path):
    theirs(Inside, layers_to_transform=[1]).save_pretrained(tmp_path)
    edited(tmp_path, layers_to_transform=[0, 1])
    with pytest.raises(ValueError, match=r"has no .*layers.0.q_proj.*target_modules"):
        load_adapter(Inside(), tmp_path)


def test_long_lists_are_refused_in_a_short_message(tmp_path):
    theirs().save_pretrained(tmp_path)
    edited(tmp_path, target_modules=[f"x{i}" for i in range(5000)])
    with pytest.raises(ValueError, match="fits no module") as raised:
        load_adapter(plain(), tmp_path)
    assert len(str(raised.value)) < 1000
    edited(tmp_path, target_modules=None, rank_pattern={f"x{i}.*": 3 for i in range(300)})
    with pytest.raises(ValueError, match="rank_pattern has 300 expressions, at most 256 are read"):
        load_adapter(plain(), tmp_path)
    edited(tmp_path, rank_pattern={f"x{i}": 3 for i in range(5000)})
    assert paths(load_adapter(plain(), tmp_path))


def test_an_expression_that_would_run_for_ever_is_given_up():
    path = "model.layers.12.self_attn.q_proj"
    with pytest.raises(ValueError, match=r"takes more than 0\.25 s to match 'model\.layers"):
        match_pattern(["([a-z]|[a-z_0-9.])*[!?]"], path)
    assert match_pattern(["(.*)*b", r"(\w+\.)*self_attn\.[qv]_proj"], path) is not None


class Wrapped(nn.parallel.DistributedDataParallel):
    """DDP without a process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize("compiled", [False, True])
def test_what_data_parallelism_wraps_is_saved_under_the_models_own_names(compiled, tmp_path):
    model = make(target_modules=["q_proj", "v_proj"])
    wrapped = Wrapped(torch.compile(model, backend="eager") if compiled else model)
    wrapped = torch.compile(wrapped, backend="eager") if compiled else wrapped
    save_adapter(wrapped, tmp_path, bias="all")
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path)
    torch.testing.assert_close(loaded(inputs()), model(inputs()))
    other = make(seed=1, target_modules=["q_proj", "v_proj"])
    around = Wrapped(other)
    assert load_adapter(around, tmp_path) is around
    assert torch.equal(other.layers[1].q_proj.lora_B, model.layers[1].q_proj.lora_B)


def test_a_peft_model_is_refused_with_the_way_to_go(tmp_path):
    save_adapter(make(target_modules=["q_proj", "v_proj"]), tmp_path)
    model = theirs()
    before = described(model)
    for call in (
        lambda: load_adapter(model, tmp_path),
        lambda: save_adapter(model, tmp_path),
        lambda: fused_lora.merge_adapter(model),
        lambda: fused_lora.explain(model),
    ):
        with pytest.raises(ValueError, match=r"no LoRA layer: its adapters are PEFT's, which .*"):
            call()
    assert_untouched(model, before)
