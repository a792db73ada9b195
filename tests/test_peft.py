"""A patched PEFT layer computes what PEFT computes: y and every gradient, that of the input too,
by the acceptance rule next to PEFT's own forward; and everything else of PEFT goes on working."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_lora import testing

pytest.importorskip("peft", reason="needs the extra `peft`")

import peft
from peft.tuners.lora import layer as lora
from peft_models import FIRST, SECOND, SEED, Tiny, adapted, lora_layer, peft_copy, results

from fused_lora.integrations import peft as fused

pytestmark = pytest.mark.peft
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

CASES = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"first": 3}, "alpha_pattern": {"first": 5}},
    "dropout": {"lora_dropout": 0.4},
    "bias all": {"bias": "all"},
    "bf16": {"dtype": BF16, "adapter_dtype": BF16, "bias": "all"},
    "bf16 dropout": {"dtype": BF16, "adapter_dtype": BF16, "lora_dropout": 0.4},
    "fp16": {"dtype": FP16, "adapter_dtype": FP16},
    "fp32 adapters on bf16": {"dtype": BF16, "bias": "all"},
    "fp32 adapters on bf16, dropout": {"dtype": BF16, "lora_dropout": 0.4},
    "autocast": {"autocast": BF16, "bias": "all"},
    "autocast on bf16, dropout": {"dtype": BF16, "autocast": BF16, "lora_dropout": 0.4},
}


@pytest.fixture(autouse=True)
def fixed_mask(monkeypatch):
    """The fused layers draw the mask of SEED."""
    from fused_lora import dropout

    draw = lambda device: torch.tensor(SEED, dtype=torch.int64, device=device)  # noqa: E731
    monkeypatch.setattr(dropout, "draw_seed", draw)


def violations(layer, x, dy, autocast=None, backend="aten"):
    """Of the rule: the layer next to PEFT's own forward, with adapters in the compute dtype."""
    computed = autocast or x.dtype
    exact_weights = computed if autocast else None
    exact = peft_copy(layer, dtype=exact_weights).double()
    eager = peft_copy(layer, adapter_dtype=None if autocast else computed)
    expected = [
        results(eager, x, dy, autocast),
        results(exact, (x.to(computed) if autocast else x).double(), dy.to(computed).double()),
    ]
    base, A = layer.base_layer, layer.lora_A["default"].weight
    fused.patch(layer, backend=backend)
    ours = results(layer, x, dy, autocast)
    assert fused.call_counts(layer)["peft"] == 0
    assert ours["y"].dtype == computed and ours["dx"].dtype == x.dtype
    assert ours["dA"].dtype == ours["dB"].dtype == A.dtype
    assert "dbias" not in ours or ours["dbias"].dtype == base.bias.dtype
    return testing.check(ours, *expected, computed)


@pytest.mark.parametrize("special", [False, True], ids=["full", "delta"])
@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_y_and_all_gradients_are_pefts(case, backend, special, device):
    options = dict(CASES[case])
    autocast = options.pop("autocast", None)
    model = adapted(device=device, **options)
    layer = lora_layer(model)
    if special:
        layer.base_layer.register_forward_hook(lambda module, args, output: None)
    case = testing.make_case(33, FIRST[1], FIRST[0], 8, options.get("dtype", FP32), device=device)
    x, dy = case.x.view(3, 11, -1), case.dy.view(3, 11, -1)
    assert not violations(layer, x, dy, autocast, backend)
    assert fused.call_counts(layer)["delta" if special else "full"] == 1


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_gpt2s_transposed_base_is_fused_too(backend, device):
    from transformers.pytorch_utils import Conv1D

    tiny = Tiny()
    tiny.first = Conv1D(FIRST[1], FIRST[0])
    config = {"target_modules": ["first"], "bias": "all", "fan_in_fan_out": True}
    layer = lora_layer(adapted(tiny, device=device, **config))
    case = testing.make_case(33, FIRST[1], FIRST[0], 8, FP32, device=device)
    assert not violations(layer, case.x, case.dy, backend=backend)
    assert fused.call_counts(layer)["full"] == 1


def test_fp32_adapters_take_pefts_own_branch_on_request():
    model = adapted(dtype=BF16)
    x, dy = torch.randn(5, FIRST[0]).to(BF16), torch.randn(5, FIRST[1]).to(BF16)
    layer = lora_layer(model)
    expected = results(peft_copy(layer), x, dy)
    fused.patch(model, compute_dtype="peft")
    ours = results(layer, x, dy)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert "float32 adapters on bfloat16 x, compute_dtype='peft'" in fused.explain(layer)
    fused.patch(model)
    assert "float32 adapters rounded to it (compute_dtype='base')" in fused.explain(layer)
    fused.patch(model, compute_dtype="peft")
    with torch.autocast("cpu", BF16):  # where PEFT itself computes in bf16
        layer(x)
    assert fused.call_counts(layer)["full"] == 1


def test_hot_swaps_tensor_scaling_is_used_without_a_host_read(monkeypatch):
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = adapted()
    x, dy = torch.randn(5, FIRST[0]), torch.randn(5, FIRST[1])
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    layer = lora_layer(model)
    assert isinstance(layer.scaling["default"], torch.Tensor)
    expected = results(peft_copy(layer), x, dy)
    fused.patch(model)
    read = lambda self: pytest.fail("scaling was read on the host")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "item", read)
    monkeypatch.setattr(torch.Tensor, "__float__", read)
    ours = results(layer, x, dy)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], **CLOSE)
    with torch.no_grad():
        layer.scaling["default"].fill_(0.0)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_a_layer_dropout_follows_the_layers_training_flag():
    model = adapted(lora_dropout=0.5)
    fused.patch(model)
    x = torch.randn(5, FIRST[0])
    dropped, kept = model(x), model.eval()(x)
    fused.unpatch(model)
    torch.testing.assert_close(kept, model(x), **CLOSE)
    assert not torch.equal(dropped, kept)


def test_keys_names_and_parameters_do_not_change():
    model = adapted(bias="all")
    before = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    modules = [name for name, _ in model.named_modules()]
    printed = str(model)
    fused.patch(model)
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == before
    assert [name for name, _ in model.named_modules()] == modules
    assert str(model) == printed.replace("lora.Linear(", "lora.FusedLinear(")
    attributes = set(vars(lora_layer(model)))
    fused.unpatch(model)
    assert str(model) == printed and type(lora_layer(model)) is lora.Linear
    assert attributes - vars(lora_layer(model)).keys() == {"_fused_lora"}


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_independent(way):
    model = adapted()
    fused.patch(model)
    x = torch.randn(5, FIRST[0])
    expected = model(x)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(other(x), expected)
    assert fused.call_counts(other)["full"] == 4 and fused.call_counts(model)["full"] == 2
    with torch.no_grad():
        lora_layer(other).lora_B["default"].weight.zero_()
    assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)


def test_save_load_merge_and_switching_adapters_are_pefts(tmp_path):
    model, x = adapted(), torch.randn(5, FIRST[0])
    expected = model(x)
    fused.patch(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Tiny(), tmp_path)
    fused.patch(loaded)
    torch.testing.assert_close(loaded(x), expected, **CLOSE)
    loaded.add_adapter("other", peft.LoraConfig(r=4, target_modules=["first"]))
    loaded.set_adapter("other")  # B is zero, and `second` has no such adapter
    with loaded.disable_adapter():
        base = loaded(x)
    torch.testing.assert_close(loaded(x), base, **CLOSE)
    loaded.set_adapter("default")
    torch.testing.assert_close(loaded(x), expected, **CLOSE)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(x), expected, **CLOSE)
    loaded.unmerge_adapter()
    torch.testing.assert_close(loaded(x), expected, **CLOSE)
    merged = loaded.merge_and_unload()
    assert type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(x), expected, **CLOSE)


def test_enable_patches_what_is_made_until_disable():
    class Theirs(lora.Linear):
        pass

    before = adapted()
    fused.enable(backend="aten")
    try:
        during = adapted()
        assert lora_layer(during)._fused_lora.backend == "aten"
        embedded = adapted(nn.Sequential(nn.Embedding(5, 4)), target_modules=["0"])
        config = peft.LoraConfig(target_modules=["first"])
        config._register_custom_module({nn.Linear: Theirs})
        theirs = peft.get_peft_model(Tiny(), config)
    finally:
        fused.disable()
    assert lora.LoraLayer.__init__ is fused._peft_init
    assert type(lora_layer(before)) is type(lora_layer(adapted())) is lora.Linear
    assert type(lora_layer(during)) is fused.FusedLinear
    assert type(lora_layer(embedded, "0")) is lora.Embedding
    assert type(lora_layer(theirs)) is Theirs
    x = torch.randn(5, FIRST[0])
    torch.testing.assert_close(during(x), before(x), **CLOSE)
    assert fused.call_counts(during) == {"full": 2, "delta": 0, "peft": 0}


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(backend, reentrant, device, monkeypatch):
    monkeypatch.undo()  # seeds from torch's generator
    model = adapted(lora_dropout=0.5, device=device)
    fused.patch(model, backend=backend)
    x = torch.randn(5, FIRST[0], device=device, requires_grad=True)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        run(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("path", ["full", "delta"])
def test_a_compiled_model_has_no_graph_break(path):
    class Special(nn.Linear):
        pass

    tiny = Tiny()
    if path == "delta":
        tiny.first, tiny.second = Special(*FIRST), Special(*SECOND)
    model = adapted(tiny)
    x = torch.randn(5, FIRST[0], requires_grad=True)
    outcomes = [(y := model(x)), torch.autograd.grad(y.square().sum(), x)[0]]
    fused.patch(model)
    assert f": {path} (" in fused.explain(model)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    for ours, expected in zip(
        (y, torch.autograd.grad(y.square().sum(), x)[0]), outcomes, strict=True
    ):
        torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("function", [fused.patch, fused.unpatch, fused.explain, fused.call_counts])
def test_a_model_without_lora_is_refused(function):
    with pytest.raises(ValueError, match="Linear holds no PEFT LoRA layer: call get_peft_model"):
        function(nn.Linear(3, 4))


@pytest.mark.parametrize("options", [{"backend": "cuda"}, {"compute_dtype": "fp32"}], ids=str)
@pytest.mark.parametrize("function", ["patch", "enable"])
def test_unknown_options_are_refused(function, options):
    arguments = () if function == "enable" else (adapted(),)
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*: got"):
        getattr(fused, function)(*arguments, **options)
    assert type(lora_layer(adapted())) is lora.Linear
