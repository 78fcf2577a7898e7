"""Activation functions on integers: a table of 256 linear pieces, exact beyond its ends."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.checked import bounded
from fairseq.modules.quantization.integer.dyadic import round_shift

PIECES = 256
UNIT_BITS = 15
"""The table's limit is 2**15 units, so that a piece is 2**8 units long."""
INPUT_BITS = 24


def table(values: Tensor) -> Tensor:
    """The table of a function that is 0 below -limit and x above it: int32 (2, 256), values and differences, 16 bits.

    Args:
        values: float64 (257,), the function in units of limit / 2**15, at the ends of the pieces. The line of a piece
            goes through them.
    """
    ends = torch.round(values).to(torch.int32)
    return torch.stack((ends[:-1], ends[1:] - ends[:-1]))


def piecewise(t: Tensor, entries: Tensor) -> Tensor:
    """The function of :func:`table` of t, in units of limit / 2**15, both.

    With i = (t >> 8) + 128 and f = t & 255: value[i] + round_shift(difference[i] * f, 8) within the table; t above it,
    0 below. In 32 bits throughout. Error: half a unit of each end, half of the product, and what a line over a piece of
    length p leaves, p**2 / 8 times the second derivative; of GELU with limit 6 together 4e-4, measured over all t.

    Args:
        t: int64 of 24 bits.
        entries: int64 (2, 256).
    """
    bounded(t, INPUT_BITS, "activation, input")
    inside = t.clamp(-(2**UNIT_BITS), 2**UNIT_BITS - 1)
    place, rest = (inside >> 8) + PIECES // 2, inside & 255
    line = entries[0][place] + round_shift(bounded(entries[1][place] * rest, 32, "activation, line"), 8)
    beyond = torch.where(t >= 2**UNIT_BITS, t, line)
    return torch.where(t < -(2**UNIT_BITS), 0, beyond)
