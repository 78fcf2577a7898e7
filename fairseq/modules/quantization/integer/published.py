"""GELU and softmax of I-BERT and of I-ViT on the integers of an integer-only model, to compare and for hardware.

I-BERT: Kim et al., 2021, https://arxiv.org/abs/2101.01321. I-ViT: Li and Gu, 2023, https://arxiv.org/abs/2207.01405.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.attention import FRACTION, MEAN_FRACTION, SCORE_LIMIT, exp2
from fairseq.modules.quantization.integer.checked import bounded
from fairseq.modules.quantization.integer.constants import ERF
from fairseq.modules.quantization.integer.dyadic import round_shift
from fairseq.modules.quantization.integer.matmul import matmul
from fairseq.modules.quantization.integer.piecewise import INPUT_BITS, UNIT_BITS

FUNCTIONS = ("default", "ibert", "ivit")
GELUS = {"ibert": ("gelu", "gelu_tanh"), "ivit": ("gelu", "gelu_tanh", "quick_gelu")}
"""Activations that each of them stands for."""
ERF_SHIFT = 28
IBERT_BITS = 8
"""Of a probability of I-BERT."""
IVIT_BITS = 15
"""Of a probability of I-ViT, with a sign 16."""
SIGMOID_BITS = 7
"""Of a sigmoid of I-ViT, with a sign 8."""
SHIFT_HALVINGS = 16
"""I-ViT's exponential has so many bits below the integer for 1; what is smaller is 0."""
RECIPROCAL_SHIFT = 53


def gelu_constants(functions: str, limit: float) -> Tensor:
    """int64 (2,): what :func:`gelu` needs, for t in units of limit / 2**15."""
    unit = limit / 2**UNIT_BITS
    if functions == "ivit":
        return torch.tensor([math.floor(1 / unit), 0])
    a, b = ERF[2]
    square = -a * unit**2 / 2 * 2.0 ** (UNIT_BITS + ERF_SHIFT)
    return torch.tensor([round(-b * math.sqrt(2) / unit), round(square)])


def gelu(t: Tensor, constants: Tensor, functions: str) -> Tensor:
    """GELU of t, in units of limit / 2**15, both: :func:`polynomial_gelu` or :func:`shift_gelu`."""
    bounded(t, INPUT_BITS, "activation, input")
    return polynomial_gelu(t, constants) if functions == "ibert" else shift_gelu(t, constants)


def polynomial_gelu(t: Tensor, constants: Tensor) -> Tensor:
    """I-BERT's GELU, x / 2 (1 + erf(x / sqrt 2)), erf(u) = sgn(u) (1 + a (min(abs(u), -b) + b)**2).

    power = (B - min(abs(t), B))**2, erf = sgn(t) (2**15 - round_shift(power * A, 28)), and the result is
    round_shift(t (2**15 + erf), 16). With limits from 6, B < 2**15 and power * A < 2**45.

    abs(error) < 0.0184, over all t; beyond b sqrt 2 it is exactly x or 0.

    Args:
        t: int64 of 24 bits.
        constants: B, -b sqrt 2 in units; A, -a at the scale of the power.
    """
    b, a = constants[0], constants[1]
    power = bounded((b - torch.minimum(t.abs(), b)) ** 2, 31, "GELU, square")
    magnitude = bounded(2**UNIT_BITS - round_shift(bounded(power * a, 47, "GELU, scaled"), ERF_SHIFT), 17, "GELU, erf")
    return round_shift(bounded(t * (2**UNIT_BITS + torch.sign(t) * magnitude), 41, "GELU, product"), UNIT_BITS + 1)


def shift_exp(d: Tensor, one: Tensor | int) -> Tensor:
    """I-ViT's exponential exp(-d / one) for d >= 0, its 1 being ``one`` << 17: 33 bits for ``one`` up to 2**15.

    log2(e) is 1 + 1/2 - 1/16, by shifts; 2**-f is 1 - f / 2. abs(error) < 0.066 of 1.
    """
    p = d + (d >> 1) - (d >> 4)
    z = torch.div(p, one, rounding_mode="floor")
    line = (2 * one - (p - z * one)) << SHIFT_HALVINGS
    return bounded(torch.where(z <= SHIFT_HALVINGS, line >> z.clamp(max=SHIFT_HALVINGS), 0), 34, "shift exponential")


def shift_gelu(t: Tensor, constants: Tensor) -> Tensor:
    """I-ViT's GELU, x sigmoid(1.702 x): 1.702 is 1 + 1/2 + 1/8 + 1/16 by shifts, the sigmoid has 7 bits and a sign.

    The sigmoid is e / (e + e'), of exponentials of p and 0 less the larger of the two, so that a channel's result
    depends on no other (I-ViT takes a row's largest p: the same quotient).

    Args:
        t: int64 of 24 bits.
        constants: the integer that stands for 1, floor(2**15 / limit).
    """
    one = constants[0]
    p = t + (t >> 1) + (t >> 3) + (t >> 4)
    e, whole = shift_exp(p.abs(), one), one << (SHIFT_HALVINGS + 1)
    part = torch.where(p >= 0, whole, e)
    sigmoid = bounded(torch.div(part << SIGMOID_BITS, whole + e, rounding_mode="floor"), 9, "sigmoid")
    return round_shift(bounded(t * sigmoid, 33, "GELU, product"), SIGMOID_BITS)


def attend_published(u: Tensor, v: Tensor, functions: str) -> Tensor:
    """Rows of v weighted with the softmax of u: int64 (..., T, d) in units of 2**-12 of those of v, 20 bits.

    Probabilities are normalized, rounded down and then multiplied by v: 8 bits of I-BERT's polynomial, of which 1 is
    255, or 15 bits of I-ViT's shifts. What rounding leaves is lost.

    Args:
        u: int64 (..., T, T), 15 fractional bits; base 2 for I-BERT, e for I-ViT.
        v: int8 (..., T, d), T up to 65,535.
    """
    u = u.clamp(-SCORE_LIMIT, SCORE_LIMIT)
    d = u.amax(dim=-1, keepdim=True) - u
    if functions == "ibert":
        x, bits = exp2(d), IBERT_BITS
    else:
        x, bits = shift_exp(d, 2**FRACTION) >> (SHIFT_HALVINGS + 1 + FRACTION - 23), IVIT_BITS  # 1 is 2**23
    total = bounded(x.sum(dim=-1, keepdim=True), 41, "sum of exponentials")
    r = bounded(torch.div(2**RECIPROCAL_SHIFT, total, rounding_mode="floor"), 32, "attention, reciprocal")
    p = (bounded(x * r, 55, "probabilities, scaled") >> (RECIPROCAL_SHIFT - bits)).clamp(max=2**bits - 1)
    mixed = bounded(matmul(p, v.to(torch.int64)), 40, "probabilities times values")
    limit = 127 << MEAN_FRACTION
    return round_shift(mixed << MEAN_FRACTION, bits).clamp(-limit, limit)
