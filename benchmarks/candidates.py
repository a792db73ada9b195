"""Ways to compute a part of the layer with a given kernel configuration: what campaign.py and
tune.py check and time. A candidate is plain data, so that a worker process can compile it, and
knows nothing of time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import DROPOUT, DROPOUT_SEED
from results import Case
from torch import Tensor

from fused_lora import dropout, lora_linear, triton_backend
from fused_lora.kernels import config
from fused_lora.kernels.matmul import matmul
from fused_lora.kernels.matmul_descriptor import descriptor_matmul
from fused_lora.kernels.rank_grad import partial_elements, rank_grad, tile_counts
from fused_lora.kernels.shrink import shrink
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

    @functools.cached_property
    def dropped(self) -> tuple[Tensor, Tensor]:
        """(S, packed mask) of a forward with dropout."""
        x, seed = self.inputs.x, _seed(self.inputs)
        bits = dropout.packed_mask(seed, *x.shape, DROPOUT)
        kept = dropout.keep_scale(DROPOUT) * x * dropout.unpack(bits, x.shape[1])
        return _states(kept, self.inputs.lora_A, self.inputs.scaling), bits


def operands(inputs: Inputs) -> Operands:
    S = _states(inputs.x, inputs.lora_A, inputs.scaling)
    return Operands(inputs, S, _states(inputs.dy, inputs.lora_B.t(), inputs.scaling))


def _states(x: Tensor, factor: Tensor, scaling: float) -> Tensor:
    S = x.new_zeros((x.shape[0], padded_rank(factor.shape[0])))
    S[:, : factor.shape[0]] = scaling * (x.float() @ factor.float().t())
    return S


def _seed(inputs: Inputs) -> Tensor:
    return torch.tensor(DROPOUT_SEED, device=inputs.x.device)


class Blank(Operands):
    """Operands on the CPU whose values nobody reads: enough to compile for."""

    @functools.cached_property
    def dropped(self) -> tuple[Tensor, Tensor]:
        M, K = self.inputs.x.shape
        return self.S, torch.empty((M, dropout.packed_columns(K)), dtype=torch.uint8)


def blank(case: Case) -> Blank:
    dtype = getattr(torch, case.dtype)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    M, N, K, r = case.M, case.N, case.K, case.r
    inputs = Inputs(
        empty(M, K), empty(N, K), empty(r, K), empty(N, r), None, empty(M, N), scaling=1.0
    )
    return Blank(inputs, empty(M, padded_rank(r)), empty(M, padded_rank(r)))


@contextlib.contextmanager
def forced(choice: str | config.Product) -> Iterator[None]:
    """Within it, the library takes this path or plan."""
    before, config.FORCED = config.FORCED, choice
    try:
        yield
    finally:
        config.FORCED = before


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
class Planned(Candidate):
    """The library's own forward ("fwd"), dX alone ("dx") or dX, dA and dB ("bwd"), by this plan."""

    of: str
    plan: config.Product
    dropout: bool = False

    @property
    def rule(self) -> str:  # type: ignore[override]
        return "dropout" if self.dropout else "eager"

    def prepare(self, o: Operands) -> Call:
        i, scale = o.inputs, Scale(o.inputs.scaling, None)
        p, seed = (DROPOUT, _seed(i)) if self.dropout else (0.0, None)
        factors = (i.weight, i.lora_A, i.lora_B)
        if self.of == "fwd":

            def forward() -> Results:
                with forced(self.plan):
                    made = triton_backend.forward(
                        *(i.x, *factors, None, scale, p, seed, None), for_backward=False
                    )
                return {"y": made[0]}

            return forward
        S, bits = o.dropped if self.dropout else (o.S, None)
        needs = (True, self.of == "bwd", self.of == "bwd")

        def backward() -> Results:
            with forced(self.plan):
                made = triton_backend.backward(
                    *(i.dy, i.x, *factors, S, bits, scale, p, None, *needs)
                )
            names = ("dx", "dA", "dB")
            return {name: t for name, t in zip(names, made, strict=True) if t is not None}

        return backward


@dataclass(frozen=True)
class RankGrad(Candidate):
    """dA and dB in one launch, and the memset of its counters that shrink does in the layer."""

    tiles: config.RankGrad

    def prepare(self, o: Operands) -> Call:
        i = o.inputs
        (M, K), (N, r) = i.x.shape, i.lora_B.shape
        counts = tile_counts(K, N, r, self.tiles, True, True)
        slots = sum(counts[:2]) * counts[2]
        splits = config.rank_grad_splits(config.device_of(i.x.device), slots, M, self.tiles)

        def call() -> Results:
            dA, dB = torch.empty_like(i.lora_A), torch.empty_like(i.lora_B)
            partial = counters = None
            if splits > 1:
                elements = partial_elements(counts, splits, r, self.tiles)
                partial = i.x.new_empty(elements, dtype=torch.float32)
                counters = i.x.new_zeros(slots, dtype=torch.int32)
            shared = {"partial": partial, "counters": counters}
            factors = {"x": i.x, "dS": o.dS, "dA": dA, "dY": i.dy, "S": o.S, "dB": dB}
            rank_grad(self.tiles, splits, M, r, **factors, **shared)
            return {"dA": dA, "dB": dB}

        return call


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
            with forced(self.path), torch.set_grad_enabled(self.mode != "fwd"):
                y = forward(leaves["dx"], o.inputs.weight, leaves["dA"], leaves["dB"])
                if self.mode == "fwd":
                    return {"y": y}
                grads = torch.autograd.grad(y, tuple(leaves.values()), o.inputs.dy)
            return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

        return call

    def _function(self, inputs: Inputs) -> Callable[..., Tensor]:
        if self.compute in ("eager3", "addmm"):
            import providers  # torch's compiler comes with it: seconds that workers can do without

            function = getattr(providers, self.compute)
            return lambda *tensors: function(*tensors, inputs.scaling)
        options: dict[str, Any] = {"scaling": inputs.scaling, "backend": self.compute}
        if self.dropout:
            options |= {"dropout_p": DROPOUT, "seed": _seed(inputs)}
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
    run(x, w, y, tiles, config.device_of(x.device).sm_count, b=b, S=S)
