"""Properties of the layer for shapes, strides and dtypes that nobody chose: drawn by hypothesis,
the same draws at every run."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from shapes import BF16, DTYPES, FP16, FP32, PATHS, embedded, force_path

from fused_lora import lora_linear, reference
from fused_lora.kernels import config
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.testing import (
    Case,
    check,
    eager_gradients,
    exact_gradients,
    gradients,
    make_case,
)

kernels = pytest.mark.kernels

BACKENDS = {name: partial(lora_linear, backend=name) for name in ("triton", "aten")}
LAYOUTS = {
    "contiguous": lambda t: t,
    "embedded": embedded,
    "transposed": lambda t: t.t().contiguous().t(),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}


def drawn(examples):
    """Derandomised: a draw that fails today fails tomorrow, on every machine. Not shrunk: that
    takes many minutes in the interpreter."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@st.composite
def layers(draw):
    """Sizes, leading dimensions, dtypes, layouts and a path: everything a call may differ in."""
    dtype = draw(st.sampled_from(DTYPES))
    aligned = draw(st.booleans())  # sizes that tensor descriptors can address
    features = st.integers(1, 11).map(lambda n: 8 * n) if aligned else st.integers(2, 90)
    return {
        "leading": draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)),
        "K": draw(features),
        "N": draw(features),
        "r": draw(st.integers(1, 40)),
        "dtype": dtype,
        "adapter_dtype": draw(st.sampled_from((dtype, FP32))),
        "bias": draw(st.booleans()),
        "layouts": draw(st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 4)),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.3))),
        "path": draw(st.sampled_from(("auto", *PATHS))),
        "seed": draw(st.integers(0, 2**31)),
    }


def laid_out(case, layouts):
    names = ("x", "weight", "lora_A", "lora_B")
    changed = {n: LAYOUTS[name](getattr(case, n)) for n, name in zip(names, layouts, strict=True)}
    return replace(case, **changed)


@kernels
@drawn(60)
@given(layer=layers())
def test_both_backends_agree_with_the_reference(device, layer):
    M, K, N = math.prod(layer["leading"]), layer["K"], layer["N"]
    case = make_case(
        M,
        N,
        K,
        layer["r"],
        layer["dtype"],
        seed=layer["seed"],
        bias=layer["bias"],
        adapter_dtype=layer["adapter_dtype"],
        device=device,
    )
    case = laid_out(case, layer["layouts"])
    leading = tuple(layer["leading"])
    case = replace(case, x=case.x.reshape(*leading, K), dy=case.dy.view(*leading, N))
    options = {
        "dropout_p": layer["dropout_p"],
        "seed": torch.tensor(layer["seed"], device=device),
    }
    eager = eager_gradients(*case.tensors(), **options)
    exact = exact_gradients(*case.tensors(), **options)
    with pytest.MonkeyPatch.context() as patch:
        force_path(patch, layer["path"])
        for name, function in BACKENDS.items():
            ours = gradients(function, *case.tensors(), **options)
            assert check(ours, eager, exact, layer["dtype"]) == [], name


def whole_numbers(M, K, N, r, dtype, seed, device):
    """A case of small whole numbers: every sum is exact in fp32, those that are rounded on the way
    (S, dS, the base product of aten) in bf16, too. Each result is the exact one rounded once,
    whatever the order of summation."""
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape):
        return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)

    x, weight, lora_A, lora_B = whole(M, K), whole(N, K), whole(r, K), whole(N, r)
    bias, dy = whole(N), whole(M, N)
    for left, right, factor in (
        (x, weight, 1),
        (dy, weight.t(), 1),
        (x, lora_A, 4),
        (dy, lora_B.t(), 4),
    ):
        assert factor * (left.double() @ right.double().t()).abs().max() < 255
    return Case(x, weight, lora_A, lora_B, bias, dy, scaling=2.0)


@st.composite
def exact_layers(draw):
    features = st.integers(1, 20).map(lambda n: 8 * n) | st.integers(1, 160)
    return {
        "M": draw(st.integers(1, 150)),
        "K": draw(features),
        "N": draw(features),
        "r": draw(st.integers(1, 64)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def fitting(sizes, path):
    """The sizes cut to what the decode path takes."""
    if path != "decode":
        return sizes
    return sizes | {"M": min(sizes["M"], 16), "r": min(sizes["r"], 16)}


@kernels
@pytest.mark.parametrize("path", (*PATHS, "aten"))
@drawn(12)
@given(sizes=exact_layers(), dropout_p=st.sampled_from((0.0, 0.5)))
@example(sizes={"M": 64, "K": 64, "N": 56, "r": 8, "dtype": BF16, "seed": 1}, dropout_p=0.0)
@example(sizes={"M": 150, "K": 64, "N": 56, "r": 33, "dtype": FP16, "seed": 2}, dropout_p=0.5)
def test_whole_numbers_are_computed_exactly(path, device, sizes, dropout_p):
    case = whole_numbers(**fitting(sizes, path), device=device)
    options = {"dropout_p": dropout_p, "seed": torch.tensor(sizes["seed"], device=device)}
    exact = exact_gradients(*case.tensors(), **options)
    with pytest.MonkeyPatch.context() as patch:
        if path != "aten":
            force_path(patch, path)
        layer = BACKENDS["aten" if path == "aten" else "triton"]
        for name, result in gradients(layer, *case.tensors(), **options).items():
            assert torch.equal(result, exact[name].to(result.dtype)), name


@pytest.mark.parametrize("path", (*PATHS, "aten"))
@drawn(5)
@given(sizes=exact_layers(), order=st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_results_and_keeps_the_adapters_gradients(
    path, device, sizes, order
):
    """On whole numbers, where the bits do not depend on which row of a tile a token is."""
    case = whole_numbers(**fitting(sizes, path), device=device)
    permutation = list(range(case.x.shape[0]))
    order.shuffle(permutation)
    shuffled = replace(case, x=case.x[permutation], dy=case.dy[permutation])
    with pytest.MonkeyPatch.context() as patch:
        if path != "aten":
            force_path(patch, path)
        layer = BACKENDS["aten" if path == "aten" else "triton"]
        before, after = (gradients(layer, *c.tensors()) for c in (case, shuffled))
    for name in ("y", "dx"):
        assert torch.equal(before[name][permutation], after[name]), name
    for name in ("dA", "dB", "dbias"):
        assert torch.equal(before[name], after[name]), name


def product_alone(case, path):
    """x W^T + bias by the kernel, tiles and all, that this path would use, without an adapter."""
    (M, K), N = case.x.shape, case.weight.shape[0]
    plan = config.choose_product(
        config.FORCED,
        config.device_of(case.x.device),
        8 * case.x.element_size(),
        *(M, N, K, case.lora_A.shape[0]),
        drawn=False,
        masked=False,
        followed=False,
        addressable=True,
    )
    assert plan.path == path
    y = case.x.new_empty((M, N))
    if path == "pdl":
        descriptor_matmul(case.x, case.weight.t(), y, plan.matmul, 4, bias=case.bias)
    else:
        matmul(case.x, case.weight.t(), y, plan.matmul, bias=case.bias)
    return y


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ("portable", "single", "pdl", "aten"))
def test_zero_lora_b_gives_the_base_product_bit_for_bit(path, dtype, monkeypatch, device):
    if path == "pdl" and (dtype == FP32 or path not in PATHS):
        pytest.skip("the descriptor path takes 16-bit dtypes, on Hopper")
    case = make_case(100, 56, 200, 16, dtype, device=device)
    if path == "aten":
        base = torch.nn.functional.linear(case.x, case.weight, case.bias)
    else:
        force_path(monkeypatch, path)
        base = product_alone(case, path)
    layer = BACKENDS["aten" if path == "aten" else "triton"]
    zero = torch.zeros_like(case.lora_B)
    y = layer(case.x, case.weight, case.lora_A, zero, case.bias, scaling=case.scaling)
    assert torch.equal(y, base)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", (*PATHS, "aten"))
def test_an_adapter_with_either_factor_zero_adds_nothing(path, dtype, monkeypatch, device):
    if path != "aten":
        force_path(monkeypatch, path)
    layer = BACKENDS["aten" if path == "aten" else "triton"]
    case = make_case(16, 56, 200, 16, dtype, device=device)
    arguments = {"bias": case.bias, "scaling": case.scaling}
    without_A = layer(case.x, case.weight, torch.zeros_like(case.lora_A), case.lora_B, **arguments)
    without_B = layer(case.x, case.weight, case.lora_A, torch.zeros_like(case.lora_B), **arguments)
    assert torch.equal(without_A, without_B)
    assert not torch.equal(
        without_A, layer(case.x, case.weight, case.lora_A, case.lora_B, **arguments)
    )


@drawn(30)
@given(rows=st.integers(1, 40), scaling=st.sampled_from((0.5, 1.0, 4.0)), data=st.integers(0, 99))
def test_the_reference_is_the_merged_layer(device, rows, scaling, data):
    """The specification itself, against W0 + s B A in fp64."""
    case = make_case(rows, 7, 9, 3, torch.float64, seed=data, device=device)
    merged = case.weight + scaling * case.lora_B @ case.lora_A
    expected = torch.nn.functional.linear(case.x, merged, case.bias)
    arguments = (case.x, case.weight, case.lora_A, case.lora_B, case.bias)
    torch.testing.assert_close(reference.lora_linear(*arguments, scaling=scaling), expected)
