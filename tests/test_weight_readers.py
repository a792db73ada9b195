"""Layers whose weight the module around them reads itself: refused where known, else warned of."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_lora import apply_lora
from fused_lora.weight_readers import READERS, weights_read_in


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("read", "helped", "called", "asked", "above", "elsewhere"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x):
        return self.called(x) @ self.above.weight


class Reads(Base):
    def forward(self, x):
        x = F.linear(x, self.read.weight)
        x = self._help(x).to(self.asked.weight.dtype).type_as(self.asked.weight)
        if isinstance(self.asked.weight, torch.Tensor) and x.shape[0] != self.asked.weight.shape[0]:
            x = self.asked(x).to(self.asked.weight)
        if self.asked.weight is not None and hasattr(self.asked.weight, "quant_state"):
            x = x.to(self.asked.weight.data.dtype)
        return super().forward(x)

    def _help(self, x):
        return x @ self.helped.weight.t() + self.helped.bias

    def reset_parameters(self):
        nn.init.zeros_(self.elsewhere.weight)


def test_what_forward_and_its_helpers_read_is_found_and_nothing_else():
    assert weights_read_in(Reads) == {"read", "helped", "above"}
    assert weights_read_in(Base) == {"above"}


def test_what_has_no_source_is_not_looked_at():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n def forward(self, x): return self.a.weight", namespace)
    assert weights_read_in(namespace["Made"]) == set()
    namespace["Made"].__module__ = None
    namespace["Made"].forward.__wrapped__ = namespace["Made"].forward
    assert weights_read_in(type("Other", (namespace["Made"],), {"helper": torch.ones(2)})) == set()
    assert weights_read_in(nn.Module) == weights_read_in(nn.MultiheadAttention) == set()


def test_a_reader_is_warned_of_and_takes_its_adapter():
    model = nn.Sequential(Reads())
    with pytest.warns(UserWarning, match=r"Reads reads read.weight itself: .* adapter of 0.read"):
        apply_lora(model, r=2, lora_alpha=2, target_modules=["read", "called"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(nn.Sequential(Reads()), r=2, lora_alpha=2, target_modules=["called", "asked"])


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "intermediate_size": 24}
    if kind == "MobileBert":
        config = transformers.MobileBertConfig(
            **small | {"embedding_size": 16, "true_hidden_size": 16, "hidden_size": 24}
        )
        return transformers.MobileBertForMaskedLM(config)
    if kind == "Bloom":
        return transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=37, hidden_size=16, n_layer=1, n_head=2)
        )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))


def test_the_list_is_refused_and_named():
    with pytest.raises(TypeError, match=r"MobileBertLMPredictionHead reads dense.weight itself"):
        apply_lora(transformers_model("MobileBert"), r=2, lora_alpha=2, target_modules=["dense"])
    apply_lora(transformers_model("MobileBert"), r=2, lora_alpha=2)  # leaves it out
    assert all(names and isinstance(names, tuple) for names in READERS.values())


@pytest.mark.parametrize("kind", ["Bloom", "Llama"])
def test_usual_models_are_not_warned_of(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(transformers_model(kind), r=2, lora_alpha=2)


def test_an_output_layer_is_warned_of():
    with pytest.warns(
        UserWarning, match="lm_head is the output layer: losses that read its weight"
    ):
        apply_lora(transformers_model("Llama"), r=2, lora_alpha=2, target_modules=["lm_head"])


def test_somebody_elses_class_of_the_same_name_is_not_on_the_list():
    class SparseAutoEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(4, 4)

        def forward(self, x):
            return self.encoder(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_lora(nn.Sequential(SparseAutoEncoder()), r=2, lora_alpha=2)


def test_a_warning_names_the_line_that_called():
    with pytest.warns(UserWarning) as caught:
        apply_lora(nn.Sequential(Reads()), r=2, lora_alpha=2, target_modules=["read", "nope"])
        apply_lora(nn.Sequential(Reads()), r=2, lora_alpha=2, adapters={"a": {}})
    assert len(caught) == 5 and {each.filename for each in caught} == {__file__}
