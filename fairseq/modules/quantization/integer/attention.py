"""Attention on bytes: int8 scores, exponentials of 8 bits that are not normalized, their sum divided out last.

    int8 q, k --product--> int32 scores --times scales--> int32, 15 fractional bits, base 2
       --less the row's maximum, exp2--> uint8 e
       --product with int8 v, and sum(e)--> int32 --times 1 / sum(e)--> 20 bits

Normalizing before the product would cost accuracy, since 1 / 197 of 8 bits is one step; the largest e of a row is 255.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.checked import bounded
from fairseq.modules.quantization.integer.dyadic import round_shift

FRACTION = 15
"""Fractional bits of scores: products of a fraction are (a * b + 2**14) >> 15, an instruction on most processors."""
ONE = 2**FRACTION
SQUARE = round(0.35815147 * math.log(2) ** 2 * ONE)
SLOPE = round(0.96963238 * math.log(2) * ONE)
"""I-BERT's exp(p) ~ 0.35815147 p**2 + 0.96963238 p + 1, p in (-ln 2, 0], in base 2:
2**-f ~ 1 - SLOPE f + SQUARE f**2."""
SCORE_LIMIT = 2**30 - 1
SMALLEST = 24
"""2**-24 of 255 rounds to 0."""
LARGEST = 255
MEAN_FRACTION = 12
RECIPROCAL_SHIFT = 38
MOST_TOKENS = 2**16 - 1
ROW_SHIFT = 9


def exp2_bytes(d: Tensor) -> Tensor:
    """255 * 2**(-d / 2**15), rounded to 8 bits, for d >= 0.

    With d = z * 2**15 + f, by the polynomial of f, shifted right by z. All in 32 bits.

    abs(error) <= 1/2 + 255 * 0.0020 < 1.02 steps, over all d; 0 gives 255.

    Args:
        d: int64 >= 0.
    """
    d = d.clamp(max=SMALLEST << FRACTION)
    z, f = d >> FRACTION, d & (ONE - 1)
    slope = SLOPE - round_shift(SQUARE * f, FRACTION)
    power = bounded(ONE - round_shift(slope * f, FRACTION), FRACTION + 2, "exponential")
    return round_shift(bounded(LARGEST * power, 32, "exponential, times 255"), FRACTION + z)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q @ k.T of bytes: (..., T, d), (..., T, d) -> int64 (..., T, T), below 2**14 * d."""
    return bounded(q.to(torch.int64) @ k.to(torch.int64).transpose(-1, -2), 32, "scores")


def scale_scores(s: Tensor, query_m: Tensor, key_m: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """Scores of bytes whose rows have scales m, to 15 fractional bits in base 2.

    The multiplier of a row is round_shift(m * multiplier, 9), at most 2**24; s * m of the key is below 2**37 for heads
    of up to 256 channels, so that the product is below 2**61.

    Args:
        s: int64 (..., T, T).
        query_m, key_m: int64 (..., T, 1), 1 to 2**15.
        multiplier, shift: int64, what a unit of s * m * m is; shift at least 9.
    """
    row = bounded(round_shift(query_m * multiplier, ROW_SHIFT), 26, "scores, a row's multiplier")
    product = bounded(bounded(s * key_m.transpose(-1, -2), 38, "scores, times key scales") * row, 62, "scores, scaled")
    return round_shift(product, shift - ROW_SHIFT)


def attend(u: Tensor, v: Tensor) -> Tensor:
    """Means of the rows of v weighted with 2**u: int64 (..., T, d) in units of 2**-12 of those of v, below 2**19.

    r = floor(2**38 / sum(e)), one division a row, is within 2**-14 of itself for up to 65,535 tokens.

    Args:
        u: int64 (..., T, T), 15 fractional bits.
        v: int8 (..., T, d).
    """
    u = u.clamp(-SCORE_LIMIT, SCORE_LIMIT)
    e = exp2_bytes(u.amax(dim=-1, keepdim=True) - u)
    total = bounded(e.sum(dim=-1, keepdim=True), 32, "sum of exponentials")
    mixed = bounded(e @ v.to(torch.int64), 32, "exponentials times values")
    r = torch.div(2**RECIPROCAL_SHIFT, total, rounding_mode="floor")
    return bounded(round_shift(mixed * r, RECIPROCAL_SHIFT - MEAN_FRACTION), 20, "attention, mean")
