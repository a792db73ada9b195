"""What test_distributed asks of every rank under tensor parallelism: the numbers of one process."""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from fused_lora import FusedLoRALinear, dropout, reference
from fused_lora.parallel import ColwiseLoRAParallel, RowwiseLoRAParallel

K, N, R = 12, 22, 3  # 22 splits into unequal parts over 4 ranks
BATCH, TOKENS, STEPS = 2, 8, 3


class MLP(nn.Module):
    """The pair that tensor parallelism is made for; biases are trained too."""

    def __init__(self, train_bias=True, **options):
        super().__init__()
        options = {"r": R, "init_lora_weights": False, "dtype": torch.float64, **options}
        self.up = FusedLoRALinear(K, N, **options)
        self.down = FusedLoRALinear(N, K, **options)
        for layer in (self.up, self.down):
            layer.bias.requires_grad_(train_bias)

    def forward(self, x):
        return self.down(self.up(x).tanh())


def world_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def twins(**options):
    torch.manual_seed(0)
    model = MLP(**options)
    return model, copy.deepcopy(model)


def split(model, up=None, down=None):
    plan = {"up": up or ColwiseLoRAParallel(), "down": down or RowwiseLoRAParallel()}
    return parallelize_module(model, world_mesh(), plan)


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(BATCH, TOKENS, K, dtype=dtype, requires_grad=True)


def part(x, dim):
    """This rank's share of a tensor along a dimension, with a gradient of its own."""
    return x.detach().chunk(dist.get_world_size(), dim)[dist.get_rank()].requires_grad_()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(ours, theirs, **tolerance):
    for name, p in trainable(theirs).items():
        grad = trainable(ours)[name].grad
        assert grad.placements == trainable(ours)[name].placements, f"{name}: {grad.placements}"
        torch.testing.assert_close(whole(grad), p.grad, **tolerance)


def communicated(call):
    with CommDebugMode() as mode:
        result = call()
    counts = mode.get_comm_counts().items()
    return result, {str(op).rpartition(".")[2]: count for op, count in counts if count}


def it_trains_like_one_process():
    model, alone = twins()
    split(model)
    losses = []
    for module in (model, alone):
        optimizer = torch.optim.AdamW(trainable(module).values(), lr=0.01)
        losses.append([])
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = F.mse_loss(module(inputs() * (step + 1)), torch.ones(BATCH, TOKENS, K).double())
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*map(torch.tensor, losses))
    assert_same_gradients(model, alone)
    for name, p in alone.named_parameters():
        torch.testing.assert_close(whole(dict(model.named_parameters())[name]), p)


def one_all_reduce_is_added_for_each_replicated_factor():
    model, _ = twins(train_bias=False)
    split(model)
    x = inputs()
    y, forward = communicated(lambda: model(x))
    _, backward = communicated(lambda: y.sum().backward())
    # the base's own: y of the row parallel layer, dX of the column parallel one
    assert forward == {"all_reduce": 1}, forward
    assert backward == {"all_reduce": 1 + 2}, backward
    model, _ = twins(train_bias=False)
    split(model)
    model.up.lora_A.requires_grad_(False)
    model.down.lora_B.requires_grad_(False)
    y = model(inputs().detach())
    _, backward = communicated(lambda: y.sum().backward())
    assert backward == {}, backward


def a_sequence_parallel_input_and_output_give_the_same():
    model, alone = twins()
    split(
        model,
        ColwiseLoRAParallel(input_layouts=Shard(1)),
        RowwiseLoRAParallel(output_layouts=Shard(1)),
    )
    x = inputs()
    share = part(x, 1)
    y, forward = communicated(lambda: model(share))
    expected = alone(x)
    torch.testing.assert_close(y, part(expected, 1))
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    part_of_loss = (y * part(weights, 1)).sum()
    _, backward = communicated(part_of_loss.backward)
    torch.testing.assert_close(share.grad, part(x.grad, 1))
    assert_same_gradients(model, alone)
    assert forward == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}, forward
    assert backward == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 3}


def inputs_and_outputs_have_the_layouts_asked_for():
    mesh = world_mesh()
    for output, local in ((Replicate(), True), (Shard(-1), False), (Shard(1), True)):
        model, alone = twins()
        split(
            model,
            ColwiseLoRAParallel(output_layouts=Replicate()),
            RowwiseLoRAParallel(
                input_layouts=Replicate(), output_layouts=output, use_local_output=local
            ),
        )

        def shard(x, output=output):
            return x if output == Replicate() else part(x, output.dim)

        x = inputs()
        given = distribute_tensor(x.detach(), mesh, [Replicate()]).requires_grad_()
        y, expected = model(given), alone(x)
        assert isinstance(y, DTensor) != local
        y = y if local else y.to_local()
        torch.testing.assert_close(y, shard(expected))
        dy = torch.randn_like(expected)
        (y * shard(dy)).sum().backward()
        (expected * dy).sum().backward()
        torch.testing.assert_close(whole(given.grad), x.grad)
        assert_same_gradients(model, alone)
        with torch.no_grad():
            again = model.eval()(given)
        assert torch.equal(again if local else again.to_local(), y)


def gathered(mask, columns):
    """The ranks' masks of their columns, side by side."""
    sizes = [len(part) for part in torch.arange(columns).chunk(dist.get_world_size())]
    masks = [torch.empty(len(mask), n, dtype=torch.uint8) for n in sizes]
    for rank, other in enumerate(masks):
        other.copy_(mask if rank == dist.get_rank() else other)
        dist.broadcast(other, rank)
    assert not torch.equal(masks[0], masks[1]), "one mask on different columns"
    return torch.cat(masks, 1).bool()


def a_replicated_input_has_one_mask_and_a_split_one_independent_masks():
    """Whatever the ranks' generators are seeded with; backward uses the masks of forward."""
    rank, p = dist.get_rank(), 0.5
    for seeds, name in ((7, "up"), (7 + rank, "up"), (7, "down"), (7 + rank, "down")):
        model, alone = twins(lora_dropout=p, train_bias=False)
        split(model, ColwiseLoRAParallel(output_layouts=Replicate()))
        ours, theirs = getattr(model, name), getattr(alone, name)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(64, theirs.in_features, generator=generator, dtype=torch.float64)
        share = (x if name == "up" else part(x, 1)).requires_grad_()
        torch.manual_seed(seeds)
        seed = dropout.draw_seed(torch.device("cpu"))
        if name == "up":
            dist.broadcast(seed, 0)
            mask = dropout.keep_mask(seed, 64, theirs.in_features, p)
        else:
            mask = dropout.keep_mask(seed + rank, 64, share.shape[1], p)
            mask = gathered(mask, theirs.in_features)
        torch.manual_seed(seeds)
        y = ours(share)
        expected = reference.lora_linear(
            *(x, theirs.weight, theirs.lora_A, theirs.lora_B, theirs.bias),
            scaling=theirs.scaling,
            dropout_p=p,
            mask=mask,
        )
        torch.testing.assert_close(y, expected)
        y.sin().sum().backward()
        expected.sin().sum().backward()
        assert_same_gradients(ours, theirs)


def a_recomputed_block_gives_the_same_gradients_bit_for_bit():
    grads = []
    for recompute in (False, True):
        model, _ = twins(lora_dropout=0.5)
        split(model)
        x = inputs()
        torch.manual_seed(5)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad.to_local() for p in trainable(model).values())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def it_compiles_to_one_graph_that_gives_the_same():
    for p in (0.0, 0.5):
        model, _ = twins(lora_dropout=p)
        split(model)
        grads = []
        for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            x = inputs()
            torch.manual_seed(5)
            call(x).sin().sum().backward()
            grads.append([x.grad, *(q.grad.to_local() for q in trainable(model).values())])
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


def it_runs_the_kernels():
    options = {"dtype": torch.float32, "backend": "triton"}
    model, alone = twins(**options)
    split(model)
    for module in (model, alone):
        module(inputs(torch.float32)).sin().sum().backward()
    assert_same_gradients(model, alone, rtol=1e-4, atol=1e-4)


def it_composes_with_fsdp():
    """Two by two: tensor parallel pairs, FSDP2 over them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(MLP(), nn.Tanh(), MLP())
    alone = copy.deepcopy(model)
    plan = {"*.up": ColwiseLoRAParallel(), "*.down": RowwiseLoRAParallel()}
    parallelize_module(model, mesh["tp"], plan)
    for block in (model[0], model[2], model):
        fully_shard(block, mesh=mesh["dp"])
    x = inputs().detach()
    model(x[mesh["dp"].get_local_rank()]).square().mean().backward()
    alone(x).square().mean().backward()
    for name, p in trainable(alone).items():
        torch.testing.assert_close(whole(trainable(model)[name].grad), p.grad)


FOUR_RANKS = [
    it_trains_like_one_process,
    a_sequence_parallel_input_and_output_give_the_same,
    inputs_and_outputs_have_the_layouts_asked_for,
    a_replicated_input_has_one_mask_and_a_split_one_independent_masks,
    it_composes_with_fsdp,
]
TWO_RANKS = [
    *FOUR_RANKS[:-1],
    one_all_reduce_is_added_for_each_replicated_factor,
    a_recomputed_block_gives_the_same_gradients_bit_for_bit,
    it_compiles_to_one_graph_that_gives_the_same,
    it_runs_the_kernels,
]
