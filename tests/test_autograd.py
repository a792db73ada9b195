"""The layer in autograd's graphs: what is saved for backward, which gradients are computed, reuse,
strides, accumulation, hooks, and that nothing that was given is written to."""

from __future__ import annotations

import contextlib
import weakref

import both_backends
import pytest
import torch
from both_backends import K, M, N, R, trainable
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import ops, reference
from fused_lora.delta import lora_delta

make, inputs = both_backends.make, both_backends.inputs
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32 sums in another order

pytestmark = pytest.mark.parametrize("backend", ["aten", "triton"])


class Recorder(TorchDispatchMode):
    """The arguments of every call of the library's operators."""

    def __enter__(self):
        self.forward, self.backward = [], []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is ops.forward:
            self.forward.append(args)
        elif function is ops.backward:
            self.backward.append(args)
        return function(*args, **(kwargs or {}))


def plain(layer, x):
    """The layer in plain PyTorch, on the very parameters."""
    tensors = (layer.weight, layer.lora_A, layer.lora_B, layer.bias)
    return reference.lora_linear(x, *tensors, scaling=layer.scaling)


def assert_same_gradients(ours, theirs, wanted):
    ours, theirs = (torch.autograd.grad(loss, wanted, retain_graph=True) for loss in (ours, theirs))
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


# --- what is saved for backward


@contextlib.contextmanager
def saved_tensors():
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward_are_x_w_a_b_s_and_nothing_else(
    make, inputs, device, dropout, autocast, adapter_dtype
):
    layer, x = make(lora_dropout=dropout, adapter_dtype=adapter_dtype), inputs()
    with saved_tensors() as saved, torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = layer(x)
    kept_x, weight, lora_A, lora_B, S, *mask = saved
    computed = torch.bfloat16 if autocast else torch.float32
    for kept, parameter in ((weight, layer.weight), (lora_A, layer.lora_A), (lora_B, layer.lora_B)):
        assert storage(kept) == storage(parameter) and kept.dtype == parameter.dtype
    assert kept_x.shape == (M, K) and kept_x.dtype == computed
    assert autocast or storage(kept_x) == storage(x)
    assert S.dtype == computed and S.shape[0] == M and S.shape[1] < R + 16
    assert [(m.dtype, m.shape) for m in mask] == (
        [(torch.uint8, (M, (K + 31) // 32 * 4))] if dropout else []
    )
    assert storage(y) not in [storage(tensor) for tensor in saved]


def test_a_frozen_weight_used_often_under_autocast_keeps_no_cast_copy(make, inputs, device):
    layer, x = make(), inputs()
    with saved_tensors() as saved, torch.autocast(device, torch.bfloat16):
        ys = [layer(x) for _ in range(3)]
    large = {storage(tensor) for tensor in saved if tensor.numel() == N * K}
    assert large == {storage(layer.weight)}
    reference_to = weakref.ref(ys[0].grad_fn)
    del ys, saved
    assert reference_to() is None, "the graph outlives its output"


@pytest.mark.parametrize("frozen", ["x", "lora_A", "lora_B", "both adapters"])
def test_only_the_gradients_that_are_needed_are_computed_and_saved_for(make, inputs, frozen):
    layer, x = make(), inputs(requires_grad=frozen != "x")
    layer.lora_A.requires_grad_(frozen not in ("lora_A", "both adapters"))
    layer.lora_B.requires_grad_(frozen not in ("lora_B", "both adapters"))
    candidates = [x, layer.weight, layer.lora_A, layer.lora_B, layer.bias]
    wanted = [tensor for tensor in candidates if tensor.requires_grad]
    with saved_tensors() as saved:
        y = layer(x)
    with Recorder() as calls:
        ours = torch.autograd.grad(y, wanted, torch.ones_like(y))
    expected = torch.autograd.grad(plain(layer, x).sum(), wanted)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    (call,) = calls.backward
    assert call[-2] == [tensor.requires_grad for tensor in candidates]
    kept = [storage(tensor) for tensor in saved]
    assert (storage(x) in kept) == layer.lora_A.requires_grad, "x is for dA alone"
    own = [storage(tensor) for tensor in candidates]
    assert len([s for s in kept if s not in own]) == layer.lora_B.requires_grad, "S is for dB alone"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_no_gradient_is_wanted(make, inputs, context):
    layer, x = make(), inputs()
    with saved_tensors() as saved, context(), Recorder() as calls:
        y = layer(x)
    assert not saved and not y.requires_grad
    assert [call[-1] for call in calls.forward] == [False]
    torch.testing.assert_close(y, plain(layer, x).detach(), **CLOSE)
    layer.requires_grad_(False)
    with Recorder() as calls:
        assert not layer(x.detach()).requires_grad
    assert [call[-1] for call in calls.forward] == [False]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batched_gradients_are_those_one_by_one(make, inputs, dropout):
    layer, x = make(lora_dropout=dropout), inputs()
    y = layer(x)
    wanted = [x, *trainable(layer)]
    dys = torch.randn(4, *y.shape, device=y.device)
    one = [torch.autograd.grad(y, wanted, dy, retain_graph=True) for dy in dys]
    for mine, each in zip(
        torch.autograd.grad(y, wanted, dys, is_grads_batched=True),
        zip(*one, strict=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, torch.stack(each), **CLOSE)


def test_what_was_made_in_inference_mode_is_run_as_torch_does(make, inputs):
    with torch.inference_mode():
        layer = make()
    y = layer(inputs(requires_grad=False))
    assert not y.requires_grad
    x = inputs(requires_grad=False)
    base = torch.nn.functional.linear(x, layer.weight, layer.bias)
    options = {"scaling": layer.scaling, "backend": layer.backend}
    out = lora_delta(base, x, layer.lora_A, layer.lora_B, **options)
    torch.testing.assert_close(out, y, **CLOSE)
    assert not out.requires_grad


# --- graphs


def test_one_layer_used_twice_in_a_graph(make, inputs):
    layer, x = make(), inputs(2, M)

    def twice(call):
        return call(call(x)[..., :K].sin()).sin().sum()

    ours, theirs = twice(layer), twice(lambda x: plain(layer, x))
    assert_same_gradients(ours, theirs, [x, *trainable(layer)])


def test_x_shared_by_several_layers(make, inputs):
    layers, x = [make(seed) for seed in range(3)], inputs()
    ours = sum(layer(x).sin().sum() for layer in layers)
    theirs = sum(plain(layer, x).sin().sum() for layer in layers)
    wanted = [x, *(p for layer in layers for p in trainable(layer))]
    assert_same_gradients(ours, theirs, wanted)


VIEWS = {
    "expanded rows": lambda x: x[:1].expand(5, K),
    "expanded in front": lambda x: x.expand(3, M, K),
    "every second row": lambda x: x[::2],
    "sliced in 3-D": lambda x: torch.stack([x, x])[:, 1:],
    "transposed": lambda x: x.t().contiguous().t(),
    "one token": lambda x: x[0],
    "no token": lambda x: x[:0],
    "four dimensions": lambda x: x.view(1, M, 1, K),
}


@pytest.mark.parametrize("view", VIEWS)
def test_x_of_any_strides_and_leading_dimensions(make, inputs, view):
    layer, x = make(), inputs()
    y, expected = layer(VIEWS[view](x)), plain(layer, VIEWS[view](x))
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, **CLOSE)
    assert_same_gradients(y.sin().sum(), expected.sin().sum(), [x, *trainable(layer)])


@pytest.mark.parametrize(
    "loss",
    [
        torch.sum,  # dY of strides (0, 0)
        lambda y: y.mean(0).square().sum(),  # of strides (0, 1)
        lambda y: y.t().contiguous().sin().sum(),  # transposed
        lambda y: y[:, 1:].sin().sum(),
    ],
)
def test_gradients_of_any_strides(make, inputs, loss):
    layer, x = make(), inputs()
    assert_same_gradients(loss(layer(x)), loss(plain(layer, x)), [x, *trainable(layer)])


def test_gradients_accumulate_in_place_and_repeat_with_retain_graph(make, inputs):
    layer, x = make(), inputs()
    loss = layer(x).sin().sum()
    loss.backward(retain_graph=True)
    held = [x.grad, *(p.grad for p in trainable(layer))]
    once = [grad.clone() for grad in held]
    loss.backward()
    layer(x).sin().sum().backward()
    for grad, first, tensor in zip(held, once, [x, *trainable(layer)], strict=True):
        assert tensor.grad is grad
        torch.testing.assert_close(grad, 3 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_hooks_run_and_may_change_what_passes(make, inputs):
    layer, x, seen = make(), inputs(), []
    expected = torch.autograd.grad(plain(layer, x).sum(), [x, *trainable(layer)])
    handles = [
        layer.register_forward_hook(lambda module, args, y: seen.append("forward") or 2 * y),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        layer.lora_A.register_hook(lambda grad: seen.append("dA") or grad / 2),
        layer.lora_B.register_post_accumulate_grad_hook(lambda p: seen.append("dB")),
        x.register_hook(lambda grad: seen.append("dx") or grad * 3),
    ]
    layer(x).sum().backward()
    assert seen[0] == "forward" and sorted(seen[1:]) == ["backward", "dA", "dB", "dx"]
    for tensor, grad, factor in zip([x, *trainable(layer)], expected, (6, 1, 2), strict=True):
        torch.testing.assert_close(tensor.grad, factor * grad, **CLOSE)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("loss", ["linear", "curved"])
@pytest.mark.parametrize("of", ["x", "lora_A", "lora_B"])
def test_differentiating_twice_says_that_it_cannot(make, inputs, loss, of):
    """Also where dY itself has no graph: the gradients owe x, A and B something all the same."""
    layer, x = make(), inputs()
    leaves = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
    y = layer(x) if loss == "linear" else layer(x).sin()
    (grad,) = torch.autograd.grad(y.sum(), leaves[of], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice through a fused LoRA layer"):
        grad.pow(2).sum().backward()


def test_second_derivatives_are_refused_not_zero(make, inputs):
    layer, x = make(), inputs().detach()
    for second in (torch.autograd.functional.hessian, torch.autograd.functional.hvp):
        arguments = (x,) if second is torch.autograd.functional.hessian else (x, x)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            second(lambda x: layer(x).pow(2).sum(), *arguments)


def test_a_graph_of_the_gradients_that_nobody_differentiates_is_harmless(make, inputs):
    layer, x = make(), inputs()
    expected = torch.autograd.grad(layer(x).sum(), [x, *trainable(layer)])
    layer(x).sum().backward(create_graph=True)
    for tensor, grad in zip([x, *trainable(layer)], expected, strict=True):
        assert torch.equal(tensor.grad, grad)
        tensor.grad = None  # or the graph would hold itself


@pytest.mark.parametrize("leading", [(M,), (2, M)])
def test_the_output_is_nobodys_view_and_may_be_changed_in_place(make, inputs, leading):
    layer, x = make(lora_dropout=0.5), inputs(*leading)
    torch.manual_seed(5)
    expected = torch.autograd.grad(layer(x).mul(2).relu().sum(), [x, *trainable(layer)])
    torch.manual_seed(5)
    with saved_tensors() as saved:
        y = layer(x)
    assert storage(y) not in [storage(tensor) for tensor in [x, *layer.parameters(), *saved]]
    gradients = torch.autograd.grad(y.mul_(2).relu_().sum(), [x, *trainable(layer)])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    with torch.no_grad():
        y = layer.eval()(x)
        before = y.clone()
        y.zero_()
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("leading", [(M,), (2, M)])
def test_what_was_made_without_gradients_may_be_written_to_with_them(make, inputs, leading):
    layer, x = make(), inputs(*leading)
    with torch.no_grad():
        y = layer(x)
        expected = y.clone()
    shift = torch.ones(y.shape[-1], device=y.device, dtype=y.dtype, requires_grad=True)
    y += shift
    y.sum().backward()
    assert torch.equal(y, expected + 1) and torch.equal(shift.grad, shift * y[..., 0].numel())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_inputs_are_never_written_to(make, inputs, dropout):
    layer, x = make(lora_dropout=dropout).requires_grad_(True), inputs(2, M)
    y = layer(x)
    dy = torch.randn_like(y)
    tensors = [x, dy, *layer.parameters()]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    layer(x)
    torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)
    for tensor, (bits, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, bits) and tensor._version == version
