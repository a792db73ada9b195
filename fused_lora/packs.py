"""Packs of adapters over a whole model: put in, and one adapter added, replaced or removed in all
layers or in none, so that a name, and an id, mean the same adapter in every layer."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fused_lora.adapter_config import AdapterConfig
from fused_lora.adapter_files import check_name, read_adapter
from fused_lora.adapter_pack import AdapterPack
from fused_lora.extras import require_same_embeddings
from fused_lora.layer import InitLoRA, check_adapter_options, initialise
from fused_lora.multi import MultiLoRALinear
from fused_lora.places import (
    Replacement,
    checked_targets,
    find_targets,
    module_places,
    pack_layers,
)
from fused_lora.scale import padded_rank
from fused_lora.targets import describe_targets


def apply_packs(
    model: nn.Module,
    adapters: Mapping[str, Mapping[str, Any] | str | os.PathLike[str]],
    own: Mapping[str, Any],
    common: Mapping[str, Any],
    total_rank: int | None,
    max_adapters: int,
) -> None:
    """`apply_lora` with `adapters`; own: what each of them may have of its own."""
    if pack_layers(model):
        raise ValueError(
            "the model has packs already, and an id must mean one adapter in all of them: "
            "add_adapter and load_adapter put more into these"
        )
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must map names to options or folders: got {adapters!r}")
    check_adapter_options(r=1, **common)
    paths = [where[0].path for where in module_places(model).values()]
    plans: dict[str, dict[str, tuple[int, float, tuple[Tensor, Tensor] | None]]] = {}
    for name, given in adapters.items():
        check_name(name)
        if isinstance(given, Mapping):
            for unknown in [key for key in given if key not in own]:
                raise ValueError(
                    f"adapters[{name!r}] has {unknown!r}: expected a folder, or any of "
                    f"{', '.join(own)}; what else there is goes for all adapters"
                )
            config = AdapterConfig(**{**own, **given})
            plans[name] = {
                path: (config.rank(path), config.scaling(path), None)
                for path in checked_targets(model, config, common)
            }
        elif isinstance(given, (str, os.PathLike)):
            adapter = read_adapter(Path(given))
            require_same_embeddings(model, adapter)
            loaded = adapter.for_packs("modules of the model", paths)
            plans[name] = {
                path: (len(A), scaling, (A, B)) for path, (A, B, scaling) in loaded.items()
            }
        else:
            raise TypeError(f"adapters[{name!r}] must be options or a folder: got {given!r}")
    rooms = Counter[str]()
    for plan in plans.values():
        rooms.update({path: padded_rank(r) for path, (r, _, _) in plan.items()})
    if total_rank is not None:
        targets = find_targets(model, own["target_modules"], own["exclude_modules"])
        rooms = Counter(dict.fromkeys([*targets, *rooms], total_rank))
    if not rooms:
        raise ValueError("adapters is empty: give total_rank, the room in the pack of each layer")
    layer_options = {key: value for key, value in common.items() if key != "init_lora_weights"}
    layer_options["max_adapters"] = max_adapters
    replacement = Replacement(
        model,
        {path: {"total_rank": room, **layer_options} for path, room in rooms.items()},
        packs=True,
    )
    layers = replacement.layers
    for name, plan in plans.items():
        factors = {
            path: (*(given or _initial(layers[path].pack, r, common["init_lora_weights"])), scaling)
            for path, (r, scaling, given) in plan.items()
        }
        put_adapter(layers, name, factors)
    replacement.commit()


def add_adapter(
    model: nn.Module,
    name: str,
    *,
    r: int,
    lora_alpha: float,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    init_lora_weights: InitLoRA = True,
) -> None:
    """Add an untrained adapter to the packs of `model`, a model of `apply_lora(adapters=...)`, in
    place. Options as there; "all-linear" is every layer with a pack. The id is the smallest free
    one.

    Raises ValueError if the name is taken or could be no folder's, a target has no pack, room is
    missing, or there are no packs; then all packs are as they were.
    """
    layers = _require_packs(model)
    check_name(name)
    if any(name in layer.pack.names for layer in layers.values()):
        raise ValueError(f"there is an adapter {name!r} already: delete_adapter() removes it")
    if target_modules == "all-linear":
        paths = [where[0].path for where in module_places(model).values()]
        target_modules = describe_targets(list(layers), paths)
    config = AdapterConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        use_rslora=use_rslora,
    )
    targets = checked_targets(model, config, {"init_lora_weights": init_lora_weights})
    for path in targets:
        if path not in layers:
            raise ValueError(f"{path} has no pack: leave it out of target_modules")
    factors = {
        path: (
            *_initial(layers[path].pack, config.rank(path), init_lora_weights),
            config.scaling(path),
        )
        for path in targets
    }
    put_adapter(layers, name, factors)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove adapter `name` from all packs of `model`; its room and its id are free then, also for
    `use_adapters` blocks that are open. Raises KeyError if there is no such adapter, ValueError if
    there are no packs; then, as after any other failure, all packs are as they were."""
    layers = _require_packs(model)
    _require_alike(layers)
    for layer in layers.values():
        layer.pack.require_storage()
    with _all_or_nothing(layers, name):
        for layer in layers.values():
            layer.pack.remove(name)


def _require_packs(model: nn.Module) -> dict[str, MultiLoRALinear]:
    layers = pack_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no pack of adapters: call apply_lora with adapters={{}}"
        )
    return layers


def _initial(pack: AdapterPack, r: int, how: InitLoRA) -> tuple[Tensor, Tensor]:
    lora_A = pack.lora_A.new_empty(r, pack.in_features)
    lora_B = pack.lora_B.new_empty(pack.out_features, r)
    initialise(lora_A, lora_B, how)
    return lora_A, lora_B


def put_adapter(
    layers: Mapping[str, MultiLoRALinear],
    name: str,
    factors: Mapping[str, tuple[Tensor, Tensor, float]],
) -> None:
    """Add adapter `name`, or replace it, in the packs of all `layers`, {path: layer}.

    factors: {path: (lora_A [r, in], lora_B [out, r], scaling)} of the layers that it changes; in
    the others it gets rank 0, with which its tokens take the base. Raises ValueError, naming the
    layer, if it does not fit a pack or the packs were filled apart; then all are as they were.
    """
    _require_alike(layers)
    prepared = {}
    for path, layer in layers.items():
        pack = layer.pack
        nothing = (pack.lora_A[:0], pack.lora_B[:, :0], 0.0)
        try:
            prepared[path] = pack.prepare(name, *factors.get(path, nothing))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    with _all_or_nothing(layers, name):
        for path, layer in layers.items():
            layer.pack.write(name, prepared[path])


@contextlib.contextmanager
def _all_or_nothing(layers: Mapping[str, MultiLoRALinear], name: str) -> Iterator[None]:
    """Whatever fails within the context (memory runs out, say), adapter `name` is as it was."""
    before = {path: layer.pack.packed(name) for path, layer in layers.items()}
    try:
        yield
    except BaseException:
        for path, layer in layers.items():
            earlier = before[path]
            if earlier is not None:
                layer.pack.write(name, earlier)
            elif name in layer.pack.names:
                layer.pack.remove(name)
        raise


def _require_alike(layers: Mapping[str, MultiLoRALinear]) -> None:
    """Raise ValueError unless all packs hold the same adapters under the same ids."""
    held = {
        path: {name: layer.pack.id(name) for name in layer.pack.names}
        for path, layer in layers.items()
    }
    first = next(iter(held))
    for path, ids in held.items():
        if ids != held[first]:
            raise ValueError(
                f"the packs were filled apart, {first} with {held[first]} and {path} with {ids}: "
                "an id must mean one adapter in all layers; remove() what only some of them hold"
            )
