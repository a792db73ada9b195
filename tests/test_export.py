"""Exported adapters mean to each server what they mean here, by the rules of its own loader."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import apply_lora, export_adapter, load_adapter, save_adapter
from fused_lora.model import lora_layers

load_file = pytest.importorskip("safetensors.torch").load_file
PREFIX = "base_model.model."


class Block(nn.Module):
    """Grouped-query attention and a gated MLP, with the names servers know."""

    def __init__(self):
        super().__init__()
        for name, out in (("q_proj", 12), ("k_proj", 6), ("v_proj", 6), ("gate_proj", 20)):
            setattr(self, name, nn.Linear(12, out))
        self.up_proj, self.score = nn.Linear(12, 20), nn.Linear(12, 2)


def model_with(targets, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))})
    options = {"r": 4, "lora_alpha": 6} | options
    return apply_lora(model, target_modules=targets, init_lora_weights=False, **options)


def read(directory):
    config = json.loads((directory / "adapter_config.json").read_bytes())
    return config, load_file(directory / "adapter_model.safetensors")


def served(directory, server):
    """{path: scaling * B A} as the loader of `server` computes it, after its own refusals."""
    config, tensors = read(directory)
    assert isinstance(config["target_modules"], list)
    if server == "vllm":
        assert config["bias"] == "none" and not config["use_dora"]
        assert config["init_lora_weights"] in (True, "gaussian", "eva", "orthogonal")
        assert set(config["modules_to_save"] or ()) <= {"classifier", "score"}
        root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
        scaling = config["lora_alpha"] / root
    else:
        scaling = config["lora_alpha"] / config["r"]
    deltas = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        path = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        parent, name = path.rsplit(".", 1)
        assert name in config["target_modules"]
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert A.shape[0] == B.shape[1] == config["r"]
        if server == "sglang":  # stacked: a KeyError if one of them is not there
            group = ("q_proj", "k_proj", "v_proj") if name[0] in "qkv" else ("gate_proj", "up_proj")
            stacked = [tensors[f"{PREFIX}{parent}.{n}.lora_A.weight"] for n in group]
            torch.cat(stacked)
        deltas[path] = scaling * B.double() @ A.double()
    return deltas


ADAPTERS = {
    "all": (["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], {}),
    "query and value": (["q_proj", "v_proj"], {}),
    "query alone": (["q_proj"], {}),
    "key and gate": (["k_proj", "gate_proj"], {}),
    "rslora": (["q_proj", "v_proj"], {"use_rslora": True, "r": 5}),
    "uneven alpha": (["q_proj", "v_proj"], {"lora_alpha": 0.3}),
    "patterns": (
        ["q_proj", "v_proj", "up_proj"],
        {"rank_pattern": {"0.q_proj": 7, "up_proj": 1}, "alpha_pattern": {"1.v_proj": 17}},
    ),
    "16 bits": (["q_proj", "v_proj"], {"adapter_dtype": torch.bfloat16}),
    "16 bits, rslora": (["q_proj"], {"adapter_dtype": torch.bfloat16, "use_rslora": True}),
}


@pytest.mark.parametrize("source", ["model", "directory"])
@pytest.mark.parametrize("server", ["vllm", "sglang", "peft"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_server_computes_what_the_model_does(case, server, source, tmp_path):
    targets, options = ADAPTERS[case]
    model = model_with(targets, **options)
    given = model
    if source == "directory":
        save_adapter(model, tmp_path / "saved")
        given = tmp_path / "saved"
    incomplete = server == "sglang" and targets in (["q_proj"], ["k_proj", "gate_proj"])
    if incomplete and source == "directory":
        with pytest.raises(ValueError, match=r"layers.0.*size is not in the files: pass the model"):
            export_adapter(given, tmp_path / "out", for_=server)
        assert not (tmp_path / "out").exists()
        return
    export_adapter(given, tmp_path / "out", for_=server)
    layers = lora_layers(model)
    if server == "peft":
        twin = model_with(targets)
        load_adapter(twin, tmp_path / "out")
        for path, layer in lora_layers(twin).items():
            assert torch.equal(layer.delta_weight(), layers[path].delta_weight())
        return
    deltas = served(tmp_path / "out", server)
    assert set(layers) <= set(deltas)
    for path, delta in deltas.items():
        expected = torch.zeros_like(delta)
        if path in layers:
            layer = layers[path]
            expected = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        assert (delta - expected).abs().max() <= 2e-7 * expected.abs().max()
    config, tensors = read(tmp_path / "out")
    assert isinstance(config["lora_alpha"], int) and not config["use_rslora"]
    if case == "16 bits":  # nothing had to be folded: not a bit is changed
        kept = tensors[f"{PREFIX}layers.0.q_proj.lora_B.weight"]
        assert torch.equal(kept, layers["layers.0.q_proj"].lora_B)


def test_what_a_server_cannot_express_is_refused(tmp_path):
    model = model_with(["q_proj", "v_proj"])
    save_adapter(model, tmp_path / "bias", bias="lora_only")
    save_adapter(model, tmp_path / "head", modules_to_save=["score"])
    for server in ("vllm", "sglang"):
        with pytest.raises(ValueError, match=rf"{server} cannot load trained biases \(bias='lora_"):
            export_adapter(tmp_path / "bias", tmp_path / "out", for_=server)
    with pytest.raises(ValueError, match=r"sglang cannot load the whole module 'score'"):
        export_adapter(tmp_path / "head", tmp_path / "out", for_="sglang")
    with pytest.raises(ValueError, match=r"for_ must be 'vllm', 'sglang' or 'peft': got 'tgi'"):
        export_adapter(model, tmp_path / "out", for_="tgi")
    assert not (tmp_path / "out").exists()
    export_adapter(tmp_path / "head", tmp_path / "out", for_="vllm")
    config, tensors = read(tmp_path / "out")
    assert config["modules_to_save"] == ["score"]
    assert torch.equal(tensors[f"{PREFIX}layers.1.score.weight"], model["layers"][1].score.weight)


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = model_with(["q_proj"], use_rslora=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_adapter(model, tmp_path, for_="sglang")
    after = fused_lora.lora_state_dict(model)
    assert after.keys() <= before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("source", ["model", "directory"])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_one_adapter_of_packs_is_exported_by_its_name(server, source, tmp_path):
    given = tmp_path / "all"
    twins = {}
    for name, targets in (("one", ["q_proj"]), ("two", ["q_proj", "v_proj"])):
        twins[name] = model_with(targets, use_rslora=name == "two")
        save_adapter(twins[name], given, name=name)
    if source == "model":
        model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))})
        folders = {name: given / name for name in twins}
        given = apply_lora(model, adapters=folders)
    export_adapter(given, tmp_path / "out", for_=server, name="two")
    deltas = served(tmp_path / "out", server)
    for path, layer in lora_layers(twins["two"]).items():
        torch.testing.assert_close(deltas[path].float(), layer.delta_weight())


def test_a_name_where_there_is_one_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has one adapter: leave name out"):
        export_adapter(model_with(["q_proj"]), tmp_path, for_="vllm", name="a")
    assert list(tmp_path.iterdir()) == []
