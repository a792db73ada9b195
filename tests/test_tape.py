"""Which calls a tape is replayed for, and what a replay hands out: no GPU, no launch."""

import gc
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels


@pytest.fixture
def tape(monkeypatch):
    from fused_lora.kernels import tape

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(tape, "INTERPRETING", False)
    monkeypatch.setattr(tape, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(tape, "_tapes", {})
    return tape


def recorder(tape):
    """Whether a call records: True the first time, False where its tape is replayed."""
    calls = []

    def function(recording, x, *options):
        calls.append(1)
        return [recording.empty(x.shape)]

    def records(x, *options):
        before = len(calls)
        tape.play(function, (x,), options)
        return len(calls) > before

    return records


def test_a_tape_is_replayed_for_calls_of_the_same_facts_alone(tape):
    records = recorder(tape)
    storage = torch.zeros(64)
    x = storage[:16].view(4, 4)
    assert records(x, "a")
    assert not records(x, "a") and not records(storage[16:32].view(4, 4), "a")
    others = {
        "address": storage[1:17].view(4, 4),
        "strides": x.t(),
        "dtype": x.int(),
        "shape": storage[:20].view(5, 4),
    }
    for what, other in others.items():
        assert records(other, "a"), what
    assert records(x, "b"), "options"


def test_a_profiled_call_is_recorded_anew(tape, monkeypatch):
    records = recorder(tape)
    x = torch.zeros(4, 4)
    assert records(x) and not records(x)
    monkeypatch.setattr(tape, "_profiled", lambda: True)
    assert records(x)


def test_a_replay_returns_what_the_call_returned(tape):
    def function(recording, x):
        y, counters = recording.empty((2, 3)), recording.empty((5,), torch.int32, zeroed=True)
        return [counters, None, y]

    for turn in ("recorded", "replayed"):
        counters, nothing, y = tape.play(function, (torch.zeros(4, 4, dtype=torch.float16),), ())
        assert nothing is None and len(tape._tapes) == 1, turn
        assert counters.dtype == torch.int32 and counters.tolist() == [0] * 5, turn
        assert y.dtype == torch.float16 and y.shape == (2, 3), turn


def test_a_tape_is_the_threads_for_its_call_alone_and_holds_no_tensors(tape):
    def function(recording, x, fails):
        assert tape.recording() is recording
        y = recording.empty(x.shape)
        if fails:
            raise ValueError
        return [y]

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before = tensors()
    tape.play(function, (torch.zeros(3),), (False,))
    assert tape.recording() is None and len(tape._tapes) == 1
    assert tensors() == before
    with pytest.raises(ValueError):
        tape.play(function, (torch.zeros(3),), (True,))
    assert tape.recording() is None
