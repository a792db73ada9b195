"""Which path a patched PEFT layer takes, that whatever it takes computes what PEFT does, and that
docs/peft.md says so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra `peft`")

import peft
import peft_table
from peft.helpers import disable_input_dtype_casting
from peft_models import FIRST, Tiny, adapted, lora_layer
from peft_table import FEATURES

from fused_lora import delta
from fused_lora.integrations import peft as fused

pytestmark = pytest.mark.peft
NEWEST = tuple(int(part) for part in peft.__version__.split(".")[:2]) >= (0, 21)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# another mask or another rounding: compared by the acceptance rule in test_peft.py
OTHER_NUMBERS = ("lora_dropout, in training", "fp32 adapters on a bf16 base", "autocast")
HERE = [f for f in FEATURES if f.title not in OTHER_NUMBERS and (NEWEST or not f.newest)]


def outcome(feature, patched):
    """y and the gradients of x and of all trainable parameters of a feature's model."""
    model = peft_table.build(feature)
    if patched:
        fused.patch(model, **feature.patch)
    x = peft_table.tokens(feature).requires_grad_()
    y = feature.run(model, x)
    y.square().sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    grads = [getattr(grad, "_local_tensor", grad) for grad in grads if grad is not None]
    return [y.detach(), *grads]


@pytest.mark.parametrize("feature", HERE, ids=lambda feature: feature.title)
def test_every_feature_gives_pefts_values_and_gradients(feature):
    if peft_table.paths(feature)[0][0] == "peft":
        close = torch.equal
    else:
        close = lambda a, b: torch.testing.assert_close(a, b, **CLOSE) is None  # noqa: E731
    expected, ours = outcome(feature, False), outcome(feature, True)
    assert len(ours) == len(expected)
    assert all(close(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.skipif(not NEWEST, reason="the document is written with the newest PEFT")
def test_the_document_is_what_the_library_does():
    written = peft_table.DOCUMENT.read_text(encoding="utf-8")
    assert peft_table.document() == written, "run `python tests/peft_table.py`"


def row(start):
    (feature,) = [feature for feature in FEATURES if feature.title.startswith(start)]
    return feature


def test_the_term_is_added_in_place_only_to_fresh_outputs(monkeypatch):
    in_place = []
    lora_delta = fused.lora_delta

    def spied(out, *arguments, **options):
        in_place.append(options["in_place"])
        return lora_delta(out, *arguments, **options)

    monkeypatch.setattr(fused, "lora_delta", spied)
    rows = ("quantised weight", "base of another", "forward hook", "accelerate")
    for start in rows:
        model = peft_table.build(row(start))
        fused.patch(model)
        peft_table.call(row(start), model)
    assert in_place == [True, False, False, False]


@pytest.mark.parametrize("special", ["view", "leaf"])
def test_a_base_output_that_is_not_its_own_is_not_written_to(special):
    kept = torch.randn(2 * 6, FIRST[1], requires_grad=special == "leaf")
    out = kept[:6] if special == "view" else kept
    assert not delta.may_write(nn.Linear(*FIRST), out)
    assert delta.may_write(nn.Linear(*FIRST), torch.randn(6, FIRST[1]))


def test_what_a_hook_has_seen_stays_as_it_was():
    model = adapted(target_modules=["first"])
    layer, x = lora_layer(model), torch.randn(5, FIRST[0])
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    fused.patch(model)
    model(x)
    assert torch.equal(seen[0], nn.functional.linear(x, *layer.base_layer.parameters()))


def test_the_path_is_chosen_anew_at_every_call():
    model, x = adapted(target_modules=["first"]), torch.randn(5, FIRST[0])
    fused.patch(model)
    layer = lora_layer(model)
    model(x)
    handle = layer.base_layer.register_forward_hook(lambda *arguments: None)
    model(x)
    handle.remove()
    with model.disable_adapter():
        model(x)
    model(x)
    assert fused.call_counts(model) == {"full": 2, "delta": 1, "peft": 1}
    assert layer._fused_lora.calls["peft", "adapters are disabled"] == 1


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.empty(5, FIRST[0], device="meta"), "x and the adapters are on different devices"),
        (torch.ones(5, FIRST[0], dtype=torch.int64), "x is int64, lora_A float32"),
        (torch.ones(5, FIRST[0], dtype=torch.float64), "casting of the input's dtype is disabled"),
    ],
)
def test_what_pefts_layer_refuses_is_left_to_it(x, reason):
    layer = lora_layer(adapted())
    fused.patch(layer)
    with disable_input_dtype_casting(layer):
        assert fused.explain(layer, x).startswith(f"layer: peft ({reason})")


def test_a_dropout_that_drops_everything_leaves_the_base():
    model, x = adapted(lora_dropout=1.0), torch.randn(5, FIRST[0])
    fused.patch(model)
    assert torch.equal(lora_layer(model)(x), lora_layer(model).base_layer(x))


def test_hooks_on_every_module_send_calls_to_peft():
    model, x = adapted(), torch.randn(5, FIRST[0])
    fused.patch(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *rest: seen.append(m))
    try:
        model(x)
    finally:
        handle.remove()
    assert lora_layer(model).lora_A["default"] in seen
    assert fused.call_counts(model) == {"full": 0, "delta": 0, "peft": 2}


@pytest.mark.parametrize("what", ["nn.Linear.forward", "F.linear"])
def test_what_replaces_all_linear_layers_reaches_those_of_peft(what, monkeypatch):
    model, x = adapted(), torch.randn(5, FIRST[0])
    expected = model(x)
    fused.patch(model)
    linear, forward = nn.functional.linear, nn.Linear.forward
    if what == "F.linear":
        monkeypatch.setattr(nn.functional, "linear", lambda *given: linear(*given) * 2)
    else:
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 2)
    y = model(x)
    assert fused.call_counts(model) == {"full": 0, "delta": 0, "peft": 2}
    fused.unpatch(model)
    assert torch.equal(y, model(x)) and not torch.allclose(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", ["base", "peft"])
def test_a_base_that_computes_in_a_narrower_dtype_does_not_narrow_the_adapter(dtype, compute_dtype):
    class Narrow(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x.clamp(-9, 9).to(dtype), self.weight.to(dtype))

    tiny = Tiny()
    tiny.first = Narrow(*FIRST, bias=False)
    model, x = adapted(tiny, target_modules=["first"]), torch.randn(5, FIRST[0]) * 1e5
    layer = lora_layer(model)
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(1e-4)
    expected = layer(x)
    fused.patch(model, compute_dtype=compute_dtype)
    assert expected.isfinite().all() and torch.equal(layer(x), expected)


def test_a_forward_that_is_replaced_after_patch_is_pointed_out():
    model = adapted()
    fused.patch(model)
    lora_layer(model).forward = lambda x: x
    words = "calls go through a forward of the instance, which may not hand on"
    assert [words in line for line in fused.explain(model).splitlines()] == [True, False]


@pytest.mark.parametrize(("unit", "path"), [("block", "full"), ("leaf", "peft")])
def test_fsdp2_by_block_is_fused_and_by_leaf_left_to_peft(unit, path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        x, grads = torch.randn(5, FIRST[0]), []
        for patched in (False, True):
            model = adapted()
            if patched:
                fused.patch(model)
            if unit == "leaf":
                layer = lora_layer(model)
                for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
                    fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model(x).square().sum().backward()
            grads.append([p.grad.full_tensor() for p in model.parameters() if p.requires_grad])
        for expected, ours in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected, **CLOSE)
    finally:
        dist.destroy_process_group()
    assert [taken for taken, _ in lora_layer(model)._fused_lora.calls] == [path]


def test_the_report_says_what_was_fused_and_what_was_not():
    tiny = Tiny()
    tiny.embedding, tiny.replaced = nn.Embedding(5, 4), nn.Linear(4, 4)
    model = adapted(tiny, target_modules=["first", "embedding", "replaced"])
    replaced = lora_layer(model, "replaced")
    replaced.forward = replaced.forward
    report = fused.patch(model)
    assert report.fused == ("base_model.model.first",)
    assert report.left == {
        "base_model.model.embedding": "lora.Embedding has no fused class",
        "base_model.model.replaced": "its forward was replaced on the instance before patch",
    }
    assert str(report).splitlines() == [
        "fused-lora: 1 of 3 LoRA layers patched",
        "  1 left to PEFT: lora.Embedding has no fused class",
        "  1 left to PEFT: its forward was replaced on the instance before patch",
    ]
    assert fused.patch(model).fused == report.fused


def test_a_subclass_of_pefts_layer_is_left_alone():
    from peft.tuners.lora import layer as lora

    class Theirs(lora.Linear):
        pass

    model = adapted()
    lora_layer(model).__class__ = Theirs
    report = fused.patch(model)
    assert report.left == {"base_model.model.first": "lora.Theirs has no fused class"}
    assert type(lora_layer(model)) is Theirs


def test_explain_says_path_reason_backend_dtype_and_calls():
    model = adapted(dtype=torch.bfloat16)
    lines = fused.explain(model).splitlines()
    assert lines[0] == "base_model.model.first: peft (not patched, call patch(model))"
    fused.patch(model)
    lora_layer(model, "second").base_layer.register_forward_hook(lambda *arguments: None)
    expected = [
        "full (Linear base), aten in bfloat16, float32 adapters rounded to it "
        "(compute_dtype='base')",
        "delta (base has hooks), aten in bfloat16, float32 adapters rounded to it "
        "(compute_dtype='base')",
    ]
    first, second = fused.explain(model).splitlines()
    assert first == f"base_model.model.first: {expected[0]}; not called yet"
    assert second == f"base_model.model.second: {expected[1]}; not called yet"
    model(torch.randn(5, FIRST[0]).bfloat16())
    assert fused.explain(model).splitlines()[1].endswith("; so far 1 delta (base has hooks)")
    with torch.autocast("cpu", torch.float16):
        x = torch.randn(5, FIRST[0])
        assert "aten in float16" in fused.explain(lora_layer(model), x)


def test_a_method_kept_from_before_unpatch_still_works():
    model, x = adapted(), torch.randn(5, FIRST[0])
    expected = lora_layer(copy.deepcopy(model))(x)
    fused.patch(model)
    forward = lora_layer(model).forward
    fused.unpatch(model)
    assert torch.equal(forward(x), expected)
