"""What a training step keeps and what it needs: bytes saved for backward, and peak memory, of one
layer and of a model, frozen and with LoRA in plain PyTorch, in PEFT and fused, on plain bases and
on those of bitsandbytes.

    python benchmarks/memory.py [--quick]

Writes results/memory-<gpu or cpu>-<date>.json. Fields and units: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import four_bit
import machine
import protocol
import report
import results
import torch
import torch.nn.functional as F
from four_bit import NF4
from providers import Unavailable
from results import PLAIN
from torch import Tensor, nn

from fused_lora import FusedLoRALinear
from fused_lora.quantized import QuantizedLoRALinear

RESULTS = Path(__file__).resolve().parent / "results"
FROZEN, FUSED = "frozen", "fused"
INT8 = "int8"
PROVIDERS = (FROZEN, "eager3", "peft", "peft (fp32 adapters)", FUSED, "fused (fp32 adapters)")


@dataclass(frozen=True)
class Case:
    """`blocks` decoder blocks of this width on M tokens; 0 blocks: one square layer."""

    M: int
    width: int
    blocks: int
    r: int
    dtype: str
    dropout: float
    base: str = PLAIN

    def __str__(self) -> str:
        what = f"{self.blocks} decoder blocks" if self.blocks else "one layer"
        return (
            f"{what}, width {self.width}, {self.M} tokens, r={self.r}, {self.dtype}, "
            f"dropout {self.dropout:g}" + ("" if self.base == PLAIN else f", {self.base} base")
        )


@dataclass(frozen=True)
class Row:
    """One provider on one case, in MiB; None where it did not run or cannot be known."""

    M: int
    width: int
    blocks: int
    r: int
    dtype: str
    dropout: float
    base: str
    provider: str
    saved_mib: float | None = None
    saved_over_frozen_mib: float | None = None
    held_mib: float | None = None
    peak_mib: float | None = None
    peak_over_frozen_mib: float | None = None
    note: str | None = None


class Eager3(nn.Module):
    """The layer as everybody writes it first, around an nn.Linear."""

    def __init__(self, linear: nn.Linear, r: int, dropout: float):
        super().__init__()
        self.linear, self.dropout = linear, dropout
        self.lora_A = nn.Parameter(torch.randn_like(linear.weight[:r]) * 0.02)
        self.lora_B = nn.Parameter(torch.zeros_like(linear.weight[:, :r]))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(F.dropout(x, self.dropout), self.lora_A), self.lora_B)
        return self.linear(x) + 2.0 * update


class DecoderBlock(nn.Module):
    """Attention and a gated MLP, as in the Llama family, without positions: memory is the same."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(2)])
        sizes = {"gate": (width, 3 * width), "up": (width, 3 * width), "down": (3 * width, width)}
        sizes |= {name: (width, width) for name in "qkvo"}
        for name, size in sizes.items():
            setattr(self, name, nn.Linear(*size, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        heads = [f(h).unflatten(-1, (-1, 64)).transpose(-2, -3) for f in (self.q, self.k, self.v)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(attended.transpose(-2, -3).flatten(-2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def build(case: Case, provider: str, device: torch.device) -> nn.Module:
    """The frozen model of the case with the provider's adapters around all its linear layers.

    Raises:
        Unavailable: a library is missing, or the provider knows no such base.
    """
    if case.base != PLAIN and provider == "eager3":
        raise Unavailable("it takes plain weights")
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        if case.blocks:
            parts = [DecoderBlock(case.width) for _ in range(case.blocks)]
        else:
            parts = [nn.Linear(case.width, case.width, bias=False)]
    model = nn.Sequential(*parts).to(dtype).requires_grad_(False)
    if case.base != PLAIN:
        quantise(model, case.base, device)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    adapter_dtype = torch.float32 if "fp32" in provider else dtype
    options = {"r": case.r, "lora_alpha": 2 * case.r, "lora_dropout": case.dropout}
    if provider.startswith("peft"):
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise Unavailable("not installed") from None
        inject_adapter_in_model(LoraConfig(**options, target_modules=linears), model)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    elif provider != FROZEN:
        for name in linears:
            parent, _, child = name.rpartition(".")
            linear = model.get_submodule(name)
            if provider == "eager3":
                layer: nn.Module = Eager3(linear, case.r, case.dropout)
            elif case.base != PLAIN:
                layer = QuantizedLoRALinear(linear, **options, adapter_dtype=adapter_dtype)
            else:
                layer = FusedLoRALinear.from_linear(linear, **options, adapter_dtype=adapter_dtype)
            setattr(model.get_submodule(parent), child, layer)
    return model.train()


def quantise(model: nn.Module, base: str, device: torch.device) -> None:
    """Put a layer of bitsandbytes in the place of every linear layer of `model`, and mark the model
    as transformers does, which is what PEFT looks at."""
    try:
        import bitsandbytes
    except ImportError:
        raise Unavailable("bitsandbytes is not installed") from None
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        if base == NF4:
            layer = four_bit.frozen_linear(linear.weight)
        else:
            size = linear.in_features, linear.out_features
            layer = bitsandbytes.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
            layer.load_state_dict({"weight": linear.weight.cpu()})
            layer = layer.to(device).requires_grad_(False)  # which quantises it
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = base == NF4, base == INT8


def measure(case: Case, provider: str, device: torch.device) -> Row:
    """Run the provider's step a few times, and look at the memory."""
    row = {**vars(case), "provider": provider}
    if "fp32" in provider and case.dtype == "float32":
        return Row(**row, note=f"the same as {provider.split()[0]} in this dtype")
    try:
        model = build(case, provider, device)
    except Unavailable as error:
        return Row(**row, note=str(error))
    x = torch.randn(1, case.M, case.width, device=device, dtype=getattr(torch, case.dtype))
    x.requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> object:
        return torch.autograd.grad(model(x).sum(), leaves)

    step()  # kernels are compiled, library workspaces allocated
    gc.collect()
    return Row(
        **row,
        saved_mib=_mib(saved_bytes(lambda: model(x), [x, *model.parameters()])),
        held_mib=_mib(held_bytes(lambda: model(x), device)),
        peak_mib=_mib(protocol.peak_bytes(step, device)),
    )


def saved_bytes(forward: Callable[[], Tensor], given: list[Tensor]) -> int:
    """Bytes of the storages that a forward saves for its backward, but for those of `given`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # alive, so that no address is used twice
    for tensor in given:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


def held_bytes(forward: Callable[[], Tensor], device: torch.device) -> int | None:
    """What the allocator still counts after a forward, but for the output; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    y = forward()
    return torch.cuda.memory_allocated(device) - before - y.untyped_storage().nbytes()


def over_frozen(rows: list[Row]) -> list[Row]:
    """The rows of one case with their distance from the frozen model."""
    frozen = next(row for row in rows if row.provider == FROZEN)
    compared = []
    for row in rows:
        fields = vars(row).copy()
        for name in ("saved", "peak"):
            mine, base = fields[f"{name}_mib"], vars(frozen)[f"{name}_mib"]
            if mine is not None:
                fields[f"{name}_over_frozen_mib"] = round(mine - base, 3)
        compared.append(Row(**fields))
    return compared


def table(case: Case, rows: list[Row]) -> str:
    names = ("saved", "over frozen", "held (GPU)", "peak", "over frozen")
    lines = [str(case), f"{'MiB':24}" + "".join(f"{name:>14}" for name in names)]
    for row in rows:
        values = (
            row.saved_mib,
            row.saved_over_frozen_mib,
            row.held_mib,
            row.peak_mib,
            row.peak_over_frozen_mib,
        )
        cells = "".join("             -" if v is None else f"{v:14.3f}" for v in values)
        lines.append(f"{row.provider:24}" + (f"  n/a ({row.note})" if row.note else cells))
    return "\n".join(lines)


def cases(device: torch.device, quick: bool) -> list[Case]:
    if device.type == "cuda":
        layer, model = (8192, 4096, 0), (4096, 2048, 4)
        dtypes = ("bfloat16",)
    else:
        layer, model = (1024, 512, 0), (256, 256, 2)
        dtypes = ("float32", "bfloat16")
    dropouts = (0.0, 0.05)
    if quick:
        layer, model = (64, 64, 0), (16, 64, 1)
        dtypes, dropouts = ("bfloat16",), (0.05,)
    plain = [
        Case(*sizes, r=16, dtype=dtype, dropout=dropout)
        for sizes in (layer, model)
        for dtype in dtypes
        for dropout in dropouts
    ]
    quantised = [
        Case(*sizes, r=16, dtype="bfloat16", dropout=dropouts[-1], base=base)
        for sizes in (layer, model)
        for base in (NF4, INT8)
    ]
    return plain + quantised


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    args = parser.parse_args(arguments)
    device = machine.benchmark_device()
    meta = machine.describe(device, "bfloat16" if device.type == "cuda" else "float32")
    meta["command"] = "python benchmarks/memory.py" + (" --quick" if args.quick else "")
    path = args.output / f"{machine.file_stem(device, meta['date'], 'memory')}.json"
    print(report.header(meta), flush=True)
    rows: list[Row] = []
    for case in cases(device, args.quick):
        measured = over_frozen([measure(case, provider, device) for provider in PROVIDERS])
        rows += measured
        results.save(path, meta, rows)
        print("\n" + table(case, measured), flush=True)
    print(f"\nwritten: {path}")
    return 0


def _mib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 3)


if __name__ == "__main__":
    sys.exit(main())
