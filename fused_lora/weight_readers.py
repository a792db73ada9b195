"""Modules that read the weight of a linear layer themselves, past its forward, so that an adapter
in its place would do nothing: a list, and a look into the code of those that are not on it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any, NamedTuple

from torch import nn

_RELATIVE = ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")
READERS = {
    # transformers; some read it only where their own kernels are installed
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "FalconH1Mixer"), ("out_proj",)),
    **dict.fromkeys(("NemotronHMamba2Mixer", "Zamba2MambaMixer"), ("out_proj",)),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    **dict.fromkeys(("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap"), ("k_proj",)),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    **dict.fromkeys(("LayoutLMv2Encoder", "LayoutLMv3Encoder"), _RELATIVE),
    "LongcatFlashTopkRouter": ("classifier",),
    "TDNNLayer": ("kernel",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "RwkvSelfAttention": ("output",),  # divided in place between training and evaluation
    "RwkvFeedForward": ("value",),
    # diffusers
    "HunyuanDiTAttentionPool": ("q_proj", "k_proj", "v_proj", "c_proj"),
    "ChannelsProj": ("proj",),
    # sentence-transformers
    "SparseAutoEncoder": ("encoder",),
}
"""{class: names of its linear layers}, which are refused."""
_LIBRARIES = ("transformers", "diffusers", "sentence_transformers")
# these read one in a mode that is not the usual one, which is worth no warning
_SELDOM = {"BloomAttention", "BloomMLP", "DisentangledSelfAttention", "LSHSelfAttention"}
_FACTS = {"dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "requires_grad", "size", "dim"}
_FACTS |= {"numel", "stride", "get_device", "is_floating_point", "element_size", "is_quantized"}
_ASK = {"isinstance", "hasattr", "getattr", "type", "id"}
_LIKE = {"to", "type_as"}  # x.to(weight) takes its dtype and device


def read_by(parent: nn.Module) -> tuple[str, ...]:
    """Names of the layers in `parent` whose weight it reads itself, as far as is known for sure."""
    cls = type(parent)
    ours = str(cls.__module__).startswith(_LIBRARIES)
    return READERS.get(cls.__name__, ()) if ours else ()


@functools.cache
def weights_read_in(cls: type[nn.Module]) -> frozenset[str]:
    """The names in `self.<name>.weight` that forward of `cls`, or a method that it calls, uses for
    more than a dtype or a shape; none where there is no source to read."""
    if str(cls.__module__).startswith("torch.nn.") or cls.__name__ in _SELDOM:
        return frozenset()
    names: set[str] = set()
    seen: set[tuple[int, str]] = set()
    todo = [(0, "forward")]  # where in the order of base classes a method is looked for
    while todo:
        start, method = todo.pop()
        if (start, method) in seen:
            continue
        seen.add((start, method))
        found = _function(cls, start, method)
        if found is None:
            continue
        index, function = found
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except Exception:  # no source, or somebody's own idea of a function
            continue
        uses = _uses(tree)
        names |= uses.reads
        todo += [(0, name) for name in uses.calls] + [(index + 1, name) for name in uses.supers]
    return frozenset(names)


def _function(cls: type, start: int, name: str) -> tuple[int, Any] | None:
    """(index in cls.__mro__, function) of a method that a class below nn.Module defines."""
    for index, base in enumerate(cls.__mro__):
        if base is nn.Module:
            return None
        if index >= start and name in vars(base):
            return index, vars(base)[name]
    return None


class _Uses(NamedTuple):
    """Names whose weight is read, and methods that are called, on self and on super()."""

    reads: set[str]
    calls: set[str]
    supers: set[str]


def _uses(tree: ast.AST) -> _Uses:
    uses, facts = _Uses(set(), set(), set()), set()
    for node in ast.walk(tree):  # from the outside in: what is done with a weight comes first
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
            if name in (_LIKE if isinstance(node.func, ast.Attribute) else _ASK):
                facts.update(node.args)
            uses.calls.add(_name_on(node.func, "self"))
            uses.supers.add(_name_on(node.func, "super"))
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            facts.add(node.left)
        elif isinstance(node, ast.Attribute):
            if node.attr in _FACTS or (node.attr == "data" and node in facts):
                facts.add(node.value)
            elif node.attr == "weight" and node not in facts and isinstance(node.ctx, ast.Load):
                uses.reads.add(_name_on(node.value, "self"))
    for names in uses:
        names.discard("")
    return uses


def _name_on(node: ast.AST, owner: str) -> str:
    """The name in `self.<name>` or `super().<name>`, "" for anything else."""
    if not isinstance(node, ast.Attribute):
        return ""
    holder = node.value.func if isinstance(node.value, ast.Call) else node.value
    return node.attr if getattr(holder, "id", None) == owner else ""
