"""Small promises of the function and its operators: what is saved, cast, refused and recorded."""

import pytest
import torch

import fused_lora
from fused_lora import aten_backend, ops
from fused_lora.functional import checked_options


def tensors(*trained):
    torch.manual_seed(0)
    given = {
        "x": torch.randn(6, 16),
        "weight": torch.randn(8, 16),
        "lora_A": torch.randn(4, 16),
        "lora_B": torch.randn(8, 4),
        "bias": torch.randn(8),
    }
    for name in trained:
        given[name].requires_grad_()
    return given


@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_the_mask_is_saved_for_those_who_need_it_alone(backend):
    for trained, saves in (("lora_B", False), ("x", True), ("lora_A", True)):
        saved = []

        def pack(t, saved=saved):
            saved.append(t.dtype)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fused_lora.lora_linear(**tensors(trained), dropout_p=0.5, backend=backend)
        assert (torch.uint8 in saved) is saves, trained


def test_s_and_the_mask_of_the_operator_take_no_gradient():
    given = tensors("lora_A", "lora_B")
    y, S, mask = ops.forward(*given.values(), 1.0, None, 0.5, torch.tensor(1), [], "aten", True)
    assert y.requires_grad and not S.requires_grad and not mask.requires_grad


def test_autocast_leaves_integers_and_fp64_as_they_are():
    given = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"x has dtype torch.int64"):
            fused_lora.lora_linear(**(given | {"x": torch.ones(6, 16, dtype=torch.int64)}))
        exact = {name: t.double() for name, t in given.items()}
        y = fused_lora.lora_linear(**exact)
    assert y.dtype == torch.float64 and torch.equal(y, fused_lora.lora_linear(**exact))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float64])
def test_a_scaling_tensor_is_taken_in_fp32_and_beside_fp64_in_fp64(dtype, given):
    exact = torch.promote_types(dtype, torch.float32)
    third = torch.tensor(1 / 3, dtype=given)
    factor, tensor, *_ = checked_options(torch.empty(2, 2, dtype=dtype), third, 0.0, None, "aten")
    assert factor == 1.0 and tensor.dtype == exact and tensor == third.to(exact)


@pytest.mark.parametrize("version", [None, "6.4"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_the_kernels_take_gpus_from_capability_8_and_all_of_amd(capability, version, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = ops._why_not_triton.__wrapped__(torch.device("cuda"), torch.bfloat16)
    assert (reason is None) is (version is not None or capability >= (8, 0))


def test_backward_under_autocast_computes_in_the_dtype_of_forward():
    def gradients(where):
        given = tensors("x", "lora_A", "lora_B")
        y = fused_lora.lora_linear(**given, backend="aten")
        with where:
            wanted = [given[name] for name in ("x", "lora_A", "lora_B")]
            return torch.autograd.grad(y.square().sum(), wanted)

    inside = gradients(torch.autocast("cpu", torch.bfloat16))
    for got, expected in zip(inside, gradients(torch.enable_grad()), strict=True):
        assert torch.equal(got, expected)


def test_a_layer_without_outputs_launches_nothing():
    x, W = torch.randn(4, 16), torch.empty(0, 16)
    assert ops.backend_of("triton", x, 0, 2, W) is aten_backend


def test_the_first_id_behind_a_full_pack_is_refused():
    layer = fused_lora.MultiLoRALinear(8, 8, total_rank=32, max_adapters=2)
    for name in "ab":
        layer.pack.add(name, torch.randn(4, 8), torch.randn(8, 4))
    layer(torch.randn(2, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="adapter_ids holds 2, expected -1"):
        layer(torch.randn(2, 8), torch.tensor([0, 2]))
