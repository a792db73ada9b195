"""What test_distributed asks of every rank about parameters that are shards: saved and loaded,
built on the meta device, merged, refused."""

import tempfile

import pytest
import tensor_parallel_checks as tensor_parallel
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from data_parallel_checks import (
    Model,
    assert_close,
    assert_trains_like_one_process,
    data,
    mine,
    shard,
    twins,
    whole,
    wrap,
)
from tensor_parallel_checks import MLP, K, inputs, split, world_mesh
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_adapters,
    load_adapter,
    lora_state_dict,
    merge_adapter,
    save_adapter,
    unload,
    unmerge_adapter,
)
from fused_lora.parallel import ColwiseLoRAParallel, RowwiseLoRAParallel

FULL = StateDictOptions(full_state_dict=True)


def fsdp_state_dicts_are_those_of_one_process():
    model, alone = twins()
    expected = {name: value.clone() for name, value in alone.state_dict().items()}
    shard(model)
    assert_close(get_model_state_dict(model, options=FULL), expected)
    other = shard(Model(dtype=torch.float64))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, dict(expected) if dist.get_rank() == 0 else {}, options=options)
    assert_close(get_model_state_dict(other, options=FULL), expected)
    for layer in (other.blocks[0].up, other.blocks[1].down):  # an adapter alone, as sharded tensors
        layer.load_state_dict(
            {k: layer.state_dict()[k] for k in ("lora_A", "lora_B")}, strict=False
        )
    assert_close(get_model_state_dict(other, options=FULL), expected)


def fsdp_checkpoints_are_written_and_read_in_shards():
    model, alone = twins()
    shard(model)
    torch.manual_seed(9)
    other = shard(Model(dtype=torch.float64))
    state = {"model": get_model_state_dict(other)}
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder[0])
        dcp.load(state, checkpoint_id=folder[0])
        dist.barrier()
    set_model_state_dict(other, state["model"])
    assert_close(get_model_state_dict(other, options=FULL), dict(alone.state_dict()))


def fsdp_builds_on_the_meta_device_and_refuses_to_run_before_it_has_adapters():
    _, alone = twins()
    x = mine(data()[0][0])

    def materialised():
        model = shard(Model(dtype=torch.float64, device="meta"))
        model.to_empty(device="cpu")
        return model

    with pytest.raises(RuntimeError, match="reset_lora_parameters"):
        materialised()(x)
    model = materialised()
    for block in model.blocks:
        block.up.reset_lora_parameters()
        block.down.reset_lora_parameters()
        for layer in (block.up, block.down):
            A = layer.lora_A.full_tensor()
            assert 0.5 < A.abs().max() * layer.in_features**0.5 <= 1, "not initialised as a whole"
    base = {name: value for name, value in alone.state_dict().items() if "lora" not in name}
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, base, options=options)
    full = get_model_state_dict(model, options=FULL)
    alone.load_state_dict({name: value.clone() for name, value in full.items()})
    assert_trains_like_one_process(model, model, alone)


def a_layer_outside_of_fsdps_forward_is_refused():
    model, _ = twins()
    shard(model)
    with pytest.raises(TypeError, match="weight is a DTensor"):
        model.blocks[0].up(mine(data()[0][0]))


def fsdp_refuses_to_merge_what_it_would_undo():
    """Whether the parameters are shards, or whole as the root's are after a forward."""
    for called in (False, True):
        model, alone = twins()
        fully_shard(model)
        if called:
            model(mine(data()[0][0]))
        before = {name: whole(p).clone() for name, p in model.named_parameters()}
        for merge in (lambda model=model: merge_adapter(model), model.blocks[0].up.merge):
            with pytest.raises(RuntimeError, match=r"FSDP holds the base weight.*gather"):
                merge()
        assert not model.blocks[0].up.merged
        assert_close(dict(model.named_parameters()), before)
        x = data()[0][0]
        torch.testing.assert_close(model(x), alone(x))


def fsdp_leaves_merged_layers_merged():
    model, alone = twins()
    for each in (model, alone):
        each.requires_grad_(False)
        merge_adapter(each)
    shard(model)
    x = data()[0][0]
    for _ in range(2):
        torch.testing.assert_close(model(mine(x)), mine(alone(x)))
        assert model.blocks[0].up.merged


def adapters_of_sharded_layers_are_not_exchanged():
    model, _ = twins()
    alone = {name: p.detach().clone() for name, p in model.named_parameters()}
    shard(model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(twins()[0], folder)
        with pytest.raises(RuntimeError, match=r"blocks.0.up is sharded: load an adapter before"):
            load_adapter(model, folder)
    layer = model.blocks[0].up
    with pytest.raises(RuntimeError, match="lora_A and lora_B are sharded: set an adapter before"):
        layer.set_adapter(torch.zeros(3, layer.in_features), torch.zeros(22, 3), lora_alpha=1)
    with pytest.raises(ValueError, match=r"blocks.0.up.lora_A is sharded: gather the state_dict"):
        save_adapter(model, "nowhere")
    assert_close(dict(model.named_parameters()), alone)


def fsdp1_saves_what_it_has_gathered():
    model, alone = twins()
    wrapped = wrap(model)
    x = data()[0][0]
    wrapped(mine(x)).square().mean().backward()  # afterwards every rank has a part again
    with tempfile.TemporaryDirectory() as folder:
        for refused in (
            lambda: save_adapter(wrapped, f"{folder}/refused"),
            lambda: lora_state_dict(wrapped),
            wrapped.blocks[0].up.delta_weight,
        ):
            with pytest.raises(RuntimeError, match=r"inside of .*summon_full_params\(model\)"):
                refused()
        with FullyShardedDataParallel.summon_full_params(wrapped):
            save_adapter(wrapped, f"{folder}/saved")
            state = lora_state_dict(wrapped)
            assert_close(state, lora_state_dict(alone))
            with pytest.raises(
                RuntimeError, match=r"blocks.0.up is sharded: load an adapter before"
            ):
                load_adapter(wrapped, f"{folder}/saved")
        other = load_adapter(Model(dtype=torch.float64), f"{folder}/saved")
    assert_close(lora_state_dict(other), lora_state_dict(alone))
    for merge in (lambda: merge_adapter(wrapped), wrapped.blocks[0].up.merge):
        with pytest.raises(RuntimeError, match=r"FSDP holds the base weight.*gather"):
            merge()


def what_fsdp_holds_beside_the_adapters_is_not_saved_in_parts_or_put_back():
    with tempfile.TemporaryDirectory() as folder:
        alone = twins()[0]
        save_adapter(alone, folder, bias="all", modules_to_save=["head"])
        for fsdp1 in (True, False):
            model = load_adapter(Model(dtype=torch.float64), folder)
            whole_head = model.head.weight.detach().clone()
            options = {"use_orig_params": True, "device_id": torch.device("cpu")}
            if fsdp1:
                model.head = FullyShardedDataParallel(model.head, **options)
            else:
                fully_shard(model.head)
            for call, words in (
                (lambda m=model: save_adapter(m, f"{folder}/no"), "is sharded: save inside of"),
                (lambda m=model: load_adapter(m, folder), "load an adapter before the model is"),
                (lambda m=model: disable_adapters(m).__enter__(), "cannot be put in its place"),
            ):
                with pytest.raises(RuntimeError, match=words):
                    call()
            if fsdp1:
                with FullyShardedDataParallel.summon_full_params(model.head):
                    save_adapter(model, f"{folder}/yes")
                again = load_adapter(Model(dtype=torch.float64), f"{folder}/yes")
                torch.testing.assert_close(again.head.weight.detach(), whole_head)


def fsdp_keeps_the_very_layers_it_was_given():
    for put_around in (shard, wrap):
        merged = twins()[0].requires_grad_(False)
        merge_adapter(merged)
        expected = merged(data()[0][0])
        merged = put_around(merged)
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) before"):
            unmerge_adapter(merged)
        with pytest.raises(RuntimeError, match="unload before"):
            unload(merged)
        for _ in range(2):
            torch.testing.assert_close(merged(mine(data()[0][0])), mine(expected))
        plain = put_around(Model(dtype=torch.float64))
        with pytest.raises(TypeError, match=r"head .* holds its parameters already"):
            apply_lora(plain, r=2, lora_alpha=2, target_modules=["head"])


def packs_of_sharded_layers_are_not_changed():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 8))
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "total_rank": 48}
    apply_lora(model, adapters={"a": {}}, **options)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    for call in (
        lambda: save_adapter(model, "nowhere", name="a"),
        lambda: delete_adapter(model, "a"),
        lambda: add_adapter(model, "b", r=2, lora_alpha=2),
    ):
        with pytest.raises(
            RuntimeError, match="the pack is sharded: add, replace, remove and save"
        ):
            call()
    assert all(layer.pack.names == ["a"] for layer in model)
    assert_close(dict(model.named_parameters()), before)


def a_split_layer_merges_and_unmerges_in_shards():
    model, alone = tensor_parallel.twins()
    split(model)
    x = inputs().detach()
    expected = alone(x)
    base = model.up.weight
    for layer in (model.up, model.down):
        layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(whole(model.up.weight), alone.up.merge().weight)
    for layer in (model.up, model.down):
        layer.unmerge()
    assert model.up.weight is base
    torch.testing.assert_close(model(x), expected)


def split_layers_start_from_the_first_ranks_adapters():
    model, alone = tensor_parallel.twins()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(dist.get_rank())
    split(model)
    torch.testing.assert_close(model(inputs()), alone(inputs()))


def a_meta_layer_is_split_then_filled():
    model, alone = tensor_parallel.twins()
    empty = split(MLP(device="meta")).to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="reset_lora_parameters"):
        empty(inputs())
    empty.up.reset_lora_parameters()
    assert empty.up.lora_A.full_tensor().abs().max() <= K**-0.5
    split(model)
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(inputs()), alone(inputs()))


def what_cannot_be_split_is_refused():
    mesh = world_mesh()
    for plan, module, error, words in (
        (ColwiseLoRAParallel(), nn.Linear(4, 4), TypeError, "got Linear; for an nn.Linear take"),
        (RowwiseLoRAParallel(), FusedLoRALinear(4, 4).merge(), RuntimeError, r"call unmerge\(\)"),
        (ColwiseParallel(), FusedLoRALinear(4, 4), NotImplementedError, "only support nn.Linear"),
    ):
        with pytest.raises(error, match=words):
            parallelize_module(module, mesh, plan)


TWO_RANKS = [
    fsdp_state_dicts_are_those_of_one_process,
    fsdp_checkpoints_are_written_and_read_in_shards,
    fsdp_builds_on_the_meta_device_and_refuses_to_run_before_it_has_adapters,
    a_layer_outside_of_fsdps_forward_is_refused,
    fsdp_refuses_to_merge_what_it_would_undo,
    fsdp_leaves_merged_layers_merged,
    adapters_of_sharded_layers_are_not_exchanged,
    fsdp1_saves_what_it_has_gathered,
    what_fsdp_holds_beside_the_adapters_is_not_saved_in_parts_or_put_back,
    fsdp_keeps_the_very_layers_it_was_given,
    packs_of_sharded_layers_are_not_changed,
    a_split_layer_merges_and_unmerges_in_shards,
    split_layers_start_from_the_first_ranks_adapters,
    a_meta_layer_is_split_then_filled,
    what_cannot_be_split_is_refused,
]
