"""The acceptance rule: when is a layer's result right? Used by the tests and by the benchmarks,
which refuse to time what is wrong, and open to anyone who changes a kernel.

A result is compared with fp64 on the same inputs, next to the three-operation layer computed in
the same dtype. For y, dx, dA, dB and dbias:

    max|ours - exact|  <=  2 max|eager - exact| + f max|exact|
    relL2(ours)        <=  max(1.1 relL2(eager), f)

f = 2^-7 (bf16), 2^-10 (fp16), 2^-19 (fp32) keeps tiny shapes from raising false alarms; without it
(`floor=False`) a larger case is held to 1.1 times eager's own error. Inputs come with amplified
edges, so that a dropped last row, column or rank cannot hide in rounding, and every case is run a
second time with a zero base weight, so that a wrong adapter cannot hide under the base product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_lora import reference

FLOOR = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}
FLOOR[torch.float64] = 2.0**-40


@dataclass(frozen=True)
class Case:
    """Inputs of one layer: x [M, K], weight [N, K], lora_A [r, K], lora_B [N, r], dy [M, N]."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    dy: Tensor
    scaling: float

    def without_base(self) -> Case:
        return replace(self, weight=torch.zeros_like(self.weight))

    def tensors(self) -> tuple:
        """The arguments of `exact_gradients` and `eager_gradients`."""
        return (
            self.x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            self.scaling,
            self.dy,
        )


def make_case(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    scaling: float = 16 / 3,
    bias: bool = True,
    adapter_dtype: torch.dtype | None = None,
    amplify: bool = True,
    device: torch.device | str = "cpu",
) -> Case:
    """Random inputs, lora_B not zero; edges amplified unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, dy = normal(M, K), normal(M, N)
    weight, lora_A, lora_B = normal(N, K) / K**0.5, normal(r, K) / K**0.5, normal(N, r) * 0.3
    if amplify:
        x[:, -1] *= 8
        x[-1:] *= 4
        dy[-1:] *= 4
        dy[:, -1] *= 8
        lora_A[-1] *= 4
        lora_B[-1] *= 4
        lora_B[:, -1] *= 4
    if dtype == torch.float16:
        dy *= 2.0**-6  # amplified sums over thousands of tokens would leave fp16's range
    adapters = adapter_dtype or dtype
    return Case(
        x.to(device, dtype),
        weight.to(device, dtype),
        lora_A.to(device, adapters),
        lora_B.to(device, adapters),
        normal(N).to(device, dtype) if bias else None,
        dy.to(device, dtype),
        scaling,
    )


def gradients(
    layer: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dy: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    """{"y", "dx", "dA", "dB", "dbias"} of a function with the signature of `lora_linear`."""
    leaves = [t.detach().requires_grad_() for t in (x, lora_A, lora_B)]
    if bias is not None:
        leaves.append(bias.detach().requires_grad_())
    y = layer(
        leaves[0],
        weight.detach(),
        leaves[1],
        leaves[2],
        leaves[3] if bias is not None else None,
        scaling=scaling,
        **options,
    )
    grads = torch.autograd.grad(y, leaves, dy)
    return dict(zip(("y", "dx", "dA", "dB", "dbias"), (y.detach(), *grads), strict=False))


def exact_gradients(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dy: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    """The same in fp64, on the same (already rounded) inputs."""
    return gradients(
        reference.lora_linear,
        x.double(),
        weight.double(),
        lora_A.double(),
        lora_B.double(),
        None if bias is None else bias.double(),
        scaling,
        dy.double(),
        **options,
    )


def eager_gradients(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dy: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    """The three-operation layer in x's dtype, adapters cast to it."""
    lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return gradients(reference.lora_linear, x, weight, lora_A, lora_B, bias, scaling, dy, **options)


def check(
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    floor: bool = True,
) -> list[str]:
    """The violations of the rule in words, empty when `ours` is accepted. `dtype` is the dtype the
    layer computes in; only keys of `ours` are looked at, and each must be in the other two."""
    f = FLOOR[dtype] if floor else 0.0
    violations = []
    for name, result in ours.items():
        o, e, t = result.double(), eager[name].double(), exact[name].double()
        if not (e.isfinite().all() and t.isfinite().all()):
            raise ValueError(f"{name} of the case overflows {dtype} in eager: take smaller inputs")
        if o.shape != t.shape:
            violations.append(f"{name}: shape {tuple(o.shape)}, expected {tuple(t.shape)}")
            continue
        if t.numel() == 0:
            continue
        allowed = 2 * _largest(e - t) + f * _largest(t)
        if not _largest(o - t) <= allowed:  # a NaN fails
            violations.append(f"{name}: largest error {_largest(o - t):.3g}, allowed {allowed:.3g}")
        norm = max(t.norm().item(), 1e-300)
        error, limit = (o - t).norm().item() / norm, max(1.1 * (e - t).norm().item() / norm, f)
        if not error <= limit:
            violations.append(f"{name}: relative L2 error {error:.3g}, allowed {limit:.3g}")
    return violations


def violations_of(
    layer: Callable[..., Tensor], case: Case, *, floor: bool = True, **options: Any
) -> list[str]:
    """Check `layer` on a case, with its base weight and without. `options` (dropout_p, seed) go to
    the layer, eager and exact alike; an option of the layer alone belongs in a partial."""
    found = []
    for label, inputs in (("", case), ("W = 0: ", case.without_base())):
        ours = gradients(layer, *inputs.tensors(), **options)
        eager = eager_gradients(*inputs.tensors(), **options)
        exact = exact_gradients(*inputs.tensors(), **options)
        found += [label + v for v in check(ours, eager, exact, case.x.dtype, floor)]
    return found


def _largest(t: Tensor) -> float:
    return t.abs().max().item()
