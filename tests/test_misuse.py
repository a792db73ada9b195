"""Arguments of the wrong type end in words, at every public function, and change nothing."""

import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import (
    AdapterPack,
    FusedLoRALinear,
    MultiLoRALinear,
    apply_lora,
    explain,
    load_adapter,
    lora_linear,
    multi_lora_linear,
    save_adapter,
    use_adapters,
)
from fused_lora.delta import lora_delta

K, N = 6, 4
X = torch.ones(3, K)
A, B = torch.ones(2, K), torch.ones(N, 2)


def plain():
    return nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))


def adapted(**options):
    return apply_lora(plain(), r=2, lora_alpha=4, **options)


def packed():
    pack = AdapterPack(K, N, total_rank=32)
    pack.add("a", A, B)
    return pack


MODEL_FUNCTIONS = {
    "apply_lora": lambda m: apply_lora(m, r=2, lora_alpha=4),
    "mark": fused_lora.mark_only_lora_as_trainable,
    "lora_state_dict": fused_lora.lora_state_dict,
    "trainable_parameters": fused_lora.trainable_parameters,
    "merge_adapter": fused_lora.merge_adapter,
    "unmerge_adapter": fused_lora.unmerge_adapter,
    "unload": fused_lora.unload,
    "disable_adapters": lambda m: fused_lora.disable_adapters(m).__enter__(),
    "load_adapter": lambda m: load_adapter(m, "nowhere"),
    "save_adapter": lambda m: save_adapter(m, "nowhere"),
    "add_adapter": lambda m: fused_lora.add_adapter(m, "a", r=2, lora_alpha=4),
    "delete_adapter": lambda m: fused_lora.delete_adapter(m, "a"),
    "explain": explain,
    "use_adapters": lambda m: use_adapters(m, ["a"]).__enter__(),
}


@pytest.mark.parametrize("model", [None, "gpt2", [nn.Linear(2, 2)], X], ids=lambda m: str(type(m)))
@pytest.mark.parametrize("name", MODEL_FUNCTIONS)
def test_a_model_must_be_a_module(name, model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}, expected a torch.nn"):
        MODEL_FUNCTIONS[name](model)


MISUSES = {
    "targets a number": (lambda: adapted(target_modules=1), "target_modules must be a list of"),
    "targets hold None": (lambda: adapted(target_modules=["0", None]), "target_modules holds None"),
    "excluded bytes": (lambda: adapted(exclude_modules=[b"0"]), "exclude_modules holds b'0'"),
    "patterns in a list": (lambda: adapted(rank_pattern=["0"]), "rank_pattern must map names"),
    "pattern of a number": (lambda: adapted(alpha_pattern={1: 4}), "alpha_pattern's keys holds 1"),
    "adapters a list": (lambda: adapted(adapters=["a"]), "adapters must map names"),
    "an adapter of None": (
        lambda: adapted(adapters={"a": None}),
        r"adapters\['a'\] must be options",
    ),
    "whole modules a string": (
        lambda: save_adapter(adapted(), "nowhere", modules_to_save="head"),
        "modules_to_save must be a list of names: got 'head'",
    ),
    "whole modules of numbers": (
        lambda: fused_lora.mark_only_lora_as_trainable(adapted(), modules_to_save=[1]),
        "modules_to_save holds 1",
    ),
    "explain numpy": (lambda: explain(adapted(), np.ones((3, K))), "x must be a floating tensor"),
    "explain integers": (lambda: explain(adapted(), X.long()), "x must be a floating tensor"),
    "explain no dimension": (lambda: explain(adapted(), X[0, 0]), "x must be a floating tensor"),
    "use_adapters None": (lambda: use_adapters(adapted(), None).__enter__(), "ids is None"),
    "use_adapters numbers": (
        lambda: use_adapters(MultiLoRALinear(K, N, total_rank=16), [0, 0]).__enter__(),
        "ids holds 0, expected names or None: pass numbers as a tensor",
    ),
    "no pack": (
        lambda: multi_lora_linear(X, torch.ones(N, K), {}, torch.zeros(3)),
        "pack is a dict, expected an AdapterPack",
    ),
    "pack names in one string": (lambda: packed().ids("a"), "expected a list of adapters' names"),
    "pack name a list": (lambda: packed().id(["a"]), "an adapter's name must be a string"),
    "pack add a list": (lambda: packed().add(["b"], A, B), "an adapter's name must be a string"),
    "pack add None": (lambda: packed().add("b", None, B), "lora_A is a NoneType, expected"),
    "pack add numpy": (lambda: packed().add("b", A, B.numpy()), "lora_B is a ndarray, expected"),
    "pack add integers": (lambda: packed().add("b", A.long(), B), "lora_A has dtype torch.int64"),
    "pack add complex": (lambda: packed().add("b", A, B + 0j), "lora_B has dtype torch.complex64"),
    "pack of integers": (
        lambda: AdapterPack(K, N, total_rank=16, dtype=torch.int8),
        "adapter_dtype must be",
    ),
    "set_adapter None": (
        lambda: FusedLoRALinear(K, N).set_adapter(None, B, lora_alpha=1),
        "lora_A is a NoneType, expected a torch.Tensor",
    ),
    "set_adapter numpy": (
        lambda: FusedLoRALinear(K, N).set_adapter(A, B.numpy(), lora_alpha=1),
        "lora_B is a ndarray, expected a torch.Tensor",
    ),
    "set_adapter a word": (
        lambda: FusedLoRALinear(K, N).set_adapter(A, B, lora_alpha=1, use_rslora="no"),
        "use_rslora must be True or False: got 'no'",
    ),
    "complex base": (lambda: FusedLoRALinear(K, N, dtype=torch.complex64), "adapter_dtype must be"),
    "delta of None": (lambda: lora_delta(torch.ones(3, N), None, A, B), "x is a NoneType"),
    "delta of numpy": (lambda: lora_delta(X.numpy(), X, A, B), "base_output is a ndarray"),
}


@pytest.mark.parametrize("what", MISUSES)
def test_the_wrong_type_is_named(what):
    call, message = MISUSES[what]
    with pytest.raises(TypeError, match=message):
        call()


OUT_OF_RANGE = {
    "r missing": (lambda: apply_lora(plain(), lora_alpha=4), "apply_lora needs r and lora_alpha"),
    "alpha a flag": (lambda: FusedLoRALinear(K, N, lora_alpha=True), "lora_alpha must be a finite"),
    "total_rank a flag": (
        lambda: AdapterPack(K, N, total_rank=True),
        "total_rank must be an integ",
    ),
    "max_adapters a word": (
        lambda: AdapterPack(K, N, total_rank=16, max_adapters="8"),
        "max_adapters must be an integer",
    ),
    "untrained of rank 8.0": (
        lambda: packed().add_untrained("b", 8.0),
        "r must be an integer of at least 1: got 8.0",
    ),
    "scaling a word": (
        lambda: packed().add("b", A, B, scaling="2"),
        "scaling of adapter 'b' must be a finite number: got '2'",
    ),
    "num_beams a word": (
        lambda: use_adapters(adapted(), ["a"], num_beams="2").__enter__(),
        "num_beams must be an integer of at least 1: got '2'",
    ),
    "a linear layer alone": (
        lambda: apply_lora(nn.Linear(K, N), r=2, lora_alpha=4),
        "FusedLoRALinear.from_linear makes a LoRA layer",
    ),
}


@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(what):
    call, message = OUT_OF_RANGE[what]
    with pytest.raises(ValueError, match=message):
        call()


NUMBERS = {"numpy": (np.int64(2), np.float32(4), np.float64(0.5)), "exact": (2, Fraction(4), 0.5)}


@pytest.mark.parametrize("numbers", NUMBERS)
def test_numbers_of_other_libraries_train_and_are_saved(numbers, tmp_path):
    r, lora_alpha, lora_dropout = NUMBERS[numbers]
    model = apply_lora(plain(), r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    model(X).sum().backward()
    model[0].set_adapter(torch.ones(2, K), torch.ones(N, 2), lora_alpha=lora_alpha)
    save_adapter(model, tmp_path)
    loaded = load_adapter(plain(), tmp_path)
    assert (loaded[0].r, loaded[0].scaling, loaded[0].lora_dropout) == (2, 2.0, 0.5)
    given = X, torch.ones(N, K), A, B
    ys = [lora_linear(*given, dropout_p=p, seed=torch.tensor(3)) for p in (0.5, np.float32(0.5))]
    assert torch.equal(*ys)
    pack = AdapterPack(K, N, total_rank=np.int32(5), max_adapters=np.int64(2))
    pack.add("a", A, B, scaling=np.float32(2))
    assert pack.total_rank == 16 and pack.get_extra_state() is not None
    layer = MultiLoRALinear(K, N, total_rank=16, lora_dropout=np.float32(0.5))
    layer(X, torch.full((3,), -1))


@pytest.mark.parametrize("variable", ["FUSED_LORA_PATH", "FUSED_LORA_CHECK_IDS"])
def test_a_variable_of_the_environment_that_means_nothing_is_refused(variable):
    environment = os.environ | {variable: "nonsense"}
    done = subprocess.run(
        [sys.executable, "-c", "import fused_lora"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and f"ValueError: {variable} must be" in done.stderr
    command = [sys.executable, "-c", "import fused_lora"]
    subprocess.run(command, env=environment | {variable: ""}, check=True)
