"""What LoRA costs on the model of examples/paper.py: latency by the benchmarks' own protocol,
switching tasks, and the memory of training."""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import data
import safetensors.torch
import torch
from paper_runs import Method, add_adapters, build, loss_of, optimizer_of
from torch import Tensor, nn

import fused_lora

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import machine
import protocol
import results

__all__ = ["adapted", "latency", "machine", "memory", "results", "switching"]

BASE, MERGED, AGAIN, UNMERGED = "base", "merged", "merged (A/A)", "unmerged"
SHAPES = ((1, 32), (16, 32))  # sentences, tokens
SWITCHES = 20


def adapted(encoder: nn.Module, method: Method, factors: dict[str, Tensor]) -> nn.Module:
    """A copy of the encoder with a trained adapter in it, unmerged; factors as in
    `fused_lora.lora_state_dict`."""
    model = copy.deepcopy(encoder)
    add_adapters(model, method)
    model.load_state_dict(factors, strict=False)
    return model.eval().requires_grad_(False)


def latency(
    encoder: nn.Module, make: Callable[[], nn.Module], seconds: float
) -> dict[str, dict[str, dict]]:
    """Forward passes of the whole encoder: as it is, merged, merged again (what equal things differ
    by) and unmerged, over as many copies of the weights as exceed the cache three times."""
    weights = sum(p.nbytes for name, p in encoder.named_parameters() if "embeddings" not in name)
    count = protocol.input_sets(weights, machine.cache_bytes(torch.device("cpu")))

    def merged() -> nn.Module:
        model = make()
        fused_lora.merge_adapter(model, keep_base=False)
        return model

    makers = {BASE: lambda: copy.deepcopy(encoder).eval(), MERGED: merged, AGAIN: merged}
    makers[UNMERGED] = make
    models = {name: [maker() for _ in range(count)] for name, maker in makers.items()}
    cases = {}
    for sentences, tokens in SHAPES:
        generator = torch.Generator().manual_seed(0)
        high = encoder.config.vocab_size
        ids = torch.randint(high, (sentences, tokens), generator=generator)
        calls = {
            name: [lambda model=model, ids=ids: model(input_ids=ids) for model in copies]
            for name, copies in models.items()
        }
        budget = protocol.Budget(seconds=seconds, min_samples=30, max_samples=400)
        with torch.inference_mode():
            samples = protocol.measure(calls, torch.device("cpu"), budget, seed=0)
        times = {name: protocol.percentiles(got.device_us) for name, got in samples.items()}
        rows: dict = {
            name: {
                "p20_us": round(p20, 1),
                "p50_us": round(p50, 1),
                "p80_us": round(p80, 1),
                "over_base": round(p50 / times[BASE][1], 4),
            }
            for name, (p20, p50, p80) in times.items()
        }
        rows["noise"] = round(
            protocol.noise(samples[MERGED].device_us, samples[AGAIN].device_us, seed=0), 4
        )
        rows["samples"] = len(samples[BASE].device_us)
        cases[f"{sentences} x {tokens} tokens"] = rows
    return cases


def switching(encoder: nn.Module, models: list[nn.Module]) -> dict[str, float | int | bool]:
    """From one adapter to another in a merged model that serves, against another whole model.

    A switch reads the files, takes the old update out and merges the new one. Files are in the
    system's cache, for both ways alike.
    """
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(len(models))]
        for model, folder in zip(models, folders, strict=True):
            fused_lora.save_adapter(model, folder)
        served = copy.deepcopy(models[0])
        fused_lora.merge_adapter(served)
        first = _weights(served)
        adapter_ms = _milliseconds(
            [lambda folder=folder: fused_lora.load_adapter(served, folder) for folder in folders]
        )
        fused_lora.load_adapter(served, folders[0])
        again_equal = _equal(_weights(served), first)
        fused_lora.unmerge_adapter(served)
        after = {name: value for name, value in _weights(served).items() if name in before}
        whole = Path(scratch, "model.safetensors")
        safetensors.torch.save_file(before, whole)
        plain = copy.deepcopy(encoder)
        model_ms = _milliseconds(
            [lambda: plain.load_state_dict(safetensors.torch.load_file(whole))] * len(folders)
        )
        return {
            "adapter_ms": round(adapter_ms, 3),
            "model_ms": round(model_ms, 3),
            "adapter_bytes": sum(file.stat().st_size for file in folders[1].iterdir()),
            "model_bytes": whole.stat().st_size,
            "base_restored": _equal(after, before),
            "merged_again_equal": again_equal,
        }


def memory(
    encoder: nn.Module, classes: int, methods: list[Method], batch: data.Encoded
) -> dict[str, dict[str, int]]:
    """Gradients and optimizer state after one step, counted tensor by tensor, and the most bytes
    that the step held at once beyond the weights (activations, gradients, optimizer state)."""
    rows = {}
    for method in methods:
        model = build(method, encoder, classes, seed=0)
        optimizer = optimizer_of(model, rate=0.0)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss_of(model, batch).backward()
            optimizer.step()

        peak = protocol.peak_bytes(step, torch.device("cpu"))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        state = [
            value
            for entry in optimizer.state.values()
            for value in entry.values()
            if isinstance(value, Tensor) and value.dim() > 0  # not the count of steps
        ]
        rows[str(method)] = {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "gradient_bytes": sum(tensor.nbytes for tensor in gradients),
            "optimizer_bytes": sum(tensor.nbytes for tensor in state),
            "peak_bytes": peak,
        }
    return rows


def _milliseconds(calls: list[Callable[[], object]]) -> float:
    """Median time of a call, the calls in turn."""
    times = []
    for turn in range(SWITCHES + 2):
        start = time.perf_counter()
        calls[(turn + 1) % len(calls)]()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
