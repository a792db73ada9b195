"""The dropout mask: the right random bits, everywhere the same, on the adapter's input only."""

from functools import partial

import pytest
import torch
from shapes import BF16, DTYPES, FP16, FP32, PATHS, Output, force_path

from fused_lora import FusedLoRALinear, dropout, lora_linear, reference
from fused_lora.kernels import config
from fused_lora.testing import check, eager_gradients, exact_gradients, gradients, make_case

kernels = pytest.mark.kernels

P = (0.05, 0.5, 0.9)
ALL_ONES = 0xFFFFFFFF
LAYERS = {name: partial(lora_linear, backend=name) for name in ("triton", "aten")}


ROUNDS = 7


def philox4x32(counter, key, rounds=ROUNDS):
    """Philox in Python's integers, after Salmon et al. 2011: four words."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & ALL_ONES, (a >> 32) ^ c[3] ^ k[1], a & ALL_ONES]
        k = [(k[0] + 0x9E3779B9) & ALL_ONES, (k[1] + 0xBB67AE85) & ALL_ONES]
    return c


def specified_mask(seed, rows, columns, p):
    """keep[row, column] as docs and docstrings define it, element by element."""
    key = seed & ALL_ONES, (seed >> 32) & ALL_ONES
    mask = torch.empty(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for column in range(columns):
            words = philox4x32((column // 8, row, 0, 0), key)
            half = (words[column % 8 // 2] >> 16 * (column % 2)) & 0xFFFF
            mask[row, column] = half >= round(65536 * p)
    return mask


def five_deviations(count, chance):
    """Of the mean of `count` independent draws of this chance: passed once in two million."""
    return 5 * (chance * (1 - chance) / count) ** 0.5


@pytest.mark.parametrize(
    ("rounds", "word", "answer"),
    (
        (7, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (7, ALL_ONES, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (10, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (10, ALL_ONES, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ),
)
def test_philox_gives_the_published_known_answers(rounds, word, answer):
    assert philox4x32([word] * 4, [word] * 2, rounds) == answer


def test_the_library_draws_philox_words():
    zero = torch.tensor(0)
    first = [int(word[0, 0]) for word in dropout._philox(zero, 0, 1, 1)]
    assert first == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    for seed in (-1, 2**40 + 3, -(2**63)):
        words = dropout._philox(torch.tensor(seed), 0, 3, 4)
        key = seed & ALL_ONES, (seed >> 32) & ALL_ONES
        for row in range(3):
            for call in range(4):
                drawn = [int(word[row, call]) for word in words]
                assert drawn == philox4x32((call, row, 0, 0), key)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("seed", (0, -1, 0x123456789ABCDEF))
def test_the_mask_is_the_specified_one(seed, p, device):
    mask = dropout.keep_mask(torch.tensor(seed, device=device), 9, 21, p)
    assert torch.equal(mask.cpu(), specified_mask(seed, 9, 21, p))


@pytest.mark.parametrize("at_once", (1, 3, 8, 26))
def test_a_mask_drawn_in_pieces_is_the_same(at_once, monkeypatch):
    monkeypatch.setattr(dropout, "_CALLS_AT_ONCE", {"cpu": at_once})
    mask = dropout.keep_mask(torch.tensor(7), 9, 21, 0.3)
    assert torch.equal(mask, specified_mask(7, 9, 21, 0.3))


@pytest.mark.parametrize("p", P)
def test_the_keep_rate_is_one_minus_p(p, device):
    for seed in range(3):
        mask = dropout.keep_mask(torch.tensor(seed, device=device), 1000, 1000, p).double()
        assert abs(mask.mean().item() - (1 - p)) < five_deviations(mask.numel(), p)
        limit = 1.1 * five_deviations(1000, p)  # there are 2000 rows and columns to pass it
        assert (mask.mean(0) - (1 - p)).abs().max() < limit
        assert (mask.mean(1) - (1 - p)).abs().max() < limit


@pytest.mark.parametrize("p", (1e-6, 0.05, 0.3, 0.999, 0.99999))
def test_what_is_kept_is_scaled_by_the_probability_with_which_it_is_kept(p):
    mask = dropout.keep_mask(torch.tensor(1), 2048, 2048, p).double()
    kept = 1 - dropout.threshold(p) / 65536
    assert dropout.keep_scale(p) * kept == pytest.approx(1.0, rel=1e-12)
    assert abs(mask.mean().item() - kept) <= five_deviations(mask.numel(), 1 - kept)


def test_the_threshold_is_rounded_and_leaves_something(device):
    assert [dropout.threshold(p) for p in (0.3, 0.1, 0.0, 1 - 2**-18)] == [19661, 6554, 0, 65535]
    seeds = [dropout.draw_seed(torch.device(device)).item() for _ in range(100)]
    assert min(seeds) < 0 < 2**32 < max(seeds)


@kernels
def test_a_mask_of_whole_words_keeps_its_rim(device):
    """32 divides its columns, the tile does not."""
    from fused_lora.kernels.shrink import shrink

    M, K, r, p = 33, 96, 3, 0.3
    case, seed = make_case(M, 8, K, r, FP32, device=device), torch.tensor(5, device=device)
    S = Output(M, 16, FP32, device)
    bits = Output(M, dropout.packed_columns(K), torch.uint8, device)
    drawn = {"seed": seed, "threshold": dropout.threshold(p), "mask": bits.matrix}
    shrink(case.x, case.lora_A, S.matrix, config.Shrink(16, 64, 4, 2), 2, **drawn)
    assert torch.equal(dropout.unpack(bits.matrix, K), dropout.keep_mask(seed, M, K, p))
    bits.assert_rim_untouched()


@kernels
def test_a_half_that_is_the_threshold_is_kept(device):
    """In each of the eight columns of a call, by a threshold that is one of the very halves."""
    from fused_lora.kernels.shrink import shrink

    M, K, seed = 16, 16, torch.tensor(77, device=device)
    words = torch.stack(dropout._philox(seed, 0, M, K // 8), -1)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)[:, :K]
    case, S = make_case(M, 8, K, 3, FP32, device=device), torch.empty(M, 16, device=device)
    for column in range(8):
        limit = int(halves[0, column])
        bits = torch.empty(M, dropout.packed_columns(K), dtype=torch.uint8, device=device)
        drawn = {"seed": seed, "threshold": limit, "mask": bits}
        shrink(case.x, case.lora_A, S, config.Shrink(16, 16, 4, 2), 1, **drawn)
        assert torch.equal(dropout.unpack(bits, K), halves >= limit), column


@pytest.mark.parametrize("p", P)
def test_rows_columns_and_calls_are_independent(p, device):
    def mask(seed):
        return dropout.keep_mask(torch.tensor(seed, device=device), 1000, 1000, p)

    one, other = mask(1), mask(2)
    high = mask(1 + 2**32)
    pairs = {f"columns {n} apart": (one[:, n:], one[:, :-n]) for n in (1, 2, 4, 8, 16)}
    pairs |= {f"rows {n} apart": (one[n:], one[:-n]) for n in (1, 2, 8)}
    pairs |= {"seeds": (one, other), "high halves of seeds": (one, high)}
    for name, (a, b) in pairs.items():
        both = (a & b).double().mean().item()
        expected = (1 - p) ** 2
        # pairs overlap, which at most doubles the variance of their mean
        assert abs(both - expected) < 2**0.5 * five_deviations(a.numel(), expected), name


@kernels
@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", (*(p for p in PATHS if p not in ("single", "decode")), "aten"))
def test_forward_dx_and_da_use_the_mask_of_the_seed(path, dtype, p, monkeypatch, device):
    """Against the reference given the mask itself: right only if all three use it."""
    if path != "aten":
        force_path(monkeypatch, path)
    layer = LAYERS["aten" if path == "aten" else "triton"]
    for M, K, N, r in ((33, 50, 70, 3), (130, 72, 56, 16)):
        case = make_case(M, N, K, r, dtype, seed=r, device=device)
        seed = torch.tensor(2**50 + r, device=device)
        mask = dropout.keep_mask(seed, M, K, p)
        for inputs in (case, case.without_base()):
            ours = gradients(layer, *inputs.tensors(), dropout_p=p, seed=seed)
            eager = eager_gradients(*inputs.tensors(), dropout_p=p, mask=mask)
            exact = exact_gradients(*inputs.tensors(), dropout_p=p, mask=mask)
            assert check(ours, eager, exact, dtype) == []
            without = exact_gradients(*inputs.tensors())
            assert check(ours, eager_gradients(*inputs.tensors()), without, dtype) != []


@kernels
@pytest.mark.parametrize("backend", LAYERS)
def test_rows_are_counted_over_all_leading_dimensions(backend, device):
    case = make_case(33, 70, 50, 8, FP32, device=device)
    options = {"dropout_p": 0.5, "seed": torch.tensor(4, device=device)}
    flat = LAYERS[backend](case.x, case.weight, case.lora_A, case.lora_B, **options)
    batch = case.x.view(3, 11, 50)
    assert torch.equal(
        LAYERS[backend](batch, case.weight, case.lora_A, case.lora_B, **options),
        flat.view(3, 11, 70),
    )


@kernels
@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("backend", LAYERS)
def test_dropout_leaves_the_base_alone(backend, p, device):
    case = make_case(33, 50, 70, 8, BF16, device=device)
    zero, arguments = torch.zeros_like(case.lora_B), (case.x, case.weight, case.lora_A)
    dropped = LAYERS[backend](*arguments, zero, case.bias, dropout_p=p)
    if backend == "aten":
        assert torch.equal(dropped, torch.nn.functional.linear(case.x, case.weight, case.bias))
    ours = {"y": dropped}
    eager = {"y": reference.lora_linear(*arguments, zero, case.bias)}
    double = [t.double() for t in (*arguments, zero, case.bias)]
    assert check(ours, eager, {"y": reference.lora_linear(*double)}, BF16) == []


@kernels
@pytest.mark.parametrize("backend", LAYERS)
@pytest.mark.parametrize("dtype", (FP32, FP16))
def test_p_of_zero_is_no_dropout_bit_for_bit(dtype, backend, device):
    case = make_case(33, 50, 70, 8, dtype, device=device)
    seed = torch.tensor(1, device=device)
    plain = gradients(LAYERS[backend], *case.tensors())
    zero = gradients(LAYERS[backend], *case.tensors(), dropout_p=0.0, seed=seed)
    assert all(torch.equal(plain[name], zero[name]) for name in plain)


def layer_with_dropout(backend, device, p=0.5):
    torch.manual_seed(3)
    return FusedLoRALinear(
        50,
        70,
        r=8,
        lora_dropout=p,
        init_lora_weights=False,
        device=device,
        backend=backend,
    )


@kernels
@pytest.mark.parametrize("backend", LAYERS)
def test_the_generator_reproduces_a_call_and_the_next_call_differs(backend, device):
    layer, x = layer_with_dropout(backend, device), torch.randn(33, 50, device=device)
    torch.manual_seed(11)
    first, second = layer(x), layer(x)
    torch.manual_seed(11)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    torch.manual_seed(12)
    assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("backend", LAYERS)
def test_eval_mode_drops_nothing(backend, device):
    layer, x = layer_with_dropout(backend, device), torch.randn(33, 50, device=device)
    plain = layer_with_dropout(backend, device, p=0.0)
    assert torch.equal(layer.eval()(x), plain(x))
    assert not torch.equal(layer.train()(x), plain(x))


@kernels
@pytest.mark.parametrize("backend", LAYERS)
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_a_checkpoint_recomputes_the_same_mask(use_reentrant, backend, device):
    def grads(checkpointed):
        layer = layer_with_dropout(backend, device)
        x = torch.randn(33, 50, device=device, requires_grad=True)
        torch.manual_seed(5)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
        else:
            y = layer(x)
        torch.rand(7, device=device)  # a recomputation from here would draw another mask
        y.square().sum().backward()
        return y, x.grad, layer.lora_A.grad, layer.lora_B.grad

    for plain, recomputed in zip(grads(False), grads(True), strict=True):
        assert torch.equal(plain, recomputed)


def laid_out_anew(mask, shift, gap):
    """The mask's values from another place on, in rows of another stride."""
    rows, columns = mask.shape
    room = mask.new_full((shift + rows * (columns + gap),), 255)
    other = room[shift:].view(rows, columns + gap)[:, :columns]
    return other.copy_(mask)


@kernels
@pytest.mark.parametrize(("shift", "gap"), ((0, 1), (1, 0), (2, 2)))
@pytest.mark.parametrize("backend", LAYERS)
def test_a_mask_that_a_hook_has_laid_out_anew_is_read_right(backend, shift, gap, device):
    case = make_case(33, 50, 100, 5, FP32, device=device)
    tensors = [t.requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)]
    seed = torch.tensor(3, device=device)

    def gradients_with(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = LAYERS[backend](*tensors, dropout_p=0.5, seed=seed)
        return torch.autograd.grad(y, tensors, case.dy)

    def pack(t):
        return laid_out_anew(t, shift, gap) if t.dtype == torch.uint8 else t

    for moved, kept in zip(gradients_with(pack), gradients_with(lambda t: t), strict=True):
        assert torch.equal(moved, kept)


@pytest.mark.parametrize("p", (0.0, 0.5))
@pytest.mark.parametrize("backend", LAYERS)
def test_dropout_saves_one_bit_an_element_of_x(backend, p, device):
    """Saved for backward: x, W, A, B, S [M, padded r], and the packed mask, whose rows are
    whole words; nothing else."""
    M, K, N, r = 130, 500, 70, 8
    case = make_case(M, N, K, r, BF16, device=device)
    tensors = [t.requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        LAYERS[backend](*tensors, dropout_p=p)
    given = {t.untyped_storage().data_ptr() for t in tensors}
    new = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in saved
        if t.untyped_storage().data_ptr() not in given
    }
    S_bytes, mask_bytes = M * 16 * 2, M * 4 * -(-K // 32)
    assert sum(new.values()) <= S_bytes + (mask_bytes if p else 0)
