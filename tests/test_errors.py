"""What a user can get wrong is refused in words, with the right type, and nothing has changed."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, lora_linear

M, K, N, R = 7, 33, 50, 3


def arguments(**changes):
    torch.manual_seed(0)
    shapes = {"x": (2, M, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | changes


def empty(*shape, **options):
    return torch.zeros(*shape, **options)


MISTAKES = {
    # what is passed instead, the type raised, then what the message says: got, expected, what to do
    "x has too few features": (
        {"x": empty(M, K - 1)},
        *(
            ValueError,
            "x has 32 features",
            "expects in_features 33",
            "x (7, 32) and weight (50, 33)",
        ),
    ),
    "x has no dimension": ({"x": empty(())}, ValueError, "got shape ()", "[..., in_features]"),
    "weight is no matrix": (
        {"weight": empty(N)},
        *(
            ValueError,
            "must be matrices [out, in], [r, in], [out, r]",
            "got (50,), (3, 33), (50, 3)",
        ),
    ),
    "lora_A is no matrix": ({"lora_A": empty(K)}, ValueError, "must be matrices", "(33,)"),
    "lora_B is no matrix": (
        {"lora_B": empty(N, R, 1)},
        ValueError,
        "must be matrices",
        "(50, 3, 1)",
    ),
    "lora_A of another layer": (
        {"lora_A": empty(R, K + 2)},
        *(
            ValueError,
            "lora_A has in_features 35",
            "weight expects 33",
            "lora_A (3, 35) and weight",
        ),
    ),
    "lora_B of another layer": (
        {"lora_B": empty(N - 1, R)},
        *(
            ValueError,
            "lora_B has out_features 49",
            "weight expects 50",
            "lora_B (49, 3) and weight",
        ),
    ),
    "ranks differ": (
        {"lora_B": empty(N, R + 1)},
        *(ValueError, "lora_A has rank 3, lora_B has rank 4", "expected [r, in] and [out, r]"),
    ),
    "lora_B transposed": ({"lora_B": empty(R, N)}, ValueError, "lora_B has out_features 3", "50"),
    "rank 0": (
        {"lora_A": empty(0, K), "lora_B": empty(N, 0)},
        *(ValueError, "the rank must be at least 1", "got lora_A (0, 33)"),
    ),
    "bias too short": ({"bias": empty(N - 1)}, ValueError, "must have shape (50,)", "got (49,)"),
    "bias a matrix": ({"bias": empty(N, 1)}, ValueError, "must have shape (50,)", "got (50, 1)"),
    "weight in another dtype": (
        {"weight": empty(N, K, dtype=torch.float64)},
        *(TypeError, "weight is torch.float64, x is torch.float32", "one dtype", "autocast"),
    ),
    "bias in another dtype": (
        {"bias": empty(N, dtype=torch.float16)},
        *(TypeError, "bias is torch.float16, x is torch.float32", "one dtype", "cast x"),
    ),
    **{
        f"{name} is {dtype}": (
            {name: empty(*shape, dtype=dtype)},
            *(TypeError, f"{name} has dtype {dtype}", "expected a floating dtype", "cast it"),
        )
        for name, shape, dtype in (
            ("x", (M, K), torch.int64),
            ("weight", (N, K), torch.int8),
            ("lora_A", (R, K), torch.bool),
            ("lora_B", (N, R), torch.uint8),
            ("bias", (N,), torch.complex64),
            ("x", (M, K), torch.float8_e4m3fn),
            ("lora_A", (R, K), torch.float8_e5m2),
        )
    },
    **{
        f"{name} is on another device": (
            {name: empty(*shape, device="meta")},
            *(ValueError, f"{name} is on meta, x is on cpu", "move them to one device"),
        )
        for name, shape in (
            ("weight", (N, K)),
            ("lora_A", (R, K)),
            ("lora_B", (N, R)),
            ("bias", (N,)),
        )
    },
    **{
        f"dropout_p {p}": ({"dropout_p": p}, ValueError, "dropout_p must be in [0, 1)", f"got {p}")
        for p in (-0.1, 1.0, 1.5, math.nan)
    },
    "x is a list": ({"x": [1.0]}, *(TypeError, "x is a list, expected a torch.Tensor")),
    "no lora_A": ({"lora_A": None}, *(TypeError, "lora_A is a NoneType, expected a torch.Tensor")),
    "unknown backend": (
        {"backend": "cuda"},
        *(ValueError, "backend must be one of auto, triton, aten", "got 'cuda'"),
    ),
    "scaling a vector": (
        {"scaling": torch.ones(1)},
        *(ValueError, "scaling must be a number or a 0-dim tensor", "got (1,)"),
    ),
    "scaling wants a gradient": (
        {"scaling": torch.tensor(0.5, requires_grad=True)},
        *(ValueError, "scaling requires grad, which is not supported", "pass scaling.detach()"),
    ),
    **{
        f"seed {what}": (
            {"seed": seed, "dropout_p": 0.5},
            *(kind, "seed must be a 0-dim int64 tensor on cpu", got),
        )
        for what, seed, kind, got in (
            ("a vector", torch.zeros(2, dtype=torch.int64), ValueError, "got (2,) torch.int64"),
            ("int32", torch.tensor(1, dtype=torch.int32), ValueError, "got () torch.int32"),
            ("elsewhere", torch.tensor(1, device="meta"), ValueError, "int64 on meta"),
            ("a number", 3, TypeError, "got 3"),
        )
    },
    "triton in fp64": (
        {
            **{name: tensor.double() for name, tensor in arguments().items()},
            "backend": "triton",
        },
        *(RuntimeError, "backend='triton' cannot run", "float64", "use backend='aten'"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_lora_linear_refuses_and_changes_nothing(mistake):
    changes, kind, *fragments = MISTAKES[mistake]
    given = arguments(**changes)
    tensors = {k: v for k, v in given.items() if torch.is_tensor(v) and not v.is_meta}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    generator = torch.get_rng_state()
    with pytest.raises(kind) as caught:
        lora_linear(**given)
    assert type(caught.value) is kind
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), generator), "a seed was drawn for a refused call"


def test_the_arguments_that_mistakes_are_made_in_are_right_themselves():
    assert lora_linear(**arguments()).shape == (2, M, N)


def test_a_dtensor_is_refused():
    from torch.distributed.tensor import DTensor, init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for name in ("x", "weight", "lora_A", "lora_B", "bias"):
            given = arguments()
            given[name] = DTensor.from_local(given[name], mesh)
            with pytest.raises(
                TypeError, match=rf"{name} is a DTensor, expected a plain .*to_local"
            ):
                lora_linear(**given)
    finally:
        torch.distributed.destroy_process_group()


OPTIONS = {
    "r 0": ({"r": 0}, ValueError, "r must be an integer of at least 1: got 0"),
    "r negative": ({"r": -8}, ValueError, "r must be an integer of at least 1: got -8"),
    "r fractional": ({"r": 2.5}, ValueError, "r must be an integer of at least 1: got 2.5"),
    "r a flag": ({"r": True}, ValueError, "r must be an integer of at least 1: got True"),
    **{
        f"alpha {alpha}": ({"lora_alpha": alpha}, ValueError, f"a finite number: got {alpha!r}")
        for alpha in ("16", None, math.nan, math.inf)
    },
    **{
        f"dropout {p}": ({"lora_dropout": p}, ValueError, f"must be in [0, 1): got {p}")
        for p in (-0.1, 1.0, math.nan)
    },
    "backend": ({"backend": "cublas"}, ValueError, "one of auto, triton, aten: got 'cublas'"),
    "init": (
        {"init_lora_weights": "olora"},
        *(ValueError, "must be True, False, 'kaiming' or 'gaussian': got 'olora'"),
    ),
    "adapter_dtype": ({"adapter_dtype": torch.int64}, TypeError, "64 bits: got torch.int64"),
}


@pytest.mark.parametrize("how", ["constructor", "from_linear"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_layer_refuses_options_and_leaves_the_linear_as_it_was(option, how):
    options, kind, message = OPTIONS[option]
    linear = nn.Linear(K, N)
    with pytest.raises(kind, match=re.escape(message)):
        if how == "constructor":
            FusedLoRALinear(K, N, **options)
        else:
            FusedLoRALinear.from_linear(linear, **options)
    assert linear.weight.requires_grad and linear.bias.requires_grad


class Subclass(nn.Linear):
    pass


def quantised():
    linear = nn.Linear(K, N)
    linear.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    "given, got",
    [
        (nn.Conv1d(3, 4, 5), "Conv1d"),
        (nn.ReLU(), "ReLU"),
        (Subclass(K, N), "Subclass"),
        (FusedLoRALinear(K, N), "FusedLoRALinear"),
        (quantised(), "Linear with torch.int8"),
        (None, "NoneType"),
    ],
)
def test_from_linear_takes_an_nn_linear_and_nothing_else(given, got):
    with pytest.raises(TypeError, match=f"from_linear takes an nn.Linear.*: got {got}"):
        FusedLoRALinear.from_linear(given)


@pytest.mark.parametrize("keep_base", ["disk", None, 2])
def test_merge_refuses_an_unknown_keep_base_and_stays_unmerged(keep_base):
    layer = FusedLoRALinear(K, N)
    weight = layer.weight
    with pytest.raises(ValueError, match=rf"keep_base must be True, .*'cpu': got {keep_base!r}"):
        layer.merge(keep_base)
    assert layer.weight is weight and not layer.merged


def test_a_plain_layer_has_nothing_to_requantise():
    layer = FusedLoRALinear(K, N)
    with pytest.raises(ValueError, match=r"requantise=True is for quantised bases.*without it"):
        layer.merge(requantise=True)
    assert not layer.merged
