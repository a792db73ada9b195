"""LoRA over a whole model: what is targeted, what trains, what merging and switching off may touch,
and that a refused call changes nothing."""

from __future__ import annotations

import pytest
import torch
from small_models import OPTIONS, assert_untouched, described, inputs, make, paths, plain
from torch import nn

import fused_lora
from fused_lora import FusedLoRALinear, apply_lora

BLOCKS = [f"layers.{i}.{name}" for i in range(2) for name in ("q", "q_proj", "v_proj")]
TARGETS = {
    "all linear layers but the output": ({}, [*BLOCKS, "shared"]),
    "ends of paths at a dot": (
        {"target_modules": ["q", "v_proj"]},
        [f"layers.{i}.{n}" for i in range(2) for n in ("q", "v_proj")],
    ),
    "whole paths": ({"target_modules": ["layers.1.q", "lm_head"]}, ["layers.1.q", "lm_head"]),
    "a regular expression is for the whole path": (
        {"target_modules": r".*\.0\.[qv]_proj"},
        ["layers.0.q_proj", "layers.0.v_proj"],
    ),
    "exclusion wins": (
        {"exclude_modules": ["q_proj", "shared"]},
        [path for path in BLOCKS if not path.endswith("q_proj")],
    ),
    "exclusion by expression": (
        {"target_modules": ["q"], "exclude_modules": r"layers\.0\..*"},
        ["layers.1.q"],
    ),
    "the second name of a shared layer": ({"target_modules": ["again"]}, ["shared"]),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_those_of_peft(case):
    options, expected = TARGETS[case]
    assert paths(make(**options)) == expected
    peft = pytest.importorskip("peft")
    if case == "the second name of a shared layer":
        return  # PEFT looks at first names only and finds nothing
    given = {"target_modules": "all-linear"} | options
    if given["target_modules"] == "all-linear":  # PEFT asks transformers models alone for this one
        given["exclude_modules"] = [*given.get("exclude_modules", []), "lm_head"]
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(**given))
    layer = peft.tuners.lora.layer.Linear
    assert expected == sorted(
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, layer)
    )


def test_patterns_set_rank_and_alpha_of_single_layers_as_peft_does():
    ranks = {"layers.1.q": 5, "q_proj": 2, r".*\.v_.*": 4}
    alphas = {r"layers\.0\.q": 20, "shared": 1.5}
    model = make(rank_pattern=ranks, alpha_pattern=alphas)
    ours = {p: (m.r, m.scaling) for p, m in fused_lora.model.lora_layers(model).items()}
    assert ours["layers.1.q"] == (5, 6 / 5) and ours["layers.0.q"] == (3, 20 / 3)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q", "q_proj", "v_proj", "shared"],
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    for path, module in peft.get_peft_model(plain(), config).named_modules():
        if isinstance(module, peft.tuners.lora.layer.Linear):
            theirs = module.r["default"], module.scaling["default"]
            assert ours[path.removeprefix("base_model.model.")] == theirs


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_model_computes_what_pefts_does(use_rslora):
    peft = pytest.importorskip("peft")
    model = make(use_rslora=use_rslora, target_modules=["q_proj", "v_proj", "q"])
    theirs = peft.get_peft_model(
        plain(),
        peft.LoraConfig(
            r=3, lora_alpha=6, use_rslora=use_rslora, target_modules=["q_proj", "v_proj", "q"]
        ),
    )
    wrapped = theirs.get_base_model()
    for path, layer in fused_lora.model.lora_layers(model).items():
        copied = wrapped.get_submodule(path)
        copied.lora_A["default"].weight.data.copy_(layer.lora_A)
        copied.lora_B["default"].weight.data.copy_(layer.lora_B)
    torch.testing.assert_close(model(inputs()), theirs(inputs()))


def test_a_layer_used_in_two_places_becomes_one_layer_in_both():
    model = make()
    assert isinstance(model.shared, FusedLoRALinear) and model.again is model.shared
    fused_lora.unload(model)
    assert type(model.shared) is nn.Linear and model.again is model.shared


def test_a_block_used_under_two_names_is_found_by_both():
    model = nn.ModuleDict({"first": plain().layers[0]})
    model["second"] = model["first"]
    apply_lora(model, **OPTIONS, target_modules=["second.q"])
    assert paths(model) == ["first.q"] and isinstance(model["second"].q, FusedLoRALinear)


def test_tied_weights_stay_tied_and_are_not_written_by_merging():
    model = plain()
    embedding = nn.Embedding(12, 12)
    model.shared.weight = embedding.weight
    before = embedding.weight.detach().clone()
    apply_lora(model, **OPTIONS)
    assert model.shared.weight is embedding.weight
    fused_lora.merge_adapter(model)
    assert torch.equal(embedding.weight, before) and model.shared.weight is not embedding.weight
    fused_lora.unmerge_adapter(model)
    assert model.shared.weight is embedding.weight


class Hooked(nn.Linear):
    pass


def encoder():
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    return nn.Sequential(nn.Linear(12, 12), nn.TransformerEncoder(layer, 1, False))


def hooked():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].register_forward_hook(lambda *_: None)
    return model


def inside_peft():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["q"]))


def test_names_that_fit_nothing_are_warned_of():
    with pytest.warns(UserWarning, match="target_modules has w1, w2, which no module of Model is"):
        model = apply_lora(plain(), **OPTIONS, target_modules=["w1", "q", "w2"])
    assert paths(model) == ["layers.0.q", "layers.1.q"]


def mamba():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, num_hidden_layers=1, vocab_size=31, state_size=4)
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


REFUSED = {
    # the model, options, type, then what the message says
    "nothing fits": (plain, {"target_modules": ["qq"]}, ValueError, "fits no module of Model"),
    "nothing is left": (
        lambda: apply_lora(plain(), r=2, lora_alpha=2, target_modules="all-linear"),
        {"target_modules": "all-linear"},
        ValueError,
        "adapters have",
    ),
    "a bare name as expression": (plain, {"target_modules": "q"}, ValueError, "whole path"),
    "no expression": (
        plain,
        {"target_modules": "(q"},
        ValueError,
        "not a valid regular expression",
    ),
    "not linear": (plain, {"target_modules": ["q", "norm"]}, TypeError, "norm (LayerNorm)"),
    "rank 0 by pattern": (
        plain,
        {"rank_pattern": {"shared": 0}},
        *(ValueError, "r must be an integer"),
    ),
    "an idle pattern": (
        plain,
        {"alpha_pattern": {"lm_head": 3}},
        *(ValueError, "alpha_pattern has 'lm_head', which decides for no"),
    ),
    "an unknown init": (plain, {"init_lora_weights": "pissa"}, ValueError, "got 'pissa'"),
    "inside attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(12, 2)),
        {},
        *(TypeError, "0.out_proj", "MultiheadAttention reads out_proj.weight itself"),
    ),
    "inside an encoder layer": (
        encoder,
        {"exclude_modules": ["out_proj"]},
        *(TypeError, "1.layers.0.linear1", "TransformerEncoderLayer reads linear1.weight"),
    ),
    "beside a kernel": (
        mamba,
        {"target_modules": ["in_proj", "x_proj"]},
        *(TypeError, "mixer.x_proj", "MambaMixer reads x_proj.weight itself", "exclude_modules"),
    ),
    "twice": (make, {"target_modules": ["q"]}, TypeError, "is a LoRA layer already", "unload()"),
    "hooks": (hooked, {}, TypeError, "1 (Linear)", "has hooks"),
    "inside PEFT": (inside_peft, {}, TypeError, "part of a PEFT layer"),
    "a subclass": (lambda: nn.Sequential(Hooked(12, 12)), {}, TypeError, "0 (Hooked)"),
    "the model itself": (lambda: nn.Linear(12, 12), {}, ValueError, "fits no module of Linear"),
}


def test_what_is_left_of_a_state_space_layer_takes_lora():
    model = mamba().eval()
    unread = ["x_proj", "dt_proj", "out_proj"]
    apply_lora(model, **OPTIONS, exclude_modules=unread)
    assert paths(model) == ["backbone.layers.0.mixer.in_proj"]
    tokens = torch.arange(1, 9).view(2, 4)
    model(tokens).logits.square().sum().backward()
    layer = model.backbone.layers[0].mixer.in_proj
    assert layer.lora_A.grad.abs().max() > 0 and layer.lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_says_why_and_changes_nothing(case):
    build, options, error, *said = REFUSED[case]
    model = build()
    before = described(model)
    with pytest.raises(error) as raised:
        apply_lora(model, **{**OPTIONS, **options})
    for text in said:
        assert text in str(raised.value)
    assert_untouched(model, before)


def test_running_out_of_memory_half_way_changes_nothing(monkeypatch):
    model, seen = plain(), []
    before = described(model)
    reset = FusedLoRALinear.reset_lora_parameters

    def fail(layer):
        seen.append(layer)
        if len(seen) == 3:
            raise torch.OutOfMemoryError("out of memory")
        reset(layer)

    monkeypatch.setattr(FusedLoRALinear, "reset_lora_parameters", fail)
    with pytest.raises(torch.OutOfMemoryError):
        apply_lora(model, **OPTIONS)
    assert_untouched(model, before)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_only_the_adapters_and_the_named_biases_train_and_are_in_lora_state_dict(bias):
    model = make(target_modules=["q_proj", "v_proj"])
    fused_lora.mark_only_lora_as_trainable(model, bias)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    adapters = {f"{path}.lora_{f}" for path in paths(model) for f in "AB"}
    biases = {key for key, _ in model.named_parameters() if key.endswith("bias")}
    own = {f"layers.{i}.q_proj.bias" for i in range(2)}
    assert trained == adapters | {"none": set(), "all": biases, "lora_only": own}[bias]
    state = fused_lora.lora_state_dict(model, bias)
    assert set(state) == trained
    other = make(seed=1, target_modules=["q_proj", "v_proj"])
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(other.layers[0].q_proj.lora_B, model.layers[0].q_proj.lora_B)


def test_trainable_parameters_counts_shared_ones_once_and_prints(capsys):
    model = make(target_modules=["shared", "q"])
    fused_lora.mark_only_lora_as_trainable(model)
    counts = fused_lora.trainable_parameters(model)
    total = sum(p.numel() for p in model.parameters())
    assert counts == (3 * 3 * 24, total)
    assert counts.percent == pytest.approx(100 * 216 / total)
    assert (
        capsys.readouterr().out == f"216 of {total:,} parameters train ({counts.percent:.4g} %)\n"
    )


@pytest.mark.parametrize("keep_base", [None, True, "cpu"])
def test_disabled_adapters_leave_the_base_bit_for_bit(keep_base):
    model, base = make(), plain()
    adapted = model(inputs())
    if keep_base is not None:
        fused_lora.merge_adapter(model, keep_base)
    with fused_lora.disable_adapters(model) as disabled:
        assert disabled is model
        assert torch.equal(model(inputs()), base(inputs()))
        with fused_lora.disable_adapters(model):
            pass
        assert torch.equal(model(inputs()), base(inputs()))
    torch.testing.assert_close(model(inputs()), adapted)
    with pytest.raises(KeyError), fused_lora.disable_adapters(model):
        raise KeyError
    assert all(layer.adapter_enabled for layer in fused_lora.model.lora_layers(model).values())


def test_gradients_reach_x_but_not_the_adapters_while_disabled():
    model, base, x = make(), plain(), inputs().requires_grad_()
    with fused_lora.disable_adapters(model):
        (dx,) = torch.autograd.grad(model(x).sum(), x)
        adapters = [p for key, p in model.named_parameters() if "lora" in key]
        grads = torch.autograd.grad(model(x).sum(), adapters, allow_unused=True)
    assert torch.equal(dx, torch.autograd.grad(base(x).sum(), x)[0])
    assert grads == (None,) * len(adapters)
