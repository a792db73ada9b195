"""Tests of the tests of several adapters: bugs planted into the kernels must break the rule."""

from functools import cache

import pytest
import torch
from multi_cases import fused, make_batch, make_ids, specified
from planting import plant
from shapes import BF16, FP32, PATHS, force_path

from fused_lora.kernels import decode, matmul, matmul_descriptor, rank_grad, shrink
from fused_lora.testing import check

OWNED = "adapters.owned(ids_ptr, owner_ptr, offs_m, offs_r, M, r)"
WANTED = "tl.where(wanted, K, 0)"
FEW, MANY = (8, 16, 33), (16,) * 34  # MANY: beyond the window, in several rank blocks
PAIR = (8, 16)  # what a single launch takes of fp32


def where_S_is_formed(module, path, ranks, owned="own", column="offs_r"):
    scaling = f"column_scaling_ptr + {column},"
    edits = {
        "ids of the next token": (OWNED, OWNED.replace("offs_m", "offs_m + 1")),
        "last adapter ignored": (OWNED, f"({OWNED} & (offs_r < r - 16)[None, :])"),
        "every token gets every adapter": (f"tl.where({owned}, ", "tl.where(True, "),
        "scaling of the first": (scaling, f"column_scaling_ptr + 0 * {column},"),
        "scaling of the next": (scaling, f"column_scaling_ptr + ({column} + 16) % r,"),
    }
    return [(name, module, *edit, path, ranks) for name, edit in edits.items()]


def in_large_packs(module, path, edits):
    return [(name, module, *edit, path, MANY) for name, edit in edits.items()]


SHRINK = {
    "tile skipped": (WANTED, "tl.where(wanted, 0, K)"),
    "last K tile skipped": (WANTED, "K - 64"),
}
MATMUL = {
    "last columns skipped": ("min(r, end * BLOCK_R)", "(end - 1) * BLOCK_R"),
    "first columns skipped": ("first * BLOCK_R", "(first + 1) * BLOCK_R"),
}
DESCRIPTOR = {
    "other columns": ("step - main_steps + rank_start", "step - main_steps"),
    "last step lost": ("+ rank_end -", "+ rank_end - 1 -"),
}
RANK_GRAD = {
    "lowest adapter lost": ("(ids >= low)", "(ids > low)"),
    "highest adapter lost": ("(ids <= high)", "(ids < high)"),
    "first rows lost": ("range(first, last, ", "range(first + BLOCK_M, last, "),
    "ids of the first tile": ("ids_ptr + offs_m", "ids_ptr + offs_m - m"),
}
BUGS = (
    *where_S_is_formed(shrink, "portable", FEW),
    *where_S_is_formed(matmul, "single", PAIR),
    *where_S_is_formed(decode, "decode", PAIR, "own if TOKENS_LEFT else tl.trans(own)", "j"),
    *in_large_packs(shrink, "portable", SHRINK),
    *in_large_packs(matmul, "portable", MATMUL),
    *in_large_packs(matmul_descriptor, "pdl", DESCRIPTOR),
    *in_large_packs(rank_grad, "portable", RANK_GRAD),
)


@cache
def batch_of(path, ranks, device):
    """A batch without base weight, and what eager and fp64 make of it."""
    M = 16 if path in ("single", "decode") else 80
    popularity, order = ("distinct", "grouped") if ranks == MANY else ("uniform", "shuffled")
    ids = make_ids(popularity, order, M, len(ranks), seed=1)
    dtype = FP32 if path in ("portable", "single") else BF16
    batch = make_batch(M, 40, 56, ranks, dtype, ids, device).without_base()
    return batch, specified(batch), specified(batch.to(torch.float64))


def found(path, ranks, device):
    batch, eager, exact = batch_of(path, ranks, device)
    return check(fused(batch, backend="triton"), eager, exact, batch.x.dtype)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug[4]}: {bug[0]}")
def test_the_rule_catches(bug, monkeypatch, tmp_path, device):
    _, module, old, new, path, ranks = bug
    if path not in PATHS:
        pytest.skip("this GPU takes the portable kernel")
    plant(monkeypatch, tmp_path, module, old, new)
    taken = force_path(monkeypatch, path)
    assert found(path, ranks, device) != []
    assert set(taken) == {path}


@pytest.mark.parametrize("path", ("portable", "single", "decode", "pdl"))
def test_the_rule_accepts_the_kernels_as_they_are(path, monkeypatch, tmp_path, device):
    if path not in PATHS:
        pytest.skip("this GPU takes the portable kernel")
    force_path(monkeypatch, path)
    for module in {module for _, module, *_ in BUGS}:
        plant(monkeypatch, tmp_path, module, "", "")  # copies without an edit
    for ranks in (PAIR,) if path in ("single", "decode") else (FEW, MANY):
        assert found(path, ranks, device) == []


def test_the_window_is_at_work_where_its_bugs_are_planted():
    assert sum(MANY) > matmul.WINDOW_RANK
