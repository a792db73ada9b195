"""Many adapters in one batch against one merged matrix product of the same size: `--multi`.

Who asks for which adapter (popularity) and in which order is varied. What is timed is checked by
the acceptance rule first, as everywhere; merged is the yardstick of time alone, for it is no
implementation: it serves one adapter.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import machine
import protocol
import report
import results
import torch
import torch.nn.functional as F
from checks import Verdict, amplify_edges
from protocol import Budget
from providers import SCALING, first_line, leaf, random_inputs
from results import MERGED, MERGED_AGAIN, Case
from torch import Tensor

from fused_lora import AdapterPack, multi_lora_linear, reference, testing

LOOP, MASKED, FUSED = "loop over adapters", "eager masked", "fused"
PROVIDERS = (MERGED, MERGED_AGAIN, LOOP, MASKED, FUSED)
ADAPTERS, POPULARITIES = (2, 8, 64), ("identical", "zipf", "distinct")
ORDERS = ("grouped", "shuffled")
SHAPES = {  # (device, --quick) -> [(M, K, N)], numbers of adapters
    ("cuda", False): ([(M, 4096, 4096) for M in (16, 64, 4096, 8192)], ADAPTERS),
    ("cuda", True): ([(M, 4096, 4096) for M in (64, 8192)], (8,)),
    ("cpu", False): ([(M, 1024, 1024) for M in (16, 64, 1024)], ADAPTERS),
    ("cpu", True): ([(M, 1024, 1024) for M in (64, 512)], (2, 8)),
}


@dataclass(frozen=True)
class MultiCase:
    """A layer, how many adapters of rank r it has, and what the tokens ask for."""

    layer: Case
    adapters: int
    popularity: str  # "identical": one adapter for all; "distinct": in turn; "zipf"
    order: str  # "grouped": tokens of one adapter together; "shuffled"

    def __str__(self) -> str:
        return f"{self.layer} {self.adapters} adapters {self.popularity} {self.order}"


@dataclass(frozen=True)
class MultiRow:
    """One provider on one case; fields and units as in `results.Row`."""

    mode: str
    M: int
    K: int
    N: int
    r: int
    dtype: str
    adapters: int
    popularity: str
    order: str
    provider: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    vs_merged: float | None = None
    noise: float | None = None
    host_p50_us: float | None = None
    extra_mib: float | None = None
    launches: int | None = None
    ok: bool | None = None
    note: str | None = None


@dataclass(frozen=True)
class Batch:
    """x [M, K], weight [N, K], dy [M, N], factors [(A [r, K], B [N, r])], ids int32 [M]."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    factors: list[tuple[Tensor, Tensor]]
    ids: Tensor


Step = Callable[[], tuple[Tensor, ...]]


def random_batch(case: MultiCase, device: torch.device, generator: torch.Generator) -> Batch:
    inputs = [random_inputs(case.layer, device, generator)]
    one_row = Case("fwd", 1, case.layer.K, case.layer.N, case.layer.r, case.layer.dtype)
    factors = [random_inputs(one_row, device, generator) for _ in range(case.adapters)]
    ids = _ids(case, device, generator)
    pairs = [(each.lora_A, each.lora_B) for each in factors]
    return Batch(inputs[0].x, inputs[0].weight, inputs[0].dy, pairs, ids)


def _ids(case: MultiCase, device: torch.device, generator: torch.Generator) -> Tensor:
    M, count = case.layer.M, case.adapters
    if case.popularity == "identical":
        ids = torch.full((M,), count - 1, device=device)
    elif case.popularity == "distinct":
        ids = torch.arange(M, device=device) % count
    else:
        weights = 1.0 / torch.arange(1, count + 1, device=device)
        ids = torch.multinomial(weights, M, replacement=True, generator=generator)
    if case.order == "grouped":
        return ids.sort().values.int()
    return ids[torch.randperm(M, device=device, generator=generator)].int()


def build(provider: str, batch: Batch, mode: str) -> Step:
    """One step of a provider: () -> (y,) or (y, dx, dA of every adapter, dB of every adapter)."""
    x = leaf(batch.x)
    forward, leaves, unpack = _BUILDERS[provider](x, batch)
    if mode == "fwd":
        return lambda: (forward(),)

    def step() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, (x, *leaves), batch.dy, materialize_grads=True)

    step.unpack = unpack  # type: ignore[attr-defined]
    return step


def _merged(x: Tensor, batch: Batch):
    return lambda: F.linear(x, batch.weight), (), None


def _loop(x: Tensor, batch: Batch):
    """What a serving loop does, its rows found beforehand: finding them would wait for the GPU.
    Adapters without rows are left out, what there is is added in place."""
    rows = [(batch.ids == g).nonzero().flatten() for g in range(len(batch.factors))]
    factors = [(leaf(A), leaf(B)) for A, B in batch.factors]

    def forward() -> Tensor:
        y = F.linear(x, batch.weight)
        for own, (A, B) in zip(rows, factors, strict=True):
            if len(own):
                y.index_add_(0, own, F.linear(F.linear(x[own], A), B), alpha=SCALING)
        return y

    return forward, [t for pair in factors for t in pair], _of_pairs


def _masked(x: Tensor, batch: Batch):
    """All adapters for all tokens, packed along the rank, and a mask in between."""
    A = leaf(torch.cat([A for A, _ in batch.factors]))
    B = leaf(torch.cat([B for _, B in batch.factors], 1))
    r = batch.factors[0][0].shape[0]
    owner = torch.arange(len(batch.factors), device=x.device).repeat_interleave(r)

    def forward() -> Tensor:
        own = (batch.ids[:, None] == owner) * SCALING
        return F.linear(x, batch.weight) + F.linear(F.linear(x, A) * own.to(x.dtype), B)

    return forward, (A, B), lambda grads: _of_packed(grads, r, r)


def _fused(x: Tensor, batch: Batch):
    (N, K), r = batch.weight.shape, batch.factors[0][0].shape[0]
    padded = -(-r // 16) * 16
    count = len(batch.factors)
    pack = AdapterPack(
        K, N, total_rank=count * padded, max_adapters=count, device=x.device, dtype=x.dtype
    )
    for index, (A, B) in enumerate(batch.factors):
        pack.add(str(index), A, B, scaling=SCALING)

    def forward() -> Tensor:
        return multi_lora_linear(x, batch.weight, pack, batch.ids)

    return forward, (pack.lora_A, pack.lora_B), lambda grads: _of_packed(grads, r, padded)


_BUILDERS: dict[str, Callable[[Tensor, Batch], tuple]] = {
    **{name: _merged for name in (MERGED, MERGED_AGAIN)},
    LOOP: _loop,
    MASKED: _masked,
    FUSED: _fused,
}


def _of_pairs(grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"d{'AB'[i % 2]} {i // 2}": grad for i, grad in enumerate(grads)}


def _of_packed(grads: tuple[Tensor, ...], r: int, stride: int) -> dict[str, Tensor]:
    dA, dB = grads
    named = {}
    for g in range(dA.shape[0] // stride):
        own = slice(g * stride, g * stride + r)
        named |= {f"dA {g}": dA[own], f"dB {g}": dB[:, own]}
    return named


class Judge:
    """The acceptance rule on a batch with amplified edges, with W and with W = 0, as checks.py has
    it; exact and yardstick values are computed once for all providers."""

    def __init__(self, batch: Batch, mode: str) -> None:
        self.mode = mode
        factors = [(A.clone(), B.clone()) for A, B in batch.factors]
        edges = replace(batch, x=batch.x.clone(), dy=batch.dy.clone(), factors=factors)
        amplify_edges(edges.x, edges.dy, factors)
        self.batches = [edges, replace(edges, weight=torch.zeros_like(edges.weight))]
        with torch.enable_grad():
            self.expected = [
                [_specified(each, dtype, mode) for dtype in (batch.x.dtype, torch.float64)]
                for each in self.batches
            ]

    def verdict(self, provider: str) -> Verdict:
        """Whatever a provider raises makes it wrong."""
        if provider in (MERGED, MERGED_AGAIN):
            return Verdict(True)
        found = []
        for batch, (yardstick, exact) in zip(self.batches, self.expected, strict=True):
            try:
                step = build(provider, batch, self.mode)
                y, *grads = step()
                ours = {"y": y.detach()}
                if grads:
                    ours |= {"dx": grads[0], **step.unpack(grads[1:])}  # type: ignore[attr-defined]
            except Exception as error:
                return Verdict(False, f"raised {type(error).__name__}: {first_line(error)}")
            found += testing.check(ours, yardstick, exact, batch.x.dtype)
        return Verdict(not found, "; ".join(found) or None)


def _specified(batch: Batch, dtype: torch.dtype, mode: str) -> dict[str, Tensor]:
    x = leaf(batch.x.to(dtype))
    factors = [(leaf(A.to(dtype)), leaf(B.to(dtype))) for A, B in batch.factors]
    adapters = [(A, B, SCALING) for A, B in factors]
    y = reference.multi_lora_linear(x, batch.weight.to(dtype), adapters, batch.ids)
    if mode == "fwd":
        return {"y": y.detach()}
    leaves = (x, *(t for pair in factors for t in pair))
    dx, *grads = torch.autograd.grad(y, leaves, batch.dy.to(dtype))
    return {"y": y.detach(), "dx": dx, **_of_pairs(tuple(grads))}


def cases(args: argparse.Namespace, device_type: str) -> list[MultiCase]:
    shapes, counts = SHAPES[device_type, args.quick]
    dtype = args.dtype or ("bfloat16" if device_type == "cuda" else "float32")
    chosen = itertools.product(
        args.shapes or shapes, args.ranks or (16,), args.modes, counts, POPULARITIES, ORDERS
    )
    return [
        MultiCase(Case(mode, M, K, N, r, dtype), count, popularity, order)
        for (M, K, N), r, mode, count, popularity, order in chosen
        if not (popularity == "identical" and order == "shuffled")  # there is no order in it
    ]


def measure_case(
    case: MultiCase, device: torch.device, budget: Budget, seed: int
) -> list[MultiRow]:
    """Check every provider, time the accepted ones together, and make their rows."""
    layer = case.layer
    generator = torch.Generator(device).manual_seed(seed)
    first = random_batch(case, device, generator)
    operands = first.x.nbytes + first.weight.nbytes
    count = protocol.input_sets(operands, machine.cache_bytes(device))
    sets = [first, *(random_batch(case, device, generator) for _ in range(count - 1))]
    with torch.set_grad_enabled(layer.mode != "fwd"):
        judge = Judge(first, layer.mode)
        verdicts = {name: judge.verdict(name) for name in PROVIDERS}
        del judge
        calls = {
            name: [build(name, batch, layer.mode) for batch in sets]
            for name in PROVIDERS
            if verdicts[name].ok
        }
        samples = protocol.measure(calls, device, budget, seed)
        peaks = {name: protocol.peak_bytes(c[0], device) for name, c in calls.items()}
        launches = {name: protocol.launches(c[0], device) for name, c in calls.items()}
    merged, again = samples[MERGED].device_us, samples[MERGED_AGAIN].device_us
    noise = round(protocol.noise(merged, again, seed), 4)
    merged_p50 = protocol.percentiles(merged)[1]
    rows = []
    for name in PROVIDERS:
        row: dict[str, Any] = {field: getattr(layer, field) for field in ("mode", "M", "K", "N")}
        row |= {"r": layer.r, "dtype": layer.dtype, "adapters": case.adapters}
        row |= {"popularity": case.popularity, "order": case.order, "provider": name}
        if not verdicts[name].ok:
            rows.append(MultiRow(**row, ok=False, note=verdicts[name].note))
            continue
        p20, p50, p80 = (round(p, 3) for p in protocol.percentiles(samples[name].device_us))
        rows.append(
            MultiRow(
                **row,
                **{"p20_us": p20, "p50_us": p50, "p80_us": p80, "noise": noise, "ok": True},
                samples=len(samples[name].device_us),
                vs_merged=round(p50 / merged_p50, 4),
                host_p50_us=round(protocol.percentiles(samples[name].host_us)[1], 3),
                extra_mib=round((peaks[name] - peaks[MERGED]) / 2**20, 3),
                launches=launches[name],
            )
        )
    return rows


def case_table(case: MultiCase, rows: list[MultiRow]) -> str:
    lines = [
        f"{case}",
        f"{'provider':22s} {'over merged':>11s} {'p50 us':>10s} {'extra MiB':>10s} launches",
    ]
    for row in rows:
        if row.p50_us is None:
            lines.append(f"{row.provider:22s} WRONG: {(row.note or '')[:90]}")
            continue
        launched = "-" if row.launches is None else row.launches
        over = report.overhead(row.vs_merged, row.noise)
        lines.append(
            f"{row.provider:22s} {over:>11s} {row.p50_us:10.1f} {row.extra_mib:10.2f} {launched:>8}"
        )
    return "\n".join(lines)


def loss_list(rows: list[MultiRow]) -> str:
    """Every case where fused is slower than another provider beyond the A/A noise."""
    groups: dict[tuple, dict[str, MultiRow]] = {}
    for row in rows:
        case = (row.mode, row.M, row.K, row.N, row.r, row.adapters, row.popularity, row.order)
        groups.setdefault(case, {})[row.provider] = row
    lines = []
    for case, group in groups.items():
        fused = group[FUSED]
        for name in (LOOP, MASKED):
            other = group[name]
            if fused.p50_us is None or other.p50_us is None:
                continue
            ratio = fused.p50_us / other.p50_us - 1
            if ratio > (fused.noise or 0.0):
                lines.append(f"  {' '.join(map(str, case))}: {name} is {100 * ratio:.1f} % faster")
    return "\n".join([f"fused is slower than a baseline on {len(lines)} of its rows", *lines])


def run(
    args: argparse.Namespace,
    device: torch.device,
    budget: Budget,
    meta: dict[str, Any],
    progress: Any,
) -> int:
    """Measure all cases, print a table each, write the JSON; 1 if a provider was wrong, else 0."""
    stem = machine.file_stem(device, meta["date"]).replace("latency", "multi", 1)
    path = args.output / f"{stem}.json"
    rows: list[MultiRow] = []
    budget = replace(budget, seconds=budget.seconds / 4)  # many cases, few providers
    for case in cases(args, device.type):
        progress.set_description_str(str(case))
        mine = measure_case(case, device, budget, args.seed)
        rows += mine
        results.save(path, meta, rows)
        progress.write("\n" + case_table(case, mine))
        progress.update()
    progress.close()
    print("\n" + loss_list(rows))
    print(f"\nwritten: {path}")
    return 1 if any(row.ok is False for row in rows) else 0
