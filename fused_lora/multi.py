"""Many adapters in one batch: `multi_lora_linear`, the layer `MultiLoRALinear` over it, and
`use_adapters`, by which unchanged model code serves a mixed batch."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora import ops
from fused_lora.adapter_pack import AdapterPack, CallPack
from fused_lora.autograd import ANOTHER_BLOCK
from fused_lora.functional import autocasted, check_tensors, checked_options, run
from fused_lora.layer import check_adapter_options, is_size, plain
from fused_lora.linear import is_conv1d, require_plain
from fused_lora.wrapped import require_module


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    pack: AdapterPack | CallPack,
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    *,
    cu_tokens: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """LoRA linear layer in which every token has an adapter of its own, or none.

    `x_m W^T + bias + scaling_g (D(x_m) A_g^T) B_g^T` for token m, g = adapter_ids[m]. The order of
    the tokens never changes a result, only the speed: for large packs tokens of one adapter are
    best kept together.

    Args:
        x, weight, bias, dropout_p, seed, backend: as in `fused_lora.lora_linear`.
        pack: the adapters. Its factors are differentiable; a column without tokens gets zero.
        adapter_ids: integers on x's device, `pack.id(name)` or -1 for the base alone; one per token
            (x.shape[:-1]) or for what x's leading dimensions begin with: [B] for x [B, T, K]; with
            cu_tokens one per sequence, [S].
        cu_tokens: [S + 1], integers on x's device, for sequences of different lengths one after the
            other, as variable-length attention takes them: of x's tokens [M, K] those from
            cu_tokens[i] up to cu_tokens[i + 1] have adapter_ids[i]. Tokens outside have none.

    Returns:
        [..., N] in x's dtype; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`; ValueError for ids of another shape
        or device, and for ids that are not in the pack and cu_tokens that do not rise from 0 to M
        at most: on a CPU always, on a GPU only with FUSED_LORA_CHECK_IDS=1 in the environment (it
        waits for the GPU). Unchecked such ids count as -1.

    Adapters are isolated from each other for finite values: zero times infinity is not zero, so an
    adapter that is not finite spoils its neighbours' tokens, which is why a pack refuses it.
    """
    if not isinstance(pack, (AdapterPack, CallPack)):
        raise TypeError(f"pack is a {type(pack).__name__}, expected an AdapterPack")
    held = pack() if isinstance(pack, AdapterPack) else pack
    return _run(x, weight, held, adapter_ids, bias, cu_tokens, dropout_p, seed, backend, None)


def _run(
    x: Tensor,
    weight: Tensor,
    pack: CallPack,
    adapter_ids: Tensor,
    bias: Tensor | None,
    cu_tokens: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
    block: Tensor | None,
) -> Tensor:
    x, autocast = autocasted(x)
    check_tensors(x, weight, pack.lora_A, pack.lora_B, bias, autocast)
    tables = pack.for_tokens(_ids_of_tokens(adapter_ids, x, cu_tokens))
    options = checked_options(x, 1.0, dropout_p, seed, backend)
    return run(x, weight, pack.lora_A, pack.lora_B, bias, options, tables, block=block)


def _ids_of_tokens(adapter_ids: Tensor, x: Tensor, cu_tokens: Tensor | None) -> Tensor:
    """int32 [M], contiguous."""
    _check_integers("adapter_ids", adapter_ids, x, "pass pack.ids([...])")
    leading = x.shape[:-1]
    if cu_tokens is not None:
        leading = torch.Size((math.prod(leading),))
        adapter_ids = _ids_of_sequences(adapter_ids, cu_tokens, x)
    shape = adapter_ids.shape
    if leading[: len(shape)] != shape:
        raise ValueError(
            f"adapter_ids has shape {tuple(shape)}, expected one id per token {tuple(leading)} or "
            f"per sequence, a beginning of that shape: got x {tuple(x.shape)}"
        )
    if adapter_ids.dtype == torch.int64:  # an id beyond int32 stays one that no adapter has
        adapter_ids = adapter_ids.clamp(-2, 2**31 - 1)
    spread = adapter_ids.reshape((*shape, *(1,) * (len(leading) - len(shape)))).expand(leading)
    return spread.to(torch.int32).reshape(-1).contiguous()


def _check_integers(name: str, given: Tensor, x: Tensor, remedy: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a tensor of int32: {remedy}")
    if given.is_floating_point() or given.dtype == torch.bool:
        raise TypeError(f"{name} is {given.dtype}, expected int32: {remedy}")
    if given.device != x.device:
        raise ValueError(
            f"{name} is on {given.device}, x is on {x.device}: move them to one device"
        )


def _ids_of_sequences(adapter_ids: Tensor, cu_tokens: Tensor, x: Tensor) -> Tensor:
    """The ids of x's tokens, [M], from those of sequences that lie one after the other."""
    _check_integers("cu_tokens", cu_tokens, x, "pass the cumulative lengths, from 0 on")
    if adapter_ids.dim() != 1 or cu_tokens.shape != (len(adapter_ids) + 1,):
        raise ValueError(
            f"with cu_tokens, adapter_ids has one id per sequence, [S], and cu_tokens is [S + 1]: "
            f"got {tuple(adapter_ids.shape)} and {tuple(cu_tokens.shape)}"
        )
    tokens = math.prod(x.shape[:-1])
    if not torch.compiler.is_compiling() and ops.looks_at(adapter_ids):
        ends = torch.cat((cu_tokens, cu_tokens.new_full((1,), tokens)))
        if cu_tokens[0] != 0 or (ends.diff() < 0).any():
            raise ValueError(
                f"cu_tokens must rise from 0 to at most x's {tokens} tokens: got "
                f"{cu_tokens.tolist()}"
            )
    # behind the last sequence: an id of nobody, which unsigned ones do not have
    adapter_ids = adapter_ids.to(torch.int64)
    ids = torch.cat((adapter_ids, adapter_ids.new_full((1,), -1)))
    positions = torch.arange(tokens, dtype=cu_tokens.dtype, device=x.device)
    return ids[torch.searchsorted(cu_tokens, positions, right=True) - 1]


class _Chosen:
    """What a layer takes inside one use_adapters block, and how often it was called there."""

    def __init__(
        self, ids: Tensor, beam_ids: Tensor | None, cu_tokens: Tensor | None, block: Hashable
    ) -> None:
        self.ids, self.beam_ids, self.cu_tokens = ids, beam_ids, cu_tokens
        self.thread = threading.get_ident()
        self._block, self._version, self._number = block, -1, ids
        self._calls, self._backward, self._again = 0, -1, 0

    def ids_for(self, x: Tensor) -> Tensor:
        beams = self.beam_ids
        return self.ids if beams is None or x.shape[:1] != beams.shape[:1] else beams

    def number(self) -> Tensor:
        """For these adapters, on the CPU: another one where ids has other values since."""
        version = 0 if self.ids.is_inference() else self.ids._version
        if version != self._version:
            self._version = version
            self._number = torch.tensor(hash((self._block, version)), device="cpu")
        return self._number

    def count(self) -> None:
        """A call: what reentrant checkpointing computes again in one backward pass cannot be more
        than what was computed in this block, unless it is from another one: then RuntimeError. The
        other kind has hooks on saved tensors, and `number` among these tells."""
        backward = torch._C._current_graph_task_id()  # -1 outside of backward
        if backward == -1:
            self._calls += 1
        elif torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            self._again = 1 if backward != self._backward else self._again + 1
            self._backward = backward
            if self._again > self._calls:
                raise RuntimeError(ANOTHER_BLOCK)


class MultiLoRALinear(nn.Module):
    """A linear layer with a frozen base weight and a pack of adapters, one for each token.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        total_rank, max_adapters: the room in `pack`, see `AdapterPack`.
        lora_dropout: drop probability of the adapters' input in training mode, in [0, 1).
        adapter_dtype: dtype of the factors, the base's by default.
        backend: "auto", "triton" or "aten", see `fused_lora.lora_linear`.

    Parameters: weight [out, in] and bias [out] (frozen), pack.lora_A and pack.lora_B. Adapters are
    added, replaced and removed by `layer.pack`.

    Raises ValueError for lora_dropout outside [0, 1), an unknown backend, and sizes below 1.
    """

    weight: Tensor
    bias: Tensor | None
    fan_in_fan_out: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        total_rank: int,
        max_adapters: int = 64,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self._setup(
            nn.Linear(in_features, out_features, bias, device, dtype),
            total_rank=total_rank,
            max_adapters=max_adapters,
            lora_dropout=lora_dropout,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        total_rank: int,
        max_adapters: int = 64,
        lora_dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> MultiLoRALinear:
        """A layer around the weight and bias of `linear`: shared, not copied, and frozen from now
        on. `linear` may be a Conv1D of transformers (GPT-2), whose weight stays stored [in, out].
        Raises TypeError if it is not exactly one of the two with a plain floating weight."""
        require_plain(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._setup(
            linear,
            total_rank=total_rank,
            max_adapters=max_adapters,
            lora_dropout=lora_dropout,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )
        return layer.train(linear.training)

    def _setup(
        self,
        base: nn.Linear,
        *,
        total_rank: int,
        max_adapters: int,
        lora_dropout: float,
        adapter_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        check_adapter_options(
            r=1, lora_dropout=lora_dropout, adapter_dtype=adapter_dtype, backend=backend
        )
        self.fan_in_fan_out = is_conv1d(base)
        self.weight = base.weight
        self.out_features, self.in_features = self._matrix().shape
        self.lora_dropout, self.backend = plain(lora_dropout), backend
        self.register_parameter("bias", base.bias)
        self.pack = AdapterPack(
            self.in_features,
            self.out_features,
            total_rank=total_rank,
            max_adapters=max_adapters,
            device=base.weight.device,
            dtype=adapter_dtype or base.weight.dtype,
        )
        base.requires_grad_(False)
        self._chosen: _Chosen | None = None

    def forward(
        self, x: Tensor, adapter_ids: Tensor | None = None, cu_tokens: Tensor | None = None
    ) -> Tensor:
        """[..., in_features] -> [..., out_features]. adapter_ids and cu_tokens as in
        `multi_lora_linear`; without adapter_ids, those of the `use_adapters` block the call is in.
        Raises RuntimeError outside one."""
        block = None
        if adapter_ids is None:
            chosen = self._chosen
            if chosen is None:
                raise RuntimeError(
                    "no adapter ids: call the model inside use_adapters(model, ids), or the layer "
                    "with adapter_ids"
                )
            if not torch.compiler.is_compiling():
                chosen.count()
                block = chosen.number()
            adapter_ids, cu_tokens = chosen.ids_for(x), chosen.cu_tokens
        dropout_p = self.lora_dropout if self.training else 0.0
        pack, matrix = self.pack(), self._matrix()
        return _run(
            *(x, matrix, pack, adapter_ids, self.bias, cu_tokens, dropout_p, None, self.backend),
            block,
        )

    def _matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the adapters of a block are not of the layer."""
        return self.__dict__ | {"_chosen": None}

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}"
        if self.lora_dropout > 0.0:
            text += f", lora_dropout={self.lora_dropout}"
        return text + f", backend={self.backend}"


_BLOCKS = itertools.count()
_choosing = threading.Lock()


def _require_this_thread(layers: Sequence[MultiLoRALinear]) -> None:
    """Raise RuntimeError if another thread is in a block: adapters are chosen for a model, since
    backward, which may compute a forward pass again, has threads of its own."""
    for layer in layers:
        if layer._chosen is not None and layer._chosen.thread != threading.get_ident():
            raise RuntimeError(
                "another thread is inside a use_adapters block of this model, whose adapters this "
                "one would take: serve one batch after the other, or both in one"
            )


@contextlib.contextmanager
def use_adapters(
    model: nn.Module,
    ids: Tensor | Sequence[str | None],
    cu_tokens: Tensor | None = None,
    *,
    num_beams: int = 1,
) -> Iterator[None]:
    """Inside the block, the MultiLoRALinear layers of `model` take these adapters.

    So unchanged model code, a `forward` or `generate` of transformers, serves a mixed batch. Under
    activation checkpointing call backward inside the block that made the forward pass: it computes
    that again, with the adapters of the block that it is in. Blocks nest; one thread at a time.

    Args:
        ids, cu_tokens: as `adapter_ids` and `cu_tokens` of `multi_lora_linear`, for packs that were
            filled alike, as `apply_lora` and `load_adapter` fill them; or one name per sequence
            (None: base only), looked up in the pack of each layer. Names go to x's first dimension:
            for models whose layers see the time first (XLNet), give one id per token.
        num_beams: how many rows `generate` makes of a sequence, by num_beams or by
            num_return_sequences. Layers that are called with as many rows as there are ids, the
            encoder's, and those that are called with num_beams times as many both take them.

    Raises ValueError if the model has no MultiLoRALinear, num_beams is below 1 or beams are to be
    packed by cu_tokens, KeyError for a name that a pack lacks, TypeError for ids that are neither a
    tensor nor a sequence of names, RuntimeError if another thread is in a block of this model; a
    layer raises RuntimeError if checkpointing computes another block's forward pass again.
    """
    if isinstance(ids, str) or not isinstance(ids, (Tensor, Iterable)):
        raise TypeError(f"ids is {ids!r}, expected a list, one name per sequence, or a tensor")
    if not is_size(num_beams) or (num_beams > 1 and cu_tokens is not None):
        reason = "1 with cu_tokens" if is_size(num_beams) else "an integer of at least 1"
        raise ValueError(f"num_beams must be {reason}: got {num_beams!r}")
    require_module(model)
    layers = [module for module in model.modules() if isinstance(module, MultiLoRALinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no MultiLoRALinear: nothing to choose for")
    if isinstance(ids, Tensor):
        block: Hashable = next(_BLOCKS)
        many = num_beams > 1 and ids.dim() > 0
        beams = ids.repeat_interleave(num_beams, 0) if many else None
        chosen = [_Chosen(ids, beams, cu_tokens, block) for _ in layers]
    else:
        block = ids = tuple(ids)
        for name in ids:
            if name is not None and not isinstance(name, str):
                raise TypeError(
                    f"ids holds {name!r}, expected names or None: pass numbers as a tensor"
                )
        repeated = [name for name in ids for _ in range(num_beams)]
        chosen = [
            _Chosen(
                layer.pack.kept_ids(ids),
                layer.pack.kept_ids(repeated) if num_beams > 1 else None,
                cu_tokens,
                block,
            )
            for layer in layers
        ]
    with _choosing:
        _require_this_thread(layers)
        before = [layer._chosen for layer in layers]
        for layer, own in zip(layers, chosen, strict=True):
            layer._chosen = own
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer._chosen = earlier
