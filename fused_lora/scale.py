"""Two small things that both backends share: the scaling factor and the padding of S."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

RANK_PADDING = 16
"""S has its columns padded with zeros to this multiple: 16-byte rows for every 16-bit dtype."""


class Scale(NamedTuple):
    """scaling as a host number times an optional 0-dim fp32 tensor, read on the device alone."""

    value: float
    tensor: Tensor | None


def padded_rank(r: int) -> int:
    return (r + RANK_PADDING - 1) // RANK_PADDING * RANK_PADDING
