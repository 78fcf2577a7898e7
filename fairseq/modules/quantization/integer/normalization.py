"""LayerNorm on integers: exact square root, one division a row, 24 bits of result."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.arithmetic import bit_length, newton_root
from fairseq.modules.quantization.integer.checked import bounded
from fairseq.modules.quantization.integer.dyadic import round_shift

STREAM_BITS = 22
UNIT_BITS = 24
MOST_CHANNELS = 2**16


def normalize(h: Tensor, eps: Tensor) -> Tensor:
    """(h - mean) / sqrt(C * (variance + eps)) over the last dimension, in units of 2**-24: abs <= 2**24.

    1. mean = floor((2 sum(h) + C) / 2C), rounded half up; d = h - mean, 23 bits.
    2. v = sum(d**2) + eps, with C <= 2**16 below 2**61; shifted left by 2j to 61 or 62 bits.
    3. root = floor(sqrt(v << 2j)), exact, 2**30 <= root < 2**31; r = floor((2**61 - 1) / root), below 2**31.
    4. round_shift(d * r, 37 - j); d * r is below 2**54.

    Times sqrt(C) * weight, plus bias, it is the LayerNorm; :class:`~.dyadic.Requantize` does that.

    Error: the mean is off by at most half a step of h, which adds at most C / 4 to v; root and r are each within 2**-29
    of themselves. So abs(error) <= (1 / 2 + abs(d) * C / 8 v) / sqrt(v) + 2**-24; beside a standard deviation of 1,000
    steps and 192 channels that is 2**-14.

    Args:
        h: int64 of 22 bits, (..., C).
        eps: int64, C * eps / scale**2, 1 to 2**60: at least 1, so that a row of equal entries gives 0.
    """
    count = h.shape[-1]
    total = bounded(h, STREAM_BITS, "LayerNorm, input").sum(dim=-1, keepdim=True)
    mean = torch.div(2 * total + count, 2 * count, rounding_mode="floor")
    d = bounded(h - mean, STREAM_BITS + 1, "LayerNorm, less the mean")
    v = bounded((d * d).sum(dim=-1, keepdim=True) + eps, 63, "LayerNorm, sum of squares")
    j = (62 - bit_length(v)) >> 1
    root = newton_root(v << 2 * j)
    r = bounded(torch.div(2**61 - 1, root, rounding_mode="floor"), 32, "LayerNorm, reciprocal")
    return bounded(round_shift(d * r, 37 - j), UNIT_BITS + 2, "LayerNorm, normalized")
