"""Quantised bases: the adapter term is right on top of whatever the base computes, gradients reach
x and the adapters, and the base is never written to."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle

import pytest
import torch
from quantized_layers import BASES, BITSANDBYTES, K, N, R, adapted, base_layer, inputs, int8, nf4
from torch import nn

import fused_lora
from fused_lora import four_bit, load_adapter, reference, save_adapter, testing
from fused_lora.quantized import QuantizedLoRALinear, quantization_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
UNPACKED = "unpacked for the call, then multiplied together with the adapter"
HOW = dict.fromkeys(BASES, "the base's own product, then the adapter added to its output")
HOW["nf4"] = UNPACKED


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_the_adapter_is_added_to_what_the_base_computes(kind, dtype, backend):
    model, base = adapted(kind, dtype, backend=backend, adapter_dtype=torch.float32)
    case = testing.make_case(7, N, K, R, dtype, adapter_dtype=torch.float32)
    layer = model[0].train()
    layer.set_adapter(case.lora_A, case.lora_B, lora_alpha=16)
    x = case.x.clone().requires_grad_()
    y = layer(x)
    dx, dA, dB = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), case.dy)
    ours = {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}
    assert y.dtype == dtype and dA.dtype == torch.float32

    x = case.x.clone().requires_grad_()
    base_y = base(x)
    (base_dx,) = torch.autograd.grad(base_y, x, case.dy)
    term = case.without_base().tensors()
    term = (*term[:4], None, *term[5:])
    eager, exact = testing.eager_gradients(*term), testing.exact_gradients(*term)
    for right in (eager, exact):
        right["y"] = right["y"] + base_y.detach().to(right["y"].dtype)
        right["dx"] = right["dx"] + base_dx.to(right["dx"].dtype)
    assert not testing.check(ours, eager, exact, dtype)


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["dequantise", "delta"])
def test_both_paths_of_a_4_bit_base_meet_the_acceptance_rule(path, dtype, backend, monkeypatch):
    model, base = adapted("nf4", dtype, backend=backend, adapter_dtype=torch.float32)
    if path == "delta":
        monkeypatch.setattr(QuantizedLoRALinear, "path", lambda layer, x: "delta")
    case = testing.make_case(33, N, K, R, dtype, adapter_dtype=torch.float32)
    functional = importlib.import_module("bitsandbytes").functional
    weight = functional.dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)
    case = dataclasses.replace(case, weight=weight)
    layer = model[0]
    assert layer.path(case.x) == path
    layer.set_adapter(case.lora_A, case.lora_B, lora_alpha=16)
    base.bias.data = case.bias
    base.bias.requires_grad_()
    x = case.x.clone().requires_grad_()
    y = layer(x)
    leaves = (x, layer.lora_A, layer.lora_B, base.bias)
    grads = torch.autograd.grad(y, leaves, case.dy)
    ours = dict(zip(("y", "dx", "dA", "dB", "dbias"), (y.detach(), *grads), strict=True))
    right = testing.eager_gradients(*case.tensors()), testing.exact_gradients(*case.tensors())
    assert not testing.check(ours, *right, dtype)


def test_the_weight_is_unpacked_where_bitsandbytes_would_unpack_it_too(monkeypatch):
    model, base = adapted("nf4", torch.bfloat16)
    layer, x = model[0], inputs(dtype=torch.bfloat16)
    assert layer.path(x) == layer.path(x[0]) == "dequantise"
    monkeypatch.setattr(four_bit, "least_tokens", lambda device: 7)
    assert layer.path(x) == "dequantise" and layer.path(x[:6]) == "delta"
    assert layer.path(x.float()) == "delta"  # the adapter is computed in x's dtype there
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.path(x.float()) == "dequantise"
        y = layer(x.float())
        assert y.dtype == base(x.float()).dtype == torch.float32
    torch.testing.assert_close(y, layer(x).float())
    base.register_forward_hook(lambda module, args, output: 2 * output)
    assert layer.path(x) == "delta"
    with torch.no_grad():
        layer.lora_B.zero_()
        assert torch.equal(layer(x), base(x))

    monkeypatch.undo()
    base._forward_hooks.clear()
    assert layer.path(x) == "dequantise"
    del base.weight.quant_state  # as under FSDP: the base finds it elsewhere
    assert layer.path(x) == "delta"


@pytest.mark.parametrize("capability, least", [((8, 0), 513), ((9, 0), 65), ((10, 0), 65)])
def test_few_tokens_on_a_gpu_are_left_to_the_4_bit_product_of_bitsandbytes(
    capability, least, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert four_bit.least_tokens(torch.device("cuda", 0)) == least
    assert four_bit.least_tokens(torch.device("cpu")) == 1


def test_the_dtype_in_which_4_bit_weights_are_stored_says_nothing_of_the_adapter():
    torch.manual_seed(0)
    model = nn.Sequential(nf4(quant_storage=torch.bfloat16))
    assert model[0].weight.dtype == torch.bfloat16
    plain = model[0](inputs())
    fused_lora.apply_lora(model, r=R, lora_alpha=6)
    assert model[0].lora_A.dtype == model[0].lora_B.dtype == torch.float32
    torch.testing.assert_close(model(inputs()), plain)


def test_the_weight_is_unpacked_in_the_dtype_asked_for_and_kept_packed():
    _, base = adapted("nf4")
    packed, state = base.weight.data, base.weight.quant_state
    functional = importlib.import_module("bitsandbytes").functional
    W = functional.dequantize_4bit(packed, state)
    assert W.dtype == state.dtype == torch.float32
    unpacked = four_bit._unpacked(state, packed, torch.bfloat16)
    assert torch.equal(unpacked, W.bfloat16()) and state.dtype == torch.float32

    model, _ = adapted("nf4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(inputs().requires_grad_())
    assert {t.dtype for t in saved if t.numel() >= N * K / 2} == {torch.uint8}


def test_x_that_does_not_fit_is_refused_before_anything_is_unpacked():
    model, _ = adapted("nf4")
    with pytest.raises(ValueError, match=r"x has 128 features, weight expects in_features 64"):
        model(torch.randn(4, 2 * K))


@pytest.mark.parametrize("kind", BASES)
def test_shapes_switches_copies_and_checkpoints(kind):
    model, base = adapted(kind)
    layer, x = model[0], inputs(2, 3)
    assert isinstance(layer, QuantizedLoRALinear) and layer.base_layer is base
    with torch.no_grad():
        expected = base(x) + reference.lora_linear(
            x, torch.zeros(N, K), layer.lora_A, layer.lora_B, scaling=layer.scaling
        )
        torch.testing.assert_close(model(x), expected)
        assert torch.equal(model(x[0, 0]), model(x[:1, :1])[0, 0])
        with fused_lora.disable_adapters(model):
            assert torch.equal(model(x), base(x))
        twins = [copy.deepcopy(model)]
        if kind in BITSANDBYTES:  # the tensors of torchao cannot be pickled
            twins.append(pickle.loads(pickle.dumps(model)))
        for twin in twins:
            torch.testing.assert_close(twin(x), model(x))
    assert not base.weight.requires_grad
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        "0.lora_A",
        "0.lora_B",
    }
    assert fused_lora.unload(model)[0] is base


@pytest.mark.parametrize("asked", range(3))
@pytest.mark.parametrize("kind", BASES)
def test_only_the_gradients_asked_for_are_computed(kind, asked):
    model, _ = adapted(kind)
    leaves = (inputs().requires_grad_(), model[0].lora_A, model[0].lora_B)
    expected = torch.autograd.grad(model(leaves[0]).square().sum(), leaves)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == asked)
    (grad,) = torch.autograd.grad(model(leaves[0]).square().sum(), leaves[asked])
    torch.testing.assert_close(grad, expected[asked])


@pytest.mark.parametrize("kind", BASES)
def test_dropout_is_on_the_adapter_alone_and_off_in_eval(kind):
    model, base = adapted(kind, lora_dropout=0.5)
    x = inputs()
    torch.manual_seed(3)
    one = model.train()(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), one)
    assert not torch.equal(model(x), one)
    with fused_lora.disable_adapters(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model.eval()(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x[:1]), model(x)[:1])
    model.train()(x.requires_grad_()).sum().backward()  # and back from eval to training
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", BASES)
def test_merging_refuses_with_the_reason_and_changes_nothing(kind):
    model, base = adapted(kind)
    said = rf"^0: the base is quantised \({quantization_of(base)}\).*requantise=True"
    with pytest.raises(RuntimeError, match=said):
        fused_lora.merge_adapter(model)
    if kind not in BITSANDBYTES:
        with pytest.raises(RuntimeError, match=r"does not tell: merge a model in full precision"):
            fused_lora.merge_adapter(model, requantise=True)
    assert not model[0].merged and model[0].base_layer is base


def weight_of(layer):
    """What a quantised layer multiplies by, in fp32: its answer to the unit vectors."""
    with torch.no_grad():
        return (layer(torch.eye(K)) - layer.bias).t()


@pytest.mark.parametrize("keep_base", [True, "cpu", False])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_requantised_merge_is_the_quantised_sum_and_is_undone_exactly(kind, keep_base):
    model, base = adapted(kind)
    layer, x = model[0], inputs()
    before, base_y = model(x), base(x)
    exact = weight_of(base) + layer.delta_weight()
    fused_lora.merge_adapter(model, keep_base, requantise=True)
    fresh = base_layer(kind)
    source = nn.Linear(K, N)
    source.weight.data.copy_(exact)
    quantised = {"nf4": nf4, "int8": int8}[kind](source=source)
    merged = weight_of(layer.base_layer)
    assert layer.merged and type(layer.base_layer) is type(fresh) and layer.bias is base.bias
    # a value on the border of two levels may go either way
    assert (merged - weight_of(quantised)).norm() < 0.01 * merged.norm()
    assert torch.equal(base(x), base_y)
    with pytest.raises(RuntimeError, match=r"0 is merged into a quantised base.*unmerge\(\)"):
        model.state_dict()
    if keep_base is False:
        with pytest.raises(RuntimeError, match="needs the base weight of 0"):
            fused_lora.unmerge_adapter(model)
        return
    with fused_lora.disable_adapters(model):
        assert torch.equal(model(x), base_y)
    layer.set_adapter(2 * layer.lora_A.detach(), layer.lora_B.detach(), lora_alpha=3)
    assert layer.merged and torch.equal(weight_of(layer.base_layer), merged)
    fused_lora.unmerge_adapter(model)
    assert layer.base_layer is base and torch.equal(model(x), before)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_plain_layers_beside_quantised_ones_are_merged_with_them(kind):
    model = nn.Sequential(base_layer(kind), nn.Linear(N, K))
    plain = model[1].weight
    fused_lora.apply_lora(model, r=R, lora_alpha=6, init_lora_weights=False)
    delta = model[1].delta_weight()
    fused_lora.merge_adapter(model, requantise=True)
    assert model[0].merged and torch.equal(model[1].weight, plain + delta)
    fused_lora.unmerge_adapter(model)
    assert model[1].weight is plain


@pytest.mark.parametrize("kind", BASES)
def test_adapter_files_fit_quantised_and_plain_bases_alike(kind, tmp_path):
    pytest.importorskip("safetensors")
    model, base = adapted(kind)
    save_adapter(model, tmp_path, bias="all")
    twin = load_adapter(nn.Sequential(base_layer(kind)), tmp_path)
    assert isinstance(twin[0], QuantizedLoRALinear)
    torch.testing.assert_close(twin(inputs()), model(inputs()))
    other, _ = adapted(kind, r=5)
    torch.testing.assert_close(load_adapter(other, tmp_path)(inputs()), model(inputs()))
    plain = load_adapter(nn.Sequential(nn.Linear(K, N)), tmp_path)
    assert torch.equal(plain[0].lora_A, model[0].lora_A)
    assert torch.equal(plain[0].bias, base.bias)


@pytest.mark.parametrize("kind", BASES)
def test_training_on_a_quantised_base_lowers_the_loss_and_leaves_the_base(kind):
    model, base = adapted(kind, init_lora_weights=True, r=8)
    state = {key: value.clone() for key, value in base.state_dict().items() if key == "weight"}
    x, target = inputs(), torch.randn(7, N)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for key, value in state.items():
        now = base.state_dict()[key]
        same = (now.dequantize(), value.dequantize()) if "torchao" in kind else (now, value)
        assert torch.equal(*same)


@pytest.mark.parametrize("kind", BASES)
def test_explain_names_the_quantisation_and_the_path(kind):
    model, base = adapted(kind, backend="aten")
    lines = fused_lora.explain(model).splitlines()
    assert lines == [
        f"0: 64 -> 48, r=3, on a quantised base ({quantization_of(base)})",
        f"  {HOW[kind]} (aten)",
    ]
    assert repr(model[0]).startswith("QuantizedLoRALinear(\n  in_features=64, out_features=48,")


def test_explain_speaks_of_the_dtype_that_a_4_bit_layer_computes_in():
    model, _ = adapted("nf4", torch.bfloat16, adapter_dtype=torch.float32)
    assert model[0].path(inputs(dtype=torch.bfloat16)) == "dequantise"
    assert UNPACKED in fused_lora.explain(model)


def test_a_packed_weight_counts_as_what_it_stands_for(capsys):
    model, _ = adapted("nf4")
    assert fused_lora.trainable_parameters(model) == (R * (K + N), R * (K + N) + K * N + N)


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match=r"expected a quantised linear layer.*got Linear"):
        QuantizedLoRALinear(nn.Linear(4, 4))
    base = base_layer("torchao int8")
    with pytest.raises(TypeError, match=r"got Linear with torch.float32 in a Int8Tensor"):
        fused_lora.FusedLoRALinear.from_linear(base)
