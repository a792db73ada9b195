"""Batches of several adapters for the tests: who asks for what in which order, the layer over a
pack next to the specification, and the acceptance rule over every adapter's gradients."""

from dataclasses import dataclass, replace

import torch

from fused_lora import AdapterPack, multi_lora_linear, reference
from fused_lora.testing import check, make_case

POPULARITIES = ("identical", "uniform", "zipf", "distinct", "none", "one token")
ORDERS = ("grouped", "shuffled")


def make_ids(popularity, order, M, adapters, seed=0):
    """int32 [M]. Whatever the popularity, but for none, some token has the last adapter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((M,), adapters - 1)
    if popularity == "uniform":  # base tokens among them
        ids = torch.randint(-1, adapters, (M,), generator=generator)
    elif popularity == "zipf":
        weights = 1.0 / torch.arange(1, adapters + 1)
        ids = torch.multinomial(weights, M, replacement=True, generator=generator)
    elif popularity == "distinct":
        ids = adapters - 1 - torch.arange(M) % adapters
    elif popularity in ("none", "one token"):
        ids.fill_(-1)
    if popularity != "none":
        ids[-1] = adapters - 1
    ids = ids.sort().values if order == "grouped" else ids[torch.randperm(M, generator=generator)]
    return ids.int()


@dataclass(frozen=True)
class Batch:
    """One layer's inputs, its adapters (lora_A, lora_B, scaling) and the adapter of each token."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor
    adapters: tuple
    ids: torch.Tensor

    def without_base(self):
        return replace(self, weight=torch.zeros_like(self.weight))

    def to(self, dtype):
        moved = {name: getattr(self, name).to(dtype) for name in ("x", "weight", "dy")}
        moved["bias"] = None if self.bias is None else self.bias.to(dtype)
        adapters = tuple((A.to(dtype), B.to(dtype), scaling) for A, B, scaling in self.adapters)
        return replace(self, adapters=adapters, **moved)


def make_batch(M, N, K, ranks, dtype, ids, device, *, adapter_dtype=None, bias=True):
    """Edges amplified as `make_case` does it, those of every adapter, scalings all different."""
    case = make_case(M, N, K, 1, dtype, seed=M + K + N, device=device, bias=bias)
    adapters = []
    for index, r in enumerate(ranks):
        own = make_case(1, N, K, r, dtype, seed=index, device=device, adapter_dtype=adapter_dtype)
        adapters.append((own.lora_A, own.lora_B, 1.5 + index / 3))
    return Batch(case.x, case.weight, case.bias, case.dy, tuple(adapters), ids.to(device))


def make_pack(batch, *, spare=0, adapter_dtype=None):
    """The adapters "0", "1", ... in a pack with `spare` ranks of room left."""
    (N, K), room = batch.weight.shape, sum(-(-A.shape[0] // 16) * 16 for A, _, _ in batch.adapters)
    pack = AdapterPack(
        K,
        N,
        total_rank=room + spare,
        device=batch.x.device,
        dtype=adapter_dtype or batch.x.dtype,
    )
    for index, (A, B, scaling) in enumerate(batch.adapters):
        assert pack.add(str(index), A, B, scaling=scaling) == index
    return pack


def fused(batch, pack=None, layer=multi_lora_linear, **options):
    """{"y", "dx", "dA 0", "dB 0", ..., "dbias"} of the layer over a pack."""
    pack = make_pack(batch) if pack is None else pack
    leaves = [batch.x.detach().requires_grad_(), pack.lora_A, pack.lora_B]
    bias = None if batch.bias is None else batch.bias.detach().requires_grad_()
    leaves += [] if bias is None else [bias]
    y = layer(leaves[0], batch.weight, pack, batch.ids, bias, **options)
    dx, dA, dB, *dbias = torch.autograd.grad(y, leaves, batch.dy)
    found = {"y": y.detach(), "dx": dx, **({"dbias": dbias[0]} if dbias else {})}
    for name in pack.names:
        columns = pack.columns(name)
        found |= {f"dA {name}": dA[columns], f"dB {name}": dB[:, columns]}
    if dA.isfinite().all():  # padding and free columns
        nobodys = pack.owner < 0
        assert torch.all(dA[nobodys] == 0) and torch.all(dB[:, nobodys] == 0)
    return found


def specified(batch, **options):
    """The same by the specification, in the batch's dtype."""
    x, bias = batch.x.detach().requires_grad_(), batch.bias
    bias = None if bias is None else bias.detach().requires_grad_()
    adapters = [
        (A.to(x.dtype).detach().requires_grad_(), B.to(x.dtype).detach().requires_grad_(), s)
        for A, B, s in batch.adapters
    ]
    y = reference.multi_lora_linear(x, batch.weight, adapters, batch.ids, bias, **options)
    factors = [t for A, B, _ in adapters for t in (A, B)]
    leaves = [x, *factors, *([] if bias is None else [bias])]
    grads = torch.autograd.grad(y, leaves, batch.dy, allow_unused=True)
    names = ["dx"] + [f"d{f} {i}" for i in range(len(adapters)) for f in "AB"] + ["dbias"]
    return {"y": y.detach(), **dict(zip(names, grads, strict=False))}


def violations(batch, pack=None, floor=True, layer=multi_lora_linear, *, backend, **options):
    """What the rule finds, with the base weight and without."""
    found = []
    for label, inputs in (("", batch), ("W = 0: ", batch.without_base())):
        ours = fused(inputs, pack, layer, backend=backend, **options)
        eager = specified(inputs, **options)
        exact = specified(inputs.to(torch.float64), **options)
        found += [label + v for v in check(ours, eager, exact, batch.x.dtype, floor)]
    return found
