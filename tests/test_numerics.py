"""`lora_linear` on every path of the kernels and on aten, against fp64 by the acceptance rule: y
and all gradients, over the ragged cover, leading dimensions, strides and what is frozen."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from shapes import (
    BF16,
    COVER,
    CROSS,
    DESCRIPTOR_PATHS,
    DTYPES,
    FP16,
    FP32,
    PATH_COVER,
    PATHS,
    PATHS_AND_DTYPES,
    TOKENS,
    embedded,
    force_path,
    multiple_of_8,
    takes,
)

from fused_lora import lora_linear, ops, reference
from fused_lora.kernels import config
from fused_lora.testing import check, make_case, violations_of

kernels = pytest.mark.kernels

INPUTS = ("x", "weight", "lora_A", "lora_B", "bias")
SUBSETS = [s for n in range(6) for s in itertools.combinations(INPUTS, n)]
TRITON, ATEN = (partial(lora_linear, backend=backend) for backend in ("triton", "aten"))


@pytest.fixture
def force(monkeypatch):
    """Force a path; the list returned names the paths that the products took."""
    return partial(force_path, monkeypatch)


def results(layer, case, needs=INPUTS, **options):
    """{"y": y, name: its gradient} for the inputs named in `needs`, the others frozen."""
    given = {name: getattr(case, name) for name in INPUTS}
    leaves = {n: None if t is None else t.detach() for n, t in given.items()}
    for name in needs:
        leaves[name].requires_grad_()
    y = layer(*leaves.values(), scaling=case.scaling, **options)
    assert y.requires_grad == bool(needs)
    wanted = [leaves[name] for name in needs]
    grads = torch.autograd.grad(y, wanted, case.dy) if needs else ()
    return {"y": y.detach(), **dict(zip(needs, grads, strict=True))}


def violations(ours, case, floor=True, **options):
    """The rule for what `results` returned."""
    needs = tuple(name for name in ours if name != "y")
    exact_case = replace(case, **{n: getattr(case, n).double() for n in (*INPUTS, "dy")})
    eager = results(reference.lora_linear, case, needs, **options)
    exact = results(reference.lora_linear, exact_case, needs, **options)
    return check(ours, eager, exact, case.x.dtype, floor)


@kernels
@pytest.mark.parametrize(("M", "K", "N", "r", "dtype", "path"), PATH_COVER)
def test_every_path_over_the_cover(M, K, N, r, dtype, path, force, device):
    if path in DESCRIPTOR_PATHS:
        K, N = multiple_of_8(K), multiple_of_8(N)
    taken = force(path)
    case = make_case(M, N, K, r, dtype, seed=M + K + N + r, device=device)
    assert violations_of(TRITON, case) == []
    assert set(taken) == {path}


@kernels
@pytest.mark.parametrize(("M", "K", "N", "r", "dtype"), COVER)
def test_aten_over_the_cover(M, K, N, r, dtype, device):
    case = make_case(M, N, K, r, dtype, seed=M + K + N + r, device=device)
    assert violations_of(ATEN, case) == []


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize(("path", "dtype"), [*PATHS_AND_DTYPES, *(("aten", d) for d in DTYPES)])
def test_the_full_cross_product(path, dtype, M, force, device):
    if path != "aten":
        force(path)
    for tokens, K, N, r in CROSS:
        if tokens == M and (path == "aten" or takes(path, M, r, dtype)):
            if path in DESCRIPTOR_PATHS:
                K, N = multiple_of_8(K), multiple_of_8(N)
            case = make_case(M, N, K, r, dtype, device=device)
            assert violations_of(ATEN if path == "aten" else TRITON, case) == [], (M, K, N, r)


@kernels
@pytest.mark.parametrize(("path", "dtype"), [*PATHS_AND_DTYPES, *(("aten", d) for d in DTYPES)])
def test_no_error_beyond_eagers_without_the_floor(path, dtype, force, device):
    taken = [path] if path == "aten" else force(path)
    M = config.MAX_DECODE[8 * dtype.itemsize][0] if path == "decode" else 256
    layer = ATEN if path == "aten" else TRITON
    case = make_case(M, 512, 512, 16, dtype, amplify=False, device=device)
    for inputs in (case, case.without_base()):
        assert violations(results(layer, inputs), inputs, floor=False) == []
    assert set(taken) == {path}


@kernels
@pytest.mark.parametrize("base", (FP16, BF16))
@pytest.mark.parametrize("path", (*PATHS, "aten"))
def test_fp32_adapters_on_a_16_bit_base_get_fp32_gradients(path, base, force, device):
    taken = [path] if path == "aten" else force(path)
    layer = ATEN if path == "aten" else TRITON
    split = 33 if path == "decode" else 130  # tokens over several programs of rank_grad
    for M, r in ((33, 3), (split, 16)):
        case = make_case(M, 56, 72, r, base, adapter_dtype=FP32, device=device)
        assert violations_of(layer, case) == []
        ours = results(layer, case)
        assert {name: t.dtype for name, t in ours.items()} == {
            "y": base,
            "x": base,
            "weight": base,
            "lora_A": FP32,
            "lora_B": FP32,
            "bias": base,
        }
        for name in ("lora_A", "lora_B"):
            if path != "aten":  # straight from the accumulator, not rounded to the base's dtype
                assert not torch.equal(ours[name], ours[name].to(base).float())
    assert set(taken) == {path}


def test_the_gradient_of_a_narrow_factor_is_contiguous(device):
    case = make_case(130, 48, 64, 8, FP32, device=device)  # more tokens than columns
    assert results(ATEN, case)["lora_B"].is_contiguous()


@kernels
@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
@pytest.mark.parametrize("needs", SUBSETS[1:], ids="-".join)
def test_gradcheck_on_aten_in_fp64(needs, dropout_p, device):
    case = make_case(3, 3, 4, 2, torch.float64, device=device, amplify=False)
    seed = torch.tensor(7, device=device)
    for names in (INPUTS, INPUTS[:4]):  # with and without a bias
        tensors = [getattr(case, n).clone().requires_grad_(n in needs) for n in names]
        if any(t.requires_grad for t in tensors):
            options = {"scaling": 1.5, "dropout_p": dropout_p, "seed": seed}
            assert torch.autograd.gradcheck(partial(ATEN, **options), tensors)


@kernels
@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("needs", SUBSETS, ids=lambda s: "-".join(s) or "nothing")
def test_only_the_needed_gradients_are_computed_and_right(needs, backend, monkeypatch, device):
    computed = []
    backward = ops._kernels[ops.backward]

    def counted(*args):
        computed.append(backward(*args))
        return computed[-1]

    monkeypatch.setitem(ops._kernels, ops.backward, counted)
    case = make_case(33, 50, 70, 3, FP32, device=device)
    ours = results(partial(lora_linear, backend=backend), case, needs)
    assert violations(ours, case) == []
    assert [len(grads) for grads in computed] == ([len(needs)] if needs else [])


@kernels
@pytest.mark.parametrize("path", (*PATHS, "aten"))
def test_scaling_may_be_a_tensor(path, force, device):
    taken = [path] if path == "aten" else force(path)
    layer = ATEN if path == "aten" else TRITON
    case = make_case(16, 56, 72, 8, BF16, device=device)
    as_tensor = replace(case, scaling=torch.tensor(case.scaling, device=device))
    ours = results(layer, as_tensor)
    assert violations(ours, case) == []
    if path != "aten":  # there the tensor is multiplied in behind the product
        for name, plain in results(layer, case).items():
            assert torch.equal(ours[name], plain)
    assert set(taken) == {path}


@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
@pytest.mark.parametrize("leading", ((0,), (2, 0, 3)))
def test_no_tokens_give_empty_results_and_zero_gradients(leading, dropout_p, backend, device):
    case = make_case(0, 50, 70, 3, FP32, device=device)
    case = replace(case, x=case.x.view(*leading, 70), dy=case.dy.view(*leading, 50))
    ours = results(partial(lora_linear, backend=backend), case, dropout_p=dropout_p)
    assert ours["y"].shape == (*leading, 50) and ours["x"].shape == (*leading, 70)
    for name in INPUTS[1:]:
        assert torch.equal(ours[name], torch.zeros_like(getattr(case, name)))


@kernels
@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("leading", ((), (1,), (6,), (2, 3), (3, 1, 2)))
def test_any_leading_dimensions(leading, backend, device):
    M = max(1, torch.Size(leading).numel())
    flat = make_case(M, 50, 70, 3, BF16, device=device)
    case = replace(flat, x=flat.x.view(*leading, 70), dy=flat.dy.view(*leading, 50))
    ours = results(partial(lora_linear, backend=backend), case)
    assert ours["y"].shape == (*leading, 50)
    assert violations(ours, case) == []


def transposed(t):
    return t.t().contiguous().t()


def sliced(t):
    """The same matrix as columns 3 onwards of a wider one: unaligned rows."""
    return torch.nn.functional.pad(t, (3, 2), value=torch.nan)[:, 3:-2]


def aligned(t):
    return torch.nn.functional.pad(t, (8, 8), value=torch.nan)[:, 8:-8]


def expanded(t):
    return t.new_ones(()).expand(t.shape)


def without_first_token(t):
    """x[:, 1:] of a batch of sequences."""
    return torch.nn.functional.pad(t.view(3, 11, -1), (0, 0, 1, 0), value=torch.nan)[:, 1:]


STRIDES = {
    "x transposed": {"x": transposed},
    "x sliced": {"x": sliced},
    "x sliced, aligned": {"x": aligned},
    "x without its first tokens": {"x": without_first_token, "dy": lambda t: t.view(3, 11, -1)},
    "weight transposed": {"weight": transposed},
    "weight sliced": {"weight": sliced},
    "adapters transposed": {"lora_A": transposed, "lora_B": transposed},
    "adapters sliced": {"lora_A": sliced, "lora_B": aligned},
    "dy transposed": {"dy": transposed},
    "dy sliced": {"dy": sliced},
    "dy expanded": {"dy": expanded},
    "bias strided": {"bias": lambda t: t.repeat_interleave(2)[::2]},
    "bias expanded": {"bias": expanded},
}


@kernels
@pytest.mark.parametrize("path", (*PATHS, "aten"))
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides, path, force, device):
    if path != "aten":
        force(path)
    case = make_case(33, 56, 72, 8, BF16, device=device)
    changed = {name: change(getattr(case, name)) for name, change in STRIDES[strides].items()}
    case = replace(case, **changed)
    assert violations(results(ATEN if path == "aten" else TRITON, case), case) == []


@kernels
@pytest.mark.parametrize("path", (*PATHS, "aten"))
def test_what_a_hook_lays_out_anew_for_backward_is_read_right(path, force, device):
    """Hooks on saved tensors may return equal ones of other strides."""
    if path != "aten":
        force(path)
    case = make_case(33, 56, 72, 8, BF16, device=device)
    with torch.autograd.graph.saved_tensors_hooks(transposed, lambda t: t):
        ours = results(ATEN if path == "aten" else TRITON, case)
    assert violations(ours, case) == []


@kernels
def test_a_mask_of_strided_columns_is_read_right(device):
    case = make_case(33, 50, 100, 5, FP32, device=device)
    tensors = [t.requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)]

    def apart(t):
        return t.repeat_interleave(2, 1)[:, ::2] if t.dtype == torch.uint8 else t

    grads = []
    for pack in (apart, lambda t: t):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = TRITON(*tensors, dropout_p=0.5, seed=torch.tensor(3, device=device))
        grads.append(torch.autograd.grad(y, tensors, case.dy))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@kernels
@pytest.mark.parametrize("path", PATHS)
def test_autocast_of_a_weight_whose_copy_descriptors_cannot_address(path, force, device):
    """x has aligned rows around a width that is not aligned, W is cast to that width."""
    force(path)
    case = make_case(33, 56, 50, 8, BF16, device=device)
    wide = replace(case, x=embedded(case.x), weight=case.weight.float(), bias=case.bias.float())
    with torch.autocast(device, BF16):
        ours = results(TRITON, wide)
    assert violations(ours, case) == []


@kernels
@pytest.mark.parametrize(("path", "dtype"), PATHS_AND_DTYPES)
def test_the_same_bits_at_every_run(path, dtype, force, device):
    M = config.MAX_DECODE[8 * dtype.itemsize][0] if path == "decode" else 130
    taken = force(path)
    case = make_case(M, 56, 72, 16, dtype, device=device)
    first, second = results(TRITON, case), results(TRITON, case)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert set(taken) == {path}


@kernels
@pytest.mark.parametrize("path", ("decode", "single"))
def test_partial_sums_beyond_fp16_cancel(path, force, device):
    """S = 160 / 32 is small, half of its sum over K is not: 32 * 24 * 128."""
    force(path)
    K, N, r = 256, 16, 5
    x, lora_A = torch.full((4, K), 32.0), torch.full((r, K), 24.0)
    lora_A[:, K // 2 :] *= -1
    lora_A[:, 0] += 1
    weight, lora_B = torch.zeros(N, K), torch.ones(N, r)
    half = [t.to(device, FP16) for t in (x, weight, lora_A, lora_B)]
    y = lora_linear(*half, backend="triton")
    assert torch.equal(y.float().cpu(), torch.full((4, N), 160.0))
    # and dX, whose dS is summed over the outputs: the same layer, transposed
    half = [t.to(device, FP16) for t in (x.zero_()[:, :N], weight.t(), lora_B.t(), lora_A.t())]
    dx_of = half[0].clone().requires_grad_()
    y = lora_linear(dx_of, *half[1:], backend="triton")
    (dx,) = torch.autograd.grad(y, dx_of, torch.full_like(y, 32.0))
    assert torch.equal(dx.float().cpu(), torch.full((4, N), 160.0))
    # what overflows as a whole is infinite, not NaN
    half = [t.to(device, FP16) for t in (torch.full((4, K), 64.0), weight, lora_A.abs(), lora_B)]
    assert lora_linear(*half, backend="triton").isposinf().all()


@kernels
@pytest.mark.parametrize("which", range(4))
def test_a_lazy_sign_is_not_lost(which, device):
    case = make_case(9, 24, 40, 4, FP32, device=device)
    tensors = [case.x, case.weight, case.lora_A, case.lora_B]
    expected = lora_linear(*tensors, backend="triton")
    tensors[which] = torch._neg_view(-tensors[which])
    assert tensors[which].is_neg()
    assert torch.equal(lora_linear(*tensors, backend="triton"), expected)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]
    y = lora_linear(leaves[0], case.weight, *leaves[1:], backend="triton")
    plain = torch.autograd.grad(y, leaves, case.dy, retain_graph=True)
    lazy = torch.autograd.grad(y, leaves, torch._neg_view(-case.dy))
    assert all(map(torch.equal, plain, lazy))
