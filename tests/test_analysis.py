"""The paper's measures against slow definitions in fp64, and the invariances they must have."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_models import make, plain

from fused_lora import analysis
from fused_lora.analysis import (
    adapter_summary,
    amplification_factor,
    effective_rank,
    random_baseline,
    similarity_grid,
    subspace_similarity,
)

K = 24


def factors(r1=4, r2=9, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(r1, K)), generator.normal(size=(r2, K))


def orthogonal(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def slow_directions(A, n):
    """Eigenvectors of A^T A, largest first: the right-singular vectors without an SVD."""
    _, vectors = np.linalg.eigh(A.T @ A)
    return vectors[:, ::-1][:, :n]


def slow_similarity(A1, A2, i, j):
    U1, U2 = slow_directions(A1, i), slow_directions(A2, j)
    total = sum((U1[:, a] @ U2[:, b]) ** 2 for a in range(i) for b in range(j))
    return total / min(i, j)


def test_similarity_and_its_grid_are_equation_4():
    A1, A2 = factors()
    grid = similarity_grid(A1, torch.from_numpy(A2))
    assert grid.shape == (4, 9) and grid.dtype == torch.float64
    for i in range(1, 5):
        for j in range(1, 10):
            exact = slow_similarity(A1, A2, i, j)
            assert subspace_similarity(A1, A2, i, j) == pytest.approx(exact, abs=1e-12)
            assert grid[i - 1, j - 1].item() == pytest.approx(exact, abs=1e-12)
    assert grid.min() >= 0 and grid.max() <= 1 + 1e-12


def test_similarity_is_one_for_the_same_space_and_zero_for_orthogonal_ones():
    A1, _ = factors()
    Q = orthogonal(K)
    assert subspace_similarity(A1, A1, 4, 4) == pytest.approx(1)
    assert subspace_similarity(A1, A1, 2, 3) == pytest.approx(1)
    assert subspace_similarity(Q[:3], Q[3:8], 3, 5) == pytest.approx(0, abs=1e-14)
    assert subspace_similarity(Q[:3], np.vstack([Q[2:3], 0.5 * Q[5:7]]), 3, 1) == pytest.approx(1)


def test_similarity_does_not_change_with_sign_scale_or_basis():
    A1, A2 = factors()
    expected = similarity_grid(A1, A2)
    Q = orthogonal(K)
    for changed in (
        (-A1, 7e-3 * A2),
        (orthogonal(4) @ A1, orthogonal(9, 1) @ A2),  # what mixes the ranks
        (A1 @ Q, A2 @ Q),  # what rotates the inputs of both
    ):
        torch.testing.assert_close(similarity_grid(*changed), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(similarity_grid(A2, A1).T, expected)
    assert (similarity_grid(A1 @ Q, A2) - expected).abs().max() > 1e-2


def test_parameters_of_any_floating_dtype_are_taken():
    A1, A2 = (torch.nn.Parameter(torch.from_numpy(A).bfloat16()) for A in factors())
    expected = similarity_grid(A1.detach().double(), A2.detach().double())
    assert torch.equal(similarity_grid(A1, A2), expected)


def test_the_random_baseline_is_max_i_j_over_k():
    grid = random_baseline(40, 5, 8, samples=400)
    i, j = torch.arange(1, 6)[:, None], torch.arange(1, 9)[None, :]
    assert (grid - torch.maximum(i, j) / 40).abs().max() < 0.012
    assert torch.equal(random_baseline(40, 5, 8, seed=3), random_baseline(40, 5, 8, seed=3))
    assert not torch.equal(random_baseline(40, 5, 8, seed=3), random_baseline(40, 5, 8, seed=4))


def test_amplification_is_that_of_section_7_3():
    generator = np.random.default_rng(0)
    W = generator.normal(size=(10, K))
    delta = generator.normal(size=(10, 3)) @ generator.normal(size=(3, K))
    for r in (1, 2, 3):
        U, V = slow_directions(delta.T, r), slow_directions(delta, r)
        exact = np.sqrt((delta**2).sum()) / np.sqrt(((U.T @ W @ V) ** 2).sum())
        assert amplification_factor(W, delta, r) == pytest.approx(exact, rel=1e-10)
    factor = amplification_factor(W, delta, 3)
    assert amplification_factor(W, -5 * delta, 3) == pytest.approx(5 * factor)
    assert amplification_factor(4 * W, delta, 3) == pytest.approx(factor / 4)
    P, Q = orthogonal(10), orthogonal(K)
    assert amplification_factor(P @ W @ Q, P @ delta @ Q, 3) == pytest.approx(factor)
    # delta W proportional to W: no direction is preferred
    assert amplification_factor(delta, 0.5 * delta, 3) == pytest.approx(0.5)
    assert amplification_factor(np.zeros((10, K)), delta, 3) == math.inf


def test_effective_rank_counts_equal_singular_values():
    Q = orthogonal(K)
    assert effective_rank(Q[:6]) == pytest.approx(6)
    assert effective_rank(-3e-9 * Q[:6]) == pytest.approx(6)
    assert effective_rank(np.outer(Q[0], Q[1])) == pytest.approx(1)
    shares = np.array([0.5, 0.25, 0.25])
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(orthogonal(3) @ np.diag(8 * shares) @ Q[:3]) == pytest.approx(expected)


def test_the_summary_holds_the_singular_values_of_delta_w():
    model = make(rank_pattern={"0.q": 12, "1.q": 1}, use_rslora=True)
    summaries = adapter_summary(model)
    assert [s.path for s in summaries][:2] == ["layers.0.q_proj", "layers.0.v_proj"]
    for summary in summaries:
        layer = model.get_submodule(summary.path)
        delta = layer.lora_B.double() @ layer.lora_A.double() * layer.scaling
        values = torch.linalg.svdvals(delta)[: layer.r]
        assert (summary.r, summary.scaling) == (layer.r, layer.scaling)
        torch.testing.assert_close(summary.singular_values, values, rtol=1e-9, atol=1e-12)
        assert summary.norm_delta == pytest.approx(delta.norm().item())
        assert summary.effective_rank == pytest.approx(effective_rank(delta), rel=1e-6)
        assert summary.norm_A == pytest.approx(layer.lora_A.double().norm().item())
        assert summary.norm_B == pytest.approx(layer.lora_B.double().norm().item())
        assert str(summary).startswith(f"{summary.path}: r={layer.r}, scaling=")
    fresh = adapter_summary(make(init_lora_weights=True))[0]
    assert fresh.norm_delta == fresh.effective_rank == 0


A1, A2 = factors()
NAN = A1.copy()
NAN[1, 2] = np.nan
MISTAKES = {
    "i too large": (subspace_similarity, (A1, A2, 5, 2), ValueError, "i .* rank 4 of A1: got 5"),
    "j too large": (subspace_similarity, (A1, A2, 2, 10), ValueError, "j .* rank 9 of A2: got 10"),
    "i of 0": (subspace_similarity, (A1, A2, 0, 1), ValueError, "i must be .* got 0"),
    "i no integer": (subspace_similarity, (A1, A2, 1.5, 1), ValueError, "got 1.5"),
    "rank deficient": (
        subspace_similarity,
        (np.vstack([A1[:1], A1[:1]]), A2, 2, 2),
        *(ValueError, "rank 1 of A1: got 2"),
    ),
    "zero": (subspace_similarity, (np.zeros((3, K)), A2, 1, 1), ValueError, "rank 0 of A1"),
    "another width": (similarity_grid, (A1, A2[:, 1:]), ValueError, "same in_features: got 24 and"),
    "NaN": (similarity_grid, (NAN, A2), ValueError, "A1 holds NaN"),
    "no matrix": (
        similarity_grid,
        (A1[0], A2),
        TypeError,
        r"A1 must be a floating matrix",
    ),
    "integers": (effective_rank, (np.eye(3, dtype=int),), TypeError, "floating matrix"),
    "a zero matrix": (effective_rank, (np.zeros((3, 3)),), ValueError, "is zero"),
    "shapes differ": (amplification_factor, (A1, A2, 1), ValueError, r"one shape: got \(4, 24\)"),
    "r too large": (amplification_factor, (A1, A1, 5), ValueError, "rank 4 of delta_W: got 5"),
    "r above the width": (random_baseline, (8, 9, 2), ValueError, "r1=9, r2=2, in_features=8"),
    "no adapter": (adapter_summary, (plain(),), ValueError, "holds no LoRA layer"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_refused_in_words(case):
    call, arguments, error, said = MISTAKES[case]
    with pytest.raises(error, match=said):
        call(*arguments)


def test_a_diverged_adapter_is_named():
    model = make()
    model.layers[1].q.lora_B.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers.1.q.lora_B holds NaN or infinity"):
        adapter_summary(model)


def test_nothing_is_plotted_at_import():
    code = "import sys, fused_lora.analysis; print('matplotlib' in sys.modules)"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False"] and analysis.__doc__
