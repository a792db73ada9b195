"""What an adapter file holds beside the factors: trained biases, whole modules, embeddings. Checked
against a model, written over its own values, and those put back."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.adapter_config import BIASES, Bias
from fused_lora.adapter_files import (
    PREFIX,
    WEIGHTS_FILE,
    Adapter,
    own_key,
    shape_of,
    short,
    unexplained,
)
from fused_lora.linear import FusedLoRALinear
from fused_lora.places import module_places
from fused_lora.targets import whole
from fused_lora.wrapped import clean_path, manager_of

_EXTRAS = "_fused_lora_extras"
_away: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose extras are


class Original(NamedTuple):
    """A value that an adapter file was written over, and who held it."""

    module: nn.Module
    tensor: Tensor
    value: Tensor


class Extras(NamedTuple):
    """What belongs to a model's adapter beside the factors: the values that those of the file that
    was loaded last were written over, and how a configuration names them."""

    originals: dict[str, Original]
    bias: Bias
    modules_to_save: list[str]


class Held(NamedTuple):
    """A parameter or persistent buffer: every module that has it with its name there, and all its
    keys in a state_dict of the base model."""

    tensor: Tensor
    places: list[tuple[nn.Module, str]]
    keys: list[str]

    @property
    def tied(self) -> bool:
        return len(self.places) > 1

    @property
    def manager(self) -> str | None:
        """Who holds it in shards, None if nobody does."""
        found = (manager_of(module, self.tensor) for module, _ in self.places)
        dtensor = "FSDP or parallelize_module" if type(self.tensor).__name__ == "DTensor" else None
        return next((name for name in found if name is not None), dtensor)

    def put(self, tensor: Tensor) -> None:
        for module, name in self.places:
            table = module._parameters if name in module._parameters else module._buffers
            table[name] = tensor  # type: ignore[assignment]


def held_tensors(model: nn.Module) -> dict[str, Held]:
    """{key: Held}, the same one for all keys of a tensor."""
    found: dict[str, Held] = {}
    of: dict[int, Held] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        persistent = module._buffers.keys() - module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or (name in module._buffers and name not in persistent):
                continue
            key = own_key(clean_path(f"{path}.{name}" if path else name))
            held = found[key] = of.setdefault(id(tensor), Held(tensor, [], []))
            held.keys.append(key)
            if (module, name) not in held.places:
                held.places.append((module, name))
    return found


def _checked_extras(held: dict[str, Held], adapter: Adapter) -> dict[str, Tensor]:
    """The biases and modules of the file, after checking that they can be written."""
    seen: dict[int, Tensor] = {}
    for key, value in adapter.extras.items():
        own = _own(held, key, value)
        biases = adapter.config.bias == "all" and all(k.endswith("bias") for k in own.keys)
        if own.tied and not biases:
            raise ValueError(
                f"{PREFIX}{key} would be written to a parameter that the model uses elsewhere too: "
                "give that module a copy of its own first"
            )
        if not torch.equal(seen.setdefault(id(own.tensor), value), value):
            raise ValueError(
                f"{PREFIX}{key} has other values than {' and '.join(own.keys)}, which are one "
                "parameter in the model: take the adapter of this model"
            )
    return adapter.extras


def _new_embeddings(model: nn.Module, held: dict[str, Held], adapter: Adapter) -> dict[str, Tensor]:
    """The embeddings that PEFT has put into the file and that are not the model's own already.
    Raises ValueError for what is none of the model's embeddings, or does not fit them."""
    expected = _embedding_keys(model, held)
    new = {}
    for key, value in adapter.embeddings.items():
        if key not in expected:
            raise ValueError(unexplained(PREFIX + key))
        own = _own(held, key, value)
        merged = [m for m, _ in own.places if isinstance(m, FusedLoRALinear) and m.merged]
        base = merged[0].base_weight() if merged else own.tensor
        if torch.equal(base.detach(), value.to(base.device, base.dtype)):
            continue
        if merged:
            raise RuntimeError(f"{key} is merged: call unmerge_adapter() before loading another")
        new[key] = value
    return new


def require_same_embeddings(model: nn.Module, adapter: Adapter) -> None:
    """Raise ValueError if the file has other embeddings than the model: adapters of a batch share
    them."""
    for key in _new_embeddings(model, held_tensors(model), adapter):
        raise ValueError(
            f"{WEIGHTS_FILE} has {PREFIX}{short(key)} with other values than the model, whose "
            "embeddings all adapters of a batch share: load this adapter alone, into a model "
            "without packs"
        )


def _own(held: dict[str, Held], key: str, value: Tensor) -> Held:
    """What `value` would be written to, if it can be."""
    own = held.get(key)
    if own is not None and own.manager is not None:
        raise RuntimeError(f"{key} is held by {own.manager}: load an adapter before the model is")
    if own is None or own.tensor.shape != value.shape:
        got = "no such parameter" if own is None else f"a parameter {shape_of(own.tensor)}"
        raise ValueError(
            f"{WEIGHTS_FILE} has {PREFIX}{short(key)} {shape_of(value)}: the model has {got}"
        )
    require_here(key, own.tensor)
    floating = own.tensor.is_floating_point() and value.is_floating_point()
    finite = floating and bool(value.to(own.tensor.dtype).isfinite().all())
    if not finite and (floating or own.tensor.dtype != value.dtype):
        raise ValueError(f"{PREFIX}{key} does not fit the model's {own.tensor.dtype}")
    return own


def _embedding_keys(model: nn.Module, held: dict[str, Held]) -> set[str]:
    weights = set()
    for which in ("get_input_embeddings", "get_output_embeddings"):
        getter: Callable[[], nn.Module | None] | None = getattr(model, which, None)
        with contextlib.suppress(NotImplementedError):
            embedding = getter() if callable(getter) else None
            weights.add(id(getattr(embedding, "weight", None)))
    return {key for key, own in held.items() if id(own.tensor) in weights}


def require_here(key: str, value: Tensor, shards: Collection[int] = ()) -> None:
    """Raise RuntimeError if the value is elsewhere, or a shard: shards are ids of tensors."""
    if type(value).__name__ == "DTensor" or hasattr(value, "ds_id") or id(value) in shards:
        raise RuntimeError(
            f"{key} is sharded: save inside of FullyShardedDataParallel.summon_full_params(model), "
            "or gather the state_dict into a model on one process and save that"
        )
    if value.is_meta:
        raise RuntimeError(
            f"{key} is on the meta device, as accelerate leaves what it offloads: call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )


def extras_of(model: nn.Module) -> Extras:
    found: Extras | None = vars(model).get(_EXTRAS)
    return Extras({}, "none", []) if found is None else found


def forget_extras(model: nn.Module) -> None:
    """What the adapter has beside the factors is the base's from now on."""
    for module in model.modules():
        vars(module).pop(_EXTRAS, None)


def require_extras_here(model: nn.Module) -> None:
    """Raise RuntimeError inside of `originals_back`."""
    if not _away.isdisjoint(model.modules()):
        raise RuntimeError(
            "inside disable_adapters the biases and modules of the adapter are away: call this "
            "outside of the block"
        )


def _originals(model: nn.Module, held: dict[str, Held]) -> dict[str, Tensor]:
    """{key: value} of the originals whose modules or Parameters the model still has: another one,
    put in the place of one, is a new base."""
    kept = {}
    for key, (module, tensor, value) in extras_of(model).originals.items():
        own = held.get(key)
        if own is None:
            continue
        if own.tensor is not tensor and all(place is not module for place, _ in own.places):
            continue
        if own.manager is not None:
            raise RuntimeError(
                f"{key} is held by {own.manager}: the base's value cannot be put in its place"
            )
        if own.tensor.shape == value.shape:
            kept[key] = value
    return kept


def remember_extras(model: nn.Module, bias: Bias, modules_to_save: Sequence[str]) -> None:
    """Count these biases and modules among the adapter's from now on."""
    originals, earlier, names = extras_of(model)
    bias = max(bias, earlier, key=BIASES.index)
    if bias != "none" or modules_to_save or names:
        more = [name for name in modules_to_save if name not in names]
        setattr(model, _EXTRAS, Extras(originals, bias, names + more))


@contextlib.contextmanager
def write_extras(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Check the extras of the file, write them over the model's own and bring back those that an
    earlier adapter had written; undone if the context fails. Its embeddings are the base's and
    stay."""
    held = held_tensors(model)
    extras, embeddings = _checked_extras(held, adapter), _new_embeddings(model, held, adapter)
    require_extras_here(model)
    originals = _originals(model, held)
    values = originals | extras | embeddings
    with torch.inference_mode(False), torch.no_grad():
        kept = {key: held[key].tensor.clone() for key in values}
    try:
        _copy(held, values)
        yield
    except BaseException:
        _copy(held, kept)
        raise
    remembered = {}
    for key, own in held_tensors(model).items() if extras else ():  # LoRA layers may be new
        if key in extras:
            value = originals.get(key, kept[key])
            remembered[key] = Original(own.places[0][0], own.tensor, value)
    if remembered or extras_of(model).originals:
        paths = {place.path for where in module_places(model).values() for place in where}
        names = adapter.config.modules_to_save or []  # PEFT adds those that a classifier may have
        names = [name for name in names if any(whole([name], path) for path in paths)]
        setattr(model, _EXTRAS, Extras(remembered, adapter.config.bias, names))


def _copy(held: dict[str, Held], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in values.items():
            held[key].tensor.copy_(value)


@contextlib.contextmanager
def originals_back(model: nn.Module) -> Iterator[None]:
    """Within the context the model has the values that an adapter file was written over, frozen, in
    Parameters of their own: what a graph made outside has kept stays as it is."""
    loaded = [module for module in model.modules() if extras_of(module).originals]
    outermost = [module for module in loaded if module not in _away]
    changed: list[Held] = []
    try:
        for module in outermost:
            held = held_tensors(module)
            for key, value in _originals(module, held).items():
                own = held[key]
                value = value.to(own.tensor.device, own.tensor.dtype, copy=True)
                if isinstance(own.tensor, nn.Parameter):
                    value = nn.Parameter(value, requires_grad=False)
                changed.append(own)
                own.put(value)
            _away.add(module)
        yield
    finally:
        for own in reversed(changed):
            own.put(own.tensor)
        for module in outermost:
            _away.discard(module)


def all_names(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """{key: tensor} of these parameters under all keys that they have: PEFT reads each of them."""
    chosen = {id(parameter) for parameter in parameters.values()}
    return {k: own.tensor for k, own in held_tensors(model).items() if id(own.tensor) in chosen}


def whole_modules(model: nn.Module, name: str, lora_paths: Sequence[str]) -> dict[str, Tensor]:
    """What `modules_to_save` has for the modules of this name. Raises ValueError for what would be
    lost, or could not be loaded."""

    def refuse(reason: str) -> ValueError:
        return ValueError(f"modules_to_save has {name!r}, which cannot be saved: {reason}")

    every = module_places(model).values()
    chosen = [where for where in every if any(whole([name], place.path) for place in where)]
    paths = [place.path for where in chosen for place in where]
    if not paths:
        raise refuse("the model has none")
    for path in lora_paths:
        if any(f"{path}.".startswith(f"{other}.") for other in paths):
            raise refuse(f"it holds the LoRA layer {path}")
    found: dict[str, Tensor] = {}
    for own in {id(each): each for each in held_tensors(model).values()}.values():
        keys = [key for key in own.keys if any(key.startswith(f"{path}.") for path in paths)]
        if keys and own.tied:
            raise refuse(
                f"{keys[0]} is tied to a parameter elsewhere in the model; give the module a copy "
                "of its own first"
            )
        if keys:  # a module in several places has the name of the first
            found[keys[0]] = own.tensor
    return found
