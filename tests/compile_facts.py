"""Compile every shipped configuration ahead of time, without a GPU, and print facts as JSON.

    python tests/compile_facts.py sm_90 gfx942 ragged-sm_90 ... > facts.json

"ragged-" before a target compiles `ragged_launches.py` for it, to look for miscompilation alone.
The launchers themselves are called, on meta tensors of real sizes, with the launch replaced by a
compilation: what is compiled is what would run. Run as a program of its own, because kernels
imported under TRITON_INTERPRET=1 cannot be compiled. `tests/test_static.py` judges the facts.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import ragged_launches
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from undefined import undefined_registers

from fused_lora.kernels import (
    config,
    decode,
    matmul,
    matmul_descriptor,
    matmul_hopper,
    rank_grad,
    shrink,
    shrink_dropout,
)
from fused_lora.kernels.launch import options_of
from fused_lora.scale import Adapters

M, K, N = 8192, 4096, 4096
HOPPERS = ("matmul_hopper", "matmul_beside")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_launch(target, kernel, tiles, given, pdl):
    """The compiled kernel that `launch` would run on `target` for these arguments."""
    signature, constants, attributes = {}, {}, {}
    unspecialized = set(kernel.do_not_specialize)
    assert set(given) == set(kernel.arg_names)
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, tuple):
            base, block, *layout = value
            dtype = POINTER[base.dtype][1:]
            signature[name] = f"tensordesc<{dtype}[{', '.join(map(str, block))}]"
            signature[name] += f",{layout[0]!r}>" if layout else ">"
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in unspecialized:
            signature[name], constants[(index,)] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialized:
                attributes[(index,)] = [["tt.divisibility", 16]]
    ast_source = GluonASTSource if kernel.is_gluon() else ASTSource
    source = ast_source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options_of(tiles, pdl))


def launches(target: str, bits: int):
    """Call the launcher of every configuration of a target and dtype, yielding the case's name."""
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    table = config.defaults()[target][str(bits)]
    x, dy = tensor(M, K, dtype=dtype), tensor(M, N, dtype=dtype)
    weight, bias = tensor(N, K, dtype=dtype), tensor(N, dtype=dtype)
    scaling, seed = tensor(dtype=torch.float32), tensor(dtype=torch.int64)
    bits_x = tensor(M, K // 8, dtype=torch.uint8)
    counters = tensor(4096, dtype=torch.int32)
    partial = tensor(1 << 22, dtype=torch.float32)

    def factors(r, adapter=dtype):
        """lora_A, lora_B and S of rank r."""
        A, B = tensor(r, K, dtype=adapter), tensor(N, r, dtype=adapter)
        return A, B, tensor(M, -(-r // 16) * 16, dtype=dtype)

    def pack(r, tokens=M):
        """What is told of 64 adapters of total rank r."""
        i32 = {"dtype": torch.int32}
        return Adapters(
            tensor(tokens, **i32), tensor(r, **i32), tensor(r, dtype=torch.float32),
            tensor(64, 2, **i32),
        )  # fmt: skip

    for r in (16, config.MAX_BESIDE_RANK):
        A, B, S = factors(r)
        for tiles in table.get("shrink_beside", []):
            shrink.shrink(x, A, S, tiles, 128, trigger=True)
            yield f"shrink_beside r={r} forward"
    for r in (16, 128):
        A, B, S = factors(r)
        for tiles in table.get("shrink_dropout", []):
            dropped = {"seed": seed, "threshold": 3277, "mask": bits_x, "trigger": True}
            shrink_dropout.shrink_dropout(x, A, S, tiles, 256, **dropped)
            yield f"shrink_dropout r={r} forward"
    for index, tiles in enumerate(table["shrink"]):
        for r in (16, 128):
            A, B, S = factors(r)
            shrink.shrink(x, A, S, tiles, 132)
            yield f"shrink[{index}] r={r} forward"
        A, B, S = factors(64)
        shrink.shrink(dy, B.t(), S, tiles, 132, counters=counters)
        yield f"shrink[{index}] r=64 backward"
        A, B, S = factors(8, torch.float32)
        shrink.shrink(
            x,
            A,
            S,
            tiles,
            132,
            scaling=scaling,
            seed=seed,
            threshold=3277,
            mask=bits_x,
            source=B,
            packed=tensor(N, 16, dtype=dtype),
            trigger=bool(table.get("matmul_descriptor")),
        )
        yield f"shrink[{index}] r=8 dropout, fp32 adapters packed"
        A, B, S = factors(128)
        shrink.shrink(x, A, S, tiles, 132, adapters=pack(128))
        yield f"shrink[{index}] r=128 forward, many adapters"
        A, B, S = factors(1024)
        shrink.shrink(
            *(x, A, S, tiles, 132),
            seed=seed,
            threshold=3277,
            mask=bits_x,
            adapters=pack(1024),
        )
        yield f"shrink[{index}] r=1024 dropout, many adapters"
    for index, tiles in enumerate(table["matmul"]):
        A, B, S = factors(128)
        matmul.matmul(x, weight.t(), dy, tiles, b=B.t(), S=S, bias=bias)
        yield f"matmul[{index}] r=128 forward"
        A, B, S = factors(16)
        matmul.matmul(dy, weight, x, tiles, b=A, S=S)
        yield f"matmul[{index}] r=16 dX"
        matmul.matmul(dy, weight, x, tiles, b=A, S=S, mask=bits_x)
        yield f"matmul[{index}] r=16 dX dropout"
        A, B, S = factors(1024)
        matmul.matmul(x, weight.t(), dy, tiles, b=B.t(), S=S, bias=bias, adapters=pack(1024))
        yield f"matmul[{index}] r=1024 forward, many adapters"
        matmul.matmul(dy, weight, x, tiles, b=A, S=S, mask=bits_x, adapters=pack(1024))
        yield f"matmul[{index}] r=1024 dX dropout, many adapters"
    singles = [("matmul_single", tiles) for tiles in table["matmul_single"]]
    singles += [("matmul_few", tiles) for tiles in table.get("matmul_few", [])]
    for index, (name, tiles) in enumerate(singles):
        A, B, S = factors(config.MAX_SINGLE_RANK)
        matmul.matmul(x, weight.t(), dy, tiles, a=A, b=B.t(), S=S, bias=bias, single=True)
        yield f"{name}[{index}] r=64 forward"
        matmul.matmul(dy, weight, x, tiles, a=B.t(), b=A, S=S, single=True)
        yield f"{name}[{index}] r=64 dX"
        many = {"single": True, "adapters": pack(config.MAX_SINGLE_RANK)}
        matmul.matmul(x, weight.t(), dy, tiles, a=A, b=B.t(), S=S, bias=bias, **many)
        yield f"{name}[{index}] r=64 forward, many adapters"
    for index, tiles in enumerate(table.get("matmul_descriptor", [])):
        name, run = f"matmul_descriptor[{index}]", matmul_descriptor.descriptor_matmul
        for r, pdl in ((128, True), (16, False)):
            A, B, S = factors(r)
            run(x, weight.t(), dy, tiles, 132, b=B.t(), S=S, bias=bias, pdl=pdl)
            yield f"{name} r={r} forward pdl={pdl}"
            run(dy, weight, x, tiles, 132, b=A, S=S, pdl=pdl)
            yield f"{name} r={r} dX pdl={pdl}"
        run(x, weight.t(), dy, tiles, 132, bias=bias)
        yield f"{name} plain forward"
        A, B, S = factors(1024)
        for pdl in (True, False):
            many = {"adapters": pack(1024), "pdl": pdl}
            run(x, weight.t(), dy, tiles, 132, b=B.t(), S=S, bias=bias, **many)
            yield f"{name} r=1024 forward pdl={pdl}, many adapters"
            run(dy, weight, x, tiles, 132, b=A, S=S, **many)
            yield f"{name} r=1024 dX pdl={pdl}, many adapters"
    hoppers = [(op, i, t) for op in HOPPERS for i, t in enumerate(table.get(op, []))]
    for op, index, tiles in hoppers:
        name, run = f"{op}[{index}]", matmul_hopper.hopper_matmul
        for r in (16, 128):
            A, B, S = factors(r)
            run(x, weight.t(), dy, tiles, 132, b=B.t(), S=S, bias=bias, pdl=True)
            yield f"{name} r={r} forward"
            run(dy, weight, x, tiles, 132, b=A, S=S, pdl=True)
            yield f"{name} r={r} dX"
        run(x, weight.t(), dy, tiles, 132)
        yield f"{name} plain forward"
        A, B, S = factors(config.MAX_MASKED_RANK)
        run(dy, weight, x, tiles, 132, b=A, S=S, mask=bits_x, pdl=True)
        yield f"{name} r=64 dX dropout"
    grads = table["rank_grad"] + table.get("rank_grad_masked", [])
    for index, tiles in enumerate(grads):
        variants = {
            f"r={r}{' dropout' if mask is not None else ''}": (r, {"mask": mask})
            for mask in (None, bits_x)
            for r in (16, 128)
        }
        for mask, name in ((None, ""), (bits_x, " dropout")):
            variants[f"r=128{name}, many adapters"] = 128, {"mask": mask, "adapters": pack(128)}
        if table.get("matmul_descriptor"):
            variants |= {f"r={r} behind dX": (r, {"behind": True}) for r in (16, 128)}
        for name, (r, options) in variants.items():
            A, B, S = factors(r)
            rank_grad.rank_grad(
                tiles,
                4,
                M,
                r,
                x=x,
                dS=S,
                dA=A,
                dY=dy,
                S=S,
                dB=B,
                partial=partial,
                counters=counters,
                **options,
            )
            yield f"rank_grad[{index}] {name}"
    decodes = dict(enumerate(table["decode"]))
    if table.get("matmul_hopper"):  # no default, but the tuner's to try
        decodes["left"] = replace(decodes[0], SPLITS=2, TOKENS_LEFT=True)
    for index, tiles in decodes.items():
        most = config.MAX_DECODE[bits]
        for tokens, r, many in (
            (*most, None),
            (*most, pack(most[1], most[0])),
            (1, 16, None),
        )[: 2 if index else 3]:
            A, B, _ = factors(r)
            few, out = tensor(tokens, K, dtype=dtype), tensor(tokens, N, dtype=dtype)
            decode.decode(
                few,
                weight.t(),
                A,
                B.t(),
                out,
                tiles,
                bias=bias,
                S=tensor(tokens, r, dtype=dtype),
                partial=partial,
                partial_s=partial,
                counters=counters,
                adapters=many,
            )
            yield f"decode[{index}] M={tokens} r={r}{'' if many is None else ', many adapters'}"


def listing(kernel) -> str:
    """The SASS of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        return _output(BINARIES / "nvdisasm", "-c", cubin.name)


def cuda_facts(kernel, capability: int) -> dict:
    sass = listing(kernel)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = _output(BINARIES / "cuobjdump", "--dump-resource-usage", cubin)
        log = ""
        if capability == 90 and "HGMMA" in sass:  # ptxas tells of serialized wgmma by a warning
            newest = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
            assembler = BINARIES / ("ptxas-blackwell" if newest else "ptxas")
            log = _output(assembler, "-v", "--gpu-name=sm_90a", ptx, "-o", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    operations = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", sass, re.M))
    widths = sorted(set(re.findall(r"HGMMA\.(\d+x\d+x\d+)", sass)))
    order = re.findall(r"\b(HGMMA|ACQBULK)\b", sass)
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": operations["STL"] + operations["LDL"],
        "hgmma": operations["HGMMA"],
        "hgmma_widths": widths,
        "hmma": operations["HMMA"],
        "tcgen05": sum(v for k, v in operations.items() if k.startswith("UTC")),
        "tma_loads": operations["UTMALDG"],
        "async_copies": operations["LDGSTS"],
        "waits": [order[: i + 1].count("HGMMA") for i, o in enumerate(order) if o == "ACQBULK"],
        "serialized": sorted(set(re.findall(r"\(C75\d+\)[^\n]*", log))),
        "undefined_registers": undefined_registers(sass),
    }


def hip_facts(kernel) -> dict:
    text = kernel.asm["amdgcn"]
    return {
        "spills": sum(map(int, re.findall(r"[sv]gpr_spill_count:\s+(\d+)", text))),
        "stack": max(
            map(int, re.findall(r"private_segment_fixed_size:?\s+(\d+)", text)), default=0
        ),
        "mfma": len(re.findall(r"v_mfma", text)),
    }


def _output(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def chained_products(kernel) -> int:
    """The products that start from what was summed before and not from zero."""
    text = kernel.asm["ttgir"]
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", text))
    return sum(start not in zeros for start in re.findall(r"tt\.dot %\S+, %\S+, (%\w+)", text))


def facts_of(target: str, only: str = "") -> dict:
    """{case: facts} for one target; `only` filters the cases by a regular expression."""
    facts: dict[str, dict] = {}
    part = target.removeprefix("ragged-")
    ragged = part != target
    gpu = (
        GPUTarget("hip", part, 64)
        if part.startswith("gfx")
        else GPUTarget("cuda", int(part[3:]), 32)
    )
    pending: list = []
    portable = (shrink, matmul, matmul_descriptor, rank_grad, decode)
    for module in (*portable, matmul_hopper, shrink_dropout):
        module.launch = lambda kernel, grid, config, *, pdl=False, **given: pending.append(
            (kernel, config, given, pdl)
        )
    shipped = (f"{bits}-bit {name}" for bits in (16, 32) for name in launches(part, bits))
    for name in ragged_launches.launches(part) if ragged else shipped:
        arguments = pending.pop()
        case = f"{target} {name}"
        if not re.search(only, case):
            continue
        try:
            compiled = compile_launch(gpu, *arguments)
        except Exception as error:  # reported as a fact: the test shows which case it is
            facts[case] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
            continue
        if ragged:
            facts[case] = {"undefined_registers": undefined_registers(listing(compiled))}
            continue
        facts[case] = {"shared": compiled.metadata.shared, "config": vars(arguments[1])}
        facts[case]["chained_products"] = chained_products(compiled)
        if gpu.backend == "hip":
            facts[case] |= hip_facts(compiled)
        else:
            facts[case] |= cuda_facts(compiled, gpu.arch)
    return facts


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", (
        "kernels must be importable for compiling"
    )
    pattern = os.environ.get("FACTS_ONLY", "")
    result = {"triton": triton.__version__, "facts": {}}
    for name in sys.argv[1:]:
        result["facts"] |= facts_of(name, pattern)
    json.dump(result, sys.stdout, indent=1)
