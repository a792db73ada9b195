"""Tests of the tests: bugs planted into the real kernels and launchers must break the rule.

A bug is one edit of the source of a module. A copy of the module with this edit takes the place of
the original for the length of a test.
"""

import itertools
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from planting import LAUNCHERS, matmul_hopper, plant, shrink_dropout
from shapes import (
    DESCRIPTOR_PATHS,
    DTYPES,
    FEATURES,
    FP32,
    HERE,
    PATH_COVER,
    PATHS,
    RANKS,
    TOKENS,
    affordable,
    force_path,
    multiple_of_8,
    pairwise,
)

from fused_lora import lora_linear, product, triton_backend
from fused_lora.kernels import config, decode, matmul, matmul_descriptor, shrink
from fused_lora.kernels import rank_grad as grad
from fused_lora.testing import make_case, violations_of

TRITON = partial(lora_linear, backend="triton")
RAGGED = ((33, 50, 70, 3), (100, 70, 50, 16), (7, 500, 50, 33))  # M, K, N, r
UNALIGNED = RAGGED[::2]  # ranks at which S has columns behind r, and lora_B is packed
SPLIT = ((130, 50, 70, 3), (200, 70, 50, 16))  # enough tokens for rank_grad to split them
SPLIT_K = ((7, 500, 500, 3), (33, 500, 450, 16))  # enough columns for every split of decode
WIDE = ((300, 50, 2049, 3),)  # enough columns for tiles that leave in parts


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in the source of `module`: seen on `path`, on every one of `shapes`."""

    name: str
    module: object
    old: str
    new: str
    path: str = "portable"
    shapes: tuple = RAGGED
    options: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.path}: {self.name}"


SHRINK_AND_PORTABLE = (
    Bug("W's last column dropped", matmul, "inside_k = offs_k < K", "inside_k = offs_k < K - 1"),
    Bug("A's last column dropped", shrink, "inside_k = offs_k < K", "inside_k = offs_k < K - 1"),
    Bug("last K tile dropped", shrink, "columns_k, BLOCK_K)", "columns_k - BLOCK_K, BLOCK_K)"),
    Bug("W's last K tile dropped", matmul, "range(0, K, BLOCK_K)", "range(0, K - 64, BLOCK_K)"),
    Bug("last rank dropped", shrink, "mask=(offs_r < r)", "mask=(offs_r < r - 1)"),
    Bug("B's last rank dropped", matmul, "mask=(offs_r < r)[:", "mask=(offs_r < r - 1)[:"),
    Bug(
        "last token dropped",
        shrink,
        "(offs_m < M)[:, None] & inside",
        "(offs_m < M - 1)[:, None] & inside",
    ),
    Bug("adapter missing", shrink, "(acc * factor)", "(acc * 0.0)"),
    Bug("scale 5 % off", shrink, "(acc * factor)", "(acc * factor * 1.05)"),
    Bug(
        "last columns stale",
        matmul,
        "acc.to(y_ptr",
        "tl.where(offs_n < N - 3, acc, acc * 0.5).to(y_ptr",
    ),
    Bug("last token not written", matmul, "(offs_m < M)[:", "(offs_m < M - 1)[:"),
    Bug("bias forgotten", matmul, "acc += tl.load(bias_ptr", "acc += 0.0 * tl.load(bias_ptr"),
    Bug(
        "dX without the adapter",
        triton_backend,
        "dy, weight, a, lora_A, dx",
        "dy, weight, a, lora_A * 0, dx",
    ),
    Bug("S without the scale", product, '"scale": scale.value', '"scale": 1.0'),
)
RANK_GRAD = (
    Bug("dA zero", grad, "tile - tiles_B,\n                rows_per_split", "tile, 0"),
    Bug("dB zero", grad, " tile,\n                rows_per_split", " tile, 0"),
    Bug("P's last column dropped", grad, "inside_c[None, :]", "(offs_c < C - 1)[None, :]"),
    Bug(
        "last token dropped",
        grad,
        "(offs_m < M)[:, None] & inside_c",
        "(offs_m < M - 1)[:, None] & inside_c",
    ),
    Bug("last rank not written", grad, "inside_r = offs_r < r", "inside_r = offs_r < r - 1"),
    Bug("last split dropped", grad, "tl.range(0, SPLITS)", "tl.range(0, SPLITS - 1)", shapes=SPLIT),
    Bug("counters not zeroed", shrink, "if ZERO:", "if False:", shapes=SPLIT),
)
DROPPED = tuple(
    Bug(*bug, options={"dropout_p": 0.5})
    for bug in (
        (
            "S without 1 / (1 - p)",
            triton_backend,
            "mask = new_mask(tape, M, K, dropout_p, seed)\n    scale = _scale(scale_value, "
            "scale_tensor, dropout_p)",
            "mask = new_mask(tape, M, K, dropout_p, seed)\n    scale = _scale(scale_value, "
            "scale_tensor, 0.0)",
        ),
        (
            "dS without 1 / (1 - p)",
            triton_backend,
            "scale = _scale(scale_value, scale_tensor, dropout_p)\n    mask = None",
            "scale = _scale(scale_value, scale_tensor, 0.0)\n    mask = None",
        ),
        ("S of what was dropped", shrink, "BLOCK_K) != 0, x", "BLOCK_K) == 0, x"),
        (
            "mask stored wrong",
            shrink,
            "                        packed,",
            "                        packed ^ 255,",
        ),
        ("dX without the mask", matmul, "keep != 0", "keep < 2"),
        ("dA without the mask", grad, "keep != 0", "keep < 2"),
    )
)
OTHER_PATHS = (
    Bug(
        "W's last column dropped",
        matmul,
        "inside_k = offs_k < K",
        "inside_k = offs_k < K - 1",
        "single",
    ),
    Bug(
        "A's last column dropped",
        matmul,
        "(offs_k < K)[:, None]",
        "(offs_k < K - 1)[:, None]",
        "single",
    ),
    Bug("scale 5 % off", matmul, "(side * scale)", "(side * scale * 1.05)", "single"),
    Bug("S not stored", matmul, "if pid_n == 0:", "if pid_n < 0:", "single"),
    Bug(
        "last columns dropped",
        decode,
        "(of_x < K)",
        "(of_x < K - 1)",
        "decode",
    ),
    Bug(
        "last split dropped",
        decode,
        "tl.range(0, SPLITS)",
        "tl.range(0, SPLITS - 1)",
        "decode",
        SPLIT_K,
    ),
    Bug(
        "adapter of one split only",
        decode,
        "side *= scale",
        "side *= scale * (1 - split)",
        "decode",
        SPLIT_K,
    ),
    Bug(
        "last token not written",
        decode,
        "(n < N) & (m < M)",
        "(n < N) & (m < M - 1)",
        "decode",
    ),
    Bug("S not padded", shrink, "(offs_r < columns)", "(offs_r < r)", "pdl", UNALIGNED),
    Bug("adapter missing", matmul_descriptor, "main_steps + RANK_STEPS", "main_steps", "pdl"),
    Bug("last K tile dropped", matmul_descriptor, "tl.cdiv(K, BLOCK_K)", "K // BLOCK_K", "pdl"),
    Bug("B packed short", shrink, "(offs_m < rows)", "(offs_m < rows - 1)", "pdl", UNALIGNED),
    Bug("first tile without adapter", matmul_descriptor, "main_steps, 0)", "steps, 0)", "pdl"),
)
HOPPER = tuple(
    Bug(name, matmul_hopper, old, new, "hopper", *shapes)
    for name, old, new, *shapes in (
        ("last K step dropped", "= gl.cdiv(K, BLOCK_K)", "= K // BLOCK_K"),
        ("adapter missing", "k = (step - main_steps) *", "k = (step - main_steps + 1) *"),
        ("bias twice", "acc += bias.to(gl.float32)", "acc += 2 * bias.to(gl.float32)"),
        ("parts of y in one place", "column + i * PART, part)", "column, part)", WIDE),
        ("dX without the mask", "keep != 0", "keep < 2", RAGGED, {"dropout_p": 0.5}),
    )
)
DRAWN = tuple(
    Bug(name, shrink_dropout, old, new, "hopper", *shapes, options={"dropout_p": 0.5})
    for name, old, new, *shapes in (
        ("S of what was dropped", "words & ((pair", "words & ~((pair"),
        ("mask stored wrong", "packed.to(gl.uint8)", "(packed ^ 255).to(gl.uint8)"),
        ("another mask", "draw(seed, calls, tokens,", "draw(seed + 1, calls, tokens,"),
        (
            "last columns missing",
            "inside = (offs_m < M) & (vector * VECTOR < K)",
            "inside = (offs_m < M) & (vector * VECTOR < K - 8)",
        ),
        ("B packed short", "mask=(row < rows) &", "mask=(row < rows - 1) &", UNALIGNED),
    )
)
BUGS = SHRINK_AND_PORTABLE + RANK_GRAD + DROPPED + OTHER_PATHS + HOPPER + DRAWN


def violations(path, dtype, shape, device, **options):
    """What the rule finds on this path and shape, made to fit what the path can take."""
    M, K, N, r = shape
    if path in DESCRIPTOR_PATHS:
        K, N = multiple_of_8(K), multiple_of_8(N)
    if path == "decode":
        limits = config.MAX_DECODE[8 * dtype.itemsize]
        M, r = min(M, limits[0]), min(r, limits[1])
    if options:
        options["seed"] = torch.tensor(5, device=device)
    return violations_of(TRITON, make_case(M, N, K, r, dtype, device=device), **options)


def runs(path, dtype):
    return path in PATHS and (dtype != FP32 or path not in DESCRIPTOR_PATHS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_the_rule_catches(bug, dtype, monkeypatch, tmp_path, device):
    if not runs(bug.path, dtype):
        pytest.skip("the descriptor paths take 16-bit dtypes, on Hopper")
    plant(monkeypatch, tmp_path, bug.module, bug.old, bug.new)
    taken = force_path(monkeypatch, bug.path)
    for shape in bug.shapes:
        assert violations(bug.path, dtype, shape, device, **bug.options) != [], shape
    assert set(taken) == {bug.path}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_the_rule_accepts_the_kernels_as_they_are(path, dtype, monkeypatch, tmp_path, device):
    if not runs(path, dtype):
        pytest.skip("the descriptor paths take 16-bit dtypes, on Hopper")
    force_path(monkeypatch, path)
    for module in set(LAUNCHERS) - {None, product, triton_backend}:
        plant(monkeypatch, tmp_path, module, "", "")  # copies without an edit
    for shape in RAGGED + (SPLIT if path == "portable" else ()):
        assert violations(path, dtype, shape, device) == [], shape
    if path == "portable":
        assert violations(path, dtype, RAGGED[0], device, dropout_p=0.5) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_the_floor_the_rule_catches_a_scale_wrong_by_04_percent(
    dtype, monkeypatch, tmp_path, device
):
    force_path(monkeypatch, "portable")
    case = make_case(256, 512, 512, 16, dtype, amplify=False, device=device)
    plant(monkeypatch, tmp_path, shrink, "(acc * factor)", "(acc * factor * 1.004)")
    found = " ".join(violations_of(TRITON, case, floor=False))
    assert all(f"W = 0: {name}" in found for name in ("y", "dx", "dA", "dB"))


def test_every_path_that_can_run_here_is_tested():
    missing = set(config.PATHS) - set(PATHS)
    if HERE is config.INTERPRETER:
        assert missing == {"hopper"}
    else:
        assert not missing or HERE.capability != 90
    assert {path for *_, path in PATH_COVER} == set(PATHS)


@pytest.mark.parametrize("kept", (TOKENS, (1, 7, 33)))
def test_the_cover_has_every_possible_pair(kept):
    factors = kept, FEATURES, FEATURES, RANKS, DTYPES
    cover = pairwise(*factors)
    assert all(affordable(*row) for row in cover)
    possible = [row for row in itertools.product(*factors) if affordable(*row)]
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        for a, b in itertools.product(first, second):
            here = [row for row in cover if row[i] == a and row[j] == b]
            assert bool(here) == any(row[i] == a and row[j] == b for row in possible), (a, b)
    assert len(cover) < 70
