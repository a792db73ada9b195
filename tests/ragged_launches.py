"""Launches whose sizes, strides and dtypes narrow every load, for `compile_facts.py`: what Triton
knows of an argument is whether 16 divides it, and code for those that it does not divide is far
from that for the large, round sizes of the shipped configurations."""

import itertools
from dataclasses import replace

import torch

from fused_lora.dropout import packed_columns
from fused_lora.kernels import config, decode, matmul, rank_grad, shrink, shrink_dropout
from fused_lora.scale import padded_rank

M, N, K, RANKS = 33, 50, 70, (8, 3)
BF16, FP32 = torch.bfloat16, torch.float32


def tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(target: str):
    """Call the launchers of the portable kernels in bf16, yielding each case's name."""
    table = config.defaults()[target]["16"]
    x, dy, w = tensor(M, K), tensor(M, N), tensor(N, K)
    mask = tensor(M, packed_columns(K), dtype=torch.uint8)
    drawn = {"seed": tensor(dtype=torch.int64), "threshold": 3277, "mask": mask}
    work = {name: tensor(1 << 20, dtype=FP32) for name in ("partial", "partial_s")}
    work["counters"] = tensor(64, dtype=torch.int32)
    for (r, adapter), transposed in itertools.product(
        zip(RANKS, (BF16, FP32), strict=True), (False, True)
    ):
        name = f"r={r} {adapter} adapters{' transposed' if transposed else ''}"
        A, B = tensor(r, K, dtype=adapter), tensor(N, r, dtype=adapter)
        if transposed:
            A, B = tensor(K, r, dtype=adapter).t(), tensor(r, N, dtype=adapter).t()
        S = tensor(M, padded_rank(r))
        products = {"forward": (x, w.t(), A, B.t(), dy), "dX": (dy, w, B.t(), A, x)}
        for way, (X, W, a, b, y) in products.items():
            for index, tiles in enumerate(table["matmul_single"]):
                matmul.matmul(X, W, y, tiles, a=a, b=b, S=S, single=True)
                yield f"matmul_single[{index}] {way} {name}"
            for index, tiles in enumerate(table["matmul"]):
                matmul.matmul(X, W, y, tiles, b=b, S=S)
                yield f"matmul[{index}] {way} {name}"
            for left in (False, True):
                tiles = replace(table["decode"][-1], TOKENS_LEFT=left)
                decode.decode(X, W, a, b, y, tiles, S=S, **work)
                yield f"decode[-1] {'left ' * left}{way} {name}"
            for index, tiles in enumerate(table["shrink"]):
                shrink.shrink(X, a, S, tiles, 132)
                yield f"shrink[{index}] {way} {name}"
        packing = {"source": B, "packed": tensor(N, padded_rank(r))} if adapter == FP32 else {}
        for index, tiles in enumerate(table["shrink"]):
            shrink.shrink(x, A, S, tiles, 132, **drawn, **packing)
            yield f"shrink[{index}] dropout {name}"
        for index, tiles in enumerate(table.get("shrink_dropout", [])):
            even, A8 = tensor(M, K + 2), tensor(r, K + 2, dtype=adapter)  # whole vectors
            shrink_dropout.shrink_dropout(even, A8, S, tiles, 132, **drawn, **packing)
            yield f"shrink_dropout[{index}] {name}"
        for index, tiles in enumerate(table["rank_grad"] + table.get("rank_grad_masked", [])):
            for dropped in (None, mask):
                rank_grad.rank_grad(tiles, 1, M, r, x=x, dS=S, dA=A, dY=dy, S=S, dB=B, mask=dropped)
                yield f"rank_grad[{index}]{'' if dropped is None else ' dropout'} {name}"
