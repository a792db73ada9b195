"""What other libraries put around a model: how to look inside, and whose Parameters they hold."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

from torch import Tensor, nn

# what torch.compile, activation checkpointing and FullyShardedDataParallel put into a path
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


def require_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def clean_path(path: str) -> str:
    """A path without what wrappers add to it."""
    return _WRAPPERS.sub("", path).lstrip(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what data parallelism and torch.compile put around it."""
    require_module(model)
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner: nn.Module | None = model.module
        else:
            inner = model._modules.get("_orig_mod") or model._modules.get("_fsdp_wrapped_module")
        if inner is None:
            return model
        model = inner


def below_ddp(model: nn.Module) -> set[nn.Module]:
    """The modules whose Parameters a DistributedDataParallel in `model` has taken stock of."""
    require_module(model)
    ddp = nn.parallel.DistributedDataParallel
    wrappers = [module for module in model.modules() if isinstance(module, ddp)]
    return {module for wrapper in wrappers for module in wrapper.modules()}


def manager_of(module: nn.Module, tensor: Tensor | None) -> str | None:
    """Who exchanges the module's Parameters, this one among them, for shards and back; None if
    nobody does."""
    if getattr(module, "_is_fsdp_managed_module", False):  # torch's own mark
        return "FSDP"  # either of the two
    return "DeepSpeed ZeRO-3" if hasattr(tensor, "ds_id") else None


def sharded_now(model: nn.Module) -> set[int]:
    """ids of the Parameters that hold a shard, as FSDP1 leaves them outside of its forward and of
    summon_full_params: they look like any others."""
    require_module(model)
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return set()
    units = [m for m in model.modules() if isinstance(m, fsdp.FullyShardedDataParallel)]
    handles = [unit._handle for unit in units if unit._handle is not None]
    apart = [h.flat_param for h in handles if h._training_state.name != "SUMMON_FULL_PARAMS"]
    return {id(parameter) for flat in apart for parameter in flat._params or ()}


def warn(message: str) -> None:
    """A warning that names the first line outside of this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(__package__):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
