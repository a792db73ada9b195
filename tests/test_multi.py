"""`multi_lora_linear` on the kernels and on aten: every token gets its own adapter, by the
acceptance rule, whatever the adapters' popularity and ranks and the order of the tokens."""

from dataclasses import replace
from functools import partial
from itertools import cycle, product

import pytest
import torch
from multi_cases import (
    ORDERS,
    POPULARITIES,
    fused,
    make_batch,
    make_ids,
    make_pack,
    specified,
    violations,
)
from shapes import BF16, DESCRIPTOR_PATHS, DTYPES, FP16, FP32, PATHS, force_path, pairwise, takes

from fused_lora import lora_linear, multi_lora_linear
from fused_lora.testing import check

kernels = pytest.mark.kernels

MULTI_PATHS = PATHS
RANKS = ((16,), (8, 16, 64), (1,), (33,), (1, 16, 33, 8))
SIZES = ((1, 50, 70), (7, 500, 50), (33, 56, 72), (100, 72, 56), (130, 70, 50))  # M, N, K


@pytest.fixture
def force(monkeypatch):
    return partial(force_path, monkeypatch)


def packed(ranks):
    return sum(-(-r // 16) * 16 for r in ranks)


def possible(M, N, K, ranks, _popularity, _order, dtype, path):
    if (M, N, K) not in SIZES or not takes(path, M, packed(ranks), dtype):
        return False
    return path not in DESCRIPTOR_PATHS or (N % 8 == 0 and K % 8 == 0)


FACTORS = tuple(tuple(dict.fromkeys(sizes)) for sizes in zip(*SIZES, strict=True))
COVER = pairwise(*FACTORS, RANKS, POPULARITIES, ORDERS, DTYPES, MULTI_PATHS, allowed=possible)


@kernels
@pytest.mark.parametrize(("M", "N", "K", "ranks", "popularity", "order", "dtype", "path"), COVER)
def test_every_path_over_the_cover(M, N, K, ranks, popularity, order, dtype, path, force, device):
    taken = force(path)
    ids = make_ids(popularity, order, M, len(ranks))
    batch = make_batch(M, N, K, ranks, dtype, ids, device)
    assert violations(batch, backend="triton") == []
    assert set(taken) == {path}


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("ranks", RANKS)
def test_aten_over_the_cross_product(ranks, popularity, device):
    dtypes = cycle((*DTYPES, torch.float64, BF16, FP32, FP16))
    for (M, N, K), order in product(SIZES, ORDERS):
        dtype, ids = next(dtypes), make_ids(popularity, order, M, len(ranks))
        batch = make_batch(M, N, K, ranks, dtype, ids, device)
        assert violations(batch, backend="aten") == []


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("path", MULTI_PATHS)
def test_the_full_cross_product(path, popularity, force, device):
    force(path)
    for (M, N, K), ranks, order, dtype in product(SIZES, RANKS, ORDERS, DTYPES):
        if possible(M, N, K, ranks, popularity, order, dtype, path):
            ids = make_ids(popularity, order, M, len(ranks))
            batch = make_batch(M, N, K, ranks, dtype, ids, device)
            assert violations(batch, backend="triton") == [], (M, N, K, ranks, order, dtype)


@kernels
@pytest.mark.parametrize("path", ("portable", "pdl", "aten"))
@pytest.mark.parametrize("order", ORDERS)
def test_64_adapters_of_a_total_rank_beyond_the_window(order, path, force, device):
    """Grouped tokens skip columns, shuffled ones do not: both are right, row by row the same."""
    if path not in (*PATHS, "aten"):
        pytest.skip("this GPU takes the portable kernel")
    if path != "aten":
        force(path)
    backend = "aten" if path == "aten" else "triton"
    ids = make_ids("distinct", order, 140, 64)
    batch = make_batch(140, 40, 56, (16,) * 64, BF16, ids, device)
    pack = make_pack(batch)
    ours = fused(batch, pack, backend=backend)
    exact = specified(batch.to(torch.float64))
    assert check(ours, specified(batch), exact, BF16) == []
    shuffle = torch.randperm(140)
    shuffled = replace(batch, x=batch.x[shuffle], dy=batch.dy[shuffle], ids=batch.ids[shuffle])
    again = fused(shuffled, pack, backend=backend)
    for name in ("y", "dx"):
        assert torch.equal(again[name], ours[name][shuffle])


@kernels
@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("path", MULTI_PATHS)
@pytest.mark.parametrize("r", (1, 8, 16, 33))
def test_a_pack_of_one_equals_the_single_path_bit_for_bit(r, path, dtype, force, device):
    if not takes(path, 16, packed((r,)), dtype):
        pytest.skip("the path cannot take this rank or dtype")
    taken = force(path)
    ids = torch.zeros(16, dtype=torch.int32)
    batch = make_batch(16, 56, 72, (r,), dtype, ids, device)
    ours = fused(batch, backend="triton")
    (lora_A, lora_B, scaling), *_ = batch.adapters
    assert_equals_single(ours, batch, lora_A, lora_B, scaling, "triton")
    assert set(taken) == {path}


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_a_pack_of_one_draws_the_dropout_of_the_single_path(backend, device):
    options = {"dropout_p": 0.4, "seed": torch.tensor(3, device=device)}
    ids = torch.zeros(33, dtype=torch.int32)
    batch = make_batch(33, 56, 72, (16,), FP32, ids, device)
    (lora_A, lora_B, scaling), *_ = batch.adapters
    ours = fused(batch, backend=backend, **options)
    tensor = torch.tensor(scaling, device=device)  # multiplied in on the device, as a pack's is
    assert_equals_single(ours, batch, lora_A, lora_B, tensor, backend, **options)


def assert_equals_single(ours, batch, lora_A, lora_B, scaling, backend, **options):
    leaves = [t.detach().requires_grad_() for t in (batch.x, lora_A, lora_B, batch.bias)]
    x, A, B, bias = leaves
    y = lora_linear(x, batch.weight, A, B, bias, scaling=scaling, backend=backend, **options)
    grads = torch.autograd.grad(y, leaves, batch.dy)
    single = dict(zip(("y", "dx", "dA 0", "dB 0", "dbias"), (y, *grads), strict=True))
    assert all(torch.equal(ours[name], single[name]) for name in single)


@kernels
@pytest.mark.parametrize("path", (*MULTI_PATHS, "aten"))
def test_permuting_tokens_permutes_y_and_two_runs_agree(path, force, device):
    taken = [path] if path == "aten" else force(path)
    run = partial(fused, backend="aten" if path == "aten" else "triton")
    M, N, K = (33, 56, 72)
    batch = make_batch(M, N, K, (8, 16, 33), BF16, make_ids("uniform", "shuffled", M, 3), device)
    if path == "decode":
        batch = replace(batch, adapters=batch.adapters[1:], ids=batch.ids.clamp(max=1))
    shuffle = torch.randperm(M, device=device)
    permuted = replace(batch, x=batch.x[shuffle], dy=batch.dy[shuffle], ids=batch.ids[shuffle])
    pack = make_pack(batch)
    ours, again, other = run(batch, pack), run(batch, pack), run(permuted, pack)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert torch.equal(other["y"], ours["y"][shuffle])
    assert torch.equal(other["dx"], ours["dx"][shuffle])
    if path != "single":  # three adapters are too many for it
        assert set(taken) == {path}


@kernels
@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_without_tokens_an_adapter_has_exactly_zero_gradient(backend, device):
    ids = torch.tensor([1, 1, -1, 1, 3] * 26, dtype=torch.int32)
    batch = make_batch(130, 40, 50, (8, 16, 33, 1), BF16, ids, device)
    ours = fused(batch, backend=backend)
    for index, used in enumerate((False, True, False, True)):
        for factor in "AB":
            assert bool(ours[f"d{factor} {index}"].any()) == used
    base = torch.zeros_like(ids) - 1
    nobody = fused(replace(batch, ids=base.to(device)), backend=backend)
    plain = lora_linear(
        *(batch.x, batch.weight, *(torch.zeros_like(t) for t in batch.adapters[0][:2]), batch.bias),
        backend=backend,
    )
    assert torch.equal(nobody["y"], plain)
    assert not any(nobody[name].any() for name in nobody if name.startswith(("dA", "dB")))


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_training_together_gives_each_adapter_the_gradients_of_training_alone(backend, device):
    ranks = (8, 16, 33)
    batch = make_batch(100, 56, 72, ranks, FP32, make_ids("uniform", "shuffled", 100, 3), device)
    together = fused(batch, backend=backend)
    for index, adapter in enumerate(batch.adapters):
        own = batch.ids == index
        alone = replace(
            batch,
            x=batch.x[own],
            dy=batch.dy[own],
            adapters=(adapter,),
            ids=torch.zeros_like(batch.ids[own]),
        )
        names = {f"d{factor} {index}": f"d{factor} 0" for factor in "AB"}
        ours = {alone_name: together[name] for name, alone_name in names.items()}
        exact, eager = specified(alone.to(torch.float64)), specified(alone)
        assert check(ours, eager, exact, FP32) == []


@kernels
@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("dtype", (FP32, FP16))
def test_dropout_drops_what_the_specification_drops(dtype, backend, device):
    ids = make_ids("uniform", "shuffled", 70, 3)
    batch = make_batch(70, 40, 50, (8, 16, 33), dtype, ids, device)
    options = {"dropout_p": 0.3, "seed": torch.tensor(11, device=device)}
    assert violations(batch, backend=backend, **options) == []


@kernels
@pytest.mark.parametrize("path", ("portable", "pdl", "decode", "aten"))
def test_fp32_adapters_on_a_16_bit_base(path, force, device):
    if path not in (*PATHS, "aten"):
        pytest.skip("this GPU takes the portable kernel")
    if path != "aten":
        force(path)
    ids = make_ids("uniform", "shuffled", 33, 2)
    batch = make_batch(33, 56, 72, (8, 33), BF16, ids, device, adapter_dtype=FP32)
    pack = make_pack(batch, adapter_dtype=FP32)
    backend = "aten" if path == "aten" else "triton"
    assert violations(batch, pack, backend=backend) == []
    assert fused(batch, pack, backend=backend)["dA 1"].dtype == FP32


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("which", ("x", "dy"))
@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_a_token_that_is_not_finite_spoils_its_own_rows_alone(which, backend, device):
    """And, in the kernels, gradients of adapters in the same 128 ranks."""
    ids = make_ids("distinct", "shuffled", 33, 16)
    batch = make_batch(33, 24, 40, (16,) * 16, FP32, ids, device)
    clean = fused(batch, backend=backend)
    getattr(batch, which)[5, 3] = torch.inf
    spoilt = fused(batch, backend=backend)
    others = torch.arange(33, device=device) != 5
    for name in ("y", "dx"):
        assert torch.equal(spoilt[name][others], clean[name][others])
    own, untouched = ("y", "dx") if which == "x" else ("dx", "y")
    assert not spoilt[own][5].isfinite().all()
    assert torch.equal(spoilt[untouched], clean[untouched])
    for far in [g for g in range(16) if g // 8 != ids[5] // 8 and backend == "triton"]:
        for name in (f"dA {far}", f"dB {far}"):
            assert torch.equal(spoilt[name], clean[name])


def test_gradcheck_on_aten_in_fp64(device):
    ids = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    batch = make_batch(4, 3, 5, (2, 1), torch.float64, ids, device)
    pack = make_pack(batch)

    def layer(x, weight, lora_A, lora_B, bias):
        state = {"lora_A": lora_A, "lora_B": lora_B}
        with torch.nn.utils.stateless._reparametrize_module(pack, state):
            return multi_lora_linear(x, weight, pack, batch.ids, bias, backend="aten")

    inputs = [batch.x, batch.weight, pack.lora_A, pack.lora_B, batch.bias]
    assert torch.autograd.gradcheck(layer, [t.detach().requires_grad_() for t in inputs])
