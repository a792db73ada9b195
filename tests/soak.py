"""A fine-tune, step by step, with what a leak or a drift would show in: what test_soak compares
between fused and plain LoRA. Everything but the adapted layers is the same code."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fused_lora import FusedLoRALinear, reference

KINDS = ("fused", "plain", "plain, other rounding")


class PlainLoRALinear(nn.Module):
    """The specification on the parameters of a fused layer; the masks are those it would draw.
    `folded` applies the scaling to lora_A first: the same function, rounded otherwise."""

    def __init__(self, layer: FusedLoRALinear, folded: bool):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scaling, self.dropout, self.folded = layer.scaling, layer.lora_dropout, folded

    def forward(self, x: Tensor) -> Tensor:
        lora_A = self.lora_A * self.scaling if self.folded else self.lora_A
        return reference.lora_linear(
            *(x, self.weight, lora_A, self.lora_B, self.bias),
            scaling=1.0 if self.folded else self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )


def adapt(model: nn.Module, kind: str, targets: tuple[str, ...], **options) -> nn.Module:
    """Freeze the model and put an adapter around every linear layer whose name ends in a target."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(targets):
            layer = FusedLoRALinear.from_linear(module, **options)
            if kind != "fused":
                layer = PlainLoRALinear(layer, folded=kind != "plain").train(layer.training)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    return model


@dataclass
class History:
    """The loss of every step; bytes of all live tensors, and of the process, after some of them."""

    losses: list[float] = field(default_factory=list)
    live: list[int] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, object], Tensor],
    batches: Sequence,
    lr: float,
    every: int,
) -> History:
    """AdamW with clipped gradients, one step in five accumulated; memory is read every `every`."""
    history = History()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for step, batch in enumerate(batches, start=1):
        loss = loss_of(model, batch)
        loss.backward()
        if step % 5 != 3:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        history.losses.append(loss.item())
        del loss
        if step % every == 0:
            gc.collect()
            history.live.append(live_bytes(parameters[0].device))
            history.resident.append(resident_bytes())
    return history


def live_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    # (fake tensors and a transform's, which a compiler may have left behind, hold nothing)
    tensors = [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), Tensor)
        and not issubclass(type(thing), FakeTensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(thing)
    ]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def resident_bytes() -> int:
    """0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0
