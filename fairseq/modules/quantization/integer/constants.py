"""The integer constants that each kernel derives from the scale of its input, once, before any data is seen.

The polynomials need a fine scale: with a coarse one (0.01 and more) their constants have too few digits, and the
approximation breaks down. So q of scale S is first moved to a scale in [2**-15, 2**-14),

    q * S = (q * 2**k) * (S / 2**k),    k chosen from S alone,

which is exact for k >= 0 (a left shift) and a rounding by at most 2**-15 in real terms for k < 0. All intermediates
then have the same ranges whatever S is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.arithmetic import batch_frexp, bit_length, shift_right
from fairseq.modules.quantization.integer.carrier import check_magnitude, symmetric_limit
from fairseq.modules.quantization.integer.ranges import symmetric_linear_quantization_params

FINE_BITS = 14
ERF = {2: (-0.2888, -1.769), 4: (-0.019913, -2.698088)}  # degree: (a, b)
EXP = (0.35815147, 0.96963238)  # a, b of a p**2 + b p + 1
EXP_HALVINGS = 34  # 2**-34 of any value below 2**32 rounds to 0
SOFTMAX_BITS = 16
QUARTIC_SHIFT = 12
ERF_BITS = 15
LAYERNORM_BITS = 24
LAYERNORM_WEIGHT_BITS = 22


class ErfConstants(NamedTuple):
    """Of erf(u) ~ sgn(u) (1 + a (min(abs(u), -b) + b)**degree); int64, one entry per scale."""

    shift: Tensor
    """k: multiply q by 2**k."""
    clip: Tensor
    """Hold abs(q) to this first, so that the shifted value fits; the polynomial is flat from there on."""
    b: Tensor
    """-b at the fine scale; below 2**17."""
    c: Tensor
    """1 / abs(a) at the scale of the power; below 2**42."""
    drop: Tensor
    """Shift the result right by so many bits, which leaves 15."""
    one: Tensor
    """c after that shift: the integer that stands for 1, in [2**14, 2**15]."""


class ExpConstants(NamedTuple):
    """Of exp(p) ~ a p**2 + b p + 1 on (-ln 2, 0]; int64, one entry per scale."""

    shift: Tensor
    clip: Tensor
    """Hold -q to this first: the exponential is 0 from there on."""
    ln2: Tensor
    b: Tensor
    """b / a at the fine scale."""
    c: Tensor
    """1 / a at the square of the fine scale: the integer that stands for 1, in [2**29, 2**32)."""


class LayerNormConstants(NamedTuple):
    """Of (q - mean) / sqrt(variance + eps) * weight + bias over C entries."""

    eps_mantissa: int
    eps_exponent: int
    """C**3 eps / S**2 = eps_mantissa / 2**eps_exponent: eps in units of the sum of squares of C q - sum(q)."""
    eps_shift: int
    """The row shift that eps alone asks for."""
    half_log: int
    """ceil(log2(C) / 2)."""
    weight: Tensor
    """(C,) int64, 22 bits."""
    bias: Tensor
    """(C,) int64, at ``product_scale``."""
    weight_scale: Tensor
    product_scale: Tensor
    output_scale: Tensor


def fine_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """k (int64) and scale / 2**k in [2**-15, 2**-14), for scales from 2**-60 to 2**30 in float64."""
    fraction, exponent = torch.frexp(scale)
    return exponent.to(torch.int64) + FINE_BITS, fraction * 2.0**-FINE_BITS


def _integer(x: Tensor) -> Tensor:
    return torch.round(x).to(torch.int64)


def _clip(fine: Tensor, k: Tensor) -> Tensor:
    """The smallest q with q * 2**k >= ``fine``, at most 2**52, which no input reaches."""
    return torch.ceil(torch.ldexp(fine.to(torch.float64), -k)).clamp(max=2.0**52).to(torch.int64)


def erf_constants(scale: Tensor, degree: int) -> ErfConstants:
    """The constants of erf for inputs of ``scale``, float64 of shape (1,) or (C,).

    Raises:
        ValueError: a degree other than 2 (I-BERT's) and 4.
    """
    if degree not in ERF:
        raise ValueError(f"degree must be one of {', '.join(map(str, ERF))}, got {degree!r}")
    a, b = ERF[degree]
    k, fine = fine_scale(scale)
    b_int = _integer(-b / fine)
    unit = -a * fine**degree * (4.0**QUARTIC_SHIFT if degree == 4 else 1)  # what 1 of the power is worth
    c = _integer(1 / unit)
    drop = bit_length(c) - ERF_BITS
    return ErfConstants(k, _clip(b_int, k), b_int, c, drop, shift_right(c, drop))


def exp_constants(scale: Tensor) -> ExpConstants:
    """The constants of exp for inputs of ``scale``, float64 of shape (1,) or (C,)."""
    a, b = EXP
    k, fine = fine_scale(scale)
    ln2 = _integer(math.log(2) / fine)
    return ExpConstants(k, _clip(EXP_HALVINGS * ln2, k), ln2, _integer(b / a / fine), _integer(1 / (a * fine**2)))


def softmax_scale() -> Tensor:
    """The scale of the 16-bit exponentials inside softmax, the symmetric grid over [0, 1]: (1,) float64."""
    return symmetric_linear_quantization_params(SOFTMAX_BITS, 0.0, 1.0)


def layernorm_constants(scale: Tensor, weight: Tensor, bias: Tensor, eps: float, output_bit: int) -> LayerNormConstants:
    """The constants of layer normalization for inputs of ``scale``.

    The output scale covers the largest value that any input can give, the maximum over c of
    sqrt(C) abs(weight[c]) + abs(bias[c]): it needs no calibration, and no output saturates.

    Args:
        scale: float64, (1,).
        weight, bias: float64, (C,).
        eps: >= 0.
        output_bit: 2 to 32.

    Raises:
        ValueError: a negative or infinite eps; a weight or bias with NaN or Inf.
        OverflowError: a bias past 2**50 units of the product scale.
    """
    size, root = len(weight), len(weight) ** 0.5
    if not 0 <= eps < float("inf"):
        raise ValueError(f"IntLayerNorm: eps must be finite and >= 0, got {eps}")
    eps_m, eps_e = (int(part) for part in batch_frexp(size**3 * eps / scale / scale))
    weight_scale = symmetric_linear_quantization_params(LAYERNORM_WEIGHT_BITS, weight.min(), weight.max())
    product_scale = weight_scale * root / 2**LAYERNORM_BITS
    n = symmetric_limit(LAYERNORM_WEIGHT_BITS)
    weight_int = _integer(weight / weight_scale).clamp(-n, n)
    bias_real = torch.round(bias / product_scale)
    if not bool(torch.isfinite(bias_real).all()):
        raise ValueError("IntLayerNorm: the bias holds NaN or Inf; it must be finite")
    check_magnitude(bias_real, 2**50, "IntLayerNorm bias", "it is too large beside the weight")
    bound = (root * weight.abs() + bias.abs()).max()
    return LayerNormConstants(
        eps_mantissa=eps_m,
        eps_exponent=eps_e,
        eps_shift=-((17 + eps_e) // 2) if eps_m else -LAYERNORM_BITS,
        half_log=((size - 1).bit_length() + 1) // 2,
        weight=weight_int,
        bias=bias_real.to(torch.int64),
        weight_scale=weight_scale,
        product_scale=product_scale,
        output_scale=symmetric_linear_quantization_params(output_bit, -bound, bound),
    )
