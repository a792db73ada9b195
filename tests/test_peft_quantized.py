"""PEFT's layers over quantised bases, patched: y and every gradient by the acceptance rule next to
PEFT's own forward, and everything else of those layers goes on working."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch

from fused_lora import testing

pytest.importorskip("peft", reason="needs the extra `peft`")

import peft
from peft_models import FIRST, SEED, adapted, lora_layer, peft_copy, quantised, results

from fused_lora import integrations
from fused_lora.integrations import peft as fused

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("nf4", "int8", "torchao int8")
BITSANDBYTES = KINDS[:2]
PATH = {"nf4": "full", "int8": "delta", "torchao int8": "delta"}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CASES = {
    "fp32": {},
    "bf16": {"dtype": BF16, "adapter_dtype": BF16},
    "fp32 adapters on bf16": {"dtype": BF16},
    "dropout": {"lora_dropout": 0.4},
    "autocast": {"autocast": BF16},
    "autocast on bf16": {"dtype": BF16, "autocast": BF16},
}


def model_of(kind, dtype=FP32, **options):
    return adapted(quantised(kind, dtype), **options)


def exact_results(layer, x, dy, autocast=None):
    """In fp64, but for the base's own product, which is what it is."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer.base_layer(x)
    (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dropout = {"dropout_p": getattr(layer.lora_dropout["default"], "p", 0.0)}
    dropout["seed"] = torch.tensor(SEED)
    term = (x, x.new_zeros(B.shape[0], A.shape[1]), A, B, None, layer.scaling["default"], dy)
    exact = testing.exact_gradients(*term, **dropout)
    return exact | {"y": exact["y"] + y.double(), "dx": exact["dx"] + dx.double()}


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_y_and_all_gradients_are_pefts(kind, case, backend, monkeypatch):
    from fused_lora import dropout

    monkeypatch.setattr(dropout, "draw_seed", lambda device: torch.tensor(SEED))
    options = dict(CASES[case])
    autocast, dtype = options.pop("autocast", None), options.pop("dtype", FP32)
    layer = lora_layer(model_of(kind, dtype, **options))
    computed = autocast or dtype
    inputs = testing.make_case(33, FIRST[1], FIRST[0], 8, dtype)
    x, dy = inputs.x.view(3, 11, -1), inputs.dy.view(3, 11, -1)
    eager = peft_copy(layer, adapter_dtype=None if autocast else computed)
    expected = results(eager, x, dy, autocast)
    exact = exact_results(layer, x, dy, autocast)
    fused.patch(layer, backend=backend)
    ours = results(layer, x, dy, autocast)
    assert fused.call_counts(layer) == {"full": 0, "delta": 0, "peft": 0} | {PATH[kind]: 1}
    plain = results(peft_copy(layer), x, dy, autocast)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in plain.items()}
    assert not testing.check(ours, expected, exact, computed)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_disabled_and_several_adapters_are_left_to_peft(kind):
    model, x = model_of(kind).eval(), torch.randn(5, FIRST[0], requires_grad=True)
    config = peft.LoraConfig(target_modules=["first"], r=3, init_lora_weights=False)
    model.add_adapter("other", config)
    plain = copy.deepcopy(model)
    fused.patch(model)
    for change, reason in (
        (lambda m: m.base_model.set_adapter(["default", "other"]), "2 active adapters"),
        (lambda m: m.base_model.disable_adapter_layers(), "adapters are disabled"),
    ):
        for each in (model, plain):
            change(each)
        assert fused.explain(model).split(": ", 1)[1].startswith(f"peft ({reason}")
        assert torch.equal(lora_layer(model)(x), lora_layer(plain)(x))
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    model.merge_adapter()
    assert "peft (merged into the base weight)" in fused.explain(model)
    layer = lora_layer(model)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_switching_copying_and_unpatching_keep_pefts_own_layer(kind):
    model, x = model_of(kind), torch.randn(5, FIRST[0], requires_grad=True)
    plain = type(lora_layer(model))
    expected = model(x)
    report = fused.patch(model)
    assert len(report.fused) == 2 and not report.left
    assert type(lora_layer(model)) is not plain and isinstance(lora_layer(model), plain)
    twins = [copy.deepcopy(model)]
    if kind in BITSANDBYTES:  # the tensors of torchao cannot be pickled
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        torch.testing.assert_close(twin(x), expected, **CLOSE)
        assert fused.call_counts(twin)[PATH[kind]] == 2
    kept = lora_layer(model).forward
    fused.unpatch(model)
    assert type(lora_layer(model)) is plain
    assert torch.equal(model(x), expected)
    assert torch.equal(kept(x), lora_layer(model)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_enable_reaches_layers_over_quantised_bases(kind):
    fused.enable()
    try:
        model = model_of(kind)
    finally:
        fused.disable()
    assert all(type(lora_layer(model, name)) in fused._PLAIN for name in ("first", "second"))
    assert type(lora_layer(model_of(kind))) in fused._FUSED
    model(torch.randn(5, FIRST[0], requires_grad=True))
    assert fused.call_counts(model)[PATH[kind]] == 2


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_hot_swaps_tensor_scaling_is_used_and_not_read(kind, monkeypatch):
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = model_of(kind)
    prepare_model_for_compiled_hotswap(model, target_rank=12)
    layer, x, dy = lora_layer(model), torch.randn(5, FIRST[0]), torch.randn(5, FIRST[1])
    expected = results(peft_copy(layer), x, dy)
    fused.patch(model)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("read on the host"))
    ours = results(layer, x, dy)
    assert fused.call_counts(layer)[PATH[kind]] == 1
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], **CLOSE)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_an_output_that_autocast_would_widen_is_left_to_peft(kind):
    layer = lora_layer(model_of(kind, FP16))
    fused.patch(layer)
    with torch.autocast("cpu", BF16):
        said = fused.explain(layer, torch.ones(5, FIRST[0], dtype=FP16))
        assert said.startswith("layer: peft (float16 x under autocast in bfloat16)")
        said = fused.explain(layer, torch.ones(5, FIRST[0]))
        assert PATH[kind] in said
        computed = {"nf4": "float16", "int8": "float32"}[kind]  # nf4 names what it computes in
        assert f"aten in {computed}" in said


def test_few_tokens_on_a_4_bit_base_take_its_own_product(monkeypatch):
    from fused_lora import four_bit

    layer = lora_layer(model_of("nf4"))
    fused.patch(layer)
    monkeypatch.setattr(four_bit, "least_tokens", lambda device: 5)
    x = torch.randn(5, FIRST[0])
    both = torch.cat([layer(x)[:4], layer(x[:4])])
    assert fused.call_counts(layer) == {"full": 1, "delta": 1, "peft": 0}
    torch.testing.assert_close(both[:4], both[4:], **CLOSE)
    assert "full (Linear4bit base, unpacked for the call), aten in float32" in fused.explain(layer)


def test_bitsandbytes_is_not_imported_where_peft_has_not(monkeypatch):
    model = adapted()
    for name in ("peft.tuners.lora.bnb", "fused_lora.integrations.peft_bnb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(integrations, "peft_bnb", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises
    assert len(fused.patch(model).fused) == 2


@pytest.mark.parametrize("parts", ["whole", "factors"])
def test_adapters_that_are_quantised_themselves_are_left_to_peft(parts):
    quantization = pytest.importorskip("torchao.quantization")
    model = adapted(target_modules=["first"]).eval().requires_grad_(False)
    x = torch.randn(5, FIRST[0])
    fused.patch(model)

    def chosen(module, name):
        return type(module) is torch.nn.Linear and (parts == "whole" or "lora_" in name)

    try:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), chosen)
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"torchao cannot quantise here: {error}")
    layer = lora_layer(model)
    y = layer(x)
    assert "peft (lora_A is a " in fused.explain(layer)
    fused.unpatch(layer)
    assert torch.equal(y, layer(x))
