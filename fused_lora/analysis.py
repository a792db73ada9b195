"""What adapters have learnt: the measures of section 7 of the LoRA paper (Hu et al., ICLR 2022),
in fp64 on the CPU. Factors may be tensors or numpy arrays; nothing is plotted here."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.layer import LoRALayer
from fused_lora.model import require_layers


class LayerSummary(NamedTuple):
    """One adapter: Frobenius norms, and the singular values of delta W = scaling * B A."""

    path: str
    r: int
    scaling: float
    norm_A: float
    norm_B: float
    norm_delta: float
    effective_rank: float  # of delta W; 0 while it is zero
    singular_values: Tensor  # [min(r, in, out)], fp64, descending

    def __str__(self) -> str:
        values = " ".join(f"{value:.3g}" for value in self.singular_values[:8].tolist())
        more = " ..." if len(self.singular_values) > 8 else ""
        return (
            f"{self.path}: r={self.r}, scaling={self.scaling:g}, |A|={self.norm_A:.3g}, "
            f"|B|={self.norm_B:.3g}, |dW|={self.norm_delta:.3g}, effective rank "
            f"{self.effective_rank:.3g}, singular values {values}{more}"
        )


def subspace_similarity(A1: Any, A2: Any, i: int, j: int) -> float:
    """How much of the top i directions of A1 lies in the top j of A2: equation 4 of the paper,
    `||U1_i^T U2_j||_F^2 / min(i, j)`, from 0 (orthogonal) to 1 (one holds the other).

    A1 [r1, K] and A2 [r2, K] are lora_A of two adapters, U their right-singular vectors; for lora_B
    give B.T. Raises TypeError for other than floating matrices, ValueError for NaN or infinity,
    another K, and an i or j below 1 or above the rank of its matrix (no such direction is defined).
    """
    first, second = _directions(A1, "A1"), _directions(A2, "A2")
    _check_width(first, second)
    _check_count("i", i, len(first), "A1")
    _check_count("j", j, len(second), "A2")
    return (first[:i] @ second[:j].T).square().sum().item() / min(i, j)


def similarity_grid(A1: Any, A2: Any) -> Tensor:
    """`subspace_similarity(A1, A2, i, j)` at [i - 1, j - 1] for every i and j (figures 3 and 4),
    fp64 [rank of A1, rank of A2]. Raises as `subspace_similarity` does."""
    first, second = _directions(A1, "A1"), _directions(A2, "A2")
    _check_width(first, second)
    overlap = (first @ second.T).square().cumsum(0).cumsum(1)
    i, j = torch.arange(1, len(first) + 1), torch.arange(1, len(second) + 1)
    return overlap / torch.minimum(i[:, None], j[None, :])


def random_baseline(
    in_features: int, r1: int, r2: int, *, samples: int = 1, seed: int = 0
) -> Tensor:
    """The control of figures 3 and 4: the mean of `similarity_grid` over `samples` pairs of
    Gaussian matrices, fp64 [r1, r2]. Its expectation is max(i, j) / in_features.
    Raises ValueError unless 1 <= r1, r2 <= in_features and samples >= 1."""
    if not (1 <= r1 <= in_features and 1 <= r2 <= in_features and samples >= 1):
        raise ValueError(
            "expected 1 <= r1, r2 <= in_features and samples >= 1: got "
            f"r1={r1}, r2={r2}, in_features={in_features}, samples={samples}"
        )
    generator = torch.Generator().manual_seed(seed)

    def gaussian(r: int) -> Tensor:
        return torch.randn(r, in_features, generator=generator, dtype=torch.float64)

    grids = [similarity_grid(gaussian(r1), gaussian(r2)) for _ in range(samples)]
    return torch.stack(grids).mean(0)


def amplification_factor(W: Any, delta_W: Any, r: int) -> float:
    """How much delta W amplifies directions that W has little of (section 7.3):
    `||delta_W||_F / ||U_r^T W V_r||_F`, with U, V the left and right singular vectors of delta W.

    W and delta_W [out, in]; r from 1 to the rank of delta_W. Infinity if W has nothing at all
    there. Raises as `subspace_similarity` does."""
    weight, delta = _matrix(W, "W"), _matrix(delta_W, "delta_W")
    if weight.shape != delta.shape:
        raise ValueError(
            f"W and delta_W must have one shape: got {tuple(weight.shape)}, {tuple(delta.shape)}"
        )
    U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
    rank = _rank(values, delta.shape)
    _check_count("r", r, rank, "delta_W")
    projected = (U[:, :r].T @ weight @ Vh[:r].T).norm().item()
    return values.norm().item() / projected if projected > 0 else math.inf


def effective_rank(matrix: Any) -> float:
    """The exponential of the entropy of the normalised singular values (Roy and Vetterli 2007):
    1 for a rank-one matrix, n for n equal singular values. Raises ValueError for a zero matrix."""
    values = torch.linalg.svdvals(_matrix(matrix, "matrix"))
    if not values.any():
        raise ValueError("the matrix is zero, its effective rank is not defined")
    return _effective_rank(values)


def adapter_summary(model: nn.Module) -> list[LayerSummary]:
    """A `LayerSummary` of every LoRA layer of the model, in its order; str() of one is a line.
    Raises ValueError if there is no LoRA layer or an adapter holds NaN or infinity."""
    return [_summary(path, layer) for path, layer in require_layers(model).items()]


def _summary(path: str, layer: LoRALayer) -> LayerSummary:
    A = _matrix(layer.lora_A, f"{path}.lora_A")
    B = _matrix(layer.lora_B, f"{path}.lora_B")
    # B A = Q_B (R_B R_A^T) Q_A^T: the singular values of an r x r matrix
    core = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T
    values = torch.linalg.svdvals(core) * abs(layer.scaling)
    return LayerSummary(
        path,
        layer.r,
        layer.scaling,
        A.norm().item(),
        B.norm().item(),
        values.norm().item(),
        _effective_rank(values) if values.any() else 0.0,
        values,
    )


def _effective_rank(values: Tensor) -> float:
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


def _directions(matrix: Any, name: str) -> Tensor:
    """The right-singular vectors that are defined, [rank, K], the largest singular value first."""
    checked = _matrix(matrix, name)
    _, values, Vh = torch.linalg.svd(checked, full_matrices=False)
    return Vh[: _rank(values, checked.shape)]


def _rank(values: Tensor, shape: torch.Size) -> int:
    if values.numel() == 0:
        return 0
    return int((values > values[0] * max(shape) * torch.finfo(values.dtype).eps).sum())


def _check_count(name: str, count: int, rank: int, of: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= rank:
        raise ValueError(
            f"{name} must be an integer from 1 to the rank {rank} of {of}: got {count!r}"
        )


def _check_width(first: Tensor, second: Tensor) -> None:
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"A1 and A2 must have the same in_features: got {first.shape[1]} and {second.shape[1]}"
        )


def _matrix(value: Any, name: str) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be a floating matrix: got {tuple(tensor.shape)} of {tensor.dtype}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor.to("cpu", torch.float64)
