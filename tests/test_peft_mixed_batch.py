"""A patched PEFT model called with `adapter_names`: one fused product for the whole batch, PEFT's
own values and gradients, and nothing kept that could go stale."""

from __future__ import annotations

import pytest
import torch

from fused_lora import adapter_pack, testing

pytest.importorskip("peft", reason="needs the extra `peft`")

import peft
from peft_models import FIRST, adapted, lora_layer, peft_copy

from fused_lora.integrations import peft as fused

pytestmark = pytest.mark.peft
BF16, FP32 = torch.bfloat16, torch.float32
NAMES = ["other", "default", "__base__", "third", "other", "default", "third"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def three_adapters(dtype=FP32, adapter_dtype=None, **options):
    """Of rank 8 ("default") and 3 ("other") on both layers, of rank 17 ("third") on the first."""
    model = adapted(dtype=dtype, **options)
    config = {"init_lora_weights": False, "target_modules": ["first", "second"], **options}
    model.add_adapter("other", peft.LoraConfig(**config | {"r": 3, "lora_alpha": 5}))
    third = {"r": 17, "target_modules": ["first"], "use_rslora": True}
    model.add_adapter("third", peft.LoraConfig(**config | third))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or parameter.dtype)
            parameter.requires_grad_()
    return model.eval()


def results(layer, x, dy, autocast=None):
    """y, dx and dA, dB of every adapter of a layer, of a mixed batch."""
    x = x.detach().requires_grad_()
    leaves = {"dx": x}
    for name in layer.lora_A:
        leaves |= {f"d{name} A": layer.lora_A[name].weight, f"d{name} B": layer.lora_B[name].weight}
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = layer(x, adapter_names=NAMES)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "autocast"),
    [(FP32, None, None), (BF16, BF16, None), (BF16, FP32, None), (FP32, FP32, BF16)],
)
def test_y_and_the_gradients_of_every_adapter_are_pefts(
    dtype, adapter_dtype, autocast, backend, device
):
    layer = lora_layer(three_adapters(dtype, adapter_dtype)).to(device)
    computed = autocast or dtype
    case = testing.make_case(7 * 3, FIRST[1], FIRST[0], 8, dtype, device=device)
    x, dy = case.x.view(7, 3, -1), case.dy.view(7, 3, -1)
    exact = peft_copy(layer, dtype=computed).double()
    eager = peft_copy(layer, adapter_dtype=None if autocast else computed)
    expected = [
        results(eager, x, dy, autocast),
        results(exact, x.to(computed).double(), dy.to(computed).double()),
    ]
    fused.patch(layer, backend=backend)
    ours = results(layer, x, dy, autocast)
    assert fused.call_counts(layer) == {"full": 1, "delta": 0, "peft": 0}
    assert ours["y"].dtype == computed
    assert not testing.check(ours, *expected, computed)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_whole_model_serves_a_mixed_batch_as_peft_does(dropout):
    model, x = three_adapters(lora_dropout=dropout), torch.randn(7, FIRST[0])
    with torch.no_grad():
        expected = model(x, adapter_names=NAMES)
        fused.patch(model)
        with torch.inference_mode():  # what is kept then must serve training, too
            torch.testing.assert_close(model(x, adapter_names=NAMES), expected, **CLOSE)
    model(x, adapter_names=NAMES).sum().backward()
    alone = [model(row[None], adapter_names=[name]) for row, name in zip(x, NAMES, strict=True)]
    torch.testing.assert_close(torch.cat(alone), expected, **CLOSE)
    # of single rows, the one of the base and the two whose adapter `second` lacks are left to PEFT
    assert fused.call_counts(model) == {"full": 14, "delta": 0, "peft": 4}


def test_a_change_of_an_adapter_is_seen_by_the_next_call_however_it_is_made():
    model, x = three_adapters(), torch.randn(7, FIRST[0])
    fused.patch(model)
    layer = lora_layer(model)
    with torch.no_grad():
        layer(x, adapter_names=NAMES)
        layer.lora_B["other"].weight.data.copy_(torch.randn(FIRST[1], 3))  # raises no version
        layer.scaling["default"] *= 2
        layer.lora_A["third"].weight = torch.nn.Parameter(torch.randn(17, FIRST[0]))
        ours = layer(x, adapter_names=NAMES)
        assert fused.call_counts(layer)["full"] == 2
        torch.testing.assert_close(ours, peft_copy_of(layer)(x, adapter_names=NAMES), **CLOSE)


def peft_copy_of(layer):
    layer = peft_copy(layer)
    fused.unpatch(layer)
    return layer


def test_tables_are_made_once_for_a_batch_of_the_same_adapters():
    model, x = three_adapters(), torch.randn(7, FIRST[0])
    fused.patch(model)
    adapter_pack._tables.cache_clear()
    adapter_pack._ids_of_samples.cache_clear()
    for _ in range(3):
        lora_layer(model)(x, adapter_names=NAMES)
    assert adapter_pack._tables.cache_info().misses == 1
    assert adapter_pack._ids_of_samples.cache_info().misses == 1


def scaled_by_tensor(model):
    lora_layer(model).scaling["other"] = torch.tensor(0.5)


def in_training(model):
    lora_layer(model).train()


def hooked(model):
    lora_layer(model).lora_A["third"].register_forward_hook(lambda *arguments: None)


def of_two_dtypes(model):
    lora_layer(model).lora_A["other"].to(BF16)
    lora_layer(model).lora_B["other"].to(BF16)


@pytest.mark.parametrize(
    ("change", "names", "reason"),
    [
        (scaled_by_tensor, NAMES, "scaling is a tensor"),
        (in_training, NAMES, "dropout is active"),
        (hooked, NAMES, "lora_A has hooks"),
        (of_two_dtypes, NAMES, "adapters of several dtypes"),
        (lambda model: None, ["__base__"] * 7, "none of them in this layer"),
    ],
)
def test_what_is_left_to_peft_says_why(change, names, reason):
    model, x = three_adapters(lora_dropout=0.5), torch.randn(7, FIRST[0])
    change(model)
    layer = lora_layer(model)
    torch.manual_seed(0)
    expected = layer(x, adapter_names=names)
    fused.patch(model)
    torch.manual_seed(0)
    ours = layer(x, adapter_names=names)
    assert dict(layer._fused_lora.calls) == {("peft", f"called with adapter_names, {reason}"): 1}
    if change is not in_training:  # PEFT walks through a set: who draws first is not fixed
        assert torch.equal(ours, expected)


def test_pefts_own_errors_are_still_raised():
    model, x = three_adapters(), torch.randn(7, FIRST[0])
    fused.patch(model)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(x, adapter_names=NAMES[:3])
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(x, adapter_names=["unknown"] * 7)
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=NAMES)
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(x, adapter_names=NAMES)
