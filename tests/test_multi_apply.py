"""`apply_lora(adapters=...)`: a row of a mixed batch is answered, and trained, as by a model with
its adapter alone, whatever layers, ranks and scalings the adapters have."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_layers import base_layer
from small_models import OPTIONS, assert_untouched, described, llama, plain
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import MultiLoRALinear, add_adapter, apply_lora, use_adapters
from fused_lora.model import lora_layers, pack_layers

COMMON = OPTIONS | {"target_modules": ["q", "v_proj"]}
ADAPTERS = {
    "wide": {"r": 20},
    "narrow": {"target_modules": ["q_proj"], "r": 1, "lora_alpha": 3, "use_rslora": True},
    "patterned": {
        "target_modules": ["v_proj", "shared", "lm_head"],
        "rank_pattern": {"layers.1.v_proj": 5},
        "alpha_pattern": {"shared": 1.5},
    },
}
NAMES = ["patterned", None, "wide", "narrow", "wide"]  # one for each row
X = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(3))


def mixed(**options):
    return apply_lora(plain(), adapters=ADAPTERS, **COMMON | options)


def added(**options):
    """The same, the adapters added later."""
    targets = ["q", "v_proj", "q_proj", "shared", "lm_head"]
    model = apply_lora(plain(), adapters={}, total_rank=64, target_modules=targets, **options)
    for name, own in ADAPTERS.items():
        add_adapter(model, name, **COMMON | own)
    return model


def alone(model, name, **options):
    """A model with the adapter `name` of `model` and nothing else, by the same options."""
    if name is None:
        return plain()
    single = apply_lora(plain(), **COMMON | ADAPTERS[name], **options)
    packs = {path: layer.pack for path, layer in pack_layers(model).items()}
    assert {path for path, pack in packs.items() if pack.rank(name)} == set(lora_layers(single))
    for path, layer in lora_layers(single).items():
        assert layer.scaling == packs[path].scaling_of(name)
        layer.set_adapter(*packs[path].factors(name), lora_alpha=layer.scaling * layer.r)
    return single


def served(model, names, x=X):
    with torch.no_grad(), use_adapters(model, names):
        return model(x)


@pytest.mark.parametrize("make", [mixed, added])
@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_each_row_is_answered_as_by_a_model_with_its_adapter_alone(make, backend, device):
    model = make(backend=backend)
    y = served(model.to(device), NAMES, X.to(device)).cpu()
    for row, name in enumerate(NAMES):
        with torch.no_grad():
            expected = alone(model.cpu(), name, backend="aten")(X[row])
        torch.testing.assert_close(y[row], expected)
        assert name is None or not torch.allclose(y[row], plain()(X[row]))


def test_an_id_means_the_same_adapter_in_all_layers_and_rooms_are_what_is_needed():
    model = mixed()
    assert all(layer.pack.names == list(ADAPTERS) for layer in pack_layers(model).values())
    ids = torch.tensor([2, -1, 0, 1, 0], dtype=torch.int32)
    assert torch.equal(served(model, ids), served(model, NAMES))
    rooms = {path: layer.pack.total_rank for path, layer in pack_layers(model).items()}
    assert rooms["layers.0.q"] == 32 and rooms["layers.1.v_proj"] == 48
    assert rooms["layers.1.q_proj"] == 16 == rooms["lm_head"] == rooms["shared"]
    roomy = mixed(total_rank=100, max_adapters=3)
    assert {layer.pack.total_rank for layer in pack_layers(roomy).values()} == {112}
    assert model.again is model.shared and type(model.layers[0].q.pack.lora_A) is nn.Parameter


@pytest.mark.parametrize("recomputed", [False, True])
def test_training_all_gives_each_adapter_the_gradients_of_training_it_alone(recomputed):
    model = mixed(lora_dropout=0.0)
    fused_lora.mark_only_lora_as_trainable(model)
    assert all(".pack.lora_" in key for key, p in model.named_parameters() if p.requires_grad)
    dy = torch.randn(5, 4, 5)
    with use_adapters(model, NAMES):
        y = checkpoint(model, X, use_reentrant=False) if recomputed else model(X)
        y.backward(dy)
    for name in ADAPTERS:
        single, own = alone(model, name), [row for row, n in enumerate(NAMES) if n == name]
        single(X[own]).backward(dy[own])
        for path, layer in lora_layers(single).items():
            pack = pack_layers(model)[path].pack
            columns = pack.columns(name)
            torch.testing.assert_close(pack.lora_A.grad[columns], layer.lora_A.grad)
            torch.testing.assert_close(pack.lora_B.grad[:, columns], layer.lora_B.grad)
    for layer in pack_layers(model).values():
        nobodys = layer.pack.owner < 0
        assert not layer.pack.lora_A.grad[nobodys].any()
        assert not layer.pack.lora_B.grad[:, nobodys].any()


def test_new_adapters_start_as_the_base_and_are_drawn_as_single_ones_are():
    model = mixed(init_lora_weights=True)
    assert torch.equal(served(model, NAMES), served(model, torch.tensor(-1)))
    pack, bound = model.layers[0].q.pack, 12**-0.5
    assert 0.9 * bound < pack.lora_A[pack.columns("wide")].abs().max() <= bound


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_answers_each_prompt_as_the_model_with_its_adapter_alone(beams):
    options = {"r": 8, "lora_alpha": 64, "init_lora_weights": False}
    layers = {"a": ["q_proj", "v_proj"], "b": ["down_proj"]}
    adapters = {name: {"target_modules": targets} for name, targets in layers.items()}
    model = apply_lora(llama(), adapters=adapters, **options)
    prompts = torch.randint(0, 37, (3, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    settings["num_beams"] = beams
    names = ["b", None, "a"]
    with use_adapters(model, names, num_beams=beams):
        together = model.generate(prompts, **settings)
    with use_adapters(model, [name for name in names for _ in range(beams)]):
        assert torch.equal(model.generate(prompts, **settings), together)
    answers = []
    for prompt, name in zip(prompts, names, strict=True):
        single = llama()
        if name is not None:
            apply_lora(single, **options, **adapters[name])
            for path, layer in lora_layers(single).items():
                factors = model.get_submodule(path).pack.factors(name)
                layer.set_adapter(*factors, lora_alpha=64)
        answers.append(single.generate(prompt[None], **settings)[0])
    assert torch.equal(together, torch.stack(answers))
    assert len({tuple(row.tolist()) for row in together[:, 6:]}) == 3


def test_an_encoder_and_a_decoder_with_beams_answer_a_mixed_batch():
    transformers = pytest.importorskip("transformers")
    sizes = dict(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=37)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(decoder_start_token_id=0, **sizes)
    ).eval()
    options = {"r": 4, "lora_alpha": 64, "init_lora_weights": False, "target_modules": ["q", "v"]}
    apply_lora(model, adapters={"a": {}, "b": {}}, **options)
    prompts = torch.randint(1, 37, (3, 6), generator=torch.Generator().manual_seed(0))
    settings = {"num_beams": 3, "min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    names, answers = ["b", None, "a"], []
    for prompt, name in zip(prompts, names, strict=True):
        with use_adapters(model, [name], num_beams=3):
            answers.append(model.generate(prompt[None], **settings)[0])
    assert len({tuple(row.tolist()) for row in answers}) > 1
    ids = next(iter(pack_layers(model).values())).pack.ids(names)
    for given in (names, ids):
        with use_adapters(model, given, num_beams=3):
            assert torch.equal(model.generate(prompts, **settings), torch.stack(answers))
    for wrong in ({"num_beams": 0}, {"num_beams": 2, "cu_tokens": ids}):
        with (
            pytest.raises(ValueError, match="num_beams must be"),
            use_adapters(model, ids, **wrong),
        ):
            pass


def test_gpt2_keeps_its_conv1d_weights_under_the_packs():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens, weight = torch.arange(8).view(2, 4), model.transformer.h[0].mlp.c_fc.weight
    base = model(tokens).logits
    apply_lora(model, **OPTIONS, adapters={"a": {}})
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.weight is weight and (layer.in_features, layer.out_features) == (16, 64)
    with use_adapters(model, ["a", None]):
        logits = model(tokens).logits
    torch.testing.assert_close(logits[1], base[1])
    A, B = layer.pack.factors("a")
    x = torch.randn(3, 16)
    expected = x @ weight + layer.bias + 2 * x @ A.t() @ B.t()
    torch.testing.assert_close(layer(x, torch.zeros(3, dtype=torch.int32)), expected)
    assert not torch.allclose(logits[0], base[0])


def test_a_compiled_model_takes_other_ids_without_compiling_again():
    model, frames = mixed(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    for seed in range(3):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed)).tolist()
        names = [NAMES[i] for i in order]
        torch.testing.assert_close(served(compiled, names), served(model, names))
    assert frames.frame_count == 1


REFUSED = {
    # the call, then what is raised and said
    "nothing to hold": ({"adapters": {}}, ValueError, "adapters is empty: give total_rank"),
    "room without adapters": ({"total_rank": 16}, ValueError, "total_rank is room for `adapters`"),
    "no rank": ({"r": None, "adapters": {"a": {}}}, ValueError, "r must be an integer"),
    "no rank, no adapters": ({"r": None}, ValueError, "apply_lora needs r and lora_alpha"),
    "no alpha": ({"lora_alpha": None, "adapters": {"a": {}}}, ValueError, "lora_alpha must be"),
    "a name that no folder has": (
        {"adapters": {"team/a": {}}},
        ValueError,
        "'team/a' is not a valid adapter name",
    ),
    "a name that is none": ({"adapters": {3: {}}}, ValueError, "3 is not a valid adapter name"),
    "no room": ({"adapters": ADAPTERS, "total_rank": 32}, ValueError, "needs 16 columns, 0 of 32"),
    "too many": ({"adapters": ADAPTERS, "max_adapters": 2}, ValueError, "holds 2 adapters"),
    "an option of all": (
        {"adapters": {"a": {"lora_dropout": 0.1}}},
        ValueError,
        r"adapters\['a'\] has 'lora_dropout': expected a folder, or any of r, lora_alpha",
    ),
    "a pattern for nothing": (
        {"adapters": {"a": {"rank_pattern": {"nope": 2}}}},
        ValueError,
        "rank_pattern has 'nope'",
    ),
    "an unknown target": ({"adapters": {"a": {"target_modules": ["x"]}}}, ValueError, "no module"),
    "a norm": ({"adapters": {"a": {"target_modules": ["norm"]}}}, TypeError, r"norm \(LayerNorm"),
    "a bad dropout": ({"adapters": {"a": {}}, "lora_dropout": 1.0}, ValueError, "lora_dropout"),
    "a folder that is none": ({"adapters": {"a": "nowhere"}}, FileNotFoundError, "is missing"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_call_that_is_refused_leaves_the_model_as_it_was(what):
    options, error, message = REFUSED[what]
    model = plain()
    before = described(model)
    with pytest.raises(error, match=message):
        apply_lora(model, **COMMON | options)
    assert_untouched(model, before)


def test_an_adapter_that_cannot_be_added_changes_no_pack():
    model = mixed(total_rank=48)
    before = copy.deepcopy(model.state_dict())
    for options, message in (
        ({"name": "team/a"}, "'team/a' is not a valid adapter name"),
        ({"name": "wide"}, "there is an adapter 'wide' already"),
        ({"target_modules": ["q", "lm_head"]}, "adapter 'new' needs 48 columns"),
        ({"target_modules": "all-linear"}, "needs 48 columns"),
        ({"target_modules": ["norm"]}, "norm has no pack: leave it out of target_modules"),
        ({"target_modules": ["nope"]}, "fits no module"),
        ({"r": 0}, "r must be an integer of at least 1"),
        ({"rank_pattern": {"nope": 3}}, "rank_pattern has 'nope'"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapter(model, **{"name": "new", "r": 33, "lora_alpha": 1} | options)
    with pytest.raises(ValueError, match="holds no pack of adapters"):
        add_adapter(plain(), "new", r=1, lora_alpha=1)
    assert before.keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, before[key]) if torch.is_tensor(value) else value == before[key]
        for key, value in model.state_dict().items()
    )
    add_adapter(model, "new", r=3, lora_alpha=1, exclude_modules=["v_proj", "q"])
    assert model.lm_head.pack.rank("new") == 3 and model.layers[0].q.pack.rank("new") == 0


def test_packs_over_packs_meta_weights_and_quantised_layers_are_refused():
    model = mixed()
    before = described(model)
    with pytest.raises(TypeError, match=r"layers.0.q .*it has a pack of adapters already"):
        apply_lora(model, r=2, lora_alpha=2, target_modules=["q"])
    assert_untouched(model, before)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="0: the pack is on the meta device"):
        apply_lora(empty, r=2, lora_alpha=2, adapters={"a": {}})
    assert type(empty[0]) is nn.Linear
    quantised = nn.Sequential(base_layer("int8"))
    with pytest.raises(TypeError, match=r"a pack needs a plain weight.*bitsandbytes int8"):
        apply_lora(quantised, r=2, lora_alpha=2, target_modules=["0"], adapters={"a": {}})
    assert not isinstance(quantised[0], MultiLoRALinear)


def test_what_is_for_a_single_adapter_says_so_of_packs():
    model = mixed()
    for call in (fused_lora.merge_adapter, fused_lora.unload, fused_lora.lora_state_dict):
        with pytest.raises(ValueError, match="holds packs of adapters, not single ones"):
            call(model)
    with pytest.raises(ValueError, match="holds no LoRA layer"):
        fused_lora.merge_adapter(plain())
