"""Tensor parallelism: styles for torch's `parallelize_module` that split a FusedLoRALinear over a
mesh; every rank runs the fused kernels on its own shards."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from fused_lora import dropout
from fused_lora.linear import FusedLoRALinear


class _LoRAParallel(ParallelStyle):
    """What both styles share: they swap the parameters for DTensors and the class of the layer for
    one that computes locally. The names of the arguments are those of torch's own styles."""

    split_inputs: ClassVar[bool]
    placements: ClassVar[dict[str, Placement]]
    default_layouts: ClassVar[tuple[Placement, Placement]]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or self.default_layouts[0]
        self.output_layouts = output_layouts or self.default_layouts[1]
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not FusedLoRALinear:
            raise TypeError(
                f"{type(self).__name__} splits a FusedLoRALinear: got {type(module).__name__}; "
                "for an nn.Linear take torch's own style"
            )
        if module.merged:
            raise RuntimeError("the layer is merged: call unmerge() before splitting it")
        for name, parameter in list(module.named_parameters()):
            placements = [self.placements[name]]
            split = distribute_tensor(
                parameter, device_mesh, placements, src_data_rank=self.src_data_rank
            )
            setattr(module, name, nn.Parameter(split, parameter.requires_grad))
        module.__class__ = _ParallelLoRALinear
        module._style, module._rank = self, device_mesh.get_local_rank()  # type: ignore[assignment]
        return module


class ColwiseLoRAParallel(_LoRAParallel):
    """Split the outputs: weight, bias and lora_B by rows; lora_A is on every rank.

    The input is replicated and the output sharded in its last dimension, unless `input_layouts`
    (Shard(1) for sequence parallelism) and `output_layouts` say otherwise, as with torch's
    ColwiseParallel. Over the base's own collectives, backward has one: the all-reduce of lora_A's
    gradient [r, in]. With dropout every rank uses the first rank's seed, since all see one input.

    Raises TypeError for a module that is not a FusedLoRALinear, RuntimeError for a merged one.
    """

    split_inputs = False
    placements: ClassVar = {
        "weight": Shard(0),
        "bias": Shard(0),
        "lora_A": Replicate(),
        "lora_B": Shard(0),
    }
    default_layouts = (Replicate(), Shard(-1))


class RowwiseLoRAParallel(_LoRAParallel):
    """Split the inputs: weight and lora_A by columns; bias and lora_B are on every rank.

    The input is sharded in its last dimension and the output replicated, unless `input_layouts` and
    `output_layouts` (Shard(1) for sequence parallelism) say otherwise, as with torch's
    RowwiseParallel. The adapter's share of the output is reduced with the base's; backward has one
    collective over the base's own, the all-reduce of lora_B's gradient [out, r]. With dropout every
    rank draws a mask of its own for its columns.

    Raises TypeError for a module that is not a FusedLoRALinear, RuntimeError for a merged one.
    """

    split_inputs = True
    placements: ClassVar = {
        "weight": Shard(1),
        "bias": Replicate(),
        "lora_A": Shard(1),
        "lora_B": Replicate(),
    }
    default_layouts = (Shard(-1), Replicate())


class _ParallelLoRALinear(FusedLoRALinear):
    """A FusedLoRALinear on one rank of a mesh: its sizes are global, its parameters DTensors."""

    _style: _LoRAParallel
    _rank: int

    def forward(self, x: Tensor) -> Tensor:
        style, mesh = self._style, self.weight.device_mesh  # type: ignore[attr-defined]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [style.input_layouts], run_check=False)
        wanted = Shard(x.dim() - 1) if style.split_inputs else Replicate()
        if x.placements != (wanted,):
            x = x.redistribute(placements=[wanted])
        # each rank has a partial sum of the gradient of a replicated input
        x = x.to_local(grad_placements=None if style.split_inputs else [Partial()])

        weight, lora_A, lora_B = (_local(p) for p in (self.weight, self.lora_A, self.lora_B))
        bias = None if self.bias is None else _local(self.bias)
        if bias is not None and style.split_inputs and self._rank > 0:
            # the first rank adds it; the others must still take part in reducing its gradient
            bias = F.pad(bias[:0], (0, self.out_features)) if bias.requires_grad else None
        y = self._forward(x, weight, lora_A, lora_B, bias, self._seed(x, mesh))

        whole = torch.empty((*x.shape[:-1], self.out_features), device="meta")
        placement = Partial() if style.split_inputs else Shard(y.dim() - 1)
        y = DTensor.from_local(
            y, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        y = y.redistribute(placements=[style.output_layouts])
        return y.to_local() if style.use_local_output else y

    def _seed(self, x: Tensor, mesh: DeviceMesh) -> Tensor | None:
        """One mask for a replicated input, another one for every rank's columns of a split one:
        whatever the ranks' generators are seeded with."""
        if not self.training or self.lora_dropout == 0.0:
            return None
        seed = dropout.draw_seed(x.device)
        if self._style.split_inputs:
            return seed + self._rank
        # the sum of the first rank's and zeros: a broadcast that torch.compile can trace
        first = seed if self._rank == 0 else torch.zeros_like(seed)
        shared = DTensor.from_local(first, mesh, [Partial()], run_check=False)
        return shared.redistribute(placements=[Replicate()]).to_local()


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a DTensor. Where that is all of it, the ranks' gradients are the terms of
    one sum, which one all-reduce makes."""
    assert isinstance(parameter, DTensor)
    if not (parameter.requires_grad and torch.is_grad_enabled()):
        return parameter.to_local()
    if not parameter.placements[0].is_replicate():
        compiling = torch.compiler.is_compiling()
        return parameter.to_local() if compiling else _Part.apply(parameter)
    return parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


class _Part(torch.autograd.Function):
    """`parameter.to_local()` of a shard. Where the mesh does not divide a size, torch 2.11 would
    give the gradient other strides than the parameter has, and gather it for that."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        ctx.geometry = {"shape": parameter.shape, "stride": parameter.stride()}
        local = parameter.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:  # type: ignore[override]
        return DTensor.from_local(grad, ctx.mesh, ctx.placements, run_check=False, **ctx.geometry)
