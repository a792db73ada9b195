"""Ways to compute a part of the layer with a given kernel configuration: what campaign.py and
tune.py check and time. A candidate is plain data, so that a worker process can compile it, and
knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import DROPOUT, DROPOUT_SEED
from results import Case
from torch import Tensor

from fused_lora import lora_linear
from fused_lora.kernels import config
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.shrink import shrink
from fused_lora.kernels.tape import Tape
from fused_lora.product import adapted_product, device_of, precision_of
from fused_lora.scale import Scale, padded_rank
from fused_lora.testing import Case as Inputs

Results = dict[str, Tensor]  # some of y, dx, dA, dB, S, dS
Call = Callable[[], Results]
BOTH = ("fwd", "dx")


@dataclass(frozen=True)
class Operands:
    """One input set: the layer's inputs, and what earlier kernels would have made of them."""

    inputs: Inputs
    S: Tensor  # [M, padded r]
    dS: Tensor  # [M, padded r]


def operands(inputs: Inputs) -> Operands:
    def states(x: Tensor, factor: Tensor) -> Tensor:
        S = x.new_zeros((x.shape[0], padded_rank(factor.shape[0])))
        S[:, : factor.shape[0]] = inputs.scaling * (x.float() @ factor.float().t())
        return S

    S = states(inputs.x, inputs.lora_A)
    return Operands(inputs, S, states(inputs.dy, inputs.lora_B.t()))


def blank(case: Case) -> Operands:
    """Operands of a case's sizes on the CPU whose values nobody reads: enough to compile for."""
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    M, N, K, r = case.M, case.N, case.K, case.r
    inputs = Inputs(
        empty(M, K), empty(N, K), empty(r, K), empty(N, r), None, empty(M, N), scaling=1.0
    )
    return Operands(inputs, empty(M, padded_rank(r)), empty(M, padded_rank(r)))


@dataclass(frozen=True)
class Side:
    """Y = X W + S B of one direction: y from x, or dx from dY, with the other operands."""

    result: str
    state: str  # the name of S
    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    S: Tensor

    def new_result(self) -> Tensor:
        return self.x.new_empty((self.x.shape[0], self.w.shape[1]))


def side(o: Operands, direction: str) -> Side:
    i = o.inputs
    if direction == "fwd":
        return Side("y", "S", i.x, i.weight.t(), i.lora_A, i.lora_B.t(), o.S)
    return Side("dx", "dS", i.dy, i.weight, i.lora_B.t(), i.lora_A, o.dS)


@dataclass(frozen=True)
class Candidate:
    """`prepare` returns the call that is timed; it allocates its results as the library does.
    `rule` says what checks.Judge holds them to."""

    name: str
    rule = "eager"
    uses_triton = True

    def prepare(self, o: Operands) -> Call:
        raise NotImplementedError


@dataclass(frozen=True)
class Directed(Candidate):
    """A candidate for y, dx or both, one after the other."""

    directions: tuple[str, ...]

    def prepare(self, o: Operands) -> Call:
        calls = [self.prepare_side(side(o, d), o.inputs.scaling) for d in self.directions]
        return lambda: {name: value for call in calls for name, value in call().items()}

    def prepare_side(self, s: Side, scaling: float) -> Call:
        raise NotImplementedError


@dataclass(frozen=True)
class Merged(Directed):
    """One library product by W + s B A: the cost that everything is measured against."""

    rule = "merged"
    uses_triton = False

    def prepare_side(self, s: Side, scaling: float) -> Call:
        adapter, transposed = s.a, s.w.stride(1) != 1
        delta = adapter.float().t() @ s.b.float()  # [K, N] of this direction
        w = (s.w.float() + scaling * delta).to(s.w.dtype)
        w = w.t().contiguous().t() if transposed else w.contiguous()
        return lambda: {s.result: s.x @ w}


@dataclass(frozen=True)
class Product(Directed):
    """The product by one of our matmuls: without adapter, or with S given."""

    op: str
    tiles: config.Matmul
    adapter: bool

    @property
    def rule(self) -> str:  # type: ignore[override]
        return "eager" if self.adapter else "base"

    def prepare_side(self, s: Side, scaling: float) -> Call:
        b, S = (s.b, s.S) if self.adapter else (None, None)

        def call() -> Results:
            y = s.new_result()
            _matmul(self.op, s.x, s.w, y, self.tiles, b=b, S=S)
            return {s.result: y}

        return call


@dataclass(frozen=True)
class Shrink(Directed):
    """S alone, on a given number of programs."""

    tiles: config.Shrink
    programs: int

    def prepare_side(self, s: Side, scaling: float) -> Call:
        def call() -> Results:
            S = torch.empty_like(s.S)
            shrink(s.x, s.a, S, self.tiles, self.programs, scale=scaling)
            return {s.state: S[:, : s.a.shape[0]]}

        return call


@dataclass(frozen=True)
class Path(Directed):
    """The whole Y = X W + (s X A^T) B by a plan."""

    plan: config.Product

    def prepare_side(self, s: Side, scaling: float) -> Call:
        return lambda: {s.result: _run(self.plan, s, scaling)}


@dataclass(frozen=True)
class RankGrad(Candidate):
    """dA and dB in one launch, and the memset of their counters that shrink does in the layer."""

    tiles: config.RankGrad

    def prepare(self, o: Operands) -> Call:
        def call() -> Results:
            return _rank_grad(self.tiles, o, o.dS, _Counters(self.tiles, o, zeroed=True))

        return call


@dataclass(frozen=True)
class Backward(Candidate):
    """shrink, dX and rank_grad, as the layer launches them on the paths hopper and pdl."""

    plan: config.Product
    tiles: config.RankGrad
    behind: bool

    def prepare(self, o: Operands) -> Call:
        s = side(o, "dx")

        def call() -> Results:
            dS = torch.empty_like(o.dS)
            counters = _Counters(self.tiles, o, zeroed=False)
            dx = _run(self.plan, s, o.inputs.scaling, S=dS, counters=counters.tensor)
            return {"dx": dx} | _rank_grad(self.tiles, o, dS, counters, self.behind)

        return call


class _Counters:
    """What rank_grad needs beside its results: splits, partial sums, counters."""

    def __init__(self, tiles: config.RankGrad, o: Operands, *, zeroed: bool) -> None:
        i = o.inputs
        (M, K), (N, r) = i.x.shape, i.lora_B.shape
        counts = tile_counts(K, N, r, tiles, True, True)
        slots = sum(counts[:2]) * counts[2]
        self.splits = config.rank_grad_splits(device_of(i.x.device), slots, M, tiles)
        self.partial = self.tensor = None
        if self.splits > 1:
            elements = partial_elements(counts, self.splits, r, tiles)
            self.partial = i.x.new_empty(elements, dtype=torch.float32)
            self.tensor = (i.x.new_zeros if zeroed else i.x.new_empty)(slots, dtype=torch.int32)
        self.dA, self.dB = torch.empty_like(i.lora_A), torch.empty_like(i.lora_B)


def _rank_grad(
    tiles: config.RankGrad, o: Operands, dS: Tensor, c: _Counters, behind: bool = False
) -> Results:
    i = o.inputs
    rank_grad(
        tiles,
        c.splits,
        i.x.shape[0],
        i.lora_B.shape[1],
        x=i.x,
        dS=dS,
        dA=c.dA,
        dY=i.dy,
        S=o.S,
        dB=c.dB,
        partial=c.partial,
        counters=c.tensor,
        behind=behind,
    )
    return {"dA": c.dA, "dB": c.dB}


@dataclass(frozen=True)
class Layer(Candidate):
    """The layer as a user calls it. compute: "triton", "aten" or "auto", this library's backends,
    or "eager3" or "addmm" of providers.py. path: one of config.PATHS, forced, or "auto"."""

    compute: str
    mode: str  # "fwd", without gradients, or "fwd+bwd"
    path: str = "auto"
    dropout: bool = False

    @property
    def rule(self) -> str:  # type: ignore[override]
        return "dropout" if self.dropout else "eager"

    @property
    def uses_triton(self) -> bool:  # type: ignore[override]
        return self.compute == "triton"

    def prepare(self, o: Operands) -> Call:
        leaves = {"dx": o.inputs.x, "dA": o.inputs.lora_A, "dB": o.inputs.lora_B}
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in leaves.items()}
        forward = self._function(o.inputs)

        def call() -> Results:
            forced, config.PATH = config.PATH, self.path
            try:
                with torch.set_grad_enabled(self.mode != "fwd"):
                    y = forward(leaves["dx"], o.inputs.weight, leaves["dA"], leaves["dB"])
                    if self.mode == "fwd":
                        return {"y": y}
                    grads = torch.autograd.grad(y, tuple(leaves.values()), o.inputs.dy)
                return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
            finally:
                config.PATH = forced

        return call

    def _function(self, inputs: Inputs) -> Callable[..., Tensor]:
        if self.compute in ("eager3", "addmm"):
            import providers  # torch's compiler comes with it: seconds that workers can do without

            function = getattr(providers, self.compute)
            return lambda *tensors: function(*tensors, inputs.scaling)
        options: dict[str, Any] = {"scaling": inputs.scaling, "backend": self.compute}
        if self.dropout:
            seed = torch.tensor(DROPOUT_SEED, device=inputs.x.device)
            options |= {"dropout_p": DROPOUT, "seed": seed}
        return lambda *tensors: lora_linear(*tensors, **options)


def _matmul(
    op: str,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    tiles: config.Matmul,
    *,
    b: Tensor | None,
    S: Tensor | None,
) -> None:
    if op == "matmul":
        matmul(x, w, y, tiles, b=b, S=S)
        return
    run: Callable[..., None] = descriptor_matmul
    if op in ("matmul_hopper", "matmul_beside"):
        from fused_lora.kernels.matmul_hopper import hopper_matmul

        run = hopper_matmul
    run(x, w, y, tiles, device_of(x.device).sm_count, b=b, S=S)


def _run(
    plan: config.Product,
    s: Side,
    scaling: float,
    S: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """y of a plan. S to write to and counters to zero may be given where it has a shrink."""
    y = s.new_result()
    tape = Tape([s.x])  # which nobody plays: it only allocates
    operands = (s.x, s.w, s.a, s.b, y, S)
    adapted_product(
        *(tape, plan, *operands, Scale(scaling, None), None, precision_of(s.x)), counters=counters
    )
    return y
