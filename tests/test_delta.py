"""`lora_delta`: the adapter term added to the output of a base that computes itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora import aten_backend, testing, triton_backend
from fused_lora.delta import lora_delta
from fused_lora.scale import Scale

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 50, 70, 1), (33, 70, 50, 8), (130, 64, 500, 33), (400, 16, 24, 8))
"""The last has its tokens split over programs in rank_grad, whose counters must then be zero."""
BACKENDS = ("aten", "triton")


def layer(x, weight, lora_A, lora_B, bias=None, *, backend, in_place=False, **options):
    """A whole layer, for the acceptance rule: the base by the library, the rest by `lora_delta`."""
    base_output = F.linear(x, weight, bias)
    return lora_delta(base_output, x, lora_A, lora_B, backend=backend, in_place=in_place, **options)


def seed(value=5, device="cpu"):
    return torch.tensor(value, dtype=torch.int64, device=device)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rule_holds_for_every_dtype(shape, dtype, backend, device):
    case = testing.make_case(*shape, dtype, device=device)
    options = {}
    if shape[0] in (33, 130):
        options = {"dropout_p": 0.3, "seed": seed(device=device)}
    assert not testing.violations_of(partial(layer, backend=backend), case, **options)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_larger_case_is_as_exact_as_the_eager_layer(backend, p, device):
    shape = (256, 512, 512, 16, torch.bfloat16)
    case = testing.make_case(*shape, amplify=False, device=device)
    options = {"dropout_p": p, "seed": seed(device=device)} if p else {}
    assert not testing.violations_of(partial(layer, backend=backend), case, floor=False, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_adapters_on_a_bf16_base_get_fp32_gradients(backend, device):
    case = testing.make_case(
        33, 48, 64, 8, torch.bfloat16, adapter_dtype=torch.float32, device=device
    )
    ours = testing.gradients(partial(layer, backend=backend), *case.tensors())
    assert ours["y"].dtype == ours["dx"].dtype == torch.bfloat16
    assert ours["dA"].dtype == ours["dB"].dtype == torch.float32
    assert not testing.violations_of(partial(layer, backend=backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dropout_mask_is_lora_linears(backend, device):
    case = testing.make_case(33, 48, 70, 8, torch.float32, device=device)
    options = {"dropout_p": 0.5, "seed": seed(device=device), "backend": backend}
    ours = testing.gradients(layer, *case.tensors(), **options)
    linear = testing.gradients(fused_lora.lora_linear, *case.tensors(), **options)
    for name in ours:
        torch.testing.assert_close(ours[name], linear[name], rtol=1e-4, atol=1e-4)


def test_the_mask_comes_from_torchs_generator_and_is_redrawn_in_a_checkpoint(device):
    case = testing.make_case(33, 48, 64, 8, torch.float32, device=device)
    x, lora_A = case.x.requires_grad_(), case.lora_A.requires_grad_()

    def block(x):
        return lora_delta(F.linear(x, case.weight), x, lora_A, case.lora_B, dropout_p=0.5)

    results = []
    for run in (block, block, partial(checkpoint, block, use_reentrant=False)):
        torch.manual_seed(3)
        y = run(x)
        results.append((y.detach(), *torch.autograd.grad(y, (x, lora_A), case.dy)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not torch.equal(block(x), block(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(7,), (2, 3), (1,), (2, 1, 4)])
def test_in_place_returns_the_very_tensor_with_the_same_values(backend, leading, device):
    case = testing.make_case(8, 48, 64, 8, torch.float32, device=device)
    x = torch.randn(*leading, 64, device=device)
    base_output = torch.randn(*leading, 48, device=device)
    kept = base_output.clone()
    args = (x, case.lora_A, case.lora_B)
    fresh = lora_delta(base_output, *args, scaling=2.0, backend=backend)
    assert torch.equal(base_output, kept) and fresh.shape == base_output.shape
    version = base_output._version
    same = lora_delta(base_output, *args, scaling=2.0, backend=backend, in_place=True)
    assert same is base_output and torch.equal(same, fresh)
    assert same._version > version


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_base_output_of_any_strides_is_taken(backend, device):
    case = testing.make_case(12, 48, 64, 8, torch.float32, device=device)
    flat = torch.randn(12, 48, device=device)
    expected = lora_delta(flat, case.x, case.lora_A, case.lora_B, backend=backend)
    turned = flat.view(3, 4, 48).transpose(0, 1).contiguous().transpose(0, 1)
    for given in (flat.t().contiguous().t(), flat.repeat_interleave(2, 1)[:, ::2], turned):
        x, kept = case.x.view(*given.shape[:-1], 64), given.clone()
        out = lora_delta(given, x, case.lora_A, case.lora_B, backend=backend)
        assert torch.equal(out.reshape(12, 48), expected) and torch.equal(given, kept)
    transposed = torch.empty_strided((12, 48), (1, 12), device=device)
    with pytest.raises(ValueError, match="is not contiguous"):
        lora_delta(transposed, case.x, case.lora_A, case.lora_B, in_place=True)


def test_in_place_is_refused_where_x_would_be_written_over():
    h, lora_A, lora_B = torch.randn(7, 48), torch.randn(8, 48), torch.randn(48, 8)
    for x in (h, h.view(7, 48)):
        kept = h.clone()
        with pytest.raises(ValueError, match=r"shares its storage with x.*pass False"):
            lora_delta(h, x, lora_A, lora_B, in_place=True)
        assert torch.equal(h, kept)


def test_in_place_keeps_the_gradients_of_the_base(device):
    case = testing.make_case(33, 48, 64, 8, torch.float32, device=device)
    tensors = [t.requires_grad_() for t in (case.x, case.weight, case.lora_A, case.lora_B)]
    x, weight, lora_A, lora_B = tensors
    grads = []
    for in_place in (False, True):
        y = lora_delta(F.linear(x, weight), x, lora_A, lora_B, in_place=in_place)
        grads.append(torch.autograd.grad(y, tensors, case.dy))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_base_whose_backward_needs_its_output_raises_rather_than_lies(device):
    case = testing.make_case(7, 48, 64, 8, torch.float32, device=device)
    base_output = F.linear(case.x.requires_grad_(), case.weight).sigmoid()
    y = lora_delta(base_output, case.x, case.lora_A, case.lora_B, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for_are_computed(needs, backend, device):
    case = testing.make_case(33, 48, 64, 8, torch.float32, bias=False, device=device)
    tensors = (case.x, case.lora_A, case.lora_B)
    leaves = [t.requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    base_output = torch.randn(33, 48, device=device)
    options = {"dropout_p": 0.3, "seed": seed(device=device), "backend": backend}
    lora_delta(base_output, *leaves, **options).backward(case.dy)
    assert [leaf.grad is not None for leaf in leaves] == list(needs)


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, but for those that it writes to."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function._schema.is_mutable:
            self.largest = max(self.largest, out.untyped_storage().nbytes() // out.itemsize)
        return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_outputs_size_is_made_or_saved(backend, device):
    M, N, K, r = 16, 2048, 32, 4
    case = testing.make_case(M, N, K, r, torch.bfloat16, bias=False, device=device)
    scale, out = Scale(2.0, None), torch.zeros(M, N, dtype=torch.bfloat16, device=device)
    module = triton_backend if backend == "triton" else aten_backend
    with Sizes() as sizes:
        module.add_adapter(out, case.x, case.lora_A, case.lora_B, scale, 0.0, None, None, True)
    assert out.any() and sizes.largest <= N * r  # lora_B itself
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        lora_A, lora_B = case.lora_A.requires_grad_(), case.lora_B.requires_grad_()
        lora_delta(out, case.x, lora_A, lora_B, backend=backend, in_place=True)
    assert saved and max(saved) <= N * r


def test_scaling_may_be_a_tensor_that_is_never_read_on_the_host(device):
    case = testing.make_case(7, 48, 64, 8, torch.float32, device=device)
    args = (torch.zeros(7, 48, device=device), case.x, case.lora_A, case.lora_B)
    number = lora_delta(*args, scaling=3.0)
    tensor = lora_delta(*args, scaling=torch.tensor(3.0, device=device))
    torch.testing.assert_close(number, tensor)
    wide = [t.double() for t in args]
    exact = lora_delta(*wide, scaling=0.1)
    scaling = torch.tensor(0.1, device=device, dtype=torch.float64)
    torch.testing.assert_close(lora_delta(*wide, scaling=scaling), exact, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("K", "N"), [(0, 16), (24, 0), (0, 0)])
def test_layers_without_inputs_or_outputs_work(K, N, backend, device):
    shapes = ((2, 3, N), (2, 3, K), (4, K), (N, 4))
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    y = lora_delta(*tensors, backend=backend)
    assert torch.equal(y, tensors[0])
    for tensor, grad in zip(tensors[1:], torch.autograd.grad(y.sum(), tensors)[1:], strict=True):
        assert grad.shape == tensor.shape and not grad.any()


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_batches_and_expanded_gradients_work(rows, device):
    case = testing.make_case(1, 48, 64, 8, torch.float32, device=device)
    x = torch.randn(rows, 64, device=device, requires_grad=True)
    for backend in BACKENDS:
        y = lora_delta(x[:, :48] * 1, x, case.lora_A, case.lora_B, backend=backend)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == x.shape and dx.isfinite().all()


def test_the_operators_obey_torchs_rules_for_operators(device):
    case = testing.make_case(7, 48, 64, 8, torch.float32, device=device)
    term = (case.x, case.lora_A, case.lora_B, 2.0, None, 0.3, seed(device=device), "aten", True)
    checks = ("test_schema", "test_faketensor")
    _, S, mask = torch.ops.fused_lora.delta(case.dy, *term)
    torch.library.opcheck(torch.ops.fused_lora.delta.default, (case.dy, *term), test_utils=checks)
    torch.library.opcheck(torch.ops.fused_lora.delta_.default, (case.dy, *term), test_utils=checks)
    args = (case.dy, *term[:3], S, mask, 2.0, None, 0.3, [True, False, True], "aten")
    operator = torch.ops.fused_lora.delta_backward.default
    torch.library.opcheck(operator, args, test_utils=checks)


def test_it_compiles_without_a_graph_break(device):
    case = testing.make_case(33, 48, 64, 8, torch.float32, device=device)
    tensors = [t.requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]

    def block(x, lora_A, lora_B):
        return lora_delta(F.linear(x, case.weight), x, lora_A, lora_B, scaling=2.0)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(*tensors), tensors, case.dy) for run in (block, compiled)]
    for eager, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(6, 64)}, ValueError, "same leading dimensions"),
        ({"x": torch.ones(7, 64, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"lora_B": torch.randn(48, 4)}, ValueError, r"lora_A \[r, K\], lora_B \[N, r\]"),
        ({"lora_B": torch.randn(48, 8, 1)}, ValueError, r"lora_A \[r, K\], lora_B \[N, r\]"),
        ({"lora_A": torch.ones(0, 64), "lora_B": torch.ones(48, 0)}, ValueError, "with r >= 1"),
        ({"x": torch.tensor(1.0), "base_output": torch.randn(48)}, ValueError, "expected base_out"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\): got 1.0"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, aten"),
        ({"scaling": torch.ones(2)}, ValueError, "scaling must be a number or a 0-dim tensor"),
        ({"seed": 5, "dropout_p": 0.1}, TypeError, "seed must be a 0-dim int64 tensor on cpu"),
        ({"seed": torch.ones(1), "dropout_p": 0.1}, ValueError, "seed must be a 0-dim int64"),
        ({"base_output": torch.randn(8, 48)[:7]}, ValueError, "is a view of another tensor"),
        ({"base_output": torch.randn(7, 48, requires_grad=True)}, ValueError, "is a leaf"),
    ],
)
def test_mistakes_are_refused_in_words(change, error, message):
    arguments = {
        "base_output": torch.randn(7, 48),
        "x": torch.randn(7, 64),
        "lora_A": torch.randn(8, 64),
        "lora_B": torch.randn(48, 8),
        "in_place": True,
    }
    with pytest.raises(error, match=message):
        lora_delta(**arguments | change)


def test_batched_gradients_are_those_one_by_one():
    case = testing.make_case(9, 10, 12, 4, torch.float64)
    leaves = [t.requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]
    out = lora_delta(torch.zeros(9, 10, dtype=torch.float64), *leaves, dropout_p=0.5, seed=seed())
    dys = torch.randn(3, *out.shape, dtype=torch.float64)
    one = [torch.autograd.grad(out, leaves, dy, retain_graph=True) for dy in dys]
    many = torch.autograd.grad(out, leaves, dys, is_grads_batched=True)
    for mine, each in zip(many, zip(*one, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.stack(each))
