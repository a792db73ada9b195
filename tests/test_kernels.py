"""Each kernel through its own launcher, against fp64 by the acceptance rule, over the ragged cover.

Inputs lie inside wider buffers of NaN and outputs, NaN themselves, inside wider buffers of a
sentinel: what is read or written outside of a matrix, or not written inside, shows.
"""

import pytest
import torch
from shapes import (
    BF16,
    COVER,
    DECODE_COVER,
    DESCRIPTOR_COVER,
    DTYPES,
    FP16,
    FP32,
    GRAD_COVER,
    HOPPER_COVER,
    MATMUL_COVER,
    PATHS,
    TWO_RANK_BLOCKS,
    Output,
    embedded,
    multiple_of_8,
    tile,
)

from fused_lora import dropout, reference
from fused_lora.kernels import config
from fused_lora.kernels.decode import decode, workspace
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.shrink import shrink
from fused_lora.scale import padded_rank
from fused_lora.testing import check, make_case

pytestmark = pytest.mark.kernels

SCALE = 16 / 3
P = 0.3


def assert_right(ours, formula, *tensors):
    """`ours` against `formula` in fp64 by the rule, next to `formula` in the tensors' own dtype."""
    eager, exact = formula(*tensors), formula(*(t.double() for t in tensors))
    assert check({"out": ours}, {"out": eager}, {"out": exact}, tensors[0].dtype) == []


def products(M, K, N, r, dtype, device):
    """The two products of a layer, (X [M, K], w [K, N], a [r, K], b [r, N], bias [N]): forward, in
    which w and b are transposed, and dX, in which they are as stored and a is transposed."""
    case = make_case(M, N, K, r, dtype, seed=M + K + N + r, device=device)
    W, A, B = embedded(case.weight), embedded(case.lora_A), embedded(case.lora_B)
    yield embedded(case.x), W.t(), A, B.t(), case.bias
    yield embedded(case.dy), W, B.t(), A, torch.zeros_like(case.x[0])


def tiles_of(M, K, N, parts=1):
    return config.Matmul(tile(M), tile(N), tile(K), 2, 4, 2, parts)


def s_of(X, a, columns):
    """S as shrink leaves it: zeros in the columns behind the rank."""
    S = X.new_zeros((X.shape[0], columns))
    S[:, : a.shape[0]] = SCALE * (X.float() @ a.float().t())
    return S


def adapted(X, w, S, b, bias):
    return X @ w + S[:, : b.shape[0]] @ b + bias


@pytest.mark.parametrize(("M", "K", "N", "r", "dtype"), COVER + TWO_RANK_BLOCKS)
def test_shrink(M, K, N, r, dtype, device):
    for X, _, a, _, _ in products(M, K, N, r, dtype, device):
        S = Output(M, padded_rank(r), dtype, device)
        shrink(X, a, S.matrix, config.Shrink(tile(M), tile(X.shape[1]), 4, 2), 3, scale=SCALE)
        assert_right(S.matrix[:, :r], lambda X, a: SCALE * (X @ a.t()), X, a)
        assert torch.all(S.matrix[:, r:] == 0)
        S.assert_rim_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "r"), ((1, 70, 3), (33, 50, 200), (130, 500, 16), (7, 2049, 8)))
def test_shrink_draws_the_specified_mask_and_applies_it(M, K, r, dtype, device):
    case = make_case(M, 8, K, r, dtype, device=device)
    seed = torch.tensor(-(2**62) + K, device=device)
    S = Output(M, padded_rank(r), dtype, device)
    bits = Output(M, dropout.packed_columns(K), torch.uint8, device)
    shrink(
        embedded(case.x),
        case.lora_A,
        S.matrix,
        config.Shrink(tile(M), tile(K), 4, 2),
        2,
        seed=seed,
        threshold=dropout.threshold(P),
        mask=bits.matrix,
    )
    drawn = dropout.unpack(bits.matrix, K)
    assert torch.equal(drawn, dropout.keep_mask(seed, M, K, P))
    dropped = case.x * dropout.keep_mask(seed, M, K, P)
    assert_right(S.matrix[:, :r], lambda x, a: x @ a.t(), dropped, case.lora_A)
    bits.assert_rim_untouched()


@pytest.mark.skipif("hopper" not in PATHS, reason="written in Gluon, for Hopper alone")
@pytest.mark.parametrize("adapter_dtype", (BF16, FP32))
@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize(
    "tiles", (config.Shrink(32, 64, 4, 3, 64), config.Shrink(32, 128, 4, 1, 64))
)
@pytest.mark.parametrize(
    ("M", "K", "r"), ((1, 72, 3), (33, 48, 200), (130, 504, 16), (7, 2056, 8), (300, 4096, 64))
)
def test_shrink_dropout_draws_the_specified_mask_and_applies_it(
    M, K, r, tiles, dtype, adapter_dtype, device
):
    from fused_lora.kernels.shrink_dropout import shrink_dropout

    case = make_case(M, 40, K, r, dtype, adapter_dtype=adapter_dtype, device=device)
    seed, scaling = torch.tensor(-(2**62) + K, device=device), torch.tensor(0.5, device=device)
    S = Output(M, padded_rank(r), dtype, device)
    packed = case.lora_B.new_empty((40, padded_rank(r)), dtype=dtype)
    bits = Output(M, dropout.packed_columns(K), torch.uint8, device)
    shrink_dropout(
        embedded(case.x),
        case.lora_A,
        S.matrix,
        tiles,
        2,
        seed=seed,
        threshold=dropout.threshold(P),
        mask=bits.matrix,
        scale=3.0,
        scaling=scaling,
        source=case.lora_B,
        packed=packed,
    )
    drawn = dropout.unpack(bits.matrix, K)
    assert torch.equal(drawn, dropout.keep_mask(seed, M, K, P))
    dropped = case.x * drawn
    assert_right(S.matrix[:, :r], lambda x, a: 1.5 * x @ a.t(), dropped, case.lora_A.to(dtype))
    assert torch.all(S.matrix[:, r:] == 0)
    S.assert_rim_untouched()
    bits.assert_rim_untouched()
    assert torch.equal(packed[:, :r], case.lora_B.to(dtype))
    assert torch.all(packed[:, r:] == 0)


@pytest.mark.parametrize("programs", (1, 5))
@pytest.mark.parametrize("count", (1, 33, 1000))
def test_shrink_zeroes_the_counters(count, programs, device):
    counters = Output(1, count, torch.int32, device)
    case = make_case(40, 8, 50, 200, FP32, device=device)
    S = case.x.new_empty((40, 208))
    tiles = config.Shrink(16, 16, 4, 2)
    shrink(case.x, case.lora_A, S, tiles, programs, counters=counters.vector(count))
    assert torch.all(counters.matrix == 0)
    counters.assert_rim_untouched()


@pytest.mark.parametrize("target", (FP16, BF16))
@pytest.mark.parametrize("r", (1, 3, 8, 33, 70))
@pytest.mark.parametrize("rows", (5, 130))
def test_shrink_packs_the_other_factor(rows, r, target, device):
    case = make_case(7, rows, 50, r, target, adapter_dtype=FP32, device=device)
    packed = Output(1, rows * padded_rank(r), target, device)
    result = packed.vector((rows, padded_rank(r)))
    S, tiles = case.x.new_empty((7, padded_rank(r))), config.Shrink(16, 32, 4, 2)
    shrink(case.x, case.lora_A, S, tiles, 2, source=embedded(case.lora_B), packed=result)
    assert torch.equal(result[:, :r], case.lora_B.to(target))
    assert torch.all(result[:, r:] == 0)
    packed.assert_rim_untouched()


@pytest.mark.parametrize(("M", "K", "N", "r", "dtype", "mode"), MATMUL_COVER)
def test_matmul(M, K, N, r, dtype, mode, device):
    for X, w, a, b, bias in products(M, K, N, r, dtype, device):
        rows, columns = M, w.shape[1]
        y, tiles = Output(rows, columns, dtype, device), tiles_of(M, X.shape[1], columns)
        S = s_of(X, a, r)
        if mode == "plain":
            matmul(X, w, y.matrix, tiles, bias=bias)
            assert_right(y.matrix, lambda X, w, bias: X @ w + bias, X, w, bias)
        elif mode == "given":
            matmul(X, w, y.matrix, tiles, b=b, S=embedded(S), bias=bias)
            assert_right(y.matrix, adapted, X, w, S, b, bias)
        elif mode == "masked":
            mask = dropout.packed_mask(torch.tensor(r, device=device), rows, columns, P)
            keep = dropout.unpack(mask, columns)
            matmul(X, w, y.matrix, tiles, b=b, S=embedded(S), mask=mask)
            assert_right(
                y.matrix,
                lambda X, w, S, b, keep=keep: X @ w + (S @ b) * keep,
                *(X, w, S, b),
            )
        else:
            stored = Output(rows, padded_rank(r), dtype, device)
            out = {"S": stored.matrix, "bias": bias, "scale": SCALE}
            matmul(X, w, y.matrix, tiles, a=a, b=b, single=True, **out)
            assert_layer_right(y.matrix, stored, X, w, a, b, bias)
        y.assert_rim_untouched()


def assert_layer_right(y, stored, X, w, a, b, bias):
    """y, and S where the kernel stored it, of a kernel that computes the whole layer."""

    def layer(X, w, a, b, bias):
        return reference.lora_linear(X, w.t(), a, b.t(), bias, scaling=SCALE)

    assert_right(y, layer, X, w, a, b, bias)
    if stored is not None:
        r = a.shape[0]
        assert_right(stored.matrix[:, :r], lambda X, a: SCALE * (X @ a.t()), X, a)
        assert torch.all(stored.matrix[:, r:] == 0)
        stored.assert_rim_untouched()


@pytest.mark.skipif("pdl" not in PATHS, reason="this GPU takes the portable kernel")
@pytest.mark.parametrize(("M", "K", "N", "r", "dtype", "mode", "pdl", "parts"), DESCRIPTOR_COVER)
def test_descriptor_matmul(M, K, N, r, dtype, mode, pdl, parts, device):
    K, N = multiple_of_8(K), multiple_of_8(N)
    for X, w, a, b, bias in products(M, K, N, r, dtype, device):
        S, tiles = s_of(X, a, padded_rank(r)), tiles_of(M, X.shape[1], w.shape[1], parts)
        if w.stride(1) != 1 and r % 8:  # lora_B as shrink packs it
            b = torch.nn.functional.pad(b, (0, 0, 0, padded_rank(r) - r)).t().contiguous().t()
        y = Output(M, w.shape[1], dtype, device)
        given = {"b": b, "S": embedded(S)} if mode == "given" else {}
        if device == "cuda":
            torch.cuda.synchronize()  # what a kernel before the shrink would have written
        descriptor_matmul(X, w, y.matrix, tiles, 3, **given, bias=bias, pdl=pdl)
        exact = S if mode == "given" else torch.zeros_like(S)
        assert_right(y.matrix, adapted, X, w, exact, b, bias)
        y.assert_rim_untouched()


@pytest.mark.skipif("hopper" not in PATHS, reason="written in Gluon, for Hopper alone")
@pytest.mark.parametrize(("M", "K", "N", "r", "dtype", "mode", "pdl", "size"), HOPPER_COVER)
def test_hopper_matmul(M, K, N, r, dtype, mode, pdl, size, device):
    from fused_lora.kernels.matmul_hopper import hopper_matmul

    K, N = multiple_of_8(K), multiple_of_8(N)
    for X, w, a, b, bias in products(M, K, N, r, dtype, device):
        if mode == "masked" and r > config.MAX_MASKED_RANK:
            continue
        rows, columns = M, w.shape[1]
        S = s_of(X, a, padded_rank(r))
        tiles = config.Matmul(*size, 64, 8, size[0] // 16, 3, 2 if size[1] > 64 else 1)
        if w.stride(1) != 1 and r % 8:  # lora_B as shrink packs it
            b = torch.nn.functional.pad(b, (0, 0, 0, padded_rank(r) - r)).t().contiguous().t()
        y = Output(rows, columns, dtype, device)
        torch.cuda.synchronize()  # what a kernel before the shrink would have written
        if mode == "plain":
            hopper_matmul(X, w, y.matrix, tiles, 3, bias=bias)
            assert_right(y.matrix, lambda X, w, bias: X @ w + bias, X, w, bias)
        elif mode == "given":
            given = {"b": b, "S": embedded(S), "bias": bias, "pdl": pdl}
            hopper_matmul(X, w, y.matrix, tiles, 3, **given)
            assert_right(y.matrix, adapted, X, w, S, b, bias)
        else:
            mask = dropout.packed_mask(torch.tensor(r, device=device), rows, columns, P)
            keep = dropout.unpack(mask, columns)
            masked = {"mask": mask, "pdl": pdl}
            hopper_matmul(X, w, y.matrix, tiles, 3, b=b, S=embedded(S), **masked)
            assert_right(
                y.matrix,
                lambda X, w, S, b, keep=keep: X @ w + (S[:, : b.shape[0]] @ b) * keep,
                *(X, w, S, b),
            )
        y.assert_rim_untouched()


def grads(case, tiles, splits, want, mask, device):
    """dA and dB as Outputs, None for those not wanted; dS and S are made up from the case."""
    M, K = case.x.shape
    N, r = case.lora_B.shape
    dtype = case.x.dtype
    counts = tile_counts(K, N, r, tiles, "A" in want, "B" in want)
    partial = Output(1, partial_elements(counts, splits, r, tiles), FP32, device)
    counters = Output(1, sum(counts[:2]) * counts[2], torch.int32, device)
    counters.matrix.zero_()
    x, S = embedded(case.x), embedded(s_of(case.x, case.lora_A, r))
    dy, dS = embedded(case.dy), embedded(s_of(case.dy, case.lora_B.t(), r))
    dA = Output(r, K, dtype, device) if "A" in want else None
    dB = Output(N, r, dtype, device) if "B" in want else None
    arguments = {}
    if dA is not None:
        arguments |= {"x": x, "dS": dS, "dA": dA.matrix, "mask": mask}
    if dB is not None:
        arguments |= {"dY": dy, "S": S, "dB": dB.matrix}
    if splits > 1:
        arguments |= {"partial": partial.matrix[0], "counters": counters.matrix[0]}
    rank_grad(tiles, splits, M, r, **arguments)
    partial.assert_rim_untouched()
    counters.assert_rim_untouched()
    return x, dS, dA, dy, S, dB


@pytest.mark.parametrize(("M", "K", "N", "r", "dtype", "want", "splits", "masked"), GRAD_COVER)
def test_rank_grad(M, K, N, r, dtype, want, splits, masked, device):
    case = make_case(M, N, K, r, dtype, seed=M + K + N + r, device=device)
    seed = torch.tensor(N, device=device)
    mask = dropout.packed_mask(seed, M, K, P) if masked else None
    tiles = config.RankGrad(tile(M), tile(min(K, N)), 4, 2)
    x, dS, dA, dy, S, dB = grads(case, tiles, splits, want, mask, device)
    if dA is not None:
        keep = dropout.keep_mask(seed, M, K, P) if masked else x.new_ones(1)
        assert_right(dA.matrix, lambda x, dS: dS.t() @ (x * keep).to(x.dtype), x, dS)
        dA.assert_rim_untouched()
    if dB is not None:
        assert_right(dB.matrix, lambda dy, S: dy.t() @ S, dy, S)
        dB.assert_rim_untouched()


def decoded(X, w, a, b, bias, splits, store_s, device, left=False):
    """(y, S or None) of one product as Outputs, by `decode`, with the tokens on the `left`."""
    (M, K), N, r, dtype = X.shape, w.shape[1], a.shape[0], X.dtype
    tiles = config.Decode(tile(N), tile(K), splits, 4, 2, 64 if M % 2 else 16, left)
    sizes = workspace(M, N, r, tiles)
    partials = [Output(1, size, FP32, device) for size in sizes[:2]]
    counters = Output(1, sizes[2], torch.int32, device)
    counters.matrix.zero_()
    y, S = Output(M, N, dtype, device), Output(M, padded_rank(r), dtype, device)
    work = [output.matrix[0] if splits > 1 else None for output in (*partials, counters)]
    out = {"S": S.matrix if store_s else None, "bias": bias, "scale": SCALE}
    work = dict(zip(("partial", "partial_s", "counters"), work, strict=True))
    decode(X, w, a, b, y.matrix, tiles, **out, **work)
    for output in (*partials, counters):
        output.assert_rim_untouched()
    return y, S if store_s else None


@pytest.mark.parametrize("left", (False, True))
@pytest.mark.parametrize(("M", "K", "N", "r", "dtype", "splits", "store_s"), DECODE_COVER)
def test_decode(M, K, N, r, dtype, splits, store_s, left, device):
    for operands in products(M, K, N, r, dtype, device):
        y, S = decoded(*operands, splits, store_s, device, left)
        assert_layer_right(y.matrix, S, *operands)
        y.assert_rim_untouched()


@pytest.mark.parametrize("left", (False, True))
@pytest.mark.parametrize("dtype", (FP16, BF16))
def test_splits_of_k_whose_partial_s_cancel_are_as_exact_as_eager(dtype, left, device):
    case = make_case(16, 64, 128, 8, dtype, amplify=False, device=device)
    x, half = case.x[:, :64].repeat(1, 2), case.lora_A[:, :64]
    A = torch.cat((half, half / 32 - half), 1)
    operands = x, torch.zeros_like(case.weight).t(), A, case.lora_B.t(), case.bias * 0
    y, S = decoded(*operands, 2, True, device, left)
    assert_layer_right(y.matrix, S, *operands)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_give_the_same_bits_at_every_run(dtype, device):
    case = make_case(130, 70, 50, 33, dtype, device=device)
    first, second = (
        grads(case, config.RankGrad(16, 32, 4, 2), 3, "AB", None, device) for _ in range(2)
    )
    assert torch.equal(first[2].matrix, second[2].matrix)
    assert torch.equal(first[5].matrix, second[5].matrix)
    for operands in products(33, 500, 70, 8, dtype, device):
        first, second = (decoded(*operands, 4, True, device) for _ in range(2))
        assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(first, second, strict=True))
