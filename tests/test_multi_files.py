"""Adapters by name in the packs of a live model: loaded, replaced, saved, deleted, all layers or
none."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import OPTIONS, llama, make, plain

import fused_lora
from fused_lora import (
    AdapterPack,
    MultiLoRALinear,
    apply_lora,
    load_adapter,
    save_adapter,
    use_adapters,
)
from fused_lora.model import pack_layers

safetensors = pytest.importorskip("safetensors.torch")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
X = torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(3))
TASKS = {
    "a": {"target_modules": ["q"]},
    "b": {"target_modules": ["q", "v_proj"], "r": 20, "use_rslora": True},
    "c": {"target_modules": ["v_proj", "shared"], "rank_pattern": {"shared": 7}, "lora_alpha": 1},
    "d": {"target_modules": ["q_proj", "q"], "r": 16, "alpha_pattern": {"layers.0.q": 9}},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """{name: (folder, the single-adapter model's answer to X)}; the folders lie in one."""
    folder, found = tmp_path_factory.mktemp("tasks"), {}
    for name, options in TASKS.items():
        torch.manual_seed(ord(name))
        single = apply_lora(plain(), **OPTIONS | options)
        for layer in fused_lora.model.lora_layers(single).values():
            torch.nn.init.normal_(layer.lora_B)
        save_adapter(single, folder, name=name)
        with torch.no_grad():
            found[name] = (folder / name, single(X))
    return found


def roomy(**options):
    """A model with room in all linear layers and no adapter yet."""
    return apply_lora(plain(), **{"adapters": {}, "total_rank": 64} | options)


def served(model, names):
    with torch.no_grad(), use_adapters(model, names):
        return model(X.expand(len(names), -1, -1))


def state(model):
    """All that a refused call must leave: every bit, every place in memory, names and ids."""
    state = model.state_dict()
    tensors = {key: t for key, t in state.items() if not key.endswith("_extra_state")}
    places = {key: t.data_ptr() for key, t in tensors.items()}
    entries = {path: dict(layer.pack._entries) for path, layer in pack_layers(model).items()}
    return {key: t.clone() for key, t in tensors.items()}, places, entries


def assert_unchanged(model, before):
    tensors, *rest = state(model)
    assert all(torch.equal(value, before[0][key]) for key, value in tensors.items())
    assert rest == list(before[1:])


def test_adapters_come_go_and_change_and_each_is_served_as_alone_throughout(tasks):
    """Names are given to other adapters over time, which touch other layers."""
    model, held = roomy(max_adapters=3), {}
    _, places, _ = state(model)
    base = served(model, [None])
    steps = ("a=a", "b=b", "c=c", "b=c", "-a", "new=d", "b=a", "-c", "c=b", "-b", "-new", "a=d")
    for step in steps:
        ids = {name: model.shared.pack.id(name) for name in held}
        name, _, task = step.lstrip("-").partition("=")
        if task:
            load_adapter(model, tasks[task][0], name=name)
            held[name] = task
        else:
            fused_lora.delete_adapter(model, name)
            del held[name], ids[name]
        for layer in pack_layers(model).values():
            now = {name: layer.pack.id(name) for name in layer.pack.names}
            assert now == {**now, **ids} and set(now) == set(held) and max(now.values()) < 3
        answers = served(model, [*held, None])
        expected = torch.cat([*(tasks[task][1] for task in held.values()), base])
        torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)
    assert state(model)[1] == places
    other = roomy(max_adapters=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(served(other, [*held]), served(model, [*held]))


def test_a_change_of_one_adapter_leaves_the_answers_of_the_others_bit_for_bit(tasks):
    model, names = roomy(), ["a", "c", None, "a"]
    for name in "abc":
        load_adapter(model, tasks[name][0], name=name)
    before = served(model, names)
    load_adapter(model, tasks["d"][0], name="b")
    assert torch.equal(served(model, names), before)
    fused_lora.delete_adapter(model, "b")
    assert torch.equal(served(model, names), before)


@pytest.mark.parametrize("how", ["apply_lora", "load_adapter"])
def test_adapters_that_peft_wrote_are_served_together_with_pefts_logits(how, tmp_path):
    peft = pytest.importorskip("peft")
    config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(**config, target_modules=["q_proj", "v_proj"])
    )
    other = config | {"rank_pattern": {"layers.0.mlp.down_proj": 17}, "use_rslora": True}
    theirs.add_adapter("other", peft.LoraConfig(**other, target_modules=["down_proj"]))
    theirs.eval().save_pretrained(tmp_path)
    if how == "apply_lora":
        model = apply_lora(llama(), adapters={"first": tmp_path, "other": tmp_path / "other"})
    else:
        model = apply_lora(llama(), adapters={}, total_rank=48)
        load_adapter(model, tmp_path, name="first")  # the folder itself
        load_adapter(model, tmp_path, name="other")  # the folder of that name in it
    tokens = torch.arange(1, 9).view(2, 4)
    with torch.no_grad(), use_adapters(model, ["other", "first"]):
        logits = model(tokens).logits
    for row, name in enumerate(("other", "default")):
        theirs.set_adapter(name)
        torch.testing.assert_close(logits[row], theirs(tokens).logits[row].detach())


def test_one_adapter_of_the_packs_is_saved_for_peft_and_for_single_models(tasks, tmp_path):
    model = roomy(adapter_dtype=torch.float32)
    for name, (folder, _) in tasks.items():
        load_adapter(model, folder, name=name)
    for name, (folder, answer) in tasks.items():
        save_adapter(model, tmp_path, name=name)
        with torch.no_grad():
            assert torch.equal(load_adapter(plain(), tmp_path, name=name)(X), answer)
        one, two = (safetensors.load_file(f / WEIGHTS) for f in (folder, tmp_path / name))
        assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)
        saved = json.loads((tmp_path / name / CONFIG).read_bytes())
        given = json.loads((folder / CONFIG).read_bytes())
        assert saved["target_modules"] == given["target_modules"] and saved["r"] == given["r"]
        if not given["use_rslora"]:
            assert saved == given
        if name != "c":  # PEFT leaves a shared layer's second place alone
            peft = pytest.importorskip("peft")
            theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / name)
            torch.testing.assert_close(theirs(X), answer, rtol=1e-4, atol=1e-5)


def rewritten(**tensors):
    def change(folder):
        held = safetensors.load_file(folder / WEIGHTS)
        held |= {PREFIX + key.replace("__", "."): value for key, value in tensors.items()}
        safetensors.save_file({k: v for k, v in held.items() if v is not None}, folder / WEIGHTS)

    return change


def reconfigured(**fields):
    def change(folder):
        config = json.loads((folder / CONFIG).read_bytes()) | fields
        (folder / CONFIG).write_text(json.dumps(config))

    return change


LAST = "shared__lora_{}__weight"  # of the last layer of task c
HUGE = {LAST.format("A"): torch.full((7, 12), 1e30), LAST.format("B"): torch.ones(12, 7)}
BROKEN = {
    # what is done to a copy of task c, or to the model; then what the message says
    "NaN": (rewritten(**{LAST.format("B"): torch.full((12, 7), torch.nan)}), "NaN or infinity"),
    "half a pair": (rewritten(**{LAST.format("B"): None}), "has no .*shared.lora_B"),
    "of another size": (
        rewritten(**{LAST.format("A"): torch.ones(7, 13)}),
        "shared: .*another size",
    ),
    "beyond the packs' dtype": (rewritten(**HUGE), "shared: lora_A .* not finite in torch.float16"),
    "a layer the model lacks": (
        rewritten(nope__lora_A__weight=torch.ones(3, 12), nope__lora_B__weight=torch.ones(12, 3)),
        "nope.lora_A.weight, which is not among the layers with a pack",
    ),
    "biases": (
        lambda folder: (
            rewritten(norm__bias=torch.ones(12))(folder),
            reconfigured(bias="all")(folder),
        ),
        "norm.bias: biases and whole modules are shared",
    ),
    "DoRA": (reconfigured(use_dora=True), "use_dora is True"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
        "not a sa",
    ),
    "no room in one layer": (
        lambda model: model.shared.pack.replace("b", torch.ones(49, 12), torch.ones(12, 49)),
        "shared: adapter .* needs 16 columns, 0 of 64 are free",
    ),
    "filled apart": (
        lambda model: model.shared.pack.add("own", torch.ones(1, 12), torch.ones(12, 1)),
        r"filled apart, layers.0.q_proj with .* and shared with .*'own': 2",
    ),
    "another order": (
        lambda model: (
            model.lm_head.pack.remove("a"),
            model.lm_head.pack.replace("b", torch.ones(1, 12), torch.ones(5, 1)),
            model.lm_head.pack.remove("b"),
            model.lm_head.pack.add("b", torch.ones(1, 12), torch.ones(5, 1)),
            model.lm_head.pack.add("a", torch.ones(1, 12), torch.ones(5, 1)),
        ),
        "filled apart",
    ),
}


@pytest.mark.parametrize("name", ["new", "b"])
@pytest.mark.parametrize("what", BROKEN)
def test_an_adapter_that_is_refused_leaves_every_layer_as_it_was(what, name, tasks, tmp_path):
    change, message = BROKEN[what]
    model = roomy(
        adapter_dtype=torch.float16, target_modules=["q_proj", "q", "v_proj", "shared", "lm_head"]
    )
    for held in "ab":
        load_adapter(model, tasks[held][0], name=held)
    folder = tmp_path / "c"
    folder.mkdir()
    for file in tasks["c"][0].iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    in_model = what in ("no room in one layer", "filled apart", "another order")
    change(model if in_model else folder)
    if what == "no room in one layer" and name == "b":
        name = "new"
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["new", "b"])
def test_memory_that_runs_out_while_loading_undoes_what_was_written(name, tasks, monkeypatch):
    model, seen = roomy(), []
    for held in "abc":
        load_adapter(model, tasks[held][0], name=held)
    before, write = state(model), fused_lora.AdapterPack.write

    def fail(pack, name, packed):
        write(pack, name, packed)
        seen.append(pack)
        if len(seen) == 5:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(fused_lora.AdapterPack, "write", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_adapter(model, tasks["d"][0], name=name)
    assert_unchanged(model, before)


def test_names_that_no_pack_holds_raise_and_change_nothing(tasks, tmp_path):
    model = load_adapter(roomy(), tasks["a"][0], name="a")
    before = state(model)
    for call in (
        lambda: fused_lora.delete_adapter(model, "b"),
        lambda: save_adapter(model, tmp_path, name="b"),
        lambda: save_adapter(model, tmp_path),
        lambda: served(model, ["b"]),
    ):
        with pytest.raises(KeyError, match=r"no adapter '(b|default)' in the pack: name one of"):
            call()
    with pytest.raises(ValueError, match="belong to all adapters of packs"):
        save_adapter(model, tmp_path, name="a", bias="all")
    with pytest.raises(ValueError, match="is not a valid adapter name"):
        load_adapter(model, tasks["a"][0], name="../a")
    with pytest.raises(ValueError, match="holds no pack of adapters"):
        fused_lora.delete_adapter(make(), "default")
    with pytest.raises(FileNotFoundError, match=r"neither .*b nor .* holds an adapter"):
        load_adapter(model, tmp_path, name="b")
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_were_put_in_by_hand_take_adapters_by_name_too(tasks):
    model = plain()
    for block in model.layers:
        block.q = MultiLoRALinear.from_linear(block.q, total_rank=16)
    load_adapter(model, tasks["a"][0], name="a")
    torch.testing.assert_close(served(model, ["a"]), tasks["a"][1])


def test_a_deletion_that_fails_half_way_leaves_all_packs_as_they_were(tasks, monkeypatch):
    model = load_adapter(roomy(), tasks["a"][0], name="a")
    before, clear, calls = state(model), AdapterPack._clear, []

    def fail(pack, entry):
        calls.append(pack)
        if len(calls) == 2:
            raise MemoryError("no room")
        clear(pack, entry)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterPack, "_clear", fail)
        with pytest.raises(MemoryError):
            fused_lora.delete_adapter(model, "a")
    assert len(calls) > 2
    assert_unchanged(model, before)
    fused_lora.delete_adapter(model, "a")


def test_a_model_with_packs_takes_no_second_set_of_them(tasks):
    model = load_adapter(roomy(), tasks["a"][0], name="a")
    before = state(model)
    with pytest.raises(ValueError, match="has packs already, and an id must mean one adapter"):
        apply_lora(model, adapters={"b": {}}, r=2, lora_alpha=2, target_modules=["head"])
    assert_unchanged(model, before)


def test_an_adapter_without_any_rank_is_not_saved(tmp_path):
    layer = MultiLoRALinear(4, 4, total_rank=16)
    layer.pack.add("a", torch.ones(0, 4), torch.ones(4, 0))
    with pytest.raises(ValueError, match="adapter 'a' has rank 0 in every layer"):
        save_adapter(torch.nn.Sequential(layer), tmp_path, name="a")
