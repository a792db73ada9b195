"""`lora_linear`: checks its arguments, applies autocast, flattens leading dimensions, and hands on
to the operators. Everything a user can get wrong is refused here, in words."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_lora import dropout, ops
from fused_lora.autograd import LoRALinearFunction

BACKENDS = ("auto", "triton", "aten")
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """LoRA linear layer: `x W^T + bias + scaling * (D(x) A^T) B^T` (Hu et al. 2022, equation 3).

    Args:
        x: [..., K], K = in_features; fp32, fp16, bf16 or fp64 (fp64 runs on aten).
        weight: [N, K], N = out_features, in x's dtype; usually frozen, differentiable all the same.
        lora_A: [r, K]; lora_B: [N, r]. Any of these dtypes: fp32 adapters on a bf16 base are
            computed in bf16 with fp32 accumulation and get fp32 gradients.
        bias: [N] or None.
        scaling: lora_alpha / r, a float or a 0-dim tensor (a tensor is never read on the host).
        dropout_p: drop probability of the adapter's input, in [0, 1). The base product sees x.
        seed: 0-dim int64 tensor on x's device that fixes the dropout mask; None draws one from
            torch's generator.
        backend: "triton" (the fused kernels; raises where they cannot run), "aten" (three library
            matrix products), "auto" (the faster of the two by the tables of fused_lora.kernels).

    Returns:
        [..., N] in x's dtype; under autocast in the autocast dtype, as nn.Linear returns.

    Raises:
        TypeError: a tensor is of another dtype, dtypes differ, a DTensor is given, scaling is no
            number.
        ValueError: shapes or devices do not fit, dropout_p or backend is out of range.
        RuntimeError: backend="triton" cannot run here; the message says why.
    """
    x, autocast = autocasted(x)
    check_tensors(x, weight, lora_A, lora_B, bias, autocast)
    options = checked_options(x, scaling, dropout_p, seed, backend)
    return run(x, weight, lora_A, lora_B, bias, options)


def run(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    options: tuple,
    adapters: tuple[Tensor, ...] = (),
    unpack: Callable[[Tensor, torch.dtype], Tensor] | None = None,
    block: Tensor | None = None,
) -> Tensor:
    """The operator on checked arguments, recorded for backward where a gradient may be asked for.
    options: what `checked_options` returns; adapters: those of a pack; unpack: (weight, dtype) ->
    W [N, K], of a packed weight; block: see `LoRALinearFunction`."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # [M, K]
    wants_grad = torch.is_grad_enabled() and (
        is_tracked(x)
        or is_tracked(lora_A)
        or is_tracked(lora_B)
        or is_tracked(weight)
        or (bias is not None and is_tracked(bias))
    )
    if not torch.compiler.is_compiling():
        require_seen_through(wants_grad)
    # torch.export calls whatever a Function does a constant: it gets the operator
    if wants_grad and not ops.exporting():
        arguments = (rows, weight, lora_A, lora_B, bias, options, adapters, unpack, block, False)
        y = LoRALinearFunction.apply(*arguments)
    else:
        scaling, scaling_tensor, dropout_p, seed, backend = options
        y = ops.call(
            ops.forward,
            rows,
            weight if unpack is None else unpack(weight, x.dtype),
            lora_A,
            lora_B,
            bias,
            scaling,
            scaling_tensor,
            dropout_p,
            seed,
            adapters,
            backend,
            False,
        )[0]
    if x.dim() == 2:
        return y
    shape = (*x.shape[:-1], lora_B.shape[0])
    # a view that is made without gradients could not be written to with them
    return y.view(shape) if wants_grad else torch.ops.aten._unsafe_view.default(y, shape)


def is_tracked(tensor: Tensor) -> bool:
    """Whether autograd follows it; it passes over what was made in inference mode."""
    return tensor.requires_grad and (torch.compiler.is_compiling() or not tensor.is_inference())


def require_seen_through(recorded: bool) -> None:
    """Raise RuntimeError inside of what cannot look into the layer; recorded: by autograd."""
    if ops.transformed():
        raise RuntimeError(ops.TRANSFORMED)
    if recorded and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record the fused layer: use torch.export, or trace it under "
            "torch.no_grad() if its base is not quantised"
        )


def autocasted(x: Tensor) -> tuple[Tensor, bool]:
    """x in autocast's dtype where one is on, and whether one is."""
    if not isinstance(x, Tensor):
        _check_type(x, "x")
    autocast = ops.autocasts(x)
    if autocast and x.dtype in DTYPES and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, autocast


def check_tensors(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, autocast: bool
) -> None:
    given = ((x, "x"), (weight, "weight"), (lora_A, "lora_A"), (lora_B, "lora_B"))
    check_kinds(given if bias is None else (*given, (bias, "bias")))
    if x.dim() == 0:
        raise ValueError("x has no dimension, expected [..., in_features]: got shape ()")
    if weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            "weight, lora_A and lora_B must be matrices [out, in], [r, in], [out, r]: got "
            f"{_shape(weight)}, {_shape(lora_A)}, {_shape(lora_B)}"
        )
    (N, K), (r, A_columns), (B_rows, B_columns) = weight.shape, lora_A.shape, lora_B.shape
    if x.shape[-1] != K:
        raise ValueError(
            f"x has {x.shape[-1]} features, weight expects in_features {K}: got x {_shape(x)} and "
            f"weight {_shape(weight)}"
        )
    if A_columns != K:
        raise ValueError(
            f"lora_A has in_features {A_columns}, weight expects {K}: got lora_A "
            f"{_shape(lora_A)} and weight {_shape(weight)}"
        )
    if B_rows != N:
        raise ValueError(
            f"lora_B has out_features {B_rows}, weight expects {N}: got lora_B "
            f"{_shape(lora_B)} and weight {_shape(weight)}"
        )
    if B_columns != r:
        raise ValueError(
            f"lora_A has rank {r}, lora_B has rank {B_columns}: got lora_A {_shape(lora_A)} "
            f"and lora_B {_shape(lora_B)}; expected [r, in] and [out, r]"
        )
    if r < 1:
        raise ValueError(f"the rank must be at least 1: got lora_A {_shape(lora_A)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must have shape ({N},), weight's out_features: got {_shape(bias)}")
    if autocast:
        return
    for fixed, name in ((weight, "weight"), (bias, "bias")):
        if fixed is not None and fixed.dtype != x.dtype:
            raise TypeError(
                f"{name} is {fixed.dtype}, x is {x.dtype}, expected one dtype: cast x, or run "
                "under torch.autocast"
            )


_PLAIN = {Tensor, nn.Parameter}


def check_kinds(given: tuple[tuple[Tensor, str], ...]) -> None:
    """Type and dtype of (tensor, name) pairs, and that all are on the device of the first."""
    for tensor, name in given:
        if type(tensor) not in _PLAIN:
            _check_type(tensor, name)
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {tensor.dtype}, expected a floating dtype of 16, 32 or 64 bits: "
                f"cast it, for example {name}.to(torch.bfloat16)"
            )
        if tensor.device != given[0][0].device:
            raise ValueError(
                f"{name} is on {tensor.device}, {given[0][1]} is on {given[0][0].device}: move "
                "them to one device"
            )


def _check_type(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, expected a plain tensor: split the layer with "
            "ColwiseLoRAParallel or RowwiseLoRAParallel of fused_lora.parallel; under FSDP2 "
            "call the sharded block, not the layer; by hand, pass local tensors (to_local()) "
            "and reduce the gradients of the replicated factor"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor, expected a plain one: call the layer on x.values() and "
            "make a nested tensor of the result with the same offsets"
        )


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}: got {backend!r}")


def checked_options(
    x: Tensor, scaling: float | Tensor, dropout_p: float, seed: Tensor | None, backend: str
) -> tuple[float, Tensor | None, float, Tensor | None, str]:
    """What `LoRALinearFunction` takes as its options: scaling as a number and a tensor, dropout_p,
    a seed where there is dropout (drawn unless given), backend. A refused call draws no seed."""
    check_backend(backend)
    if not isinstance(dropout_p, (float, numbers.Real)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1): got {dropout_p!r}")
    dropout_p = float(dropout_p)
    factor, scaling_tensor = 1.0, None
    if isinstance(scaling, Tensor):
        if scaling.dim() != 0:
            raise ValueError(f"scaling must be a number or a 0-dim tensor: got {_shape(scaling)}")
        if scaling.requires_grad:
            raise ValueError("scaling requires grad, which is not supported: pass scaling.detach()")
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        scaling_tensor = scaling.to(x.device, exact)
    elif isinstance(scaling, numbers.Real):
        factor = float(scaling)
    else:
        raise TypeError(f"scaling must be a number or a 0-dim tensor: got {scaling!r}")
    if seed is not None:
        _check_seed(seed, x.device)
    if dropout_p == 0.0:
        return factor, scaling_tensor, dropout_p, None, backend
    if seed is None:
        if backend == "triton" and not torch.compiler.is_compiling():
            ops.require_triton(x)
        seed = dropout.draw_seed(x.device)
    return factor, scaling_tensor, dropout_p, seed, backend


def _check_seed(seed: Tensor, device: torch.device) -> None:
    expected = f"seed must be a 0-dim int64 tensor on {device}"
    if not isinstance(seed, Tensor):
        raise TypeError(f"{expected}: got {seed!r}; make it torch.tensor({seed!r})")
    if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
        raise ValueError(f"{expected}: got {_shape(seed)} {seed.dtype} on {seed.device}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
