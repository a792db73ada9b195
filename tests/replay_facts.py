"""What reaches the driver when an operator runs by Triton's own path and when its tape is replayed.

    python tests/replay_facts.py      prints JSON {case: {"replayed": [...], "triton": [...]}}

Runs without a GPU, over the libcuda of benchmarks/host_time.py that notes what it is given. A
process of its own: that library has to be in place before Triton is imported.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

LAUNCHES, WORDS = 16, 64
M, N, K, R = 256, 512, 384, 16
SEVERAL, SHARED_STORAGE = "several adapters", "two inputs share an address"
TWO_TAPES = (SEVERAL, SHARED_STORAGE)
MAPS = "tensor maps made again, by number of layers"
KEPT = "tensors that tapes keep"


class Launch(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32 * length) for name, length in (("setup", 7), ("words", WORDS))
    ]  # setup: function, grid, block, shared memory, launch attributes


def cases():
    """{name: (path, tokens, options)}"""
    named = {path: (path, M, {}) for path in ("hopper", "pdl", "portable", "single")}
    named["decode"] = ("decode", 16, {})
    named["dropout"] = ("hopper", M, {"dropout_p": 0.25})
    named["fp32 adapters, rank 3"] = ("pdl", M, {"r": 3, "adapters_fp32": True})
    named["bias and scaling tensor"] = ("hopper", M, {"bias": True, "scaling": True})
    named["fp32"] = ("auto", M, {"fp32": True})
    named["odd address"] = ("auto", M, {"offset": 1})
    named[SEVERAL] = ("pdl", M, {"r": 32, "several": True})
    named[SHARED_STORAGE] = ("pdl", K, {"shared": True})
    return named


def make_inputs(tokens, *, r=R, fp32=False, adapters_fp32=False, bias=False, scaling=False,
                dropout_p=0.0, offset=0, shared=False, several=False):  # fmt: skip
    import torch

    dtype = torch.float32 if fp32 else torch.bfloat16
    adapters = torch.float32 if adapters_fp32 else dtype
    x = torch.randn(tokens * K + offset, dtype=dtype)[offset:].view(tokens, K)
    given = [
        x,
        x if shared else torch.randn(N, K, dtype=dtype),
        torch.randn(r, K, dtype=adapters),
        torch.randn(K if shared else N, r, dtype=adapters),
        torch.randn(N, dtype=dtype) if bias else None,
        0.5,
        torch.tensor(2.0) if scaling else None,
        dropout_p,
        torch.tensor(7) if dropout_p else None,
        adapters_of(r, tokens) if several else [],
        "triton",
        True,
    ]
    dy = torch.randn(tokens, given[1].shape[0], dtype=dtype)
    return given, dy


def adapters_of(r, tokens):
    """Two adapters of half the rank each, taken in turn."""
    import torch

    ids = torch.arange(tokens, dtype=torch.int32) % 2
    owner = torch.arange(r, dtype=torch.int32) // (r // 2)
    window = torch.tensor([[0, r // 2], [r // 2, r]], dtype=torch.int32)
    return [ids, owner, torch.full((r,), 0.5), window]


class Pool:
    """Hands out the same buffers in the same order to every call."""

    def __init__(self):
        self.buffers, self.next = [], 0

    def __call__(self, first, shape, dtype, zeroed):
        if self.next == len(self.buffers):
            self.buffers.append(first.new_empty(shape, dtype=dtype or first.dtype))
        self.next += 1
        return self.buffers[self.next - 1]


def both(given, dy):
    """One forward and one backward of the operators, and of those of the adapter term alone."""
    from fused_lora import delta, ops

    _, S, *mask = ops.forward(*given)
    x, weight, a, b, _, scale, scaling, p, _, adapters, backend, _ = given
    needs = [True, False, True, True, False]
    kept = mask[0] if mask else None
    ops.backward(dy, x, weight, a, b, S, kept, scale, scaling, p, adapters, needs, backend)
    if not adapters:
        term = (x, a, b, scale, scaling, p, given[8], backend, True)
        S, *_ = delta.delta_(dy.clone(), *term)
        delta.delta_backward(dy, x, a, b, S, kept, scale, scaling, p, [True] * 3, backend)


def facts(stub, path, tokens, options):
    import torch

    from fused_lora.kernels import config, tape

    options = dict(options)
    config.FORCED = path
    launched = ctypes.c_uint.in_dll(stub, "stub_launched")
    noted = (Launch * LAUNCHES).in_dll(stub, "stub_launches")
    parameters = (ctypes.c_uint * LAUNCHES).in_dll(stub, "stub_parameters")

    def run(given, dy, counts):
        pool.next, launched.value = 0, 0
        parameters[:] = counts
        both(given, dy)
        return [
            [*note.setup, *note.words[: counts[i]]]
            for i, note in enumerate(noted[: launched.value])
        ]

    pool = tape._allocate = Pool()
    tape.forget()
    torch.manual_seed(0)
    first, second = make_inputs(tokens, **options), make_inputs(tokens, **options)
    none = [0] * LAUNCHES
    run(*first, none)
    launches = [launch for recorded in tape._tapes.values() for launch in recorded.launches]
    counts = none.copy()
    counts[: len(launches)] = [kernel_parameters(launch) for launch in launches]
    replayed = run(*second, counts)
    tapes = len(tape._tapes)
    tape.forget()
    return {"tapes": tapes, "replayed": replayed, "triton": run(*second, counts)}


def encodings_of_later_rounds(layers):
    """How often tensor maps are made when calls go through layers of one shape again and again."""
    import torch

    from fused_lora import ops
    from fused_lora.kernels import config, tape

    config.FORCED, encoded, encode = "pdl", [], tape.Launch._encode
    tape._allocate = Pool()
    tape.forget()
    given, _ = make_inputs(M)
    weights = [torch.randn(N, K, dtype=torch.bfloat16) for _ in range(layers)]
    tape.Launch._encode = lambda launch, addresses: encoded.append(1) or encode(launch, addresses)
    for turn in range(3):
        if turn == 2:
            encoded.clear()
        for weight in weights:
            tape._allocate.next = 0
            ops.forward(given[0], weight, *given[2:])
    tape.Launch._encode = encode
    return len(encoded)


def tensors_kept():
    """{path: how many tensors the tapes of a forward and a backward keep alive}."""
    import torch

    from fused_lora.kernels import config, tape

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    kept = {}
    for path in ("portable", "portable", "pdl", "hopper", "decode"):  # the first time to warm up
        config.FORCED = path
        tape.forget()
        before = alive()
        both(*make_inputs(16 if path == "decode" else 256))
        kept[path] = alive() - before
        assert tape._tapes
    return kept


def kernel_parameters(launch):
    """How many parameters the kernel itself takes, without scratch memory."""
    kinds = launch.compiled.src.signature.values()
    return sum(5 if kind.startswith("tensordesc") else kind != "constexpr" for kind in kinds)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    import host_time

    with tempfile.TemporaryDirectory() as folder:
        stub = host_time.build_stub(Path(folder))
        host_time.use_stub()
        kept = tensors_kept()
        found = {name: facts(stub, *case) for name, case in cases().items()}
        found[MAPS] = {layers: encodings_of_later_rounds(layers) for layers in (1, 100)}
        found[KEPT] = kept
        print(json.dumps(found))
