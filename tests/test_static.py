"""What a machine without a GPU can promise about the compiled kernels, for every shipped
configuration, on every supported architecture, with the newest Triton and the oldest."""

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from undefined import undefined_registers

from fused_lora.kernels import config

HERE = Path(__file__).parent
TARGETS = [name for name in config.defaults() if name != "interpreter"]
OLD_TRITON = os.environ.get("FUSED_LORA_OLD_TRITON")
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
OLDEST = pytest.mark.skipif(
    not OLD_TRITON, reason="FUSED_LORA_OLD_TRITON names no folder with the oldest Triton"
)
VERSIONS = ["installed", pytest.param("oldest", marks=OLDEST)]
every_target = pytest.mark.parametrize("target", TARGETS)
every_version = pytest.mark.parametrize("version", VERSIONS)


def compile_all(target, version):
    """{case: facts} of one target, compiled in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if version == "oldest":
        environment["PYTHONPATH"] = OLD_TRITON
    done = subprocess.run(
        [sys.executable, HERE / "compile_facts.py", target],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["facts"]


COMPILERS = ThreadPoolExecutor(2)


@functools.cache
def compilation(target, version):
    return COMPILERS.submit(compile_all, target, version)


@pytest.fixture
def facts(target, version):
    if OLD_TRITON:  # both at once: the oldest's turn comes next
        compilation(target, "oldest")
    return compilation(target, version).result()


def failing(facts, judge, op=""):
    """The cases of `op` whose facts the judge does not accept, with those facts."""
    chosen = {case: found for case, found in facts.items() if op in case}
    return {case: found for case, found in chosen.items() if not judge(found)}


@every_version
@every_target
def test_every_shipped_configuration_compiles(facts):
    assert len(facts) > 20
    assert not failing(facts, lambda found: "error" not in found)


@every_version
@every_target
def test_nothing_spills(facts):
    assert not failing(facts, lambda found: found["stack"] == 0 and found["spills"] == 0)


@every_version
@every_target
def test_shared_memory_fits_the_part(facts):
    limit = SHARED_LIMIT[next(iter(facts)).split()[0]]
    assert not failing(facts, lambda found: found["shared"] <= limit)


@every_version
@every_target
def test_tensor_cores_are_used_and_never_serialized(facts):
    target = next(iter(facts)).split()[0]
    sixteen = {case: found for case, found in facts.items() if "16-bit" in case}
    unit = {"sm_90": "hgmma", "sm_100": "tcgen05", "gfx942": "mfma"}.get(target, "hmma")
    either = ("hmma", unit)
    assert not failing(sixteen, lambda found: any(found.get(kind) for kind in either))
    assert not failing(facts, lambda found: not found.get("serialized"))


@every_version
@every_target
def test_fp32_products_start_from_zero(facts):
    """What the interpreter, which multiplies with numpy, cannot tell (`kernels/sums.py`)."""
    fp32 = {case: found for case, found in facts.items() if "32-bit" in case}
    assert not failing(fp32, lambda found: found["chained_products"] == 0)


@every_version
@pytest.mark.parametrize("target", [*(t for t in TARGETS if t.startswith("sm_")), "ragged-sm_90"])
def test_no_register_is_read_that_nothing_wrote(facts):
    """The ptxas of Triton 3.6 compiled narrow loads to such code once, without a word."""
    assert len(facts) > 20
    assert not failing(facts, lambda found: found.get("undefined_registers") == [])


@every_version
@pytest.mark.parametrize("target", ["sm_90"])
def test_descriptor_matmul_rides_one_pipeline_of_full_width(facts):
    """On sm_90: full-width wgmma, operands by TMA alone, and the wait between two pipelined loops.
    The adapter adds no tensor core instruction and no load to the loop of the plain product."""
    cases = {case: found for case, found in facts.items() if "matmul_descriptor" in case}
    assert cases
    for case, found in cases.items():
        tiles = found["config"]
        loads = 2 * tiles["num_stages"]  # x and w: stages - 1 in the prologue and one in the loop
        loops = 2 if "pdl=True" in case else 1
        assert found["hgmma_widths"] == [f"64x{tiles['BLOCK_N']}x16"], case
        assert found["hgmma"] == loops * tiles["BLOCK_K"] // 16, case
        assert found["tma_loads"] == loops * loads, case
        assert found["hmma"] == found["async_copies"] == 0, case
        # exactly one wait, with one whole loop of tensor core work before it
        expected = [tiles["BLOCK_K"] // 16] if loops == 2 else []
        assert found["waits"] == expected, case


@every_version
@pytest.mark.parametrize("target", ["sm_90"])
def test_the_hopper_matmul_is_of_full_width_and_has_neighbours(facts):
    """Full-width wgmma and operands by TMA alone. Beside the form that leaves room, a shrink of
    low rank is resident on the same SM, and so is rank_grad behind dX."""
    cases = {case: found for case, found in facts.items() if "matmul_hopper" in case}
    beside = {case: found for case, found in facts.items() if "matmul_beside" in case}
    assert cases and beside
    for case, found in {**cases, **beside}.items():
        width = found["config"]["BLOCK_N"]
        widths = {f"64x{width}x16"} | ({"64x64x16"} if "dropout" in case else set())
        assert set(found["hgmma_widths"]) == widths, case
        assert found["hmma"] == found["async_copies"] == 0, case
    small = "r=16"
    shrinks = [f for case, f in facts.items() if "shrink_beside" in case and small in case]
    grads = [f for case, f in facts.items() if f"rank_grad[0] {small} behind" in case]
    masked = [f for case, f in facts.items() if f"rank_grad[1] {small} dropout" in case]
    assert shrinks and grads and masked
    for case, found in beside.items():
        if "forward" in case and small not in case:
            continue
        behind = [] if "forward" in case else masked if "dropout" in case else grads
        for neighbour in [*shrinks, *behind]:
            both = (found, neighbour)
            assert sum(f["shared"] + RESERVED for f in both) <= SHARED_OF_AN_SM, case
            assert sum(registers(f) for f in both) <= REGISTERS_OF_AN_SM, case


RESERVED = 1024  # bytes of shared memory that every program takes beside its own
SHARED_OF_AN_SM, REGISTERS_OF_AN_SM = 228 * 1024, 65_536


def registers(found):
    """Of all threads of a program; they are given out by eights."""
    return -(-found["registers"] // 8) * 8 * 32 * found["config"]["num_warps"]


def test_a_register_that_nothing_wrote_is_noticed():
    """A test of the tests: what ptxas made of the single mode once, and forms that are right."""
    right = """
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;   /* 0x0000820000047ab9 */
        /*0020*/                   S2UR UR8, SR_CgaCtaId ;
        /*0030*/              @UP0 ULOP3.LUT UP1, UR9, UR8, 0x3fff, URZ, 0xc0, !UPT ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64+0x80] ;
        /*0050*/                   SYNCS.EXCH.64 URZ, [UR8], UR4 ;
        /*0060*/                   UIADD3.64 UR18, UR4, UR8, URZ ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, R52, gdesc[UR16], R24, gsb0 ;
        /*0080*/                   UPRMT UR6, UR6, 0x3340, UR6 ;
        /*0090*/                   LDSM.16.M88.4 R28, [R10+UR6+0xc000] ;
    """
    assert undefined_registers(right) == []
    wrong = (
        "UIADD3 UR22, UP0, UR22, 0x20, URZ",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16].tnspB, R24",
        "HGMMA.64x64x16.F32.BF16 R24, R52, gdesc[UR4], R24",
        "UTCHMMA gdesc[UR4], gdesc[UR22], tmem[UR8], tmem[UR8], idesc[UR9], UPT",
        "STG.E.128 desc[UR19][R2.64], R4",
        "UISETP.GE.AND UP0, UPT, UR7, UR8, UPT",
    )
    for instruction in wrong:
        assert undefined_registers(f"{right}/*00a0*/   {instruction} ;") == [instruction]


def test_a_spilling_configuration_is_noticed():
    """A test of the tests: four warps cannot hold a 128 x 256 accumulator."""
    script = (
        "import compile_facts as c; from fused_lora.kernels import config;"
        "t = config.defaults()['sm_90']; tiles = config.Matmul(128, 256, 64, 8, 4, 3);"
        "t['16'] = dict.fromkeys(config.KINDS, []) | {'matmul_descriptor': [tiles]};"
        "t['32'] = dict.fromkeys(config.KINDS, []);"
        "import json; print(json.dumps(c.facts_of('sm_90', 'plain forward')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=True,
    )
    (found,) = json.loads(done.stdout).values()
    assert found["stack"] > 0 or found["spills"] > 0
