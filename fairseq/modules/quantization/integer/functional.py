"""The integer kernels on int64 tensors: slow, obvious, and the definition of correct for the float-carried layers.

Each takes integers q and the scale S of what they stand for, S * q, and returns integers and their scale. Scales only
choose constants (see :mod:`~fairseq.modules.quantization.integer.constants`); no datum is ever a float. Every rounding
is half to even. A scale is a number or a float tensor from 2**-60 to 2**30; where a kernel works elementwise it may
have one entry per entry of the last dimension of q. Inputs may reach +-2**51; past that, OverflowError.

I-BERT: Kim et al., 2021, https://arxiv.org/abs/2101.01321.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.arithmetic import (
    batch_frexp,
    bit_length,
    divide,
    isqrt,
    requantize,
    shift,
    shift_right,
)
from fairseq.modules.quantization.integer.carrier import (
    FLOAT64_LIMIT,
    INT32_LIMIT,
    check_integers,
    check_magnitude,
    check_scale,
    check_width,
)
from fairseq.modules.quantization.integer.constants import (
    EXP_HALVINGS,
    LAYERNORM_BITS,
    QUARTIC_SHIFT,
    SOFTMAX_BITS,
    LayerNormConstants,
    erf_constants,
    exp_constants,
    layernorm_constants,
    softmax_scale,
)

__all__ = ["erf", "exp", "gelu", "isqrt", "layernorm", "linear", "requantize", "softmax"]

GELU_LIMIT = 2**35  # times a 16-bit factor: 2**51
SQUARES_LIMIT = 2**50


def linear(q: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """q @ weight.T + bias in an int32 accumulator. The scale of the result is scale_q * scale_weight.

    Exact: no error.

    Args:
        q: int64, (..., in_features).
        weight: int64, (out_features, in_features).
        bias: int64, (out_features,), at the scale of the result; or None.

    Returns:
        int64, (..., out_features), within +-(2**31 - 1).

    Raises:
        OverflowError: a result past +-(2**31 - 1).
    """
    check_integers(weight, "linear weight", INT32_LIMIT)
    largest = max(int(weight.abs().max()), 1)
    check_magnitude(check_integers(q, "linear"), 2**62 // (weight.shape[1] * largest), "linear (int64 products)")
    result = (q.unsqueeze(-2) * weight).sum(-1)  # (..., 1, in) * (out, in) -> (..., out)
    if bias is not None:
        result = result + check_integers(bias, "linear bias", INT32_LIMIT)
    check_magnitude(result, INT32_LIMIT, "linear (int32 accumulator)")
    return result


def erf(q: Tensor, scale: Tensor | float, degree: int = 2) -> tuple[Tensor, Tensor]:
    """The error function by a polynomial, sgn(u) (1 + a (min(abs(u), -b) + b)**degree) with u = scale * q.

    Degree 2 is I-BERT's equation 8 (a = -0.2888, b = -1.769); degree 4 fits better (a = -0.019913, b = -2.698088).
    Intermediates stay below 2**44.

    Measured on all of [-8, 8], for scales from 2**-30 to 2**-1: max error 0.0963 (degree 2), 0.0552 (degree 4), both
    beside 0, where the polynomial does not vanish; 0 itself gives 0, and past -b the result is exactly +-1.

    Args:
        q: int64, any shape.
        degree: 2 or 4.

    Returns:
        int64 of 15 bits and a sign, and the scale, such that 1 is an integer.
    """
    return _erf(q, check_scale(scale, check_integers(q, "erf"), "erf"), degree)


def _erf(q: Tensor, scale: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    constants = erf_constants(scale, degree)
    fine = shift(torch.minimum(q.abs(), constants.clip), constants.shift)
    power = (constants.b - torch.minimum(fine, constants.b)) ** 2  # < 2**34
    if degree == 4:
        power = shift_right(power, QUARTIC_SHIFT) ** 2
    magnitude = shift_right(constants.c - power, constants.drop)
    return torch.sign(q) * magnitude, 1 / constants.one.to(torch.float64)


def gelu(q: Tensor, scale: Tensor | float, degree: int = 2) -> tuple[Tensor, Tensor]:
    """GELU, x / 2 * (1 + erf(x / sqrt 2)) with x = scale * q. I-BERT, algorithm 2.

    Measured on all of [-8, 8], for scales from 2**-30 to 2**-1: max error against the float GELU 0.0182 with degree
    2, 0.0094 with degree 4. Beyond, the result is exactly x or 0. A coarse scale costs nothing.

    Args:
        q: int64, any shape, abs(q) <= 2**35.
        degree: 2 or 4, of the polynomial for erf.

    Returns:
        int64 of the shape of q, up to 16 bits wider; and the scale.

    Raises:
        OverflowError: a q past 2**35, whose result would not fit.
    """
    scale = check_scale(scale, check_integers(q, "gelu"), "gelu")
    check_magnitude(q, GELU_LIMIT, "gelu", "requantize the input to fewer bits")
    erf_int, erf_scale = _erf(q, scale / 2**0.5, degree)
    one = torch.round(1 / erf_scale).to(torch.int64)
    return q * (erf_int + one), scale * erf_scale / 2


def exp(q: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """exp(scale * q) for q <= 0: with x = -z ln 2 + p, p in (-ln 2, 0], a polynomial of p shifted right by z.

    I-BERT, algorithm 3: exp(p) ~ 0.35815147 p**2 + 0.96963238 p + 1.

    Measured on all of (-inf, 0], for scales from 2**-30 to 2**-1: max error 0.00194. exp(0) is exactly 1.

    Args:
        q: int64 <= 0, any shape.

    Returns:
        int64 from 0 to below 2**32, and the scale, such that 1 is an integer.

    Raises:
        ValueError: a positive q.
    """
    scale = check_scale(scale, check_integers(q, "exp"), "exp")
    if bool((q > 0).any()):
        raise ValueError(f"exp needs q <= 0, got {int(q.max())}; subtract the maximum first")
    return _exp(q, scale)


def _exp(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    constants = exp_constants(scale)
    fine = -shift(torch.minimum(-q, constants.clip), constants.shift)
    z = torch.div(-fine, constants.ln2, rounding_mode="floor")
    p = fine + z * constants.ln2  # (-ln2, 0]
    value = p * (p + constants.b) + constants.c
    return shift_right(value, z.clamp(max=EXP_HALVINGS)), 1 / constants.c.to(torch.float64)


def softmax(q: Tensor, scale: Tensor | float, output_bit: int = 8) -> tuple[Tensor, Tensor]:
    """softmax(scale * q) over the last dimension, as integers of scale 2**-output_bit. I-BERT, section 3.4.

    Subtract the maximum, i-exp, requantize to 16 bits, divide by the sum. A probability of 1 becomes
    2**output_bit - 1, the largest integer of the width.

    Measured over random rows of 2 to 1,024 entries and logits up to +-40: max error 0.00391 with 8 bits
    (2**-8: the saturation at 1), 0.00191 with 16 bits.

    Args:
        q: int64, (..., n).
        scale: one number.
        output_bit: 2 to 16.

    Returns:
        int64 in [0, 2**output_bit - 1], (..., n), and the scale 2**-output_bit.
    """
    check_width(output_bit, "output_bit", 2, SOFTMAX_BITS)
    scale = check_scale(scale, check_integers(q, "softmax"), "softmax", single=True)
    exp_int, exp_scale = _exp(q - q.amax(dim=-1, keepdim=True), scale)
    exp_int = requantize(exp_int, *batch_frexp(exp_scale / softmax_scale().to(q.device)), SOFTMAX_BITS)
    result = divide(exp_int << output_bit, exp_int.sum(dim=-1, keepdim=True))
    return result.clamp(max=2**output_bit - 1), torch.full_like(scale, 2.0**-output_bit)


def layernorm(
    q: Tensor,
    scale: Tensor | float,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    output_bit: int = 32,
    overflow_handling: bool = True,
) -> tuple[Tensor, Tensor]:
    """Layer normalization of scale * q over the last dimension. After I-BERT, section 3.5.

    With y = C q - sum(q), an integer, (q - mean) / sqrt(variance + eps) is sqrt(C) y / sqrt(sum(y**2) + E) where
    E = C**3 eps / scale**2. For the squares each row of y is shifted by its own power of two, so that their sum stays
    below 2**50: to the left exactly, to the right with rounding. Then i-sqrt, division, multiplication by the 22-bit
    weight, addition of the bias, requantization. No division by the weight, which may be 0.

    Measured over rows of 2 to 4,096 entries, magnitudes from 1 step to 2**38 steps, rows with one entry far from all
    others, weights up to 4, biases up to 2, eps 1e-5: max error 6.2e-5 with 32 bits. Fewer bits add half a step.

    Args:
        q: int64, (..., C), C abs(q) <= 2**51.
        scale: one number.
        weight, bias: floating, (C,). They only choose integers: 22 bits, and the scale of the product.
        eps: >= 0. A row without variance gives the bias, also with eps = 0.
        output_bit: 2 to 32; the output scale covers the largest possible output.
        overflow_handling: False leaves out the shift to the right.

    Returns:
        int64 of ``output_bit`` bits, (..., C), and the scale.

    Raises:
        OverflowError: C abs(q) past 2**51; without overflow handling, a sum of squares past 2**50.
    """
    scale = check_scale(scale, check_integers(q, "layernorm"), "layernorm", single=True)
    constants = layernorm_constants(scale, weight.detach().double(), bias.detach().double(), eps, output_bit)
    size = q.shape[-1]
    check_magnitude(q, FLOAT64_LIMIT // size, "layernorm (sum over the row)", "requantize the input to fewer bits")
    y = size * q - q.sum(dim=-1, keepdim=True)
    row_shift = layernorm_shift(bit_length(y.abs().amax(dim=-1, keepdim=True)), constants, overflow_handling)
    small = shift(y, -row_shift)
    if not overflow_handling:
        check_magnitude(small, int((2**62 // size) ** 0.5), "layernorm (a square)", "set overflow_handling=True")
    eps_int = shift(torch.full_like(row_shift, constants.eps_mantissa), -(constants.eps_exponent + 2 * row_shift))
    squares = (small * small).sum(dim=-1, keepdim=True) + eps_int
    check_magnitude(squares, SQUARES_LIMIT, "layernorm (the sum of squares)", "set overflow_handling=True")
    lift = root_shift(bit_length(squares))
    root = isqrt(squares << 2 * lift).clamp(min=1)
    normal = divide(shift(y, LAYERNORM_BITS + lift - row_shift), root)  # 24 bits
    product = normal * constants.weight + constants.bias
    multiplier = batch_frexp(constants.product_scale / constants.output_scale)
    return requantize(product, *multiplier, output_bit), constants.output_scale


def root_shift(digits: Tensor) -> Tensor:
    """Shift a sum of squares of so many binary digits to the left by twice this before i-sqrt: below 2**52.

    The root then has 25 or 26 bits, whatever the sum was, and is still exact in float64.
    """
    return (52 - digits) >> 1


def layernorm_shift(digits: Tensor, constants: LayerNormConstants, overflow_handling: bool) -> Tensor:
    """How far each row of :func:`layernorm` is shifted to the right; negative to the left.

    abs(y) < 2**digits then becomes at most 2**(24 - half_log), so that C squares sum to at most 2**48, as does eps.

    Args:
        digits: int64, (..., 1): bit_length of the largest abs(y) of the row.

    Raises:
        OverflowError: without overflow handling, if eps alone needs a shift to the right.
    """
    row_shift = (digits + constants.half_log - LAYERNORM_BITS).clamp(min=constants.eps_shift)
    if overflow_handling:
        return row_shift
    if constants.eps_shift > 0:
        eps_bits = 31 - constants.eps_exponent
        raise OverflowError(f"layernorm (eps): {eps_bits} bits are past the limit of 48; set overflow_handling=True")
    return row_shift.clamp(max=0)
