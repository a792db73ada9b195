"""`AdapterPack`: the adapters of one linear layer, packed along the rank, changed in place.

The storage is made once. What an adapter gets are blocks of 16 columns of it, so that adding,
replacing or removing one moves no other and a captured CUDA graph sees the change.
"""

from __future__ import annotations

import functools
import json
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lora.functional import check_kinds
from fused_lora.layer import check_adapter_options, initialise, is_size, is_to_empty
from fused_lora.scale import NOBODY, RANK_PADDING, Adapters, padded_rank
from fused_lora.wrapped import manager_of


class _Entry(NamedTuple):
    id: int
    r: int
    scaling: float
    blocks: tuple[int, ...]  # of RANK_PADDING columns each

    @property
    def columns(self) -> list[int]:
        """All columns of the blocks; the first r of them hold the adapter, the rest is padding."""
        return [RANK_PADDING * block + j for block in self.blocks for j in range(RANK_PADDING)]


class Packed(NamedTuple):
    """An adapter for a place in a pack, checked: `AdapterPack.write` puts it there."""

    entry: _Entry
    lora_A: Tensor
    lora_B: Tensor


class AdapterPack(nn.Module):
    """Room for adapters of one linear layer of `in_features` and `out_features`.

    Args:
        total_rank: room for ranks, each adapter's rounded up to a multiple of 16.
        max_adapters: the largest number of adapters at a time.
        device, dtype: of the factors. fp32 factors on a bf16 base get fp32 gradients.

    Parameters: lora_A [total_rank, in_features] and lora_B [out_features, total_rank], zero where
    no adapter is. Columns that pad a rank, and free ones, get exactly zero gradient. An optimizer
    with momentum goes on moving the columns of an adapter that was removed or replaced: reset its
    state there. One with weight decay moves adapters that had no tokens, too.

    Raises ValueError for sizes below 1, TypeError for a dtype that is not floating.
    """

    lora_A: Tensor
    lora_B: Tensor
    owner: Tensor
    scaling: Tensor
    window: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        total_rank: int,
        max_adapters: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"in_features": in_features, "out_features": out_features}
        sizes |= {"total_rank": total_rank, "max_adapters": max_adapters}
        for name, size in sizes.items():
            if not is_size(size):
                raise ValueError(f"{name} must be an integer of at least 1: got {size!r}")
        check_adapter_options(r=1, adapter_dtype=dtype)
        super().__init__()
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.max_adapters = int(max_adapters)
        self.total_rank = padded_rank(int(total_rank))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.zeros(self.total_rank, in_features, **factory))
        self.lora_B = nn.Parameter(torch.zeros(out_features, self.total_rank, **factory))
        int32: dict[str, Any] = {"device": device, "dtype": torch.int32}
        self.register_buffer("owner", torch.full((self.total_rank,), NOBODY, **int32))
        exact = torch.promote_types(self.lora_A.dtype, torch.float32)
        scaling = torch.zeros(self.total_rank, device=device, dtype=exact)
        self.register_buffer("scaling", scaling)
        self.register_buffer("window", torch.zeros(max_adapters, 2, **int32))
        self._entries: dict[str, _Entry] = {}

    def add(self, name: str, lora_A: Tensor, lora_B: Tensor, *, scaling: float = 1.0) -> int:
        """Copy an adapter, lora_A [r, in_features] and lora_B [out_features, r], into free columns;
        returns the id that `adapter_ids` name it by, the smallest free one. One of rank 0 takes no
        columns and computes the base.

        Raises ValueError, before anything is written, if the name is taken, shapes do not fit, a
        value is not finite (it would leak into the tokens of other adapters), or room is missing;
        TypeError for a name that is not a string or factors that are not floating tensors;
        RuntimeError if accelerate has offloaded the pack or FSDP has sharded it.
        """
        if isinstance(name, str) and name in self._entries:
            raise ValueError(f"there is an adapter {name!r} already: use replace(), or remove() it")
        self.write(name, self.prepare(name, lora_A, lora_B, scaling))
        return self.id(name)

    def add_untrained(self, name: str, r: int, *, scaling: float = 1.0) -> int:
        """`add` an adapter as training starts with it: lora_A Kaiming-uniform, lora_B zero."""
        check_adapter_options(r=r)
        lora_A = self.lora_A.new_empty(r, self.in_features)
        lora_B = self.lora_B.new_empty(self.out_features, r)
        initialise(lora_A, lora_B, True)
        return self.add(name, lora_A, lora_B, scaling=scaling)

    def replace(
        self, name: str, lora_A: Tensor, lora_B: Tensor, *, scaling: float | None = None
    ) -> int:
        """Put another adapter in the place of `name`, with the same id and, unless given, the same
        scaling; its rank may differ. Raises as `add`, and KeyError if there is no such adapter."""
        scaling = self.scaling_of(name) if scaling is None else scaling
        self.write(name, self.prepare(name, lora_A, lora_B, scaling))
        return self.id(name)

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Zero and free the columns of `name`. Raises KeyError if there is no such adapter."""
        entry = self._entry(name)
        self.require_storage()
        self._clear(entry)
        self.window[entry.id] = 0
        del self._entries[name]

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they were added."""
        return list(self._entries)

    def id(self, name: str) -> int:
        """What `adapter_ids` name the adapter by. Raises KeyError if there is none, as do all that
        take a name."""
        return self._entry(name).id

    def rank(self, name: str) -> int:
        """The adapter's own rank, without the padding."""
        return self._entry(name).r

    def scaling_of(self, name: str) -> float:
        """The adapter's factor, lora_alpha / r where it came from those."""
        return self._entry(name).scaling

    def columns(self, name: str) -> Tensor:
        """int64 [r]: where the adapter lies, rows of lora_A and columns of lora_B."""
        entry = self._entry(name)
        return self._index(entry.columns[: entry.r])

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A copy of the adapter: lora_A [r, in_features] and lora_B [out_features, r]."""
        self.require_storage()
        columns = self.columns(name)
        return self.lora_A.detach()[columns], self.lora_B.detach()[:, columns]

    def ids(self, names: Sequence[str | None]) -> Tensor:
        """int32 [len(names)] on the pack's device: the adapters' ids, -1 (base only) for None."""
        with torch.inference_mode(False):  # they may be saved for backward later
            return self.kept_ids(names).clone()

    def kept_ids(self, names: Sequence[str | None]) -> Tensor:
        """The same, made once for all packs and calls: nobody may write to it."""
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"expected a list of adapters' names: got {names!r}")
        ids = tuple(-1 if name is None else self.id(name) for name in names)
        return ids_of_samples(ids, self.owner.device)

    def forward(self) -> CallPack:
        """The pack for one call. A layer calls its pack, as modules are called, for the hooks with
        which accelerate brings what it has offloaded."""
        return CallPack(self.lora_A, self.lora_B, self.owner, self.scaling, self.window)

    def require_storage(self) -> None:
        """Raise ValueError if the factors hold no values, RuntimeError if accelerate has offloaded
        them or FSDP has sharded them."""
        if self.owner.is_meta:
            raise ValueError("the pack is on the meta device, without storage: build it elsewhere")
        if manager_of(self, self.lora_A) or type(self.lora_A).__name__ == "DTensor":
            raise RuntimeError(
                "the pack is sharded: add, replace, remove and save adapters before FSDP; "
                "torch.distributed.checkpoint.state_dict takes its whole state"
            )
        if self.lora_A.is_meta:
            raise RuntimeError(
                "accelerate has offloaded the pack, and would put the old factors back: call "
                "accelerate.hooks.remove_hook_from_submodules(model) first"
            )

    def memory(self) -> dict[str, int]:
        """Bytes: "adapters" (columns in use, padding included), "free" (columns that can be given
        to adapters), "tables" (which column is whose)."""
        per_block = RANK_PADDING * (self.in_features + self.out_features)
        per_block *= self.lora_A.element_size()
        used = sum(len(entry.blocks) for entry in self._entries.values())
        return {
            "adapters": used * per_block,
            "free": (self.total_rank // RANK_PADDING - used) * per_block,
            "tables": self.owner.nbytes + self.scaling.nbytes + self.window.nbytes,
        }

    def extra_repr(self) -> str:
        held = ", ".join(f"{name} (r={entry.r})" for name, entry in self._entries.items())
        mib = sum(self.memory().values()) / 2**20
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, total_rank="
            f"{self.total_rank}, {mib:.1f} MiB, adapters: {held or 'none'}"
        )

    def _entry(self, name: str) -> _Entry:
        _check_name(name)
        if name not in self._entries:
            raise KeyError(f"no adapter {name!r} in the pack: name one of {self.names}")
        return self._entries[name]

    def prepare(self, name: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Packed:
        """Check an adapter and find its place, that of the adapter of this name if there is one,
        writing nothing. Raises as `add`."""
        _check_name(name)
        self.require_storage()
        check_kinds(((lora_A, "lora_A"),))
        check_kinds(((lora_B, "lora_B"),))
        if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(
                f"adapter {name!r} must be lora_A [r, in] and lora_B [out, r]: got "
                f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            )
        r = lora_A.shape[0]
        if lora_A.shape[1] != self.in_features or lora_B.shape[0] != self.out_features:
            raise ValueError(
                f"adapter {name!r} is lora_A {tuple(lora_A.shape)} and lora_B "
                f"{tuple(lora_B.shape)}, expected [r, {self.in_features}] and "
                f"[{self.out_features}, r]: it belongs to a layer of another size"
            )
        # copies: they may be views of the very columns that `write` clears first
        factors = {
            "lora_A": lora_A.detach().to(self.lora_A, copy=True),
            "lora_B": lora_B.detach().to(self.lora_B, copy=True),
        }
        for label, factor in factors.items():
            if not torch.isfinite(factor).all():
                raise ValueError(
                    f"{label} of adapter {name!r} holds a value that is not finite in "
                    f"{factor.dtype}: it would leak into the tokens of other adapters; repair it"
                )
        if not isinstance(scaling, numbers.Real) or not math.isfinite(scaling):
            raise ValueError(
                f"scaling of adapter {name!r} must be a finite number: got {scaling!r}"
            )
        held = self._entries.get(name)
        adapter_id = self._free_id() if held is None else held.id
        blocks = self._allocate(
            name, padded_rank(r) // RANK_PADDING, () if held is None else held.blocks
        )
        return Packed(_Entry(adapter_id, r, float(scaling), blocks), **factors)

    def packed(self, name: str) -> Packed | None:
        """A copy of the adapter with its place, None if there is no such adapter."""
        return Packed(self._entries[name], *self.factors(name)) if name in self._entries else None

    @torch.no_grad()
    def write(self, name: str, packed: Packed) -> None:
        """Put what `prepare` or `packed` returned in its place, its owner last."""
        entry = packed.entry
        columns = self._index(entry.columns[: entry.r])
        first, last = min(entry.columns, default=self.total_rank), max(entry.columns, default=-1)
        window = self.window.new_tensor([first, last + 1])
        if name in self._entries:
            self._clear(self._entries[name])
        self._entries[name] = entry
        self.lora_A[columns] = packed.lora_A
        self.lora_B[:, columns] = packed.lora_B
        self.scaling[columns] = entry.scaling
        self.window[entry.id] = window
        self.owner[columns] = entry.id

    def _free_id(self) -> int:
        ids = {entry.id for entry in self._entries.values()}
        for free in range(self.max_adapters):
            if free not in ids:
                return free
        raise ValueError(
            f"the pack holds {self.max_adapters} adapters, as many as it may: remove() one, or "
            "build it with a larger max_adapters"
        )

    def _allocate(self, name: str, count: int, kept: tuple[int, ...]) -> tuple[int, ...]:
        """`count` blocks among the free ones and `kept`: `kept` if it fits, else the first run of
        neighbours that is long enough, else the first ones there are."""
        if count in (0, len(kept)):
            return kept[:count]
        taken = {block for entry in self._entries.values() for block in entry.blocks}
        taken -= set(kept)
        free = [b for b in range(self.total_rank // RANK_PADDING) if b not in taken]
        if len(free) < count:
            raise ValueError(
                f"adapter {name!r} needs {count * RANK_PADDING} columns, "
                f"{len(free) * RANK_PADDING} of {self.total_rank} are free: remove() adapters, or "
                "build the pack with a larger total_rank"
            )
        for start in range(len(free) - count + 1):
            if free[start + count - 1] - free[start] == count - 1:
                return tuple(free[start : start + count])
        return tuple(free[:count])

    def _clear(self, entry: _Entry) -> None:
        columns = self._index(entry.columns)
        self.owner[columns] = NOBODY
        self.scaling[columns] = 0.0
        self.lora_A[columns] = 0.0
        self.lora_B[:, columns] = 0.0

    def _index(self, columns: list[int]) -> Tensor:
        return torch.tensor(columns, dtype=torch.int64, device=self.owner.device)

    # --- state: what moves, what is saved, what loads

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterPack:
        was_meta, was = self.owner.is_meta, self.scaling.dtype
        super()._apply(fn, recurse)
        if (is_to_empty(fn) or was_meta) and not self.owner.is_meta:  # nothing is there but room
            self._reset()
        exact = torch.promote_types(self.lora_A.dtype, torch.float32)
        if {was, self.scaling.dtype} != {exact}:  # .half(), .double(): a scaling stays exact
            self.scaling = self.scaling.to(exact)
            for entry in self._entries.values():
                self.scaling[entry.columns[: entry.r]] = entry.scaling
        return self

    @torch.no_grad()
    def _reset(self) -> None:
        self._entries = {}
        self.owner.fill_(NOBODY)
        for tensor in (self.lora_A, self.lora_B, self.scaling, self.window):
            tensor.zero_()

    def get_extra_state(self) -> Tensor:
        """The adapters' names, ids, ranks, scalings and blocks: JSON as uint8, since safetensors
        holds tensors alone, filled up to a length that rarely depends on them, since distributed
        checkpoints load into tensors of the same size."""
        entries = {n: [*entry[:3], list(entry.blocks)] for n, entry in self._entries.items()}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % (_BYTES_OF_AN_ENTRY * self.max_adapters))
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._entries = {
            name: _Entry(adapter_id, r, scaling, tuple(blocks))
            for name, (adapter_id, r, scaling, blocks) in json.loads(bytes(state.tolist())).items()
        }

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        refusal = self._refuse(state_dict, prefix)
        if refusal is not None:  # before anything is written
            error_msgs.append(refusal)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _refuse(self, state_dict: Any, prefix: str) -> str | None:
        """Why these entries of a state_dict cannot be loaded, None if they can."""
        parts = ("lora_A", "lora_B", "owner", "scaling", "window", "_extra_state")
        given = {part: state_dict[prefix + part] for part in parts if prefix + part in state_dict}
        absent = [part for part in parts if part not in given]
        whose = [part for part in given if not part.startswith("lora_")]
        if whose and absent:
            return (
                f"{prefix}{whose[0]} is in the state_dict, {prefix}{absent[0]} is not: what says "
                "whose a pack's columns are loads together with them, and whole"
            )
        for part in parts[:-1]:
            got, expected = given.get(part), getattr(self, part)
            if got is not None and got.shape != expected.shape:
                return (
                    f"size mismatch for {prefix}{part}: got {tuple(got.shape)}, expected "
                    f"{tuple(expected.shape)}; give a checkpoint of a pack of this total_rank and "
                    "max_adapters"
                )
        return None


_BYTES_OF_AN_ENTRY = 64


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a string: got {name!r}")


class CallPack(NamedTuple):
    """A pack for one call, see `pack_for_call`."""

    lora_A: Tensor
    lora_B: Tensor
    owner: Tensor
    scaling: Tensor
    window: Tensor

    def for_tokens(self, ids: Tensor) -> Adapters:
        """What the operators are told, for ids int32 [M]."""
        return Adapters(ids, self.owner, self.scaling, self.window)


def pack_for_call(adapters: Sequence[tuple[Tensor, Tensor, float]]) -> CallPack:
    """Adapters (lora_A [r, K], lora_B [N, r], scaling) of one dtype and device, with ids 0, 1, ...,
    for one call of `multi_lora_linear`. The factors are copied, so that later changes of theirs do
    not reach this pack, and gradients flow back to them. Finiteness is not checked."""
    ranks = tuple(lora_A.shape[0] for lora_A, _, _ in adapters)
    pads = [padded_rank(r) - r for r in ranks]
    lora_A = torch.cat(
        [F.pad(A, (0, 0, 0, pad)) for (A, _, _), pad in zip(adapters, pads, strict=True)]
    )
    lora_B = torch.cat(
        [F.pad(B, (0, pad)) for (_, B, _), pad in zip(adapters, pads, strict=True)], dim=1
    )
    exact = torch.promote_types(lora_A.dtype, torch.float32)
    scalings = tuple(float(scaling) for _, _, scaling in adapters)
    return CallPack(lora_A, lora_B, *_kept(_tables, ranks, scalings, exact, lora_A.device))


@functools.lru_cache(maxsize=256)
def _tables(
    ranks: tuple[int, ...], scalings: tuple[float, ...], exact: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """owner, scaling, window. A function of host values alone, nobody writes to what it returns:
    kept, so that a layer's call copies nothing to the device."""
    total = sum(padded_rank(r) for r in ranks)
    owner: list[int] = []
    factors: list[float] = []
    window: list[tuple[int, int]] = []
    for i, (r, scaling) in enumerate(zip(ranks, scalings, strict=True)):
        pad = padded_rank(r) - r
        window.append((len(owner), len(owner) + r + pad) if r else (total, 0))
        owner += [i] * r + [NOBODY] * pad
        factors += [scaling] * r + [0.0] * pad
    with torch.inference_mode(False):  # they may be saved for backward later
        return (
            torch.tensor(owner, dtype=torch.int32, device=device),
            torch.tensor(factors, dtype=exact, device=device),
            torch.tensor(window, dtype=torch.int32, device=device),
        )


def ids_of_samples(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [len(ids)] on the device; kept as the tables are."""
    return _kept(_ids_of_samples, ids, device)[0]


@functools.lru_cache(maxsize=256)
def _ids_of_samples(ids: tuple[int, ...], device: torch.device) -> tuple[Tensor]:
    with torch.inference_mode(False):
        return (torch.tensor(ids, dtype=torch.int32, device=device),)


_in_graphs: dict[int, tuple[Tensor, ...]] = {}


def _kept(make: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """What the cached function `make` returns. A CUDA graph holds addresses and no tensors: what it
    was captured with is never let go. What is made under a mode, a fake tensor's say, is not for
    later."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return make.__wrapped__(*arguments)
    tables = make(*arguments)
    if tables[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _in_graphs[id(tables)] = tables
    return tables
