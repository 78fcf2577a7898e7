"""The one rounding of integer-only inference, and requantization: times a multiplier, plus an offset, shifted right.

Everything is rounded half up, which hardware does with an addition before an arithmetic shift,

    round_shift(x, n) = (x + (1 << (n - 1))) >> n,

so that -0.5 becomes 0, and 0.5 becomes 1. (The layers of I-BERT beside this round half to even, see ``arithmetic``.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.integer.checked import bounded, is_checked, largest

MULTIPLIER_BITS = 16
"""Of a multiplier, 2**15 to 2**16: half a unit is 2**-16 of it, and its product with a row's scale of 15 bits is one of
32 bits, which processors multiply with another such in one instruction."""
LARGEST_SHIFT = 61


def round_shift(x: Tensor, n: Tensor | int) -> Tensor:
    """floor(x / 2**n + 1/2): ``x`` / 2**n rounded half up, exactly.

    Args:
        x: int64, any shape, abs(x) < 2**62.
        n: 0 to 61, an int or an int64 tensor that broadcasts against ``x``.
    """
    half = (1 << n) >> 1 if isinstance(n, int) else (torch.ones_like(n) << n) >> 1
    return (x + half) >> n


def requantize(value: Tensor, multiplier: Tensor, shift: Tensor, offset: Tensor | int, bits: int) -> Tensor:
    """clamp(round_shift(value * multiplier + offset, shift)) to signed integers of ``bits`` bits.

    Gives integers of one scale those of another, where multiplier / 2**shift is what one scale is of the other, and
    offset / 2**shift what is added, such as a bias. The sum must be below 2**62; with a multiplier of 16 bits and an
    offset below 2**61 it is for abs(value) < 2**45.

    Args:
        value: int64, (..., C).
        multiplier: int64, (C,) or (1,), below 2**16.
        shift: int64, the shape of ``multiplier``, 0 to 61.
        offset: int64, (C,), or 0.
        bits: of the result, 2 to 32.

    Raises:
        OverflowError: in the mode ``checked``, a sum that reaches 2**62.
    """
    if is_checked():
        reach = largest(value) * largest(multiplier) + largest(offset)
        if reach >= 2**62:
            raise OverflowError(f"requantize: {value.shape} of {largest(value)} reaches {reach}, past 62 bits")
    half = 2 ** (bits - 1)
    return round_shift(value * multiplier + offset, shift).clamp(-half, half - 1)


def dyadic(factor: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Multiplier, shift and offset of :func:`requantize` for a real factor and what is added to the result.

    Args:
        factor: float64, (C,), finite, of either sign.
        offset: float64, (C,), in steps of the result; or None.

    Returns:
        int32 (C,) with abs < 2**16, int32 (C,), int64 (C,) or None. multiplier / 2**shift is within one part in 2**16
        of the factor, unless the offset leaves no room for so many bits, or the factor is below 2**-46.

    Raises:
        ValueError: not finite, or a factor past 2**17.
    """
    if not bool(torch.isfinite(factor).all()) or (offset is not None and not bool(torch.isfinite(offset).all())):
        raise ValueError("a scale or an offset is not finite")
    if bool((factor.abs() >= 2.0 ** (MULTIPLIER_BITS - 1)).any()):
        raise ValueError(f"a factor of {float(factor.abs().max())} is past 2**{MULTIPLIER_BITS - 1}")
    fraction, exponent = torch.frexp(factor)  # 0.5 <= fraction < 1
    whole = torch.round(fraction.abs() * 2**MULTIPLIER_BITS) == 2**MULTIPLIER_BITS  # it needs a bit more, or one less
    shift = MULTIPLIER_BITS - exponent.to(torch.int64) - whole.to(torch.int64)
    shift = shift.clamp(0, LARGEST_SHIFT)
    if offset is not None:
        shift = torch.minimum(shift, LARGEST_SHIFT - 1 - torch.frexp(offset).exponent.clamp(min=0)).clamp(min=0)
    power = torch.exp2(shift.to(torch.float64))
    multiplier = torch.round(factor * power).to(torch.int32)
    return multiplier, shift.to(torch.int32), None if offset is None else torch.round(offset * power).to(torch.int64)


class Requantize(nn.Module):
    """:func:`requantize` with its constants in buffers.

    Args:
        factor: float64, (C,) or (1,): scale of the input / scale of the output.
        offset: float64, the same shape, in steps of the output; or None.
        bits: of the output.
        name: how errors call it.

    Buffers:
        multiplier, shift: int32. offset: int64, or None.
    """

    multiplier: Tensor
    shift: Tensor
    offset: Tensor | None

    def __init__(self, factor: Tensor, offset: Tensor | None, bits: int, name: str = "requantize"):
        super().__init__()
        self.bits, self.name = bits, name
        try:
            multiplier, shift, added = dyadic(factor, offset)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("shift", shift)
        self.register_buffer("offset", added)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def forward(self, value: Tensor) -> Tensor:
        """int64 (..., C), abs < 2**43 -> int64 of ``bits`` bits."""
        bounded(value, 44, self.name)
        offset = 0 if self.offset is None else self.offset
        return requantize(value, self.multiplier.to(torch.int64), self.shift.to(torch.int64), offset, self.bits)


def power_of_two(limit: float, bits: int) -> int:
    """The largest e such that ``limit`` * 2**e fits signed integers of ``bits`` bits."""
    return math.floor(math.log2((2 ** (bits - 1) - 1) / limit))
