"""`AdapterPack` and the ids that name its adapters: what is kept, what is refused, what a change in
place does to batches before and after it."""

import copy

import pytest
import torch
from multi_cases import fused, make_batch, make_ids, make_pack
from shapes import BF16, FP32

from fused_lora import AdapterPack, lora_linear, multi_lora_linear, ops
from fused_lora.adapter_pack import pack_for_call
from fused_lora.kernels import config

N, K = 24, 40


def factors(r, seed=0, dtype=FP32):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, K, generator=generator) / K**0.5
    return A.to(dtype), torch.randn(N, r, generator=generator).to(dtype)


def inputs(M=10, dtype=FP32):
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(size, K, generator=generator) for size in (M, N))
    return x.to(dtype), weight.to(dtype)


def served(pack, name, x, weight):
    return multi_lora_linear(x, weight, pack, pack.ids([name]).expand(len(x)), backend="aten")


def test_adapters_are_added_replaced_and_removed_in_place():
    pack = AdapterPack(K, N, total_rank=80)
    x, weight = inputs()
    addresses = [t.data_ptr() for t in (*pack.parameters(), *pack.buffers())]
    held = {"a": factors(8), "b": factors(33, 1), "c": factors(16, 2)}
    for name, adapter in held.items():
        pack.add(name, *adapter, scaling=1.5)
    held["b"] = factors(20, 3)
    pack.replace("b", *held["b"], scaling=0.5)
    pack.remove("a")
    del held["a"]
    held["d"] = factors(17, 4)  # into what a and the end of b left
    assert pack.add("d", *held["d"], scaling=2.0) == 0
    assert pack.names == ["b", "c", "d"] and [pack.rank(n) for n in "bcd"] == [20, 16, 17]
    for name, adapter in held.items():
        expected = lora_linear(x, weight, *adapter, scaling=pack.scaling_of(name), backend="aten")
        torch.testing.assert_close(served(pack, name, x, weight), expected)
        assert all(map(torch.equal, pack.factors(name), adapter))
    after = [t.data_ptr() for t in (*pack.parameters(), *pack.buffers())]
    assert addresses == after


def test_removing_zeroes_and_frees_and_the_others_keep_their_bits():
    pack = AdapterPack(K, N, total_rank=32)
    x, weight = inputs()
    pack.add("a", *factors(16))
    pack.add("b", *factors(9, 1))
    before = served(pack, "b", x, weight)
    pack.remove("a")
    assert torch.equal(served(pack, "b", x, weight), before)
    assert pack.lora_A[:16].eq(0).all() and pack.lora_B[:, :16].eq(0).all()
    assert pack.owner.tolist() == [-2] * 16 + [1] * 9 + [-2] * 7
    pack.remove("b")
    assert not pack.window.any() and not pack.scaling.any() and pack.names == []


def test_columns_in_pieces_serve_as_well_as_neighbours():
    pack = AdapterPack(K, N, total_rank=64)
    for name in "abcd":
        pack.add(name, *factors(16))
    pack.remove("a")
    pack.remove("c")
    wide = factors(32, 5)
    pack.add("wide", *wide, scaling=0.7)
    assert pack.window[pack.id("wide")].tolist() == [0, 48]
    x, weight = inputs()
    expected = lora_linear(x, weight, *wide, scaling=0.7, backend="aten")
    torch.testing.assert_close(served(pack, "wide", x, weight), expected)


def test_memory_is_what_the_storage_takes():
    pack = AdapterPack(K, N, total_rank=40, dtype=BF16)
    pack.add("a", *factors(17))
    memory = pack.memory()
    assert memory["adapters"] == 32 * (K + N) * 2 and memory["free"] == 16 * (K + N) * 2
    tensors = [*pack.parameters(), *pack.buffers()]
    assert sum(memory.values()) == sum(t.nbytes for t in tensors)
    assert "a (r=17)" in repr(pack) and "MiB" in repr(pack)


def test_an_adapter_may_be_replaced_by_a_part_of_itself():
    pack = AdapterPack(K, N, total_rank=32)
    A, B = factors(20)
    pack.add("a", A, B)
    pack.replace("a", pack.lora_A[4:20], pack.lora_B[:, 4:20])
    assert all(map(torch.equal, pack.factors("a"), (A[4:], B[:, 4:])))


REFUSED = {
    "not finite": (lambda A, B: (A, B * torch.inf), "not finite"),
    "NaN": (lambda A, B: (A.fill_(torch.nan), B), "not finite"),
    "of another layer": (lambda A, B: (A[:, 1:], B), "another size"),
    "of two ranks": (lambda A, B: (A[1:], B), "must be lora_A"),
    "too large": (lambda A, B: factors(49), "columns, 32 of 48 are free"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_that_is_refused_leaves_the_pack_as_it_was(what):
    change, message = REFUSED[what]
    pack = AdapterPack(K, N, total_rank=48)
    pack.add("a", *factors(8))
    before = copy.deepcopy(pack)
    with pytest.raises(ValueError, match=message):
        pack.add("b", *change(*factors(8, 1)))
    if what != "too large":
        with pytest.raises(ValueError, match=message):
            pack.replace("a", *change(*factors(8, 1)))
    assert pack.names == ["a"]
    assert all(map(torch.equal, pack.parameters(), before.parameters()))
    assert all(map(torch.equal, pack.buffers(), before.buffers()))


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ("triton", "aten"))
@pytest.mark.parametrize("adapters", (2, 33))  # 33 * 16: where the kernels look up windows
def test_an_adapter_of_rank_0_takes_no_columns_and_its_tokens_take_the_base(
    adapters, backend, device
):
    ids = torch.full((80,), adapters, dtype=torch.int32)
    ids[40::3] = adapters - 1
    batch = make_batch(80, N, K, (16,) * adapters, FP32, ids, device)
    pack = make_pack(batch, spare=16)
    nothing = torch.ones(0, K), torch.ones(N, 0)
    pack.add("nothing", *factors(9))
    pack.replace("nothing", *nothing)
    assert pack.id("nothing") == adapters and pack.rank("nothing") == 0
    assert pack.window[adapters].tolist() == [pack.total_rank, 0]  # narrows no tile's window
    free = 16 * (K + N) * 4
    assert pack.memory()["free"] == free and not pack.owner.eq(adapters).any()
    ours = fused(batch, pack, backend=backend)
    batch.ids[batch.ids == adapters] = -1
    base = fused(batch, pack, backend=backend)
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_names_and_room_are_checked():
    pack = AdapterPack(K, N, total_rank=64, max_adapters=1)
    pack.add("a", *factors(8))
    for call, error, message in (
        (lambda: pack.add("a", *factors(8)), ValueError, "already: use replace"),
        (lambda: pack.add("b", *factors(8)), ValueError, "holds 1 adapters, as many as it may"),
        (
            lambda: pack.replace("a", *factors(8), scaling=torch.inf),
            ValueError,
            "be a finite number",
        ),
        (lambda: pack.remove("b"), KeyError, "no adapter 'b' in the pack: name one of"),
        (lambda: pack.ids(["a", "b"]), KeyError, "no adapter 'b'"),
        (lambda: pack.add_untrained("b", 0), ValueError, "r must be an integer of at least 1"),
        (
            lambda: AdapterPack(K, N, total_rank=0),
            ValueError,
            "total_rank must be an integer of at least 1",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_ids_that_no_adapter_has_raise(backend, device, monkeypatch):
    monkeypatch.setattr(ops, "CHECK_IDS", True)  # what a CPU does anyway
    batch = make_batch(5, N, K, (8, 16), FP32, torch.zeros(5, dtype=torch.int32), device)
    pack = make_pack(batch)
    pack.remove("0")
    call = (batch.x, batch.weight, pack)
    for wrong in (0, 2, 64, 2**31 - 1, -2, -(2**31)):
        ids = torch.full((5,), -1, dtype=torch.int32, device=device)
        ids[3] = wrong
        with pytest.raises(ValueError, match=rf"holds {wrong}, expected -1 .*one of \[1\]"):
            multi_lora_linear(*call, ids, backend=backend)


@pytest.mark.kernels
@pytest.mark.parametrize("path", ("aten", "decode", "single", "portable", "pdl"))
def test_unchecked_ids_below_minus_one_have_no_columns(path, device, monkeypatch):
    """Not those that nobody owns, either, whatever a token or these columns hold."""
    monkeypatch.setattr(ops, "looks_at", lambda ids: False)  # as on a GPU
    if path != "aten":
        monkeypatch.setattr(config, "FORCED", path)
    batch = make_batch(9, N, K, (3, 5), FP32, make_ids("uniform", "shuffled", 9, 2), device)
    pack = make_pack(batch, spare=16)
    with torch.no_grad():
        pack.lora_A[pack.owner < 0] = 3e38
    if path != "aten":  # where zero times infinity reaches all of dA
        batch.x[3, 0] = torch.inf
    results = []
    for wrong in (-1, -2, -(2**31)):
        ids = batch.ids.clone()
        ids[3] = wrong
        leaves = [batch.x.detach().requires_grad_(), pack.lora_A, pack.lora_B]
        backend = "aten" if path == "aten" else "triton"
        y = multi_lora_linear(leaves[0], batch.weight, pack, ids, backend=backend)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, batch.dy)))
        assert not results[-1][2][pack.owner < 0].any()
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_pack_for_a_call_may_begin_with_an_adapter_of_rank_0():
    x, weight = inputs(3)
    pair = factors(5)
    nothing = (pair[0][:0], pair[1][:, :0], 1.0)
    pack = pack_for_call([nothing, (*pair, 0.5)])
    y = multi_lora_linear(x, weight, pack, torch.tensor([0, 1, -1]))
    base = x @ weight.t()
    torch.testing.assert_close(y[0::2], base[0::2])
    torch.testing.assert_close(y[1], base[1] + 0.5 * x[1] @ pair[0].t() @ pair[1].t())


def test_ids_of_a_wrong_shape_or_dtype_are_refused():
    pack, (x, weight) = AdapterPack(K, N, total_rank=16), inputs(6)
    pack.add("a", *factors(3))
    for ids, error, message in (
        ([0] * 6, TypeError, "adapter_ids is a list, expected a tensor of int32"),
        (torch.zeros(6), TypeError, "adapter_ids is torch.float32, expected int32"),
        (torch.full((6,), 2**32), ValueError, "holds 2147483647, expected -1"),
        (torch.full((6,), -(2**32)), ValueError, "holds -2, expected -1"),
        (torch.zeros(6, dtype=torch.bool), TypeError, "expected int32"),
        (torch.zeros(5, dtype=torch.int32), ValueError, r"has shape \(5,\), expected one id per"),
        (torch.zeros(6, 1, dtype=torch.int32), ValueError, "has shape"),
        (torch.zeros(6, dtype=torch.int32, device="meta"), ValueError, "move them to one device"),
    ):
        with pytest.raises(error, match=message):
            multi_lora_linear(x, weight, pack, ids)


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_sequences_of_different_lengths_are_told_by_their_ends(backend, dtype, compiled, device):
    if compiled and backend == "triton":
        pytest.skip("the interpreter is not compiled")
    ids = torch.tensor([1] * 3 + [-1] * 2 + [0] * 6 + [1] * 1 + [-1] * 2, dtype=torch.int32)
    batch = make_batch(14, N, K, (8, 16), FP32, ids, device)
    pack = make_pack(batch)
    told = multi_lora_linear(batch.x, batch.weight, pack, batch.ids, backend=backend)
    sequences = torch.tensor([1, -1, 0, 0, 1], dtype=dtype, device=device)
    ends = torch.tensor([0, 3, 5, 5, 11, 12], dtype=dtype, device=device)  # two tokens of nobody
    call = multi_lora_linear
    if compiled:
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    for x in (batch.x, batch.x.view(2, 7, K)):
        y = call(x, batch.weight, pack, sequences, cu_tokens=ends, backend=backend)
        assert torch.equal(y.view(14, N), told)


def test_unsigned_ids_leave_tokens_behind_the_last_sequence_to_the_base():
    batch = make_batch(9, 24, 40, (8, 3), FP32, make_ids("uniform", "grouped", 9, 2), "cpu")
    pack, ends = make_pack(batch), torch.tensor([0, 4, 7])
    given = [
        multi_lora_linear(batch.x, batch.weight, pack, ids, cu_tokens=ends)
        for ids in (torch.tensor([1, 0], dtype=torch.uint8), torch.tensor([1, 0]))
    ]
    assert torch.equal(*given)
    torch.testing.assert_close(given[0][7:], batch.x[7:] @ batch.weight.t())


def test_a_pack_ignores_torchs_default_device():
    pack = AdapterPack(8, 6, total_rank=16)
    with torch.device("meta"):
        pack.add("a", torch.ones(2, 8, device="cpu"), torch.ones(6, 2, device="cpu"))
        state = pack.state_dict()
    assert pack.window[0].tolist() == [0, 16]
    assert not any(value.is_meta for value in state.values())


def test_ends_of_sequences_that_do_not_fit_are_refused():
    pack, (x, weight) = AdapterPack(K, N, total_rank=16), inputs(6)
    pack.add("a", *factors(3))
    for ends, error, message in (
        ([0, 3, 6], TypeError, "cu_tokens is a list, expected a tensor of int32"),
        (torch.tensor([0.0, 3.0, 6.0]), TypeError, "cu_tokens is torch.float32"),
        (torch.tensor([0, 3]), ValueError, r"cu_tokens is \[S \+ 1\]: got \(2,\) and \(2,\)"),
        (torch.tensor([0, 3, 7]), ValueError, r"to at most x's 6 tokens: got \[0, 3, 7\]"),
        (torch.tensor([1, 3, 6]), ValueError, "must rise from 0"),
        (torch.tensor([0, 4, 3]), ValueError, "must rise from 0"),
        (torch.tensor([0, 3, 6], device="meta"), ValueError, "move them to one device"),
    ):
        with pytest.raises(error, match=message):
            multi_lora_linear(x, weight, pack, torch.tensor([0, -1]), cu_tokens=ends)
    with pytest.raises(ValueError, match=r"one id per sequence, \[S\]"):
        multi_lora_linear(x, weight, pack, torch.zeros(6, 1).int(), cu_tokens=torch.tensor([0, 6]))


def test_one_token_without_leading_dimensions_and_the_meta_device():
    pack, (x, weight) = AdapterPack(K, N, total_rank=16), inputs(6)
    pack.add("a", *factors(3))
    y = multi_lora_linear(x, weight, pack, torch.tensor([0, -1, 0, -1, -1, -1]))
    for row, adapter in ((0, 0), (1, -1)):
        single = multi_lora_linear(x[row], weight, pack, torch.tensor(adapter))
        torch.testing.assert_close(single, y[row])
    pack, ids = AdapterPack(K, N, total_rank=16, device="meta"), torch.zeros(6, dtype=torch.int32)
    y = multi_lora_linear(x.to("meta"), weight.to("meta"), pack, ids.to("meta"))
    assert y.is_meta and y.shape == (6, N)


@pytest.mark.parametrize("ids_dtype", (torch.int32, torch.int64))
def test_ids_per_sequence_count_for_all_its_tokens(ids_dtype):
    pack, (x, weight) = AdapterPack(K, N, total_rank=32), inputs(12)
    for i, name in enumerate("ab"):
        pack.add(name, *factors(3, i))
    ids = torch.tensor([1, -1, 0], dtype=ids_dtype)
    y = multi_lora_linear(x.view(3, 4, K), weight, pack, ids)
    per_token = multi_lora_linear(x, weight, pack, ids.repeat_interleave(4))
    assert torch.equal(y.view(12, N), per_token)
    one = multi_lora_linear(x, weight, pack, torch.tensor(1, dtype=ids_dtype))
    assert torch.equal(one, served(pack, "b", x, weight))


def test_a_change_between_forward_and_backward_is_noticed():
    pack, (x, weight) = AdapterPack(K, N, total_rank=32), inputs()
    pack.add("a", *factors(8))
    y = served(pack, "a", x, weight)
    pack.replace("a", *factors(8, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", (FP32, BF16))
def test_the_state_of_a_pack_loads_into_another(dtype):
    pack, other = (AdapterPack(K, N, total_rank=64, dtype=dtype) for _ in range(2))
    pack.add("a", *factors(8), scaling=1 / 3)
    pack.add("b", *factors(20, 1))
    pack.remove("a")
    other.load_state_dict(pack.state_dict())
    assert other.names == ["b"] and other.id("b") == 1
    other.add("c", *factors(16, 2))
    assert other.id("c") == 0 and all(map(torch.equal, other.factors("b"), pack.factors("b")))


def test_scalings_stay_exact_when_the_pack_is_cast():
    pack = AdapterPack(K, N, total_rank=16)
    pack.add("a", *factors(3), scaling=1 / 3)
    exact = pack.scaling.clone()
    pack.to(BF16)
    assert pack.lora_A.dtype == BF16 and torch.equal(pack.scaling, exact)
    pack.double()
    assert pack.scaling[:3].tolist() == [1 / 3] * 3 and not pack.scaling[3:].any()


def test_a_distributed_checkpoint_brings_other_adapters(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def build(*names):
        pack = AdapterPack(K, N, total_rank=48, max_adapters=4)
        for seed, name in enumerate(names):
            pack.add(name, *factors(5 + seed, seed), scaling=0.5)
        return pack

    source, pack, (x, weight) = build("first", "second"), build("other"), inputs()
    dcp.save(get_model_state_dict(source), checkpoint_id=tmp_path, no_dist=True)
    state = get_model_state_dict(pack)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(pack, state)
    assert pack.names == ["first", "second"]
    for name in pack.names:
        assert torch.equal(served(pack, name, x, weight), served(source, name, x, weight))
