"""A recorded call hands the driver what Triton's own launch path would have handed it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import replay_facts

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(sys.platform != "linux", reason="the stub stands in for Linux's libcuda"),
    pytest.mark.skipif(
        shutil.which("cc") is None and shutil.which("gcc") is None,
        reason="needs a C compiler for its stub of libcuda, there is none",
    ),
]


@pytest.fixture(scope="module")
def facts():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(replay_facts.__file__)
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", replay_facts.cases())
def test_a_replay_launches_what_triton_launches(case, facts):
    """Functions, grids, shared memory, attributes, and every parameter of every kernel."""
    assert facts[case]["replayed"] == facts[case]["triton"] != []


@pytest.mark.parametrize("case", replay_facts.cases())
def test_a_call_is_recorded_unless_its_tensors_cannot_be_told_apart(case, facts):
    """Four calls; the two of the adapter term alone are not made with several adapters, and do not
    see the weight that shares x's storage."""
    assert facts[case]["tapes"] == (2 if case in replay_facts.TWO_TAPES else 4)


def test_recorded_launches_carry_programmatic_dependence(facts):
    """Launch attributes, the last entry of the setup: on the matmuls behind a shrink, and on the
    rank_grad that runs behind dX. Launches: forward's two, then shrink, matmul, rank_grad."""
    portable, pdl, hopper = (
        [launch[6] for launch in facts[case]["replayed"]][:5]
        for case in ("portable", "pdl", "hopper")
    )
    assert [a - b for a, b in zip(pdl, portable, strict=True)] == [0, 1, 0, 1, 0]
    assert [a - b for a, b in zip(hopper, portable, strict=True)] == [0, 1, 0, 1, 1]


def test_the_layers_of_a_deep_model_keep_their_tensor_maps(facts):
    assert facts[replay_facts.MAPS] == {"1": 0, "100": 0}


def test_tapes_hold_addresses_and_no_tensors(facts):
    assert facts[replay_facts.KEPT] == dict.fromkeys(("portable", "pdl", "hopper", "decode"), 0)


def test_where_all_places_are_taken_the_oldest_makes_room():
    from fused_lora.kernels import tape

    kept = {}
    for key in "abcd":
        tape._keep(kept, key, key.upper(), 3)
    assert kept == {"b": "B", "c": "C", "d": "D"}
