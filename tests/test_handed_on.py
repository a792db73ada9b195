"""What the host code of the backends hands to kernels and operators: dtypes, sizes, strides."""

import pytest
import torch
from shapes import PATHS

import fused_lora
from fused_lora import dropout, ops, product, triton_backend
from fused_lora.delta import lora_delta
from fused_lora.kernels import config

pytestmark = pytest.mark.kernels


@pytest.mark.skipif("pdl" not in PATHS, reason="this GPU takes the portable kernel")
def test_all_that_one_matmul_by_descriptors_reads_has_one_dtype(monkeypatch, path, device):
    """Under autocast, too, whose weight is of another: a GPU's tl.dot takes one dtype."""
    seen, launch = [], product.descriptor_matmul

    def spy(x, w, y, *arguments, **options):
        seen.append({t.dtype for t in (x, w, y, options["b"], options["S"])})
        launch(x, w, y, *arguments, **options)

    monkeypatch.setattr(product, "descriptor_matmul", spy)
    path("pdl")
    x = torch.randn(32, 64, device=device, requires_grad=True)
    W, A, B = (torch.randn(*size, device=device) for size in ((48, 64), (16, 64), (48, 16)))
    with torch.autocast(device, torch.bfloat16):
        fused_lora.lora_linear(x, W, A, B, backend="triton").sum().backward()
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_the_delta_of_an_x_of_any_strides_is_right(backend, device):
    sizes = ((64, 33), (33, 128), (33, 24), (4, 64), (24, 4))
    turned, wide, base, A, B = (torch.randn(*size, device=device) for size in sizes)
    for x in (turned.t(), wide[:, ::2]):
        expected = base + x @ A.t() @ B.t()
        got = lora_delta(base, x, A, B, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_auto_asks_for_the_sizes_of_the_layer(monkeypatch, device):
    asked = []
    monkeypatch.setattr(config, "choose_backend", lambda *key: asked.append(key) or ("aten", ""))
    x = torch.empty(3, 5, dtype=torch.bfloat16, device=device)
    assert triton_backend.choose_backend(x, 7, 2) == "aten"
    assert asked == [(config.device_of(x.device), 16, 3, 7, 5, 2)]  # bits, M, N, K, r


@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_the_operators_gradients_have_the_dtypes_of_what_they_are_of(
    adapter_dtype, backend, device
):
    dtypes = (torch.float16, torch.float32, adapter_dtype, adapter_dtype, torch.float16)
    sizes = ((6, 16), (6, 8), (8, 16), (4, 16), (8, 4))
    kinds = (torch.float16, torch.float16, torch.float32, adapter_dtype, adapter_dtype)
    x, dy, W, A, B = (
        torch.randn(*size, device=device, dtype=kind)
        for size, kind in zip(sizes, kinds, strict=True)
    )
    for p in (0.0, 0.5):
        seed = torch.tensor(3, device=device) if p else None
        _, S, *mask = ops.forward(x, W, A, B, None, 1.0, None, p, seed, [], backend, True)
        kept = mask[0] if mask else None
        made = ops.backward(dy, x, W, A, B, S, kept, 1.0, None, p, [], [True] * 5, backend)
        assert tuple(grad.dtype for grad in made) == dtypes


@pytest.mark.parametrize("p", [0.1, 0.3, 0.999999])
def test_the_kernels_are_given_the_specified_threshold(p, monkeypatch, path, device):
    path("portable")
    given, launch = [], product.shrink

    def noted(*arguments, **options):
        given.append(options["threshold"])
        launch(*arguments, **options)

    monkeypatch.setattr(product, "shrink", noted)
    sizes = ((4, 32), (8, 32), (2, 32), (8, 2))
    tensors = (torch.randn(*size, device=device) for size in sizes)
    fused_lora.lora_linear(*tensors, dropout_p=p, backend="triton")
    assert given == [dropout.threshold(p)]
