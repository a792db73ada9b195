"""How a call is timed and its memory and launches counted. Knows nothing of LoRA.

GPU: each provider's calls over all input sets are captured into one CUDA graph; the graphs are
replayed in turn, in a new random order each round, between two events. CPU: wall clock of single
calls, in rounds, in a new random order each round, every call on the next input set. The sets
together exceed the last-level cache three times over, so no call finds its operands warm.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

Call = Callable[[], object]

MAX_SETS = 64
MAX_SET_BYTES = 4 << 30
MIN_GRAPH_US = 500.0  # a replay shorter than this would be dominated by its own launch
HOST_ROUNDS = 20


@dataclass(frozen=True)
class Budget:
    """How long to sample: at least `min_samples` rounds, then until `seconds` are spent."""

    seconds: float
    min_samples: int
    max_samples: int


@dataclass(frozen=True)
class Samples:
    """Times of one provider. device_us pairs up with other providers' by round."""

    device_us: np.ndarray  # [rounds]
    host_us: np.ndarray  # [rounds] on a CPU, [HOST_ROUNDS] on a GPU


def input_sets(bytes_per_set: int, cache_bytes: int) -> int:
    """How many input sets exceed the cache three times over, within bounds on count and memory."""
    wanted = math.ceil(3 * cache_bytes / bytes_per_set)
    return max(2, min(wanted, MAX_SETS, MAX_SET_BYTES // bytes_per_set))


def measure(
    calls: dict[str, list[Call]], device: torch.device, budget: Budget, seed: int
) -> dict[str, Samples]:
    """Time every provider; `calls` maps a name to one callable per input set."""
    if not calls:
        return {}
    for provider_calls in calls.values():
        for call in provider_calls[:3]:
            call()
    order = random.Random(seed)
    with _garbage_collection_off():
        if device.type == "cuda":
            return _measure_cuda(calls, budget, order)
        return _measure_cpu(calls, budget, order)


def percentiles(samples_us: np.ndarray) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p20, p50, p80 = np.percentile(samples_us, (20, 50, 80))
    return float(p20), float(p50), float(p80)


def noise(merged: np.ndarray, again: np.ndarray, seed: int) -> float:
    """How far from 1 the ratio of two equal things may lie: 0.006 is 0.6 %.

    The larger end of the 95 % bootstrap interval of p50(again) / p50(merged), rounds resampled
    together: a lucky A/A pair cannot pass for a quiet machine.
    """
    generator = np.random.default_rng(seed)
    rounds = generator.integers(0, len(merged), (1000, len(merged)))
    ratios = np.median(again[rounds], axis=1) / np.median(merged[rounds], axis=1)
    return float(np.abs(np.percentile(ratios, (2.5, 97.5)) - 1).max())


def peak_bytes(call: Call, device: torch.device) -> int:
    """Largest number of bytes that were live at once through torch's allocator during the call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    live = peak = 0
    for event in _trace(call):
        if event.get("name") == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live)
    return peak


def launches(call: Call, device: torch.device) -> int | None:
    """Device launches (kernels, copies, fills) of one call; None without a GPU."""
    if device.type != "cuda":
        return None
    on_device = {"kernel", "gpu_memcpy", "gpu_memset"}
    return sum(event.get("cat") in on_device for event in _trace(call))


def fastest_us(call: Call, device: torch.device, samples: int) -> float:
    """The shortest of some times of one call: wall clock on a CPU, between events on a GPU."""
    call()
    if device.type == "cuda":
        return float(_event_us([call] * samples).min())
    times = []
    for _ in range(samples):
        start = time.perf_counter_ns()
        result = call()
        times.append((time.perf_counter_ns() - start) / 1e3)
        del result
    return min(times)


def _measure_cpu(
    calls: dict[str, list[Call]], budget: Budget, order: random.Random
) -> dict[str, Samples]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    sets = len(next(iter(calls.values())))
    turn = 0
    for names in _rounds(list(calls), budget, order):
        for name in names:
            call = calls[name][turn % sets]
            turn += 1
            start = time.perf_counter_ns()
            result = call()
            times[name].append((time.perf_counter_ns() - start) / 1e3)
            del result  # freeing the outputs is not part of the call
    return {name: Samples(np.array(t), np.array(t)) for name, t in times.items()}


def _measure_cuda(
    calls: dict[str, list[Call]], budget: Budget, order: random.Random
) -> dict[str, Samples]:
    graphs = {name: _capture(provider_calls) for name, provider_calls in calls.items()}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    previous_round_end = None
    for names in _rounds(list(calls), budget, order):
        for name in names:
            graph, _ = graphs[name]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events[name].append((start, end))
        if previous_round_end is not None:  # one round ahead: the GPU never waits for the host
            previous_round_end.synchronize()
        previous_round_end = end
    torch.cuda.synchronize()
    device_us = {
        name: np.array([s.elapsed_time(e) * 1e3 / graphs[name][1] for s, e in pairs])
        for name, pairs in events.items()
    }
    host_us: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(HOST_ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            torch.cuda.synchronize()
            start_ns = time.perf_counter_ns()
            for call in calls[name]:
                call()
            torch.cuda.synchronize()
            host_us[name].append((time.perf_counter_ns() - start_ns) / 1e3 / len(calls[name]))
    return {name: Samples(device_us[name], np.array(host_us[name])) for name in calls}


def _capture(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that runs every call, repeated until a replay is long enough, and its call count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture must find every lazy initialisation done
        for call in calls * 2:
            call()
    torch.cuda.current_stream().wait_stream(side)

    def captured(repeats: int) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # the outer block gives the stream back where a failed capture does not
        with torch.cuda.stream(stream), torch.cuda.graph(graph):
            for call in calls * repeats:
                call()
        return graph

    graph = captured(1)
    repeats = math.ceil(MIN_GRAPH_US / float(_event_us([graph.replay] * 3).min()))
    if repeats > 1:
        graph = captured(repeats)
    return graph, repeats * len(calls)


def _event_us(calls: list[Call]) -> np.ndarray:
    pairs = []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return np.array([start.elapsed_time(end) * 1e3 for start, end in pairs])


def _rounds(names: list[str], budget: Budget, order: random.Random) -> Iterator[list[str]]:
    """One random order of the providers per round, so that drift and neighbours hit all alike."""
    end = time.perf_counter() + budget.seconds
    for count in range(budget.max_samples):
        if count >= budget.min_samples and time.perf_counter() > end:
            return
        yield order.sample(names, len(names))


def _trace(call: Call) -> list[dict]:
    """What torch.profiler saw of one call, in the order it happened: operators, launches, and
    every allocation and free of the CPU allocator, those inside custom operators included."""
    with _quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted(events, key=lambda event: event.get("ts", 0))


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side writes its own log lines into the middle of a progress bar."""
    saved = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
