"""Who is compared: each provider computes one LoRA layer its own way.

A provider says how to build its forward on a set of inputs, and nothing about time; checks.py
holds what it computes to the acceptance rule before protocol.py times it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import four_bit
import results
import torch
import torch.nn.functional as F
from results import Case
from torch import Tensor, nn
from torch._inductor import select_algorithm

from fused_lora import FusedLoRALinear, QuantizedLoRALinear, explain
from fused_lora.layer import LoRALayer
from fused_lora.testing import Case as Inputs

SCALING = 2.0  # lora_alpha = 2 r
B_STD = 0.02


@dataclass(frozen=True)
class Layer:
    """A provider built on one input set: its forward, and the tensors that want a gradient."""

    forward: Callable[[], Tensor]  # -> [M, N]
    leaves: dict[str, Tensor]  # gradient name ("dx", "dA", "dB") -> leaf

    def call(self, mode: str, dy: Tensor) -> Callable[[], object]:
        """The callable that is timed; fwd is to be called without, fwd+bwd with gradients."""
        if mode == "fwd":
            return self.forward
        forward, leaves = self.forward, tuple(self.leaves.values())

        def step() -> tuple[Tensor, ...]:
            y = forward()
            return y, *torch.autograd.grad(y, leaves, dy)

        return step


class Unavailable(Exception):
    """The provider cannot run here; the message is the reason the table prints."""


class Provider:
    """Base class. `rule` says what the provider is held to (checks.py)."""

    name: str
    rule = "eager"

    def build(self, inputs: Inputs) -> Layer:
        """The layer on these inputs, sharing their storage.

        Raises:
            Unavailable: a library or a device is missing.
        """
        raise NotImplementedError

    def excuse(self, error: Exception) -> str | None:
        """Why an exception means that the provider cannot run here, None if it means a mistake."""
        return str(error) if isinstance(error, Unavailable) else None


class Base(Provider):
    """The frozen layer alone."""

    name = results.BASE
    rule = "base"

    def build(self, inputs: Inputs) -> Layer:
        x = leaf(inputs.x)
        return Layer(lambda: F.linear(x, inputs.weight), {"dx": x})


class FourBitBase(Base):
    """bitsandbytes' 4-bit layer alone."""

    def build(self, inputs: Inputs) -> Layer:
        x, layer = leaf(inputs.x), four_bit.frozen_linear(inputs.weight)
        return Layer(lambda: layer(x), {"dx": x})


class Merged(Provider):
    """W + s B A in one weight: the cost every unmerged layer is measured against."""

    rule = "merged"

    def __init__(self, name: str = results.MERGED):
        self.name = name

    def build(self, inputs: Inputs) -> Layer:
        x = leaf(inputs.x)
        delta = inputs.lora_B.float() @ inputs.lora_A.float()  # [N, K]
        weight = (inputs.weight.float() + inputs.scaling * delta).to(inputs.weight.dtype)
        return Layer(lambda: F.linear(x, weight), {"dx": x})


def eager3(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The layer as everybody writes it first: three products and two elementwise passes."""
    return F.linear(x, weight) + scaling * F.linear(F.linear(x, lora_A), lora_B)


def addmm(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The same with scaling and sum inside the last product."""
    return torch.addmm(F.linear(x, weight), F.linear(x, lora_A), lora_B.t(), alpha=scaling)


def addmm_(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The same, the sum in the place of the base's output."""
    return F.linear(x, weight).addmm_(F.linear(x, lora_A), lora_B.t(), alpha=scaling)


class Function(Provider):
    """A function of (x, W, A, B, scaling)."""

    def __init__(self, name: str, function: Callable[..., Tensor]):
        self.name = name
        self.function = function

    def build(self, inputs: Inputs) -> Layer:
        x, lora_A, lora_B = leaf(inputs.x), leaf(inputs.lora_A), leaf(inputs.lora_B)
        function = self.function
        return Layer(
            lambda: function(x, inputs.weight, lora_A, lora_B, inputs.scaling),
            {"dx": x, "dA": lora_A, "dB": lora_B},
        )


class Compiled(Function):
    """eager3 through torch.compile. Make a new one per case, after `torch._dynamo.reset()`: at
    the recompile limit torch.compile runs the function uncompiled, and says so only in a log."""

    def __init__(self, name: str, mode: str):
        select_algorithm.PRINT_AUTOTUNE = False  # its tables would tear the progress bar
        super().__init__(name, torch.compile(eager3, mode=mode, dynamic=False, fullgraph=True))

    def build(self, inputs: Inputs) -> Layer:
        if not inputs.x.is_cuda and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise Unavailable("no C++ compiler")
        return super().build(inputs)

    def excuse(self, error: Exception) -> str | None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return f"compilation failed: {first_line(error)}"
        return super().excuse(error)


class Peft(Provider):
    """PEFT's own layer around an nn.Linear or a 4-bit layer, adapters in the base's dtype or in
    fp32."""

    def __init__(
        self, name: str, adapter_dtype: torch.dtype | None = None, base: str = results.PLAIN
    ):
        self.name = name
        self.adapter_dtype = adapter_dtype
        self.base = base

    def build(self, inputs: Inputs) -> Layer:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise Unavailable("not installed") from None
        if self.adapter_dtype == inputs.weight.dtype:
            raise Unavailable("the same as peft in this dtype")
        rank = inputs.lora_A.shape[0]
        config = LoraConfig(r=rank, lora_alpha=inputs.scaling * rank, target_modules=["0"])
        quantised = self.base == four_bit.NF4
        frozen = (four_bit.frozen_linear if quantised else frozen_linear)(inputs.weight)
        model = nn.Sequential(frozen)
        model.is_loaded_in_4bit = quantised  # where PEFT looks for it
        layer = inject_adapter_in_model(config, model)[0]
        dtype = self.adapter_dtype or inputs.weight.dtype
        layer.lora_A["default"].weight = nn.Parameter(inputs.lora_A.to(dtype))
        layer.lora_B["default"].weight = nn.Parameter(inputs.lora_B.to(dtype))
        return _module_layer(
            layer, inputs, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        )


class Fused(Provider):
    """This library's layer; `explanation` is what `fused_lora.explain` says of it."""

    def __init__(self, name: str, backend: str):
        self.name = name
        self.backend = backend
        self.explanation = ""

    def build(self, inputs: Inputs) -> Layer:
        if self.backend == "triton" and not inputs.x.is_cuda:
            raise Unavailable("needs a CUDA GPU")
        rank = inputs.lora_A.shape[0]
        options = {"r": rank, "lora_alpha": inputs.scaling * rank, "backend": self.backend}
        layer = self.make(inputs, options)
        layer.lora_A, layer.lora_B = nn.Parameter(inputs.lora_A), nn.Parameter(inputs.lora_B)
        self.explanation = "; ".join(map(str.strip, explain(layer, inputs.x).splitlines()[1:]))
        return _module_layer(layer, inputs, layer.lora_A, layer.lora_B)

    def make(self, inputs: Inputs, options: dict[str, Any]) -> LoRALayer:
        return FusedLoRALinear.from_linear(frozen_linear(inputs.weight), **options)


class FusedFourBit(Fused):
    """This library's layer around bitsandbytes' 4-bit one, by the path it takes or by `delta`."""

    def __init__(self, name: str, delta: bool = False):
        super().__init__(name, backend="auto")
        self.delta = delta

    def make(self, inputs: Inputs, options: dict[str, Any]) -> QuantizedLoRALinear:
        kind = _ByDelta if self.delta else QuantizedLoRALinear
        return kind(four_bit.frozen_linear(inputs.weight), **options)


class _ByDelta(QuantizedLoRALinear):
    def path(self, x: Tensor):
        return "delta"


def all_providers(base: str = results.PLAIN) -> list[Provider]:
    """A fresh list of everybody, in the order of the table."""
    torch._dynamo.reset()
    if base == four_bit.NF4:
        return [
            FourBitBase(),
            Merged(),
            Merged(results.MERGED_AGAIN),
            Peft("peft", base=base),
            Peft("peft (fp32 adapters)", torch.float32, base),
            FusedFourBit(results.FUSED),
            FusedFourBit(results.FUSED_DELTA, delta=True),
        ]
    return [
        Base(),
        Merged(),
        Merged(results.MERGED_AGAIN),
        Function("eager3", eager3),
        Function("addmm", addmm),
        Function("addmm_", addmm_),
        Compiled("torch.compile", mode="default"),
        Compiled("torch.compile (max-autotune)", mode="max-autotune-no-cudagraphs"),
        Peft("peft"),
        Peft("peft (fp32 adapters)", torch.float32),
        Fused(results.FUSED, backend="auto"),
        Fused(results.FUSED_TUNED, backend="triton"),
    ]


def everybody(device: torch.device, dtype: str, base: str = results.PLAIN) -> list[str]:
    """The names of those who are compared unless some are asked for: without the kernels on a
    CPU, and without fp32 adapters where that is what `peft` has."""
    absent = {results.FUSED_TUNED} if device.type == "cpu" else set()
    absent |= {"peft (fp32 adapters)"} if dtype == "float32" else set()
    return [provider.name for provider in all_providers(base) if provider.name not in absent]


def random_inputs(case: Case, device: torch.device, generator: torch.Generator) -> Inputs:
    """Unit-variance x and dY, W and A scaled to keep it, B small but never zero: a missing adapter
    would go unseen."""
    dtype = getattr(torch, case.dtype)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        values = torch.randn(rows, columns, device=device, generator=generator)
        return values.mul_(std).to(dtype)

    x, weight = normal(case.M, case.K, 1.0), normal(case.N, case.K, case.K**-0.5)
    return Inputs(
        x=x,
        weight=four_bit.representable(weight) if case.base == four_bit.NF4 else weight,
        lora_A=normal(case.r, case.K, case.K**-0.5),
        lora_B=normal(case.N, case.r, B_STD),
        bias=None,
        dy=normal(case.M, case.N, 1.0),
        scaling=SCALING,
    )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def leaf(tensor: Tensor) -> Tensor:
    """A leaf that wants a gradient, on the same storage."""
    return tensor.detach().requires_grad_()


def frozen_linear(weight: Tensor) -> nn.Linear:
    """An nn.Linear without bias on this very weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _module_layer(module: nn.Module, inputs: Inputs, lora_A: Tensor, lora_B: Tensor) -> Layer:
    x = leaf(inputs.x)
    return Layer(lambda: module(x), {"dx": x, "dA": lora_A, "dB": lora_B})
