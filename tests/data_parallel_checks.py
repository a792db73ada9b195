"""What test_distributed asks of every rank under DDP and FSDP: the numbers of one process."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fused_lora import (
    FusedLoRALinear,
    apply_lora,
    explain,
    load_adapter,
    lora_state_dict,
    mark_only_lora_as_trainable,
    save_adapter,
)
from fused_lora.wrapped import clean_path

K, N, TOKENS, STEPS = 12, 22, 8, 3
FULL = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    """Frozen and trainable parameters side by side, as in a transformer's block."""

    def __init__(self, **options):
        super().__init__()
        options = {"r": 3, "init_lora_weights": False, **options}
        dtype = options.get("dtype")
        self.norm = nn.LayerNorm(K, dtype=dtype, device=options.get("device")).requires_grad_(False)
        self.up = FusedLoRALinear(K, N, **options)
        self.down = FusedLoRALinear(N, K, **options)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Model(nn.Module):
    def __init__(self, recompute=False, **options):
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList([Block(**options) for _ in range(2)])
        keep = {k: options[k] for k in ("dtype", "device") if k in options}
        self.head = nn.Linear(K, 5, **keep)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def twins(dtype=torch.float64, **options):
    """Two equal models, the same on every rank."""
    torch.manual_seed(0)
    model = Model(dtype=dtype, **options)
    return model, copy.deepcopy(model)


def data(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(STEPS, TOKENS, K, dtype=dtype), torch.randn(STEPS, TOKENS, 5, dtype=dtype)


def mine(batch):
    """This rank's share of a batch."""
    return batch[dist.get_rank() :: dist.get_world_size()]


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_close(ours, theirs, **tolerance):
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(
            whole(ours[name].detach()),
            theirs[name].detach(),
            msg=lambda m, n=name: f"{n}: {m}",
            **tolerance,
        )


def grads(model):
    return {name.removeprefix("module."): p.grad for name, p in trainable(model).items()}


def average_over_ranks(model):
    for p in trainable(model).values():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()


def losses_of(call, model, batches):
    """Train; the mean loss over the ranks at every step. The last step's gradients are left."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    losses = []
    for x, target in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(call(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_trains_like_one_process(call, model, alone):
    xs, targets = data()
    losses = losses_of(call, model, [(mine(x), mine(t)) for x, t in zip(xs, targets, strict=True)])
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    expected = losses_of(alone, alone, list(zip(xs, targets, strict=True)))
    torch.testing.assert_close(mean / dist.get_world_size(), torch.tensor(expected).double())
    assert_close(grads(model), grads(alone))
    assert_close(
        {n.removeprefix("module."): p for n, p in trainable(model).items()}, trainable(alone)
    )


def ddp_gives_the_losses_and_gradients_of_one_process():
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}):
        model, alone = twins()
        parallel = DistributedDataParallel(model, **options)
        assert_trains_like_one_process(parallel, model, alone)


def ddp_accumulates_gradients_without_synchronising():
    model, alone = twins()
    parallel = DistributedDataParallel(model)
    xs, targets = data()
    with parallel.no_sync():
        for x, target in zip(xs[:-1], targets[:-1], strict=True):
            F.mse_loss(parallel(mine(x)), mine(target)).backward()
    F.mse_loss(parallel(mine(xs[-1])), mine(targets[-1])).backward()
    for x, target in zip(xs, targets, strict=True):
        F.mse_loss(alone(x), target).backward()
    assert_close(grads(model), grads(alone))


def ddp_does_not_miss_parameters():
    """It averages the gradients of the parameters that it was made with."""
    plain = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    with pytest.raises(TypeError, match=r"put the adapters into model.module, and wrap that anew"):
        apply_lora(DistributedDataParallel(plain), r=2, lora_alpha=2)
    parallel = DistributedDataParallel(apply_lora(plain, r=3, lora_alpha=3))
    known = [id(p) for p in parallel.module.parameters()]
    state = lora_state_dict(parallel)
    assert list(state) == ["0.lora_A", "0.lora_B", "1.lora_A", "1.lora_B"]
    with tempfile.TemporaryDirectory() as folder:
        for r in (3, 2):
            other = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
            other = apply_lora(other, r=r, lora_alpha=r, init_lora_weights=False)
            save_adapter(other, f"{folder}/{r}")
        before = {name: value.clone() for name, value in state.items()}
        with pytest.raises(RuntimeError, match="load an adapter of another rank, or a first one,"):
            load_adapter(parallel, f"{folder}/2")
        assert_close(lora_state_dict(parallel), before)
        bare = DistributedDataParallel(nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)))
        with pytest.raises(RuntimeError, match="load an adapter of another rank, or a first one,"):
            load_adapter(bare, f"{folder}/3")
        load_adapter(parallel, f"{folder}/3")
    assert known == [id(p) for p in parallel.module.parameters()]
    assert not torch.equal(lora_state_dict(parallel)["0.lora_A"], before["0.lora_A"])


def ddp_around_a_part_counts_for_that_part():
    part = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K))
    model = nn.ModuleDict({"inside": DistributedDataParallel(part), "beside": nn.Linear(K, N)})
    for each in (model, torch.compile(model["inside"], backend="eager")):
        with pytest.raises(TypeError, match=r"put the adapters into model.module"):
            apply_lora(each, r=2, lora_alpha=2)
    apply_lora(model, r=2, lora_alpha=2, target_modules=["beside"])
    twin = apply_lora(nn.ModuleDict({"beside": nn.Linear(K, N)}), r=3, lora_alpha=3)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(twin, folder)
        load_adapter(model, folder)
    part.requires_grad_(False)
    part[0].weight.requires_grad_()
    model["inside"] = DistributedDataParallel(part)
    with pytest.raises(RuntimeError, match="mark the model before it is wrapped"):
        mark_only_lora_as_trainable(model, modules_to_save=["module.1"])
    assert part[0].weight.requires_grad and not part[1].weight.requires_grad


def shard(model, *, leaves=False, **options):
    """FSDP2, a unit per block, or one per adapted layer as well."""
    for block in model.blocks:
        if leaves:
            fully_shard(block.up, **options)
            fully_shard(block.down, **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)


OFFLOAD = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())


def fsdp_gives_the_losses_and_gradients_of_one_process():
    for options in (
        {},
        {"reshard_after_forward": False},
        {"leaves": True},
        {"offload_policy": OFFLOAD},
    ):
        model, alone = twins()
        assert_trains_like_one_process(shard(model, **options), model, alone)
        layer = model.blocks[0].up
        assert all(isinstance(p, DTensor) for p in layer.parameters()), "not sharded at rest"


def fsdp_recomputes_checkpointed_blocks_with_their_masks():
    for recompute in (False, True):
        model, plain = twins(lora_dropout=0.5)
        model.recompute = recompute
        shard(model)
        x, target = (mine(t[0]) for t in data())
        for module in (model, plain):
            torch.manual_seed(5 + dist.get_rank())
            F.mse_loss(module(x), target).backward()
        average_over_ranks(plain)
        assert_close(grads(model), grads(plain))


def fsdp_mixed_precision_computes_in_bf16_and_reduces_in_fp32():
    """Each rank's share in bf16 copies of the parameters, the mean of the gradients in fp32."""
    model, alone = twins(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mp_policy=policy)
    x, target = (mine(t[0]) for t in data(torch.float32))
    loss = F.mse_loss(model(x).float(), target)
    loss.backward()
    half = {name: p.detach().bfloat16() for name, p in alone.named_parameters()}
    for name in trainable(alone):
        half[name].requires_grad_()
    expected = F.mse_loss(torch.func.functional_call(alone, half, (x.bfloat16(),)).float(), target)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    for name, p in trainable(alone).items():
        p.grad = half[name].grad.float()
    average_over_ranks(alone)
    assert_close(grads(model), grads(alone), rtol=1e-6, atol=1e-7)
    assert {p.grad.dtype for p in trainable(model).values()} == {torch.float32}


def fsdp_trains_fp32_adapters_on_a_bf16_base():
    torch.manual_seed(0)
    model = Model(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    model.head.requires_grad_(False)
    alone = copy.deepcopy(model)
    shard(model)
    x = data()[0][0].bfloat16()
    model(mine(x)).square().sum().backward()
    alone(mine(x)).square().sum().backward()
    assert {p.grad.dtype for p in trainable(alone).values()} == {torch.float32}
    average_over_ranks(alone)
    assert_close(grads(model), grads(alone))


def fsdp_runs_the_kernels():
    model, alone = twins(torch.float32, backend="triton", lora_dropout=0.25)
    shard(model)
    x, target = (mine(t[0]) for t in data(torch.float32))
    for module in (model, alone):
        torch.manual_seed(5)
        F.mse_loss(module(x), target).backward()
    average_over_ranks(alone)
    assert_close(grads(model), grads(alone))
    assert "triton" in explain(model)


def wrap(model, **options):
    """FSDP1, a unit per block; frozen and trainable parameters in one need use_orig_params."""
    options = {"use_orig_params": True, "device_id": torch.device("cpu")} | options
    return FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({Block}), **options)


def fsdp1_gives_the_losses_and_gradients_of_one_process():
    for options in ({}, {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}):
        model, alone = twins()
        wrapped = wrap(model, **options)
        xs, targets = data()
        shares = [(mine(x), mine(target)) for x, target in zip(xs, targets, strict=True)]
        mean = torch.tensor(losses_of(wrapped, wrapped, shares), dtype=torch.float64)
        dist.all_reduce(mean)
        expected = losses_of(alone, alone, list(zip(xs, targets, strict=True)))
        torch.testing.assert_close(mean / dist.get_world_size(), torch.tensor(expected).double())
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            clean = {clean_path(name): p for name, p in wrapped.named_parameters()}
            assert_close(clean, dict(alone.named_parameters()))
            assert_close(
                {name: p.grad for name, p in clean.items() if p.requires_grad}, grads(alone)
            )


def fsdp1_recomputes_checkpointed_blocks_with_their_masks():
    model, plain = twins(lora_dropout=0.5, recompute=True)
    wrapped = wrap(model)
    x, target = (mine(t[0]) for t in data())
    for module in (wrapped, plain):
        torch.manual_seed(5 + dist.get_rank())
        F.mse_loss(module(x), target).backward()
    average_over_ranks(plain)
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        ours = {clean_path(name): p.grad for name, p in trainable(wrapped).items()}
        assert_close(ours, grads(plain))


TWO_RANKS = [
    ddp_gives_the_losses_and_gradients_of_one_process,
    ddp_accumulates_gradients_without_synchronising,
    ddp_does_not_miss_parameters,
    ddp_around_a_part_counts_for_that_part,
    fsdp_gives_the_losses_and_gradients_of_one_process,
    fsdp_recomputes_checkpointed_blocks_with_their_masks,
    fsdp_mixed_precision_computes_in_bf16_and_reduces_in_fp32,
    fsdp_trains_fp32_adapters_on_a_bf16_base,
    fsdp_runs_the_kernels,
    fsdp1_gives_the_losses_and_gradients_of_one_process,
    fsdp1_recomputes_checkpointed_blocks_with_their_masks,
]
