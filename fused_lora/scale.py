"""Small things that both backends share: the scaling factor, the padding of S, and who owns what
where several adapters are packed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

RANK_PADDING = 16
"""S has its columns padded with zeros to this multiple: 16-byte rows for every 16-bit dtype."""


class Scale(NamedTuple):
    """scaling as a host number times an optional 0-dim fp32 tensor, read on the device alone."""

    value: float
    tensor: Tensor | None


class Adapters(NamedTuple):
    """What is known of the M tokens of a batch and of a pack of total rank r.

    ids: int32 [M], the adapter of each token, -1 for the base alone. owner: int32 [r], the adapter
    of each column, `NOBODY` for free and padding columns. scaling: fp32 [r] (fp64 for fp64
    factors), of each column.
    window: int32 [adapters, 2], the first column of each adapter and the one behind its last; r and
    0 for an adapter of rank 0, 0 and 0 where there is no adapter.
    """

    ids: Tensor
    owner: Tensor
    scaling: Tensor
    window: Tensor


NOBODY = -2
"""The owner of a column that belongs to no adapter: not -1, which tokens without adapter have."""


def padded_rank(r: int) -> int:
    return (r + RANK_PADDING - 1) // RANK_PADDING * RANK_PADDING
