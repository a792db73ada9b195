"""torch.compile: the operators keep their contract with the compiler, and what it makes of a layer
is one graph that computes what eager does, for any number of tokens."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_lora import FusedLoRALinear, lora_linear, ops
from fused_lora.delta import lora_delta

SHAPES = [(7, 50, 33, 3), (1, 16, 8, 1), (130, 24, 40, 17)]  # M, N, K, r
BACKENDS = ["aten", "triton"]
NEEDS = [
    (True, True, True, True, True),
    (True, False, True, True, False),
    (False, False, True, False, False),
    (False, False, False, True, False),
    (False, False, False, False, False),
]
COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            shutil.which("g++") is None and shutil.which("clang++") is None,
            reason="inductor needs a C++ compiler, there is none",
        ),
    ),
]

# what the compiler warns of, a user would see
pytestmark = pytest.mark.filterwarnings("error:Dynamo")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_(function, **options):
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def graphs():
    """How many graphs were compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def forward_arguments(M, N, K, r, backend, device, *, p=0.0, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = [torch.randn(s, device=device) for s in ((M, K), (N, K), (r, K), (N, r), (N,))]
    x, weight, lora_A, lora_B, vector = (t.to(dtype) for t in tensors)
    seed = torch.tensor(5, device=device) if p else None
    return [
        x,
        weight,
        lora_A,
        lora_B,
        vector if bias else None,
        0.5,
        None,
        p,
        seed,
        [],
        backend,
        True,
    ]


def backward_arguments(needs, *args, **options):
    given = forward_arguments(*args, **options)
    x, weight, lora_A, lora_B, _, scaling, factor, p, _, _, backend, _ = given
    y, S, *mask = ops.forward(*given)
    saved = (x if needs[1] or needs[2] else None, weight, lora_A, lora_B, S if needs[3] else None)
    dropped = mask[0] if mask else None
    return [torch.randn_like(y), *saved, dropped, scaling, factor, p, [], list(needs), backend]


# --- the operators


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_operator_passes_opcheck(backend, shape, p, device):
    given = forward_arguments(*shape, backend, device, p=p)
    torch.library.opcheck(ops.forward, given)
    given[4] = None  # without a bias
    given[6] = torch.tensor(2.0, device=device)  # with a scaling tensor
    given[-1] = False  # nothing is kept for backward
    torch.library.opcheck(ops.forward, given)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_operator_passes_opcheck(backend, needs, p, device):
    given = backward_arguments(needs, *SHAPES[0], backend, device, p=p)
    torch.library.opcheck(ops.backward, given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_operator_passes_opcheck_for_every_shape(backend, shape, device):
    given = backward_arguments(NEEDS[0], *shape, backend, device)
    torch.library.opcheck(ops.backward, given)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 50, 33, 3)])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_real_ones(
    shape, keep, adapter_dtype, device
):
    given = forward_arguments(*shape, "aten", device, p=0.25, dtype=torch.bfloat16)
    given[2], given[3], given[-1] = (
        *(given[2].to(adapter_dtype), given[3].to(adapter_dtype)),
        keep,
    )
    real = ops.forward(*given)
    x, weight, lora_A, lora_B = given[:4]
    saved = [x, weight, lora_A, lora_B, *real[1:]]
    if keep:
        options = [0.5, None, 0.25, [], list(NEEDS[0]), "aten"]
        real = [*real, *ops.backward(torch.randn_like(real[0]), *saved, *options)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in given]
        fake = ops.forward(*fakes)
        if keep:
            x, weight, lora_A, lora_B = fakes[:4]
            saved = [x, weight, lora_A, lora_B, *fake[1:]]
            fake = [*fake, *ops.backward(torch.empty_like(fake[0]), *saved, *options)]
    facts = [[(t.shape, t.dtype, t.device, t.is_contiguous()) for t in r] for r in (real, fake)]
    assert facts[0] == facts[1]


def test_a_layer_runs_on_fake_tensors():
    with FakeTensorMode():
        layer = FusedLoRALinear(33, 50, r=3, lora_dropout=0.5)
        x = torch.empty(2, 7, 33, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == (2, 7, 50) and x.grad.shape == x.shape
    assert layer.lora_A.grad.shape == (3, 33) and layer.lora_B.grad.shape == (50, 3)


# --- compiled layers


def make(backend, device, **options):
    torch.manual_seed(0)
    options = {"r": 3, "init_lora_weights": False, **options}
    return FusedLoRALinear(33, 50, backend=backend, **options).to(device)


def step(layer, x):
    """A loss and the gradients of one training step; the same random numbers at every call."""
    torch.manual_seed(1)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    loss = layer(x).sin().sum()
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def assert_steps_agree(compiled, layer, x):
    for ours, eager in zip(step(compiled, x), step(layer, x), strict=True):
        # fp32, summed in another order by inductor
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dynamic, dropout", [(False, 0.0), (True, 0.25), (None, 0.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_compiles_to_one_graph_and_equals_eager(backend, dynamic, dropout, device):
    layer = make(backend, device, lora_dropout=dropout)
    compiled = compile_(layer, dynamic=dynamic)
    for M in (4, 9, 17):
        x = torch.randn(2, M, 33, device=device, requires_grad=True)
        with torch.random.fork_rng():
            assert_steps_agree(compiled, layer, x)
    # one graph for every M where sizes are dynamic from the start, from the second M on otherwise
    assert graphs() == {False: 3, True: 1, None: 2}[dynamic]
    assert not counters["graph_break"]


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_forward_without_gradients_compiles_and_equals_eager(dynamic):
    layer = make("aten", "cpu").eval()
    compiled = compile_(layer, dynamic=dynamic)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for M in (4, 9):
                x = torch.randn(M, 33)
                torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_model_with_layers_in_it_compiles_and_equals_eager(compiler, device):
    first, last = make("aten", device), make("aten", device, bias=False)
    model = nn.Sequential(first, nn.GELU(), nn.Linear(50, 33), last, nn.LayerNorm(50)).to(device)
    compiled = compile_(model, backend=compiler, dynamic=True)
    for M in (5, 12):
        assert_steps_agree(compiled, model, torch.randn(M, 33, device=device, requires_grad=True))
    assert graphs() == 1


@pytest.mark.parametrize("compiler", COMPILERS)
def test_an_optimizer_step_on_a_compiled_layer_follows_eager(compiler, device):
    x, losses = torch.randn(6, 33, device=device), []
    for compiled in (False, True):
        layer = make("aten", device)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01)
        call = compile_(layer, backend=compiler) if compiled else layer
        losses.append([])
        for _ in range(5):
            loss = call(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][-1] < losses[0][0]
    assert graphs() == 1


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_dropout_draws_at_every_call_and_has_one_mask_forward_and_backward(compiler):
    layer, x = make("aten", "cpu", lora_dropout=0.5), torch.randn(7, 33)
    compiled, losses = compile_(layer, backend=compiler), []
    base = nn.functional.linear(x, layer.weight, layer.bias).sum()
    for _ in range(3):
        loss = compiled(x).sum()
        dA, dB = torch.autograd.grad(loss, [layer.lora_A, layer.lora_B])
        # the adapter's share of a loss linear in y is linear in A, and in B
        torch.testing.assert_close((dA * layer.lora_A).sum(), loss - base, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close((dB * layer.lora_B).sum(), loss - base, rtol=1e-4, atol=1e-3)
        losses.append(loss.item())
    assert len(set(losses)) == 3 and graphs() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_compiles_inside_the_graph(backend, device):
    layer = make(backend, device)
    x = torch.randn(7, 33, device=device, requires_grad=True)

    def call(x):
        with torch.autocast(device, torch.bfloat16):
            return layer(x).float()

    y, expected = compile_(call)(x), call(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


def test_a_scaling_tensor_changes_without_a_recompile():
    x, weight, lora_A, lora_B = forward_arguments(*SHAPES[0], "aten", "cpu")[:4]

    def call(scaling):
        return lora_linear(x, weight, lora_A, lora_B, scaling=scaling)

    compiled = compile_(call)
    for value in (0.5, 2.0, -1.0):
        scaling = torch.tensor(value)
        torch.testing.assert_close(compiled(scaling), call(scaling))
        torch.testing.assert_close(compiled(scaling), call(value))
    assert graphs() == 1


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_compiled_code_says_why_triton_cannot_run(dropout):
    layer = make("triton", "cpu", dtype=torch.float64, lora_dropout=dropout)
    x = torch.randn(7, 33, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: the kernels take fp32"):
        compile_(layer)(x)


def test_an_exported_layer_computes_what_it_does():
    layer, x = make("aten", "cpu"), torch.randn(7, 33)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize("dropout", (0.0, 0.25))
def test_an_exported_model_trains(dropout, strict):
    """torch.export calls what an autograd Function does a constant."""
    layers = [make("aten", "cpu", lora_dropout=dropout) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.Linear(50, 33), nn.Tanh(), Delta(layers[1]))
    x = torch.randn(7, 33)
    exported = torch.export.export(model, (x,), strict=strict).module()
    for module in (model, exported):
        torch.manual_seed(3)
        module(x).square().sum().backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    found = {key: p.grad for key, p in exported.named_parameters() if p.requires_grad}
    assert len(found) == len(expected) == 6
    for key, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(found[key], grad)


class Delta(nn.Module):
    """A layer whose adapter is added to the output of its base."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        y = nn.functional.linear(x, layer.weight)
        dropout_p = layer.lora_dropout if self.training else 0.0
        return lora_delta(y, x, layer.lora_A, layer.lora_B, dropout_p=dropout_p)


@pytest.mark.parametrize("strict", (True, False))
def test_an_exported_layer_takes_any_leading_dimensions(strict):
    layer, dynamic = make("aten", "cpu").requires_grad_(False), torch.export.Dim.DYNAMIC
    shapes = {"x": {0: dynamic, 1: dynamic}}
    example = torch.randn(2, 3, 33)
    program = torch.export.export(layer, (example,), dynamic_shapes=shapes, strict=strict)
    x = torch.randn(5, 4, 33)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("trainable", [True, False])
def test_a_merged_layer_compiles_for_inference(trainable):
    layer = make("aten", "cpu").merge("cpu")
    layer.requires_grad_(trainable)
    x = torch.randn(7, 33, requires_grad=not trainable)
    with torch.no_grad() if trainable else torch.enable_grad():
        y = compile_(layer)(x)
    torch.testing.assert_close(y, layer(x))
    if not trainable:
        dx = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(dx, layer.weight.sum(0).expand_as(x))
