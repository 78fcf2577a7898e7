"""Attention on bytes: int8 scores, exponentials of 8 bits that are not normalized, their sum divided out last.

    int8 q, k --product--> int32 scores --times scales--> int32, 15 fractional bits, base 2
       --less the row's maximum, exp2--> uint8 e
       --product with int8 v--> int32 --and what rounding left, times 1 / sum--> 20 bits

Normalizing before the product would cost accuracy, since 1 / 197 of 8 bits is one step; the largest e of a row is 255.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.checked import bounded
from fairseq.modules.quantization.integer.dyadic import round_shift
from fairseq.modules.quantization.integer.matmul import matmul

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
RECIPROCAL_SHIFT = 53
ROW_SHIFT = 16


def exp2(d: Tensor) -> Tensor:
    """255 * 2**(-d / 2**15) in units of 2**-15, for d >= 0: 23 bits.

    With d = z * 2**15 + f, by the polynomial of f, shifted right by z, without rounding. All in 32 bits.

    abs(error) <= 255 * 0.0020 < 0.52, over all d; 0 gives 255.

    Args:
        d: int64 >= 0.
    """
    d = d.clamp(max=SMALLEST << FRACTION)
    z, f = d >> FRACTION, d & (ONE - 1)
    slope = SLOPE - round_shift(SQUARE * f, FRACTION)
    power = bounded(ONE - round_shift(slope * f, FRACTION), FRACTION + 2, "exponential")
    return bounded(LARGEST * power, 32, "exponential, times 255") >> z


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q @ k.T of bytes: (..., T, d), (..., T, d) -> int64 (..., T, T), below 2**14 * d."""
    return bounded(matmul(q.to(torch.int64), k.to(torch.int64).transpose(-1, -2)), 32, "scores")


def scale_scores(s: Tensor, query_m: Tensor, key_m: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """Scores of bytes whose rows have scales m, to 15 fractional bits in base 2.

    The multiplier of a row is round_shift(m * multiplier, 16), at most 2**15; times m of the key it is at most 2**30,
    and s at most 2**22 for heads of up to 256 channels, so that the product is at most 2**52.

    Args:
        s: int64 (..., T, T).
        query_m, key_m: int64 (..., T, 1), 1 to 2**15.
        multiplier, shift: int64, what a unit of s * m * m is; shift at least 16.
    """
    row = bounded(round_shift(query_m * multiplier, ROW_SHIFT), 17, "scores, a row's multiplier")
    both = bounded(row * key_m.transpose(-1, -2), 32, "scores, both scales")
    return round_shift(bounded(s * both, 54, "scores, scaled"), shift - ROW_SHIFT)


def attend(u: Tensor, v: Tensor) -> Tensor:
    """Means of the rows of v weighted with 2**u: int64 (..., T, d) in units of 2**-12 of those of v, 20 bits.

    1. x = exp2(max(u) - u), e = round_shift(x, 15), a byte; total = sum(x), below 2**39.
    2. rest = total - 2**15 sum(e): what rounding took from a row or gave it, at most 2**14 a token. Of a row with one
       large entry that is much: most of the others round to 0. It goes to the mean of all rows of v.
    3. product = 2**15 (e @ v) + round_shift(rest * mean, 8), mean = sum(v) / T with 8 fractional bits; below 2**48.
    4. r = floor(2**53 / total), below 2**31; round_shift(product * r, 41), within 127 * 2**12.

    abs(product) <= 3 * 127 * total, since abs(rest) <= total, so that product * r is below 2**62.

    Args:
        u: int64 (..., T, T), 15 fractional bits.
        v: int8 (..., T, d), T up to 65,535.
    """
    u, v = u.clamp(-SCORE_LIMIT, SCORE_LIMIT), v.to(torch.int64)
    x = exp2(u.amax(dim=-1, keepdim=True) - u)
    e = bounded(round_shift(x, FRACTION), 9, "bytes of exponentials")
    total = bounded(x.sum(dim=-1, keepdim=True), 40, "sum of exponentials")
    rest = bounded(total - (e.sum(dim=-1, keepdim=True) << FRACTION), 31, "rest of exponentials")
    count = v.shape[-2]
    mean = torch.div((v.sum(dim=-2, keepdim=True) << 9) + count, 2 * count, rounding_mode="floor")
    mixed = bounded(matmul(e, v), 32, "exponentials times values")
    product = bounded((mixed << FRACTION) + round_shift(rest * mean, 8), 49, "attention, sum")
    r = bounded(torch.div(2**RECIPROCAL_SHIFT, total, rounding_mode="floor"), 32, "attention, reciprocal")
    limit = 127 << MEAN_FRACTION
    return round_shift(product * r, RECIPROCAL_SHIFT - MEAN_FRACTION).clamp(-limit, limit)
