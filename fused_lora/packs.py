"""One adapter in the packs of many layers: added, replaced or removed in all of them or in none, so
that a name, and an id, mean the same adapter in every layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fused_lora.multi import MultiLoRALinear


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
    require_alike(layers)
    prepared = {}
    for path, layer in layers.items():
        pack = layer.pack
        nothing = (pack.lora_A[:0], pack.lora_B[:, :0], 0.0)
        try:
            prepared[path] = pack.prepare(name, *factors.get(path, nothing))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    before = {path: layer.pack.packed(name) for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.pack.write(name, prepared[path])
    except BaseException:  # memory ran out, say
        for path, layer in layers.items():
            earlier = before[path]
            if earlier is not None:
                layer.pack.write(name, earlier)
            elif name in layer.pack.names:
                layer.pack.remove(name)
        raise


def remove_adapter(layers: Mapping[str, MultiLoRALinear], name: str) -> None:
    """Remove adapter `name` from the packs of all `layers`. Raises KeyError if there is no such
    adapter, ValueError if the packs were filled apart; then all packs are as they were."""
    require_alike(layers)
    for layer in layers.values():
        layer.pack.remove(name)


def require_alike(layers: Mapping[str, MultiLoRALinear]) -> None:
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
