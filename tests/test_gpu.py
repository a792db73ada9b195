"""Promises that only a GPU can keep or break: ordering, graphs, streams, devices, repetition."""

import functools
import time

import pytest
import torch

from fused_lora import FusedLoRALinear, lora_linear, testing
from fused_lora.kernels import config, decode, matmul_descriptor, rank_grad, tape
from fused_lora.kernels.config import cdiv
from fused_lora.kernels.launch import launch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.gpu

fused = functools.partial(lora_linear, backend="triton")
M, N, K, R = 512, 1024, 768, 16
TILES = config.defaults()["sm_90"]["16"]
MATMULS = ("descriptor", "hopper")


def hopper():
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the descriptor matmul needs Hopper or datacentre Blackwell")


def bf16(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@triton.jit
def _late_copy(source_ptr, target_ptr, gate_ptr, n, NANOSECONDS: tl.constexpr, BLOCK: tl.constexpr):
    """What a very slow shrink does: lets its dependent start, waits until the gate is opened (but
    not for ever), then writes."""
    tl.extra.cuda.gdc_launch_dependents()
    start = tl.extra.cuda.globaltimer()
    while tl.load(gate_ptr, volatile=True) == 0:
        if tl.extra.cuda.globaltimer() - start > NANOSECONDS:
            tl.store(gate_ptr, -1)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offs, tl.load(source_ptr + offs, mask=offs < n), mask=offs < n)


def _behind_a_late_copy(source, target, launches):
    """Run the launches behind a copy that waits until all are made, and a while longer, in which
    even a GPU that many processes share runs what does not wait for the copy."""
    gate = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    torch.cuda.synchronize()
    launches()  # loads the kernels, which may make the host wait; the target's NaNs spread
    torch.cuda.synchronize()
    _late_copy[(cdiv(source.numel(), 1024),)](
        source, target, gate, source.numel(), 5_000_000_000, 1024
    )
    launches()
    time.sleep(0.1)
    assert gate.item() == 0, "the launches waited for the copy on the host"
    gate.fill_(1)
    torch.cuda.synchronize()


def _matmul(name):
    """(module, launcher, tiles) of a matmul that is launched behind a shrink."""
    if name == "descriptor":
        hopper()
        return matmul_descriptor, "descriptor_matmul", TILES["matmul_descriptor"][0]
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Gluon matmul needs Hopper")
    from fused_lora.kernels import matmul_hopper

    return matmul_hopper, "hopper_matmul", TILES["matmul_hopper"][0]


def _behind_a_slow_shrink(name, pdl):
    """y of a matmul launched behind a shrink that writes S late, and the truth."""
    module, launcher, tiles = _matmul(name)
    x, weight, B, S = bf16(M, K), bf16(N, K), bf16(N, R), bf16(M, R)
    late, y = torch.full_like(S, float("nan")), torch.empty(M, N, device="cuda", dtype=x.dtype)
    matmul = functools.partial(
        *(getattr(module, launcher), x, weight.t(), y, tiles, 132), b=B.t(), S=late, pdl=pdl
    )
    _behind_a_late_copy(S, late, matmul)
    return y.double(), x.double() @ weight.double().t() + S.double() @ B.double().t()


@pytest.mark.parametrize("name", MATMULS)
def test_the_matmul_waits_for_a_delayed_shrink(name):
    for _ in range(5):
        y, exact = _behind_a_slow_shrink(name, pdl=True)
        assert (y - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize("name", MATMULS)
def test_without_the_wait_the_delayed_shrink_is_noticed(name, monkeypatch):
    """The control: launched early but never waiting, it must read the NaNs."""
    early = functools.partial(launch, pdl=True)
    monkeypatch.setattr(_matmul(name)[0], "launch", lambda *a, pdl, **given: early(*a, **given))
    y, _ = _behind_a_slow_shrink(name, pdl=False)
    assert y.isnan().any()


@pytest.mark.parametrize("name", MATMULS)
def test_rank_grad_behind_dx_sees_a_delayed_ds_and_ends_after_dx(name):
    """shrink writes dS late: the matmul lets rank_grad start only when it is there. What follows
    rank_grad on the stream reads all of dX."""
    module, launcher, tiles = _matmul(name)
    tokens, size = 8192, 4096  # a dX of several waves
    dy, weight, x, A = bf16(tokens, size), bf16(size, size), bf16(tokens, size), bf16(R, size)
    S, dS = bf16(tokens, R), bf16(tokens, R)
    exact_dA, exact_dB = dS.double().t() @ x.double(), dy.double().t() @ S.double()
    exact_dx = dy.double() @ weight.double() + dS.double() @ A.double()
    late, dx, copy = torch.empty_like(dS), torch.empty_like(x), torch.empty_like(x)
    dA, dB = torch.empty_like(A), torch.empty_like(A.t())

    def launches():
        getattr(module, launcher)(dy, weight, dx, tiles, 132, b=A, S=late, pdl=True)
        rank_grad.rank_grad(
            *(TILES["rank_grad"][0], 1, tokens, R),
            **{"x": x, "dS": late, "dA": dA, "dY": dy, "S": S, "dB": dB, "behind": True},
        )
        copy.copy_(dx)

    for _ in range(20):
        late.fill_(float("nan"))
        _behind_a_late_copy(dS, late, launches)
        for got, exact in ((dA, exact_dA), (dB, exact_dB), (copy, exact_dx)):
            assert (got.double() - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize("rank", [3, R, 64])
def test_rank_grad_behind_dx_gives_the_same_bits(rank, monkeypatch):
    _matmul("hopper")
    case = testing.make_case(8192, 4096, 4096, rank, torch.bfloat16, device="cuda", amplify=False)
    behind = testing.gradients(fused, *case.tensors())
    with monkeypatch.context() as patch:
        patch.setattr(config, "rank_grad_behind", lambda plan: False)
        tape.forget()
        after = testing.gradients(fused, *case.tensors())
    tape.forget()
    for _ in range(100):
        assert all(torch.equal(behind[name], after[name]) for name in after)
        behind = testing.gradients(fused, *case.tensors())


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [16, 512])
def test_a_graph_replays_with_changed_inputs_and_draws_new_masks(tokens, dropout_p):
    layer = FusedLoRALinear(
        K,
        N,
        dtype=torch.bfloat16,
        device="cuda",
        r=R,
        lora_dropout=dropout_p,
        init_lora_weights=False,
        backend="triton",
    )
    x = bf16(tokens, K).requires_grad_()
    dy = bf16(tokens, N)

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(bf16(tokens, K) * (seed + 1))
            layer.lora_B.mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        results.append([t.clone() for t in captured])
        if dropout_p == 0.0:
            for replayed, eager in zip(results[-1], step(), strict=True):
                assert torch.equal(replayed, eager)
    if dropout_p > 0.0:
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(captured[0], results[-1][0])


def test_two_streams_at_once_do_not_disturb_each_other():
    cases = [
        testing.make_case(tokens, N, K, R, torch.bfloat16, seed=i, device="cuda")
        for i, tokens in enumerate((16, M))
    ]
    alone = [testing.gradients(fused, *case.tensors()) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(200):
        together = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(testing.gradients(fused, *case.tensors()))
        torch.cuda.synchronize()
        for mine, reference in zip(together, alone, strict=True):
            assert all(torch.equal(mine[name], reference[name]) for name in reference)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["rank_grad", "decode"])
def test_ten_thousand_launches_are_bit_equal(kernel):
    x, dy, weight, S = bf16(M, K), bf16(M, N), bf16(N, K), bf16(M, R)
    A, B = bf16(R, K), bf16(N, R)
    float32 = {"device": "cuda", "dtype": torch.float32}
    counters = torch.zeros(4096, device="cuda", dtype=torch.int32)

    def run():
        counters.zero_()
        device = config.device_of(torch.device("cuda:0"))
        if kernel == "rank_grad":
            tiles = config.rank_grad_tiles(None, device, 16, masked=False)
            dA, dB = torch.empty_like(A), torch.empty_like(B)
            counts = rank_grad.tile_counts(K, N, R, tiles, True, True)
            partial = torch.empty(rank_grad.partial_elements(counts, 4, R, tiles), **float32)
            rank_grad.rank_grad(
                tiles,
                4,
                M,
                R,
                x=x,
                dS=S,
                dA=dA,
                dY=dy,
                S=S,
                dB=dB,
                partial=partial,
                counters=counters,
            )
            return dA, dB
        tiles = next(
            t for t in config.defaults()[config.target_of(device)]["16"]["decode"] if t.SPLITS == 4
        )
        y, few = torch.empty(16, N, device="cuda", dtype=x.dtype), x[:16]
        sizes = decode.workspace(16, N, R, tiles)
        decode.decode(
            few,
            weight.t(),
            A,
            B.t(),
            y,
            tiles,
            partial=torch.empty(sizes[0], **float32),
            partial_s=torch.empty(sizes[1], **float32),
            counters=counters,
        )
        return (y,)

    first = run()
    for _ in range(10_000):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    case = testing.make_case(100, 64, 128, 8, torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert not testing.violations_of(fused, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("path_name", config.PATHS)
def test_training_sizes_are_right_on_every_path(dtype, path_name, path):
    path(path_name)
    for tokens in (64, 2048):
        case = testing.make_case(tokens, 4096, 4096, R, dtype, device="cuda", amplify=False)
        assert not testing.violations_of(fused, case)


def test_peak_memory_of_a_training_step_is_the_adapters_alone():
    """Over the frozen layer: S, dS, the adapters' gradients and the split partials."""
    tokens, size, r = 8192, 4096, 64
    x, dy = bf16(tokens, size).requires_grad_(), bf16(tokens, size)
    layer = FusedLoRALinear(
        size, size, bias=False, dtype=torch.bfloat16, device="cuda", r=r, backend="triton"
    )

    def peak(call):
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            highest = torch.cuda.max_memory_allocated() - before
        return highest

    def frozen():
        torch.autograd.grad(torch.nn.functional.linear(x, layer.weight), x, dy)

    def adapted():
        torch.autograd.grad(layer(x), (x, layer.lora_A, layer.lora_B), dy)

    assert peak(adapted) - peak(frozen) <= 24 * 2**20
