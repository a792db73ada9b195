"""The choice of kernels and tiles is a pure function: tested for GPUs that are not there."""

import json

import pytest

from fused_lora.kernels import config

H100 = config.Device("NVIDIA H100 80GB HBM3", "cuda", 90, 132)
B200 = config.Device("NVIDIA B200", "cuda", 100, 148)
A100 = config.Device("NVIDIA A100-SXM4-80GB", "cuda", 80, 108)
RTX5090 = config.Device("NVIDIA GeForce RTX 5090", "cuda", 120, 170)
MI300 = config.Device("AMD Instinct MI300X", "hip", 94, 304)


def choose(device, M, N, K, r, bits=16, forced="auto", **changes):
    options = {"drawn": False, "masked": False, "followed": False, "addressable": True, **changes}
    return config.choose_product(forced, device, bits, M, N, K, r, **options)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Write a measured table for a device; configuration files are read anew."""

    def write(device, entries, triton=None):
        (tmp_path / "default.json").write_text((config.TUNED / "default.json").read_text())
        content = {"triton": triton or config.triton_minor(), "measured": True, "entries": entries}
        (tmp_path / f"{config.file_name(device.name)}.json").write_text(json.dumps(content))
        monkeypatch.setattr(config, "TUNED", tmp_path)
        forget()

    def forget():
        for cached in (config.tuned, config.choose_product, config.choose_backend):
            cached.cache_clear()

    yield write
    monkeypatch.undo()
    forget()


def test_training_shapes_on_hopper_hide_shrink_behind_the_matmul():
    plan = choose(H100, 8192, 4096, 4096, 16)
    assert plan.path == "hopper"
    assert choose(B200, 8192, 4096, 4096, 16).path == "pdl"
    assert (plan.matmul.BLOCK_M, plan.matmul.BLOCK_N) == (128, 256)
    assert plan.launches == 2 and plan.memsets == 0


def test_shrink_takes_the_idle_sms_of_the_last_wave_or_all():
    # 64 x 16 tiles on 132 SMs leave 32 idle in the last wave; 8192 rows are 64 blocks
    plan = choose(H100, 8192, 4096, 4096, 16)
    assert plan.shrink_programs == 32
    # one wave of 64 x 4 tiles leaves 8 idle, far too few: all of them, with tiles of their own
    plan = choose(H100, 8192, 1024, 4096, 16)
    assert plan.shrink_programs == 128 and plan.shrink.BLOCK_M == 64
    # which at larger ranks would be too slow, so that they are as large as in the window
    plan = choose(H100, 8192, 1024, 4096, 64)
    assert plan.shrink_programs == 64 and plan.shrink.BLOCK_M == 128


def test_a_few_hundred_tokens_take_tiles_that_fill_the_device():
    tiles = {M: choose(H100, M, 4096, 4096, 16).matmul for M in (128, 256, 512, 1024)}
    sizes = {M: (t.BLOCK_M, t.BLOCK_N) for M, t in tiles.items()}
    assert sizes == {128: (64, 64), 256: (64, 128), 512: (128, 128), 1024: (128, 256)}


def test_shrink_takes_short_tiles_only_where_long_ones_would_be_late():
    rows = {M: choose(H100, M, 4096, 4096, 16, followed=True).shrink.BLOCK_M for M in (128, 2048)}
    assert rows == {128: 16, 2048: 64}
    plan = choose(H100, 128, 4096, 4096, 64)  # four rank blocks of 16 each
    assert plan.shrink.BLOCK_M == 16 and plan.shrink_programs == 8


def test_drawing_a_mask_takes_every_sm():
    plan = choose(H100, 8192, 4096, 4096, 16, drawn=True)
    assert plan.path == "hopper" and plan.shrink_programs == 256


def test_few_tokens_take_one_decode_launch():
    assert choose(H100, 1, 4096, 4096, 16).path == "decode"
    assert choose(H100, 64, 1024, 4096, 64).path == "decode"
    assert choose(H100, 65, 4096, 4096, 16).path == "hopper"
    assert choose(H100, 16, 4096, 4096, 128).path == "hopper"


def test_a_batch_of_tokens_takes_narrow_tiles_if_they_fill_the_device():
    plan = choose(H100, 64, 4096, 4096, 16)
    assert plan.path == "single" and plan.matmul.BLOCK_N == 32
    # which would form S anew twice as wide as they are
    assert choose(H100, 64, 4096, 4096, 64).path == "hopper"
    assert choose(H100, 64, 14336, 4096, 16).matmul.BLOCK_N == 128
    assert choose(A100, 64, 4096, 4096, 16).path == "decode"


def test_dropout_never_takes_a_path_that_cannot_mask():
    assert choose(H100, 1, 4096, 4096, 16, drawn=True).path == "hopper"
    assert choose(H100, 8192, 4096, 4096, 16, masked=True).path == "hopper"
    assert choose(H100, 8192, 4096, 4096, 128, masked=True).path == "portable"
    assert choose(B200, 8192, 4096, 4096, 16, masked=True).path == "portable"
    assert choose(A100, 8, 4096, 4096, 8, masked=True).path == "portable"


def test_what_tma_cannot_address_takes_the_portable_kernel():
    assert choose(H100, 8192, 4095, 4096, 64, addressable=False).path == "portable"
    assert choose(H100, 8192, 4096, 4096, 64, bits=32).path == "portable"


def test_low_ranks_without_descriptors_take_a_single_launch():
    assert choose(A100, 8192, 4096, 4096, 16).path == "single"
    assert choose(A100, 8192, 4096, 4096, 64).path == "portable"
    assert choose(RTX5090, 8192, 4096, 4096, 8).path == "single"


@pytest.mark.parametrize("device", [H100, A100, RTX5090, MI300, config.INTERPRETER])
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("M", [1, 7, 64, 65, 8192, 2**20])
@pytest.mark.parametrize("r", [1, 16, 33, 256])
def test_every_device_and_size_has_a_plan(device, bits, M, r):
    plan = choose(device, M, 4097, 50, r, bits=bits, addressable=False)
    assert plan.path in config.PATHS
    assert plan.shrink_programs >= 0
    tiles = config.rank_grad_tiles(plan, device, bits, masked=False)
    assert config.rank_grad_splits(device, 66, M, tiles) >= 1


def test_unknown_gpus_take_the_defaults_of_the_nearest_older_architecture():
    future = config.Device("NVIDIA X900", "cuda", 210, 200)
    assert config.target_of(future) == "sm_120"
    assert config.target_of(config.Device("old", "cuda", 75, 40)) == "sm_80"
    assert config.target_of(config.Device("L4", "cuda", 89, 58)) == "sm_89"
    assert config.target_of(config.Device("Orin", "cuda", 87, 16)) == "sm_86"


DEEP = config.Matmul(128, 128, 64, 8, 8, 2)
MEASURED = {
    "path": "pdl",
    "matmul": vars(DEEP),
    "shrink": {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    "shrink_programs": 7,
}


def entry(of="forward", M=8192, dropout=False, r=16, **content):
    sizes = {"bits": 16, "M": M, "N": 4096, "K": 4096, "r": r}
    return {"of": of, "dropout": dropout, **sizes, **content}


def test_a_measured_plan_is_taken_whole_for_its_sizes_alone(table):
    table(H100, [entry(plan=MEASURED), entry("backend", choice="aten")])
    plan = choose(H100, 8192, 4096, 4096, 16)
    assert plan.path == "pdl" and plan.matmul == DEEP and plan.shrink_programs == 7
    assert plan.shrink == config.Shrink(64, 64, 4, 3)
    assert plan.reason == "measured on this GPU"
    # what shrink may take of the last wave is different for each of many tokens
    for M in (8000, 8193):
        assert choose(H100, M, 4096, 4096, 16).path == "hopper"
    assert choose(H100, 8192, 4096, 4096, 32).path == "hopper"
    assert config.choose_backend(H100, 16, 8192, 4096, 4096, 16)[0] == "aten"
    assert config.choose_backend(H100, 16, 8192, 4096, 4096, 32)[0] == "triton"


def test_few_tokens_take_what_was_measured_at_the_next_power_of_two(table):
    plan = {"path": "decode", "decode": vars(config.Decode(128, 64, 3, 4, 4, 64))}
    table(H100, [entry(M=16, plan=plan)])
    for M in (9, 16):
        assert choose(H100, M, 4096, 4096, 16).decode.SPLITS == 3
    for M in (8, 17):
        assert choose(H100, M, 4096, 4096, 16).decode != config.Decode(128, 64, 3, 4, 4, 64)


def test_dx_and_dropout_have_entries_of_their_own(table):
    own = vars(config.RankGrad(128, 64, 8, 3))
    hopper = {**MEASURED, "path": "hopper"}
    table(
        H100, [entry("dx", plan={**MEASURED, "rank_grad": own}), entry(dropout=True, plan=hopper)]
    )
    assert choose(H100, 8192, 4096, 4096, 16).path == "hopper"
    dx = choose(H100, 8192, 4096, 4096, 16, followed=True)
    assert dx.path == "pdl"
    assert config.rank_grad_tiles(dx, H100, 16, masked=False) == config.RankGrad(128, 64, 8, 3)
    assert choose(H100, 8192, 4096, 4096, 16, drawn=True).shrink_programs == 7
    masked = choose(H100, 8192, 4096, 4096, 16, masked=True, followed=True)
    assert masked.shrink_programs != 7 and masked.rank_grad is None


def test_a_measured_plan_that_cannot_run_here_is_not_taken(table):
    table(H100, [entry(plan=MEASURED), entry("dx", dropout=True, plan=MEASURED)])
    assert choose(H100, 8192, 4096, 4096, 16, addressable=False).path == "single"
    assert choose(H100, 8192, 4096, 4096, 16, masked=True, followed=True).path == "hopper"
    assert choose(H100, 8192, 4096, 4096, 16, forced="hopper").path == "hopper"


def test_where_nothing_beat_the_rules_they_are_asked(table):
    table(H100, [entry(plan=None)])
    assert choose(H100, 8192, 4096, 4096, 16).path == "hopper"


def test_a_table_of_another_triton_is_not_used(table):
    table(H100, [entry(plan=MEASURED)], triton="2.0")
    assert choose(H100, 8192, 4096, 4096, 16).path == "hopper"


def test_a_forced_path_is_taken_where_it_can_run():
    for path in config.PATHS:
        assert choose(H100, 32, 4096, 4096, 16, forced=path).path == path
    assert choose(H100, 32, 4096, 4096, 128, forced="single").path == "hopper"
    refused = choose(H100, 32, 4096, 4096, 128, forced="single")
    assert refused.reason.endswith("; FUSED_LORA_PATH=single cannot run here")
    plan = config.Product("single", "", matmul=DEEP)
    assert choose(H100, 8192, 4096, 4096, 128, forced=plan) is plan


def test_a_shrink_on_few_idle_sms_has_a_program_for_each_block_of_ranks():
    for M in (16, 32, 65, 130):
        for columns in range(1, 140):
            for r in (256, 384, 512, 1024):
                for changes in ({}, {"followed": True}, {"drawn": True}):
                    plan = choose(H100, M, columns * 256, 8192, r, **changes)
                    assert plan.shrink is None or plan.shrink_programs >= 1, (M, columns, r)


def test_rank_grad_runs_behind_dx_only_where_dx_lets_it():
    assert config.rank_grad_behind(choose(H100, 8192, 4096, 4096, 16))
    assert not config.rank_grad_behind(choose(B200, 8192, 4096, 4096, 16))
    assert not config.rank_grad_behind(choose(H100, 16, 4096, 4096, 16))
    assert not config.rank_grad_behind(None)


def test_auto_takes_the_kernels_only_where_they_are_built_for():
    sizes = (8192, 4096, 4096, 16)
    assert config.choose_backend(H100, 16, *sizes)[0] == "triton"
    assert config.choose_backend(H100, 32, *sizes)[0] == "aten"
    assert config.choose_backend(A100, 16, *sizes)[0] == "aten"


def test_wave_quantisation_decides_between_tiles():
    # M=2048, N=1024: 64 tiles of 128 x 256 fill half the device, 128 of 128 x 128 nearly all of it
    assert choose(H100, 2048, 1024, 4096, 16).matmul.BLOCK_N == 128
    assert choose(H100, 8192, 4096, 4096, 16).matmul.BLOCK_N == 256


def test_shipped_defaults_say_that_they_are_not_measured():
    content = json.loads((config.TUNED / "default.json").read_text())
    assert content["measured"] is False
