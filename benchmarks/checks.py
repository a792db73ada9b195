"""A provider is right before it is timed: the acceptance rule of the tests on the case at hand.

What is timed is what is checked: the same callable, in the same mode, on the case's own shape.
Two inputs, both with amplified edges: one with W, one with W = 0, so that neither a wrong adapter
term can hide under the base product nor a dropped edge below the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from cases import DROPOUT, DROPOUT_SEED
from providers import Inputs, Provider, first_line, random_inputs
from results import Case
from torch import Tensor

from fused_lora import testing


@dataclass(frozen=True)
class Verdict:
    """`ok`: True accepted, False wrong (`note` says why), None cannot run (`note` says why)."""

    ok: bool | None
    note: str | None = None
    rel_l2: float | None = None
    rel_l2_vs_eager: float | None = None


class Judge:
    """Holds the exact and the yardstick values of one case, computed once for all providers.

    The rule (fused_lora.testing.check) compares with the exact fp64 values and allows a multiple
    of a yardstick's error. By the provider's `rule`:
        eager   exact layer with its adapter; yardstick: the eager three-op layer
        merged  the same exact y and dX; yardstick: a linear layer whose weight W + s B A was
                summed in fp64 and rounded once, for merging makes that rounding error by nature
        base    exact layer with B = 0; yardstick: the eager three-op layer with B = 0
        dropout exact layer with the mask that DROPOUT_SEED draws; yardstick: eager with it
    """

    def __init__(self, case: Case, device: torch.device, generator: torch.Generator):
        self.mode = case.mode
        self.dtype = getattr(torch, case.dtype)
        with_base = random_inputs(case, device, generator)
        amplify_edges(with_base.x, with_base.dy, [(with_base.lora_A, with_base.lora_B)])
        self.inputs = (with_base, with_base.without_base())
        self._values: dict[tuple[str, int], dict[str, Tensor]] = {}

    def verdict(self, provider: Provider) -> Verdict:
        """Run the provider on both inputs. Whatever it raises makes it wrong, not the program."""
        return self.judge(
            lambda inputs: _outputs(provider, inputs, self.mode), provider.rule, provider.excuse
        )

    def judge(
        self,
        compute: Callable[[Inputs], dict[str, Tensor]],
        rule: str,
        excuse: Callable[[Exception], str | None] = lambda error: None,
    ) -> Verdict:
        """The same of a function to some of y, dx, dA, dB, S and dS."""
        violations: list[str] = []
        errors: dict[str, tuple[float, float]] = {}
        exact_kind = {"base": "exact base", "dropout": "exact dropout"}.get(rule, "exact")
        eager_kind = rule if rule in ("base", "dropout") else "eager"
        for index, inputs in enumerate(self.inputs):
            try:
                ours = compute(inputs)
            except Exception as error:
                reason = excuse(error)
                if reason is not None:
                    return Verdict(None, f"n/a ({reason})")
                return Verdict(False, f"raised {type(error).__name__}: {first_line(error)}")
            exact = self._reference(exact_kind, index)
            yardstick = self._reference(rule, index)
            violations += [
                f"{violation}{' (W = 0)' if index else ''}"
                for violation in testing.check(ours, yardstick, exact, self.dtype)
            ]
            if index == 0:
                eager = self._reference(eager_kind, index)
                errors = {
                    name: (_rel_l2(ours[name], exact[name]), _rel_l2(eager[name], exact[name]))
                    for name in ours
                }
        if violations:
            return Verdict(False, "; ".join(violations))
        return Verdict(
            ok=True,
            rel_l2=max(error for error, _ in errors.values()),
            rel_l2_vs_eager=max(
                (error / eager for error, eager in errors.values() if eager), default=None
            ),
        )

    def _reference(self, kind: str, index: int) -> dict[str, Tensor]:
        key = (kind, index)
        if key not in self._values:
            with torch.enable_grad():
                self._values[key] = _REFERENCES[kind](self.inputs[index])
        return self._values[key]


def _outputs(provider: Provider, inputs: Inputs, mode: str) -> dict[str, Tensor]:
    layer = provider.build(inputs)
    result = layer.call(mode, inputs.dy)()
    tensors = (result,) if mode == "fwd" else result
    names = ("y", *layer.leaves)[: len(tensors)]
    return {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True)}


def _without_adapter(inputs: Inputs) -> Inputs:
    return replace(inputs, lora_B=torch.zeros_like(inputs.lora_B))


def _merged(inputs: Inputs) -> dict[str, Tensor]:
    delta = inputs.lora_B.double() @ inputs.lora_A.double()  # [N, K]
    weight = (inputs.weight.double() + inputs.scaling * delta).to(inputs.weight.dtype)
    return {"y": F.linear(inputs.x, weight), "dx": inputs.dy @ weight}


def _dropout(gradients: Callable[..., dict[str, Tensor]], inputs: Inputs) -> dict[str, Tensor]:
    seed = torch.tensor(DROPOUT_SEED, device=inputs.x.device)
    return gradients(*inputs.tensors(), dropout_p=DROPOUT, seed=seed)


def _states(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """S and dS, what shrink makes."""
    x, dy, A, B = (t.to(dtype) for t in (inputs.x, inputs.dy, inputs.lora_A, inputs.lora_B))
    return {"S": inputs.scaling * (x @ A.t()), "dS": inputs.scaling * (dy @ B)}


_REFERENCES = {
    "exact": lambda inputs: (
        testing.exact_gradients(*inputs.tensors()) | _states(inputs, torch.float64)
    ),
    "exact base": lambda inputs: testing.exact_gradients(*_without_adapter(inputs).tensors()),
    "exact dropout": lambda inputs: _dropout(testing.exact_gradients, inputs),
    "eager": lambda inputs: (
        testing.eager_gradients(*inputs.tensors()) | _states(inputs, inputs.x.dtype)
    ),
    "dropout": lambda inputs: _dropout(testing.eager_gradients, inputs),
    "base": lambda inputs: testing.eager_gradients(*_without_adapter(inputs).tensors()),
    "merged": _merged,
}


def _rel_l2(ours: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm()
    return float((ours.double() - exact).norm() / norm) if norm else 0.0


def amplify_edges(x: Tensor, dy: Tensor, factors: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Last K column of x times 8, last token of x and dY times 4, last column of dY times 8, last
    rank of A and B and last row of B times 4, in place."""
    x[:, -1] *= 8
    x[-1] *= 4
    dy[-1] *= 4
    dy[:, -1] *= 8
    for lora_A, lora_B in factors:
        lora_A[-1] *= 4
        lora_B[:, -1] *= 4
        lora_B[-1] *= 4
