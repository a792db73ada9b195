"""Hostile and broken adapter files: an error that names the key or field, and a model that is
exactly as it was."""

from __future__ import annotations

import json
import pickle
import shutil
import struct

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import assert_untouched, described, inputs, make, plain

import fused_lora
from fused_lora import load_adapter, save_adapter
from fused_lora.model import lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = PREFIX + "layers.0.q.lora_A.weight", PREFIX + "layers.0.q.lora_B.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """An adapter directory that fits the model."""
    folder = tmp_path_factory.mktemp("good")
    save_adapter(make(seed=1, target_modules=["q", "v_proj"]), folder)
    return folder


def copied(good, tmp_path):
    return shutil.copytree(good, tmp_path / "adapter")


def with_config(**fields):
    def change(folder):
        config = json.loads((folder / CONFIG).read_bytes()) | fields
        config = {name: value for name, value in config.items() if value is not ...}
        (folder / CONFIG).write_text(json.dumps(config))

    return change


def with_tensors(**options):
    """Change the tensors of the file: {key: new tensor or None to leave it out}."""

    def change(folder):
        tensors = safetensors.load_file(folder / WEIGHTS) | options["tensors"]
        tensors = {key: value for key, value in tensors.items() if value is not None}
        safetensors.save_file(tensors, folder / WEIGHTS)

    return change


def put(key, value):
    return with_tensors(tensors={key: value})


def with_header(change):
    """Rewrite the JSON header of the safetensors file, its data as they are."""

    def apply(folder):
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return apply


def raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncated(name, keep):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:keep])

    return change


def only_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def is_folder(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


NAN, INF = torch.full((3, 12), float("nan")), torch.zeros(3, 12)
INF[2, 11] = float("-inf")
HUGE = {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 144]}

BROKEN = {
    # what is done to the directory, then what the message says
    "lora_A of another rank": (put(A, torch.zeros(4, 12)), A, "(4, 12)", "r = 3"),
    "lora_B transposed": (put(B, torch.zeros(3, 12)), B, "(3, 12)", "[out, r] with r = 3"),
    "lora_A of another layer": (put(A, torch.zeros(3, 13)), A, "(3, 13)", "expects (3, 12)"),
    "lora_A is no matrix": (put(A, torch.zeros(3)), A, "(3,)"),
    "lora_B is missing": (put(B, None), "has no " + B),
    "a layer is missing": (with_tensors(tensors={A: None, B: None}), "has no " + A),
    "a layer too many": (
        with_tensors(
            tensors={
                PREFIX + "layers.7.q.lora_A.weight": torch.zeros(3, 12),
                PREFIX + "layers.7.q.lora_B.weight": torch.zeros(12, 3),
            }
        ),
        PREFIX + "layers.7.q.lora_A.weight",
        "not among",
    ),
    "a base weight": (put(PREFIX + "layers.0.q.weight", torch.zeros(12, 12)), "layers.0.q.weight"),
    "a bias nobody announced": (put(PREFIX + "norm.bias", torch.zeros(12)), "norm.bias"),
    "no prefix": (put("layers.0.q.lora_A.weight", torch.zeros(3, 12)), "has layers.0.q.lora_A"),
    "a path trick": (
        put(PREFIX + "../../etc/passwd.lora_A.weight", torch.zeros(3, 12)),
        "../../etc/passwd",
    ),
    "an attribute trick": (
        with_tensors(
            tensors={
                PREFIX + "__class__.lora_A.weight": torch.zeros(3, 12),
                PREFIX + "__class__.lora_B.weight": torch.zeros(12, 3),
            }
        ),
        "__class__.lora_A.weight",
    ),
    "DoRA's magnitude": (put(PREFIX + "layers.0.q.lora_magnitude_vector", torch.ones(12)), "magn"),
    "NaN": (put(A, NAN), A, "NaN or infinity"),
    "infinity": (put(A, INF), A, "NaN or infinity"),
    "integers": (put(A, torch.zeros(3, 12, dtype=torch.int32)), A, "dtype I32"),
    "eight bits": (put(A, torch.zeros(3, 12).to(torch.float8_e4m3fn)), A, "dtype F8_E4M3"),
    "no tensors": (lambda d: safetensors.save_file({}, d / WEIGHTS), "no lora_A and lora_B"),
    "truncated data": (truncated(WEIGHTS, -40), WEIGHTS, "not a safetensors file"),
    "truncated header": (truncated(WEIGHTS, 30), WEIGHTS, "not a safetensors file"),
    "an empty file": (truncated(WEIGHTS, 0), WEIGHTS, "not a safetensors file"),
    "a huge header": (raw(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), "not a safetensors file"),
    "a huge tensor": (with_header(lambda h: h.update({A: HUGE})), "not a safetensors file"),
    "overlapping tensors": (
        with_header(lambda h: h[A].update(data_offsets=h[B]["data_offsets"])),
        "not a safetensors file",
    ),
    "pickle in disguise": (raw(WEIGHTS, pickle.dumps({A: 1})), "not a safetensors file"),
    "pickle": (only_pickle, "adapter_model.bin is pickle, which is never read"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "a folder as weights": (is_folder, f"{WEIGHTS} is missing"),
    "no configuration": (lambda d: (d / CONFIG).unlink(), f"{CONFIG} is missing"),
    "truncated configuration": (truncated(CONFIG, 30), f"{CONFIG} is not JSON"),
    "a list as configuration": (raw(CONFIG, b"[]"), "must hold an object"),
    "a deep configuration": (raw(CONFIG, b"[" * 200_000), f"{CONFIG} is not JSON"),
    "a field twice": (raw(CONFIG, b'{"r": 1, "r": 3}'), "'r' is given twice"),
    "NaN as alpha": (with_config(lora_alpha=float("nan")), "NaN is not a number"),
    "an infinite alpha": (
        lambda d: (d / CONFIG).write_text(
            (d / CONFIG).read_text().replace('"lora_alpha": 6', '"lora_alpha": 1e999')
        ),
        "lora_alpha must be a finite number",
    ),
    "no r": (with_config(r=...), "has no r"),
    "no alpha": (with_config(lora_alpha=...), "has no lora_alpha"),
    "rank 0": (with_config(r=0), "r must be an integer of at least 1: got 0"),
    "rank true": (with_config(r=True), "r must be an integer of at least 1: got True"),
    "a huge rank": (with_config(r=2**40), "lora_A.weight is (3, 12)", "r = 1099511627776"),
    "another kind": (with_config(peft_type="IA3"), "peft_type must be 'LORA'"),
    "an unknown field": (with_config(use_magic=True), "use_magic is True"),
    "DoRA": (with_config(use_dora=True), "use_dora is True"),
    "a bias on lora_B": (with_config(lora_bias=True), "lora_bias is True"),
    "replicated layers": (with_config(layer_replication=[[0, 2]]), "layer_replication is [[0, 2]]"),
    "PiSSA": (with_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "an unknown bias": (with_config(bias="some"), "bias must be none, all or lora_only"),
    "a rank pattern of words": (with_config(rank_pattern={"q": "3"}), "rank_pattern must be"),
    "another rank by pattern": (with_config(rank_pattern={"0.q": 4}), "layers.0.q.", "r = 4"),
    "a pattern that is none": (with_config(rank_pattern={"(": 4}), "rank_pattern: ", "'(' is no"),
    "targets of numbers": (with_config(target_modules=[1]), "target_modules must be"),
    "a dropout of 1": (with_config(lora_dropout=1.0), "lora_dropout must be a number in [0, 1)"),
}
MODELS = {
    "live": lambda: make(target_modules=["q", "v_proj"]),
    "merged": lambda: merged(),
    "plain": plain,
}


def merged():
    model = make(target_modules=["q", "v_proj"])
    fused_lora.merge_adapter(model)
    return model


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_by_name_and_the_model_is_as_it_was(case, good, tmp_path):
    change, *said = BROKEN[case]
    folder = copied(good, tmp_path)
    change(folder)
    for name, build in MODELS.items():
        model = build()
        before = described(model)
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            load_adapter(model, folder)
        message = str(raised.value)
        assert all(text in message for text in said), message
        assert len(message) < 1000
        assert_untouched(model, before)
        assert all(layer.merged == (name == "merged") for layer in lora_layers(model).values())


@pytest.mark.parametrize("name", ["..", ".", "", "../adapter", "a/b", "a\\b", "C:x", "a\0"])
def test_names_that_leave_the_directory_are_refused(name, good, tmp_path):
    with pytest.raises(ValueError, match="is not a valid adapter name"):
        load_adapter(plain(), good, name=name)


def test_values_beyond_the_layers_dtype_are_refused(good, tmp_path):
    folder = copied(good, tmp_path)
    put(B, torch.full((12, 3), 1e30))(folder)
    model = make(target_modules=["q", "v_proj"], adapter_dtype=torch.float16)
    before = described(model)
    with pytest.raises(ValueError, match=r"layers.0.q.lora_B.*torch.float16 of the layer cannot"):
        load_adapter(model, folder)
    assert_untouched(model, before)


def test_a_model_that_let_its_base_go_refuses_another_adapter(good):
    model = make(target_modules=["q", "v_proj"])
    model.layers[1].q.merge(keep_base=False)
    before = described(model)
    with pytest.raises(RuntimeError, match=r"layers.1.q is merged and merge\(keep_base=False\)"):
        load_adapter(model, good)
    assert_untouched(model, before)


def test_tied_parameters_are_not_written_behind_the_models_back(tmp_path):
    model = make(target_modules=["q"])
    save_adapter(model, tmp_path, modules_to_save=["lm_head"])
    tied = plain()
    tied.embedding = torch.nn.Embedding(5, 12)
    tied.embedding.weight = tied.lm_head.weight
    before = described(tied)
    with pytest.raises(
        ValueError, match=r"lm_head.weight would be written to a parameter that the"
    ):
        load_adapter(tied, tmp_path)
    assert_untouched(tied, before)


@pytest.mark.parametrize("state", MODELS)
def test_a_failure_while_loading_is_undone(state, good, tmp_path, monkeypatch):
    folder = tmp_path / "extras"
    source = make(seed=1, target_modules=["q", "v_proj"])
    source.norm.bias.data.add_(1)
    save_adapter(source, folder, bias="all")
    model, set_adapter, seen = MODELS[state](), fused_lora.FusedLoRALinear.set_adapter, []
    before, y = described(model), model(inputs())

    def fail(layer, *factors, **options):
        set_adapter(layer, *factors, **options)
        seen.append(layer)
        if len(seen) == 3:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(fused_lora.FusedLoRALinear, "set_adapter", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, folder)
    assert_untouched(model, before)
    assert torch.equal(model(inputs()), y)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_damage_to_the_files_is_refused_or_loads_what_fits(good, tmp_path_factory, data):
    """Bytes of either file are overwritten, cut out or inserted at random."""
    folder = copied(good, tmp_path_factory.mktemp("damaged"))
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray((folder / name).read_bytes())
    # the header, and the configuration, are where damage can mean something
    at = data.draw(st.integers(0, min(len(content) - 1, 1500)))
    length = data.draw(st.integers(0, 12))
    content[at : at + length] = data.draw(st.binary(max_size=12))
    (folder / name).write_bytes(bytes(content))
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]()
    before, y = described(model), model(inputs())
    try:
        load_adapter(model, folder)
    except (ValueError, FileNotFoundError, TypeError) as error:
        assert str(error)
        assert_untouched(model, before)
        assert torch.equal(model(inputs()), y)
    else:
        assert all(p.isfinite().all() for p in model.parameters())
