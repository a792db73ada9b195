"""The operators `fused_lora::forward` and `fused_lora::backward`: one per direction, opaque to the
compiler, visible to checkpointing policies. Each call goes to one of two backends, which allocate
and compute: `triton_backend` (the fused kernels) or `aten_backend` (library matrix products).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from fused_lora import aten_backend, dropout
from fused_lora.scale import Adapters, Scale, padded_rank

try:
    from fused_lora import triton_backend
except (ImportError, AttributeError) as error:  # no triton here, or not one we know: aten only
    triton_backend = None  # type: ignore[assignment]
    _import_error = str(error)


_given = os.environ.get("FUSED_LORA_CHECK_IDS") or "0"
if _given not in ("0", "1"):
    raise ValueError(f"FUSED_LORA_CHECK_IDS must be 0 or 1: got {_given!r}")
CHECK_IDS = _given == "1"
"""Whether adapter ids are checked on a GPU, too: a debugging aid, for it waits for the GPU at every
call. Unchecked, an id that no adapter has means the base alone. On a CPU ids are always checked."""


def looks_at(ids: Tensor) -> bool:
    """Whether the values of ids are checked, which waits for a GPU, and breaks a capture."""
    if ids.is_cuda:
        return CHECK_IDS and not torch.cuda.is_current_stream_capturing()
    return ids.device.type == "cpu" and type(ids) in (Tensor, nn.Parameter)  # a fake one has none


def why_not_triton(x: Tensor) -> str | None:
    """Why the kernels cannot run on a tensor like `x`, and what to do; None if they can."""
    return _why_not_triton(x.device, x.dtype)


@functools.cache
def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if triton_backend is None:
        return (
            f"triton 3.6 or newer cannot be imported ({_import_error}): install it (`pip install "
            "'triton>=3.6'`, Linux only), or use backend='aten'"
        )
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take fp32, fp16 and bf16, x is {dtype}: use backend='aten'"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "the kernels need compute capability 8.0 or newer: use backend='aten'"
        return None
    if device.type == "cpu" and triton_backend.INTERPRETING:
        return None
    return (
        f"x is on {device}, the kernels run on a GPU: move the layer there, or use backend='aten' "
        "(for tests, TRITON_INTERPRET=1 set before the first import runs the kernels on a CPU, in "
        "fp32 and fp16: Triton's interpreter computes bf16 wrongly)"
    )


def require_triton(x: Tensor) -> None:
    """Raise RuntimeError, with the reason, where the kernels cannot run on `x`."""
    reason = why_not_triton(x)
    if reason is not None:
        raise RuntimeError(f"backend='triton' cannot run: {reason}")


def resolve(backend: str, x: Tensor, N: int, r: int) -> str:
    """The backend, "triton" or "aten", for x [M, K], N outputs and rank r; "auto" asks the tables.
    Raises RuntimeError if "triton" is asked for and cannot run."""
    if backend == "triton":
        require_triton(x)
    if backend != "auto":
        return backend
    if not x.is_cuda or why_not_triton(x) is not None:
        return "aten"
    return triton_backend.choose_backend(x, N, r)


_library = torch.library.Library("fused_lora", "DEF")
_kernels: dict[OpOverload, Callable[..., Any]] = {}
_formulas: dict[OpOverload, Callable[..., Any]] = {}


def define(schema: str) -> OpOverload:
    """A new operator of namespace fused_lora; `register` gives it what it does."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.fused_lora, schema.partition("(")[0]).default


def register(operator: OpOverload, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give an operator its kernel, one for all devices, and its fake implementation."""

    def differentiated(*arguments: Any) -> Any:
        if transformed():
            raise RuntimeError(TRANSFORMED)
        tensors = (t for t in arguments if isinstance(t, Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            formula = _formulas.get(operator)
            if formula is None:
                raise RuntimeError(TWICE)
            return formula(*arguments)
        if not _watched(arguments):
            return kernel(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    _library.impl(operator, kernel, "CompositeExplicitAutograd")
    # without it autograd, and transforms inside of compiled code, would see a constant
    _library.impl(operator, differentiated, "Autograd")
    torch.library.register_fake(operator, fake, lib=_library)
    _kernels[operator] = kernel


def differentiate(operator: OpOverload, formula: Callable[..., Any]) -> None:
    """Give an operator a form for inputs that require grad: for those who call the operator itself,
    exported graphs for example. Those without one refuse."""
    _formulas[operator] = formula


TRANSFORMED = (
    "torch.func transforms and forward-mode differentiation do not see through the fused layer: "
    "use fused_lora.reference.lora_linear there, which is plain PyTorch"
)
TWICE = (
    "trying to differentiate twice through a fused LoRA layer, whose backward is differentiable "
    "once: use fused_lora.reference.lora_linear there, which is plain PyTorch, or PEFT's own "
    "layers, unpatched"
)


def transformed() -> bool:
    """Whether the caller is inside of jvp, grad or vmap of torch.func, or of a dual level."""
    if forward_ad._current_level >= 0:
        return True
    interpreter = torch._C._functorch.peek_interpreter_stack()
    transforms = torch._C._functorch.TransformType
    return interpreter is not None and interpreter.key() != transforms.Functionalize


def exporting() -> bool:
    """torch.compiler.is_exporting(), which the compiler of torch 2.10 takes to be true always."""
    return torch.compiler._is_exporting_flag


def call(operator: OpOverload, *arguments: Any) -> Any:
    """`operator(*arguments)`. Bypasses the dispatcher, which takes as long as the launches, when no
    mode, trace or profiler needs to see the call."""
    if not _watched(arguments):
        return _kernels[operator](*arguments)
    backward = type(arguments[-1]) is str  # the backend comes last there
    if backward and not torch.compiler.is_compiling() and _is_batched(arguments[0]):
        return _kernels[operator](*arguments[:-1], "aten")  # library products have rules for it
    return operator(*arguments)


def _watched(arguments: tuple[Any, ...]) -> bool:
    """Whether there is a compiler, mode, transform, trace, profiler, tensor subclass or meta device
    that must see the operator, or a lazy sign, which the dispatcher resolves."""
    first, second, third, fourth = arguments[:4]  # tensors of all operators; the second or None
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or not _UNWATCHED.issuperset(map(type, arguments))
        or first.is_meta
        or first.is_neg()
        or (second is not None and second.is_neg())
        or third.is_neg()
        or fourth.is_neg()
        or _is_batched(first)
    )


# a gradient of torch.autograd.grad(is_grads_batched=True), several in one
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_UNWATCHED = {Tensor, nn.Parameter, bool, int, float, str, list, tuple, type(None)}

forward = define(
    "forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, float scaling, "
    "Tensor? scaling_tensor, float dropout_p, Tensor? seed, Tensor[] adapters, str backend, "
    "bool for_backward) -> Tensor[]"
)
backward = define(
    "backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? S, "
    "Tensor? mask, float scaling, Tensor? scaling_tensor, float dropout_p, Tensor[] adapters, "
    "bool[5] needs, str backend) -> Tensor[]"
)


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    adapters: list[Tensor],
    backend: str,
    for_backward: bool,
) -> list[Tensor]:
    """[y [M, N]]; `for_backward` also S [M, padded r]; with dropout then also the packed mask
    [M, dropout.packed_columns(K)]. adapters: none, or the tensors of `scale.Adapters` where lora_A
    and lora_B pack several."""
    backend_module = backend_of(backend, x, weight.shape[0], lora_A.shape[0], weight)
    scale = Scale(scaling, scaling_tensor)
    pack = _checked(adapters)
    with as_given(x):
        return backend_module.forward(
            x, weight, lora_A, lora_B, bias, scale, dropout_p, seed, pack, for_backward
        )


def _forward_fake(
    x,
    weight,
    lora_A,
    lora_B,
    bias,
    scaling,
    scaling_tensor,
    dropout_p,
    seed,
    adapters,
    backend,
    for_backward,
):
    M, K = x.shape
    outputs = [x.new_empty((M, weight.shape[0]))]
    if for_backward:
        outputs.append(x.new_empty((M, padded_rank(lora_A.shape[0]))))
        if dropout_p > 0.0:
            outputs.append(x.new_empty((M, dropout.packed_columns(K)), dtype=torch.uint8))
    return outputs


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor | None,
    mask: Tensor | None,
    scaling: float,
    scaling_tensor: Tensor | None,
    dropout_p: float,
    adapters: list[Tensor],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Of [dx, dweight, dlora_A, dlora_B, dbias] those that `needs` asks for, in this order."""
    needs_x, needs_weight, needs_A, needs_B, needs_bias = needs
    backend_module = backend_of(backend, dy, weight.shape[1], lora_A.shape[0], weight)
    scale = Scale(scaling, scaling_tensor)
    pack = Adapters(*adapters) if adapters else None
    with as_given(dy):
        dx, dA, dB = backend_module.backward(
            *(dy, x, weight, lora_A, lora_B, S, mask, scale, dropout_p, pack),
            *(needs_x, needs_A, needs_B),
        )
        # full fine-tuning of the base is LoRA's limit case: right, not special
        dweight = (dy.t() @ x).to(weight.dtype) if needs_weight and x is not None else None
        dbias = dy.sum(0) if needs_bias else None
    return [grad for grad in (dx, dweight, dA, dB, dbias) if grad is not None]


def _backward_fake(
    dy,
    x,
    weight,
    lora_A,
    lora_B,
    S,
    mask,
    scaling,
    scaling_tensor,
    dropout_p,
    adapters,
    needs,
    backend,
):
    N, K = weight.shape
    shapes = ((dy.shape[0], K), (N, K), lora_A.shape, lora_B.shape, (N,))
    dtypes = (dy.dtype, weight.dtype, lora_A.dtype, lora_B.dtype, dy.dtype)
    return [
        dy.new_empty(shape, dtype=dtype)
        for shape, dtype, needed in zip(shapes, dtypes, needs, strict=True)
        if needed
    ]


register(forward, _forward, _forward_fake)
register(backward, _backward, _backward_fake)


@register_flop_formula(torch.ops.fused_lora.forward)
def _forward_flops(
    x: Sequence[int], weight: Sequence[int], lora_A: Sequence[int], *_: Any, **__: Any
) -> int:
    (M, K), N, r = x, weight[0], lora_A[0]
    return 2 * M * (N * K + r * (N + K))


@register_flop_formula(torch.ops.fused_lora.backward)
def _backward_flops(
    dy: Sequence[int], x: Any, weight: Sequence[int], lora_A: Any, *rest: Any, **_: Any
) -> int:
    (M, N), K, r = dy, weight[1], lora_A[0]
    needs_x, needs_weight, needs_A, needs_B, _bias = rest[7]
    products = N * K * (needs_x + needs_weight) + r * (N + K) * needs_x
    products += r * N * (needs_A and not needs_x) + r * K * needs_A + r * N * needs_B
    return 2 * M * products


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device_type = "cuda" if x.is_cuda else x.device.type  # which is slow: it makes a string
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def as_given(x: Tensor) -> contextlib.AbstractContextManager:
    """Compute on x's device (Triton launches on the current one) and in the dtypes at hand
    (autocast, which `lora_linear` has applied, would cast again)."""
    # torch.cuda.current_device() without its look whether CUDA is initialised: x is there already
    elsewhere = x.is_cuda and x.get_device() != torch._C._cuda_getDevice()
    autocast = autocasts(x)
    if not elsewhere and not autocast:
        return _NOTHING_TO_CHANGE
    stack = contextlib.ExitStack()
    if elsewhere:
        stack.enter_context(torch.cuda.device(x.device))
    if autocast:
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    return stack


_NOTHING_TO_CHANGE = contextlib.nullcontext()


def _checked(adapters: list[Tensor]) -> Adapters | None:
    """The pack's tables, None without; raises ValueError for ids that it does not hold."""
    if not adapters:
        return None
    pack = Adapters(*adapters)
    if not looks_at(pack.ids):
        return pack
    ids, held = pack.ids, pack.window.any(1)
    wrong = (ids < -1) | (ids >= len(held))
    wrong |= ~held[ids.clamp(0, len(held) - 1)] & (ids != -1)
    if wrong.any():
        raise ValueError(
            f"adapter_ids holds {ids[wrong][0].item()}, expected -1 (base only) or the id of an "
            f"adapter in the pack: one of {held.nonzero().flatten().tolist()} (pack.id(name))"
        )
    return pack


def backend_of(backend: str, x: Tensor, N: int, r: int, factor: Tensor) -> ModuleType:
    """The module that computes a product of x and this factor. Empty ones have nothing to launch:
    aten."""
    if resolve(backend, x, N, r) == "triton" and x.numel() > 0 and factor.numel() > 0:
        return triton_backend
    return aten_backend
