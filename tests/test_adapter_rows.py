"""Which rows and ranks of a pack the kernels pass over: what they skip is nobody's, in tiles of
base tokens, in splits of M, and where nobody wants the first columns."""

from dataclasses import replace

import pytest
import torch
from multi_cases import make_batch, make_ids, make_pack, violations
from shapes import BF16, FP32, HERE, PATHS, Output, force_path
from test_kernels import assert_right

from fused_lora.kernels import adapters, config, rank_grad
from fused_lora.kernels.decode import decode, workspace
from fused_lora.scale import Adapters

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.kernels
SEED = 11


@triton.jit
def window_kernel(ids, window, out, M, count, BLOCK: tl.constexpr, STEP: tl.constexpr):
    first, end = adapters.rank_window(ids, window, tl.arange(0, BLOCK), M, count, STEP)
    tl.store(out, first)
    tl.store(out + 1, end)


@triton.jit
def rows_kernel(ids, out, low, high, first, last, STEP: tl.constexpr, SCAN: tl.constexpr):
    begin, end = adapters.token_range(ids, low, high, first, last, STEP, SCAN)
    tl.store(out, begin)
    tl.store(out + 1, end)


@pytest.mark.parametrize(
    ("ids", "steps"),
    [
        ([-1, -1, -1], (0, 0)),
        ([-1, 2, -1], (2, 3)),
        ([1, 2, -7], (1, 3)),
        ([0, 3, 9], (0, 1)),
        ([3, 4, 5], (0, 0)),
    ],
    ids=str,
)
def test_a_row_tile_steps_through_the_ranks_of_its_tokens(ids, steps, device):
    """Three adapters of 16 ranks, in a table whose neighbours would lead far astray."""
    room = torch.full((16, 2), 4096, dtype=torch.int32)
    room[6:9] = torch.tensor([[0, 16], [16, 32], [32, 48]])
    window = room.to(device)[6:9]
    ids = torch.tensor(ids, dtype=torch.int32, device=device)
    out = torch.full((2,), -9, dtype=torch.int32, device=device)
    window_kernel[(1,)](ids, window, out, 3, 3, 16, 16)
    assert tuple(out.tolist()) == steps


@pytest.mark.parametrize("scan", [16, 1024])
@pytest.mark.parametrize(
    ("first", "last", "hits", "expected"),
    [
        (0, 100, (5, 40), (0, 41)),
        (32, 64, (21, 45, 70), (32, 46)),
        (32, 96, (70, 71), (64, 72)),
        (0, 100, (99,), (96, 100)),
        (0, 100, (0, 50), (0, 51)),
        (0, 100, (), None),
    ],
)
def test_the_rows_between_the_first_and_the_last_token(first, last, hits, expected, scan, device):
    ids = torch.full((128,), -1, dtype=torch.int32)
    ids[list(hits)] = 2
    out = torch.zeros(2, dtype=torch.int32, device=device)
    rows_kernel[(1,)](ids.to(device), out, 1, 3, first, last, 16, scan)
    begin, end = out.tolist()
    assert (begin, end) == expected if expected else begin >= end


@pytest.mark.parametrize("path", ["portable", "pdl"])
def test_tiles_of_base_tokens_beside_a_large_pack(path, monkeypatch, device):
    if path not in PATHS:
        pytest.skip("this GPU takes the portable kernel")
    force_path(monkeypatch, path)
    ids = torch.full((600,), -1, dtype=torch.int32)
    ids[-1] = 33
    batch = make_batch(600, 40, 56, (16,) * 34, BF16, ids, device)
    assert violations(batch, backend="triton") == []


@pytest.mark.parametrize(("splits", "dropout_p"), [(2, 0.5), (4, 0.0)])
def test_splits_of_the_rows_that_adapters_span(splits, dropout_p, monkeypatch, device):
    monkeypatch.setattr(config, "rank_grad_splits", lambda *_: splits)
    monkeypatch.setattr(rank_grad, "SCAN", 64)  # several steps of the search in a split
    ids = torch.full((300,), -1, dtype=torch.int32)
    ids[10:230] = make_ids("uniform", "shuffled", 220, 3)
    batch = make_batch(300, 40, 56, (8, 16, 33), FP32, ids, device)
    options = {"dropout_p": dropout_p, "seed": torch.tensor(SEED, device=device)}
    assert violations(batch, backend="triton", **(options if dropout_p else {})) == []


def test_a_mask_is_stored_where_nobody_wants_the_first_columns(device):
    ids = make_ids("identical", "grouped", 70, 4)  # all want the last adapter
    batch = make_batch(70, 40, 50, (16,) * 4, FP32, ids, device)
    options = {"dropout_p": 0.3, "seed": torch.tensor(SEED, device=device)}
    assert violations(batch, backend="triton", **options) == []


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
def test_decode_of_several_adapters(splits, left, device):
    M, K, N, ranks = 7, 72, 56, (8, 16, 33)
    batch = make_batch(M, N, K, ranks, BF16, make_ids("uniform", "shuffled", M, 3), device)
    pack = make_pack(batch)
    a, b = pack.lora_A.detach(), pack.lora_B.detach().t()
    tables = Adapters(batch.ids, pack.owner, pack.scaling, pack.window)
    own = batch.ids[:, None] == pack.owner
    usual = config.defaults()[config.target_of(HERE)]["16"]["decode"][0]
    tiles = replace(usual, SPLITS=splits, TOKENS_LEFT=left)
    sizes, work = workspace(M, N, len(a), tiles), {}
    if splits > 1:
        float32 = {"device": device, "dtype": torch.float32}
        work = {"partial": torch.empty(sizes[0], **float32)}
        work["partial_s"] = torch.empty(sizes[1], **float32)
        work["counters"] = torch.zeros(sizes[2], device=device, dtype=torch.int32)
    y, S = Output(M, N, BF16, device), Output(M, len(a), BF16, device)
    weight = batch.weight.t()
    decode(batch.x, weight, a, b, y.matrix, tiles, S=S.matrix, adapters=tables, **work)

    def term(x, a):
        return (x @ a.t()) * (own * pack.scaling).to(x.dtype)

    assert_right(S.matrix, term, batch.x, a)
    assert torch.all(S.matrix[~own] == 0)
    assert_right(y.matrix, lambda x, w, a, b: x @ w + term(x, a) @ b, batch.x, weight, a, b)
