"""One group of candidates on one case: each is checked, then all are timed together with the merged
layer and its A/A twin. Used by campaign.py and tune.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import machine
import protocol
import torch
from candidates import Candidate, Merged, operands
from checks import Judge
from protocol import Budget, Samples
from providers import first_line, random_inputs
from results import MERGED, MERGED_AGAIN, Case

Row = dict[str, Any]
QUICK = Budget(seconds=0.0, min_samples=3, max_samples=3)


@dataclass(frozen=True)
class Group:
    """Candidates for the same results of one case.

    directions: what the merged layer computes beside them, of "fwd" and "dx". predicted: the
    expected time of some candidates over that of `yardstick`, a candidate of the group. goal: what
    the best of them should reach over merged. bytes: what each moves at least, for GB/s.
    """

    name: str
    case: Case
    directions: tuple[str, ...]
    candidates: Sequence[Candidate]
    predicted: dict[str, float] = field(default_factory=dict)
    yardstick: str = MERGED
    goal: float | None = None
    bytes: int = 0

    def everybody(self) -> list[Candidate]:
        twins = [Merged(name, self.directions) for name in (MERGED, MERGED_AGAIN)]
        return [*twins, *self.candidates]


class ContextLost(Exception):
    """The GPU refuses all further work of this process."""


def measure(
    group: Group,
    device: torch.device,
    budget: Budget,
    seed: int = 0,
    started: Callable[[str], object] = lambda what: None,
) -> list[Row]:
    """A row for every candidate: name, ok, note, and for the accepted ones times and ratios.

    `started` is told the name of the candidate that is checked next, "" when timing begins.
    Raises ContextLost if a candidate broke the process's CUDA context.
    """
    generator = torch.Generator(device).manual_seed(seed)
    judge = Judge(group.case, device, generator)
    rows: dict[str, Row] = {}
    for candidate in group.everybody():
        started(candidate.name)
        verdict = judge.judge(
            lambda inputs, c=candidate: c.prepare(operands(inputs))(), candidate.rule
        )
        _still_alive(device, verdict.note)
        rows[candidate.name] = {
            "name": candidate.name, "ok": verdict.ok, "note": verdict.note,
            "rel_l2": verdict.rel_l2, "rel_l2_vs_eager": verdict.rel_l2_vs_eager,
        }  # fmt: skip
    del judge
    started("")
    first = random_inputs(group.case, device, generator)
    count = protocol.input_sets(first.x.nbytes + first.weight.nbytes, machine.cache_bytes(device))
    inputs = [first, *(random_inputs(group.case, device, generator) for _ in range(count - 1))]
    sets = [operands(i) for i in inputs]
    calls: dict[str, list[protocol.Call]] = {
        c.name: [c.prepare(o) for o in sets] for c in group.everybody() if rows[c.name]["ok"]
    }
    samples = _timed(calls, rows, device, budget, seed)
    _add_times(group, rows, samples, seed)
    return list(rows.values())


def _timed(
    calls: dict[str, list[protocol.Call]],
    rows: dict[str, Row],
    device: torch.device,
    budget: Budget,
    seed: int,
) -> dict[str, Samples]:
    """Samples of all; who cannot be timed (captured in a graph, say) is left out with a note."""
    try:
        return protocol.measure(calls, device, budget, seed)
    except Exception as error:
        _still_alive(device, first_line(error))
    for name in list(calls):
        try:
            protocol.measure({name: calls[name]}, device, QUICK, seed)
        except Exception as error:
            note = f"cannot be timed: {type(error).__name__}: {first_line(error)}"
            _still_alive(device, note)
            rows[name] |= {"ok": False, "note": note}
            del calls[name]
    return protocol.measure(calls, device, budget, seed)


def _add_times(group: Group, rows: dict[str, Row], samples: dict[str, Samples], seed: int) -> None:
    p50 = {name: protocol.percentiles(s.device_us)[1] for name, s in samples.items()}
    noise = None
    if MERGED in samples and MERGED_AGAIN in samples:
        pair = (samples[name].device_us for name in (MERGED, MERGED_AGAIN))
        noise = round(protocol.noise(*pair, seed), 4)
    for name, timed in samples.items():
        p20, _, p80 = protocol.percentiles(timed.device_us)
        rows[name] |= {
            "p20_us": round(p20, 3), "p50_us": round(p50[name], 3), "p80_us": round(p80, 3),
            "samples": len(timed.device_us), "noise": noise,
            "host_p50_us": round(protocol.percentiles(timed.host_us)[1], 3),
            "vs_merged": round(p50[name] / p50[MERGED], 4) if MERGED in p50 else None,
        }  # fmt: skip
        if group.yardstick in p50:
            rows[name]["vs_yardstick"] = round(p50[name] / p50[group.yardstick], 4)
        if group.bytes:
            rows[name]["gbs"] = round(group.bytes / p50[name] / 1e3, 1)


def _still_alive(device: torch.device, note: str | None) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        raise ContextLost(f"{note or ''} {first_line(error)}".strip()) from error
