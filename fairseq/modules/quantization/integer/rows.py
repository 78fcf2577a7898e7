"""Rows of 16-bit integers to bytes and a scale of their own, found in integers: what "dynamic" means here."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.checked import bounded
from fairseq.modules.quantization.integer.dyadic import round_shift

LARGEST = 127
RECIPROCAL_SHIFT = 23


def quantize_rows(z: Tensor, dims: int | tuple[int, ...] = -1) -> tuple[Tensor, Tensor]:
    """Bytes q and the integer m of each row such that z is about q * m / 127.

    m is the largest magnitude of the row, at least 1; r = floor(127 * 2**23 / m), one division a row; and
    q = round_shift(z * r, 23). All of it fits 32 bits: z * r <= 127 * 2**23 < 2**30.

    abs(q - 127 * z / m) <= 1/2 + 2**-8, since r is too small by less than 1 and abs(z) <= 2**15.

    Args:
        z: int64 of 16 bits.
        dims: the dimensions that share a scale.

    Returns:
        q: int8, the shape of z, -127 to 127. m: int64, 1 to 2**15, with 1 for each of ``dims``.
    """
    m = bounded(z, 16, "rows").abs().amax(dim=dims, keepdim=True).clamp(min=1)
    r = torch.div(LARGEST << RECIPROCAL_SHIFT, m, rounding_mode="floor")
    scaled = bounded(z * r, 32, "rows, scaled")
    return round_shift(scaled, RECIPROCAL_SHIFT).to(torch.int8), m


UNSIGNED_SHIFT = 22
HALF = 128


def quantize_unsigned_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_rows` for integers of one sign: bytes q less 128 and m such that z is about q * m / 255.

    Half the step where nothing is negative. r = floor(255 * 2**22 / m); z * r <= 255 * 2**22 < 2**30, and
    abs(q - 255 * z / m) <= 1/2 + 2**-7.

    Args:
        z: int64 of 16 bits; what is negative becomes 0.

    Returns:
        q - 128: int8. m: int64 (..., 1), 1 to 2**15.
    """
    z = bounded(z, 16, "rows").clamp(min=0)
    m = z.amax(dim=-1, keepdim=True).clamp(min=1)
    r = torch.div((2 * HALF - 1) << UNSIGNED_SHIFT, m, rounding_mode="floor")
    return (round_shift(bounded(z * r, 32, "rows, scaled"), UNSIGNED_SHIFT) - HALF).to(torch.int8), m
