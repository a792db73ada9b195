"""Modules that read the weight of a linear layer themselves, past its forward, so that an adapter
in its place would do nothing: a list, and a look into the code of those that are not on it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import TypeGuard

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
# these read one in a mode that is not the usual one, which is worth no warning
_SELDOM = {"BloomAttention", "BloomMLP", "DisentangledSelfAttention", "LSHSelfAttention"}
_FACTS = {"dtype", "device", "shape", "ndim", "is_cuda", "requires_grad", "size", "dim", "numel"}


@functools.cache
def weights_read_in(cls: type[nn.Module]) -> frozenset[str]:
    """The names in `self.<name>.weight` that forward of `cls`, or a method that it calls, uses for
    more than a dtype or a shape; none where there is no source to read."""
    names: set[str] = set()
    if cls.__module__.startswith("torch.nn.") or cls.__name__ in _SELDOM:
        return frozenset()
    seen, todo = set(), ["forward"]
    while todo:
        method = todo.pop()
        seen.add(method)
        function = inspect.unwrap(getattr(cls, method, None) or _missing)
        if getattr(nn.Module, method, None) is function:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        reads, calls = _uses(tree)
        names |= reads
        todo += sorted(calls - seen)
    return frozenset(names)


def _missing() -> None:
    pass


def _uses(tree: ast.AST) -> tuple[set[str], set[str]]:
    """(names whose weight is read, methods that are called) on self."""
    reads, calls, facts = set(), set(), set()
    for node in ast.walk(tree):  # from the outside in: what is done with a weight comes first
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            facts.update(node.args)
        elif isinstance(node, ast.Call):
            calls.add(_name_on_self(node.func))
        elif isinstance(node, ast.Attribute) and node.attr in _FACTS:
            facts.add(node.value)
        elif _is_read(node) and node not in facts:
            reads.add(_name_on_self(node.value))
    return reads - {""}, calls - {""}


def _is_read(node: ast.AST) -> TypeGuard[ast.Attribute]:
    if not isinstance(node, ast.Attribute):
        return False
    return node.attr == "weight" and isinstance(node.ctx, ast.Load)


def _name_on_self(node: ast.AST) -> str:
    """The name in `self.<name>`, "" for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else ""
    return ""
