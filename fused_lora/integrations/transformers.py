"""`FusedLoRACallback`: transformers' Trainer, and TRL's trainers, with the fused kernels."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback

from fused_lora.integrations import peft

__all__ = ["FusedLoRACallback"]


class FusedLoRACallback(TrainerCallback):
    """Patches the model's PEFT layers when training begins and prints what it did, once.

        trainer = Trainer(model, args, callbacks=[FusedLoRACallback()])

    The model stays patched afterwards (`peft.unpatch` gives PEFT's classes back). When training
    ends without one fused call, a UserWarning says so, with the reasons (calls inside of a
    torch.compile graph are not counted, and not missed). `backend` and `compute_dtype` as in
    `fused_lora.integrations.peft.patch`; `report` is what that returned.

    Raises ValueError at train begin if the model holds no PEFT LoRA layer.
    """

    def __init__(self, *, backend: str = "auto", compute_dtype: peft.ComputeDtype = "base") -> None:
        peft.check_options(backend, compute_dtype)
        self.backend = backend
        self.compute_dtype: peft.ComputeDtype = compute_dtype
        self.report: peft.PatchReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = self.report is None
        self.report = peft.patch(
            kwargs["model"], backend=self.backend, compute_dtype=self.compute_dtype
        )
        if first and state.is_world_process_zero:
            print(self.report)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        counts = peft.call_counts(model)
        if not any(counts.values()) and _is_compiled(model, args):
            return
        if not counts[peft.FULL] and not counts[peft.DELTA] and state.global_step > 0:
            warnings.warn(
                f"no call of {counts[peft.PEFT]} ran fused:\n{peft.explain(model)}", stacklevel=2
            )


def _is_compiled(model: Any, args: Any) -> bool:
    return getattr(args, "torch_compile", False) or any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in model.modules()
    )
