"""Exact int64 arithmetic: rounding shift and division, integer square root, dyadic numbers, requantization.

Every rounding is half to even. Nothing here uses floating point, except that :func:`batch_frexp` reads a multiplier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.carrier import check_integers, check_width, symmetric_limit

MANTISSA_BITS = 31
ISQRT_STEPS = 6
_SPLIT = 24  # bits of q's lower part in a product of up to 84 bits


def shift_right(q: Tensor, n: Tensor | int) -> Tensor:
    """round(q / 2**n), half to even.

    Args:
        q: int64, any shape.
        n: 0 to 61, an int or an int64 tensor that broadcasts against ``q``.
    """
    n = torch.as_tensor(n, device=q.device)
    quotient = q >> n
    twice_rest, unit = (q - (quotient << n)) << 1, torch.ones_like(q) << n
    up = (twice_rest > unit) | ((twice_rest == unit) & (quotient % 2 == 1))
    return quotient + up.to(torch.int64)


def shift(q: Tensor, n: Tensor) -> Tensor:
    """q * 2**n for int64 ``q``, abs(q) < 2**60, and ``n``: exact to the left, rounded half to even to the right."""
    return shift_right(q << n.clamp(0, 62), (-n).clamp(0, 61))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """round(a / b), half to even, for int64 ``a``, abs(a) < 2**62, and 0 < ``b`` < 2**62."""
    quotient = torch.div(a, b, rounding_mode="floor")
    twice_rest = (a - quotient * b) << 1
    up = (twice_rest > b) | ((twice_rest == b) & (quotient % 2 == 1))
    return quotient + up.to(torch.int64)


def bit_length(q: Tensor) -> Tensor:
    """The number of binary digits of each q >= 0, as ``int.bit_length``: int64, 0 for 0."""
    length, rest = torch.zeros_like(q), q
    for step in (32, 16, 8, 4, 2, 1):
        wide = rest >= 1 << step
        length = torch.where(wide, length + step, length)
        rest = torch.where(wide, rest >> step, rest)
    return length + rest


def isqrt(n: Tensor) -> Tensor:
    """floor(sqrt(n)), exactly; see :func:`newton_root`.

    Args:
        n: int64, any shape, 0 <= n < 2**62.

    Raises:
        ValueError: a negative n.
        OverflowError: n >= 2**62.
    """
    check_integers(n, "isqrt", 2**62 - 1)
    if bool((n < 0).any()):
        raise ValueError(f"isqrt needs n >= 0, got {int(n.min())}")
    return newton_root(n)


def newton_root(n: Tensor) -> Tensor:
    """floor(sqrt(n)) for int64 0 <= n < 2**62, which is not looked at, so that a graph can be recorded of it.

    Newton's iteration x <- floor((x + floor(n / x)) / 2) from a power of two x >= sqrt(n), at most twice too large.
    The sequence falls until it reaches the result and never passes it; the relative error goes 1, 1/4, 1/40, 3e-4,
    5e-8, 1e-15, so that six steps reach the last bit of the 31. I-BERT, algorithm 4, https://arxiv.org/abs/2101.01321.
    """
    x = torch.ones_like(n) << ((bit_length(n) + 1) >> 1)
    for _ in range(ISQRT_STEPS):
        x = torch.minimum(x, (x + torch.div(n, x, rounding_mode="floor")) >> 1).clamp(min=1)
    return torch.where(n == 0, 0, x)


def batch_frexp(inputs: Tensor, max_bit: int = MANTISSA_BITS) -> tuple[Tensor, Tensor]:
    """The dyadic number m / 2**e nearest to each input: m an integer of exactly ``max_bit`` bits.

    Args:
        inputs: floating tensor of any shape, finite, >= 0.
        max_bit: 2 to 52, the bits of m.

    Returns:
        m in [2**(max_bit - 1), 2**max_bit) and e, both int64 and of the shape of ``inputs``; 0 is m = 0, e = 0.
        m / 2**e is within one part in 2**max_bit of the input.

    Raises:
        ValueError: a negative or infinite input, or NaN.
    """
    check_width(max_bit, "max_bit", 2, 52)
    if not bool((torch.isfinite(inputs) & (inputs >= 0)).all()):
        raise ValueError(f"batch_frexp needs finite inputs >= 0, got {inputs.flatten().tolist()[:8]}")
    fraction, exponent = torch.frexp(inputs.detach().to(torch.float64))
    m = torch.round(torch.ldexp(fraction, torch.full_like(exponent, max_bit))).to(torch.int64)
    e = max_bit - exponent.to(torch.int64)
    full = m == 2**max_bit  # a fraction just below 1 rounds up to 1
    m, e = torch.where(full, m >> 1, m), torch.where(full, e - 1, e)
    return m, torch.where(m == 0, 0, e)


def requantize(q: Tensor, mantissa: Tensor, exponent: Tensor, bits: int) -> Tensor:
    """clamp(round(q * mantissa / 2**exponent), -n, n) with n = 2**(bits - 1) - 1, exactly, rounding half to even.

    Gives integers of one scale those of another: mantissa, exponent = batch_frexp(scale / new_scale).
    I-BERT, section 3.2; Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 2.2.

    Args:
        q: int64, any shape, abs(q) <= 2**51.
        mantissa, exponent: from :func:`batch_frexp` with 31 bits; int64, broadcast against ``q``.
        bits: 2 to 32.

    Raises:
        OverflowError: a q past 2**51.
        ValueError: a mantissa that has not 31 bits and is not 0.
    """
    n = symmetric_limit(check_width(bits, "bits"))
    return scale_integers(q, mantissa, exponent).clamp(-n, n)


def scale_integers(q: Tensor, mantissa: Tensor, exponent: Tensor) -> Tensor:
    """round(q * mantissa / 2**exponent) as :func:`requantize`, held to +-2**32 in place of a width.

    A product has up to 82 bits. With an exponent above 24 it is computed in two parts, of which the lower one matters
    to the rounding only by being zero or not; otherwise any abs(q) >= 2**31 is past 2**32 and the rest fits at once.
    """
    check_integers(q, "requantize")
    if bool(((mantissa != 0) & (bit_length(mantissa.abs()) != MANTISSA_BITS) | (mantissa < 0)).any()):
        raise ValueError(f"requantize needs mantissas of {MANTISSA_BITS} bits, as batch_frexp makes them: {mantissa}")
    past = (exponent < 0) & (mantissa > 0)  # times more than 2**31: past 32 bits unless q is 0
    mantissa = torch.where(past, 2**MANTISSA_BITS, mantissa)
    exponent = exponent.clamp(0, 84)  # 2**82 / 2**84 rounds to 0
    lower = (q & (2**_SPLIT - 1)) * mantissa
    upper = (q >> _SPLIT) * mantissa + (lower >> _SPLIT)
    sticky = (lower & (2**_SPLIT - 1) != 0).to(torch.int64)
    wide = shift_right(2 * upper + sticky, (exponent - _SPLIT + 1).clamp(min=0))
    narrow = shift_right(q.clamp(-(2**31), 2**31) * mantissa, exponent.clamp(max=_SPLIT))
    return torch.where(exponent > _SPLIT, wide, narrow).clamp(-(2**32), 2**32)
