"""`MultiLoRALinear` in models: training several adapters at once, mixed batches through unchanged
model code, the compiler."""

import copy
import pickle
import threading

import pytest
import torch
from multi_cases import fused, make_batch, make_ids, make_pack
from shapes import BF16, FP32
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fused_lora import MultiLoRALinear, explain, multi_lora_linear, ops, reference, use_adapters

N, K = 24, 40


def layer_of(adapters=2, r=8, **options):
    torch.manual_seed(0)
    layer = MultiLoRALinear.from_linear(nn.Linear(K, N), total_rank=adapters * 16, **options)
    for i in range(adapters):
        layer.pack.add_untrained(str(i), r, scaling=1.0 + i)
        with torch.no_grad():
            layer.pack.lora_B[:, layer.pack.columns(str(i))] = torch.randn(N, r) * 0.1
    return layer


def test_from_linear_shares_the_frozen_weight_and_a_new_layer_has_its_own():
    linear = nn.Linear(K, N)
    layer = MultiLoRALinear.from_linear(linear, total_rank=16, adapter_dtype=BF16)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["pack.lora_A", "pack.lora_B"] and layer.pack.lora_A.dtype == BF16
    new = MultiLoRALinear(K, N, bias=False, dtype=BF16, total_rank=16)
    assert new.bias is None and new.weight.dtype == BF16 == new.pack.lora_B.dtype
    assert "bias=False" in repr(new)
    with pytest.raises(TypeError, match=r"takes an nn\.Linear: got LazyLinear"):
        MultiLoRALinear.from_linear(nn.LazyLinear(3), total_rank=16)
    for options in ({"lora_dropout": 1.0}, {"backend": "fast"}):
        with pytest.raises(ValueError, match="must be"):
            MultiLoRALinear(K, N, total_rank=16, **options)


def test_the_block_chooses_the_adapters_and_blocks_nest():
    layer, x = layer_of(), torch.randn(3, 5, K)
    model = nn.Sequential(layer, nn.ReLU())
    expected = [torch.relu(layer(x, layer.pack.ids([name] * 3))) for name in ("0", "1", None)]
    with use_adapters(model, ["0", "0", None]):
        with use_adapters(model, layer.pack.ids(["1", "1", "1"])):
            assert torch.equal(model(x), expected[1])
        mixed = model(x)
    assert torch.equal(mixed[:2], expected[0][:2]) and torch.equal(mixed[2], expected[2][2])
    packed, ends = x.view(15, K), torch.tensor([0, 4, 15])
    with use_adapters(model, ["1", None], cu_tokens=ends):
        varlen = model(packed)
    assert torch.equal(varlen[:4], expected[1].view(15, N)[:4])
    assert torch.equal(varlen[4:], expected[2].view(15, N)[4:])
    with pytest.raises(RuntimeError, match="no adapter ids: call the model inside use_adapters"):
        model(x)
    with pytest.raises(KeyError, match="no adapter 'c'"), use_adapters(model, ["c"]):
        pass
    with pytest.raises(ValueError, match="holds no MultiLoRALinear"), use_adapters(nn.ReLU(), []):
        pass
    with pytest.raises(TypeError, match="one name per sequence"), use_adapters(model, "01"):
        pass


def test_names_are_copied_to_the_device_once_for_all_layers_and_blocks():
    model = nn.Sequential(layer_of(), layer_of())
    given = []
    for _ in range(2):
        with use_adapters(model, ["1", None, "0"]):
            given += [layer._chosen.ids for layer in model]
    assert len({id(ids) for ids in given}) == 1 and given[0].tolist() == [1, -1, 0]
    # what a caller gets is his own
    model[0].pack.ids(["1", None, "0"]).zero_()
    assert given[0].tolist() == [1, -1, 0]


def test_ids_of_fake_tensors_are_not_kept_for_real_ones():
    model = nn.Sequential(layer_of())
    names = ["1", None, "0", "1"]  # which no other test has
    with FakeTensorMode(), use_adapters(model, names):
        assert isinstance(model[0]._chosen.ids, FakeTensor)
    with use_adapters(model, names):
        assert type(model[0]._chosen.ids) is torch.Tensor


@pytest.mark.parametrize("depth", (1, 2))
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing_takes_its_own_blocks_adapters_or_says_that_it_cannot(use_reentrant, depth):
    names, others = ["1", None, "0"], ["0", "0", "1"]
    model = nn.Sequential(layer_of(), nn.Linear(N, K), layer_of(), nn.Linear(N, K))
    x = torch.randn(3, K, requires_grad=True)
    factors = [p for p in model.parameters() if p.requires_grad]

    def blocks(y, parts, depth):
        for part in parts:
            inner = (lambda y, part=part: blocks(y, [part], depth - 1)) if depth > 1 else part
            y = checkpoint(inner, y, use_reentrant=use_reentrant) if depth else part(y)
        return y

    def forward(depth):
        return blocks(x, (model[:2], model[2:], model[:2]), depth).square().sum()

    def grads(loss):
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward(retain_graph=True)
        return [p.grad.clone() for p in factors if p.grad is not None]

    with use_adapters(model, names):
        expected = grads(forward(0))
        with use_adapters(model, others):
            forward(depth)
        loss = forward(depth)
        for _ in range(2):
            assert all(map(torch.equal, grads(loss), expected))
        with torch.autograd.graph.save_on_cpu():
            assert all(map(torch.equal, grads(forward(depth)), expected))
    ids = model[0].pack.ids(names)
    with use_adapters(model, ids):
        loss = forward(depth)
        assert all(map(torch.equal, grads(loss), expected))
        if not use_reentrant:
            ids.copy_(model[0].pack.ids(others))
            with pytest.raises(RuntimeError, match="in another use_adapters block"):
                grads(loss)
    with use_adapters(model, names):
        loss = forward(depth)
    with use_adapters(model, others):
        with pytest.raises(RuntimeError, match="in another use_adapters block"):
            grads(loss)
        if depth == 1 or not use_reentrant:
            with pytest.raises(RuntimeError, match="in another use_adapters block"):
                grads(loss + forward(depth))
    if not use_reentrant:  # the same adapters
        with use_adapters(model, names):
            assert all(map(torch.equal, grads(loss), expected))


def test_a_copy_that_is_made_inside_of_a_block_is_outside_of_it():
    layer, x = layer_of(), torch.randn(3, K)
    with use_adapters(layer, ["0"] * 3):
        copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        layer(x)
    for each in copies:
        with pytest.raises(RuntimeError, match="no adapter ids"):
            each(x)


def test_explain_speaks_of_the_total_rank(path):
    path("pdl")
    layer = layer_of(adapters=3, backend="aten")
    assert "-> 24, 3 adapters, total r=48, float32 on" in explain(nn.Sequential(layer))
    layer.backend = "triton"
    bf16 = torch.empty(300, K, dtype=BF16)
    if not torch.cuda.is_available():
        assert "forward: triton pdl, 2 launches" in explain(layer, bf16)


@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
def test_training_two_at_once_trains_each_as_if_alone(dropout_p):
    """Five steps of SGD over a mixed batch, against five steps over each adapter's rows."""
    both, targets = layer_of(lora_dropout=dropout_p), torch.randn(12, N)
    x, ids = torch.randn(12, K), torch.tensor([0, 1, 1] * 4, dtype=torch.int32)
    pack = both.pack
    alone = [[t.double().requires_grad_() for t in pack.factors(name)] for name in "01"]
    weight, bias = both.weight.double(), both.bias.double()
    optimizer = torch.optim.SGD(both.parameters(), lr=0.002)
    for step in range(5):
        torch.manual_seed(step)
        loss = ((both(x, ids) - targets) ** 2).sum(1)
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(step)
        adapters = [
            (*factors, pack.scaling_of(name)) for factors, name in zip(alone, "01", strict=True)
        ]
        y = reference.multi_lora_linear(
            x.double(), weight, adapters, ids, bias, dropout_p=dropout_p
        )
        for index, factors in enumerate(alone):  # one loss at a time
            own = ((y - targets) ** 2)[ids == index].sum()
            grads = torch.autograd.grad(own, factors, retain_graph=True)
            with torch.no_grad():
                for t, grad in zip(factors, grads, strict=True):
                    t -= 0.002 * grad
    for name, factors in zip("01", alone, strict=True):
        for ours, exact in zip(pack.factors(name), factors, strict=True):
            torch.testing.assert_close(ours.double(), exact.detach(), rtol=1e-4, atol=1e-5)


def test_generate_serves_a_mixed_batch_with_unchanged_model_code():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=K,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for block in model.model.layers:
        for child in ("q_proj", "v_proj"):
            linear = getattr(block.self_attn, child)
            layer = MultiLoRALinear.from_linear(linear, total_rank=32)
            for name in "ab":
                layer.pack.add(name, torch.randn(8, K), torch.randn(linear.out_features, 8) * 0.3)
            setattr(block.self_attn, child, layer)
    prompt = torch.randint(0, 64, (3, 6))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    names = ["b", None, "a"]
    with use_adapters(model, names):
        mixed = model.generate(prompt, **options)
    answers = []
    for row, name in zip(prompt, names, strict=True):
        with use_adapters(model, [name]):
            answers.append(model.generate(row[None], **options)[0])
    assert torch.equal(mixed, torch.stack(answers))
    assert len({tuple(row.tolist()) for row in mixed[:, 6:]}) == 3


@pytest.mark.parametrize("backend", ("triton", "aten"))
def test_the_operators_pass_opcheck(backend, device):
    batch = make_batch(9, N, K, (8, 3), FP32, make_ids("uniform", "shuffled", 9, 2), device)
    pack, seed = make_pack(batch), torch.tensor(1, device=device)
    tensors = [t.detach() for t in (batch.x, batch.weight, pack.lora_A, pack.lora_B)]
    tables = pack().for_tokens(batch.ids)
    arguments = (*tensors, batch.bias, 1.0, None, 0.25, seed, tables, backend, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.forward, arguments, test_utils=tests)
    _, S, mask = ops.forward(*arguments)
    back = (batch.dy, *tensors, S, mask, 1.0, None, 0.25, tables, [True] * 5, backend)
    torch.library.opcheck(ops.backward, back, test_utils=tests)


def test_compiled_code_takes_other_ids_and_hot_swaps_without_compiling_again():
    batch = make_batch(9, N, K, (8, 3), FP32, make_ids("uniform", "shuffled", 9, 2), "cpu")
    pack = make_pack(batch, spare=16)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(multi_lora_linear, backend=frames, fullgraph=True)
    for swap in range(3):
        ours = fused(batch, pack, layer=compiled, backend="aten")
        eager = fused(batch, pack, backend="aten")
        assert all(torch.equal(ours[name], eager[name]) for name in eager)
        batch.ids.copy_(batch.ids.flip(0))
        pack.replace("1", torch.randn(3, K), torch.randn(N, 3) * (swap + 1))
    assert frames.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", (16, 300))
def test_a_graph_replays_with_other_ids_and_other_adapters(tokens):
    layer = MultiLoRALinear(256, 128, dtype=BF16, device="cuda", total_rank=64, backend="triton")
    for i, r in enumerate((8, 16, 32)):
        layer.pack.add(str(i), torch.randn(r, 256), torch.randn(128, r), scaling=0.5 + i)
    x = torch.randn(tokens, 256, device="cuda", dtype=BF16, requires_grad=True)
    dy = torch.randn(tokens, 128, device="cuda", dtype=BF16)
    ids = make_ids("identical", "grouped", tokens, 3).cuda()

    def step():
        y = layer(x, ids)
        return y, *torch.autograd.grad(y, (x, layer.pack.lora_A, layer.pack.lora_B), dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for popularity in ("distinct", "uniform", "none"):
        ids.copy_(make_ids(popularity, "shuffled", tokens, 3))
        layer.pack.replace("1", torch.randn(16, 256), torch.randn(128, 16), scaling=3.0)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, step()))


@pytest.mark.gpu
def test_on_a_gpu_unknown_ids_count_as_none_without_the_debug_switch():
    layer = MultiLoRALinear(64, 64, dtype=BF16, device="cuda", total_rank=16, backend="triton")
    layer.pack.add("a", torch.randn(16, 64), torch.randn(64, 16))
    x = torch.randn(40, 64, device="cuda", dtype=BF16)
    unknown = torch.tensor([7, -2, 2**30, -(2**31)], dtype=torch.int32, device="cuda").repeat(10)
    assert torch.equal(layer(x, unknown), layer(x, torch.full_like(unknown, -1)))


def test_a_second_thread_cannot_choose_other_adapters_meanwhile():
    layer = MultiLoRALinear(4, 4, total_rank=32)
    for name in "ab":
        layer.pack.add_untrained(name, 2)
    seen = []

    def serve():
        try:
            with use_adapters(layer, ["b"]):
                seen.append(layer._chosen.ids.item())
        except RuntimeError as error:
            seen.append(str(error))

    def in_a_thread():
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()

    with use_adapters(layer, ["a"]):
        in_a_thread()
        assert layer._chosen.ids.item() == layer.pack.id("a")
        with use_adapters(layer, ["b"]):  # this thread may
            pass
    in_a_thread()
    assert "another thread is inside a use_adapters block" in seen[0]
    assert seen[1:] == [layer.pack.id("b")] and layer._chosen is None
