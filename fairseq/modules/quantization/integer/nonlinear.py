"""IntGELU, IntSoftmax and IntLayerNorm: I-BERT's integer-only nonlinear layers on (x, scaling_factor) pairs.

Each computes in float64 the integers that its namesake in
:mod:`~fairseq.modules.quantization.integer.functional` defines on int64 tensors, with straight-through gradients, and
in "none" the float layer. ``force_dequant`` names layers that are to compute in float although ``quant_mode`` is
"symmetric": "none", "gelu", "softmax", "layernorm", or "nonlinear" for all three.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from fairseq.modules.quantization.integer.activation import Pair, QuantAct
from fairseq.modules.quantization.integer.carrier import (
    FLOAT64_LIMIT,
    carrier_dtype,
    check_magnitude,
    check_quant_mode,
    check_scale,
    check_width,
)
from fairseq.modules.quantization.integer.constants import (
    EXP_HALVINGS,
    LAYERNORM_BITS,
    LAYERNORM_WEIGHT_BITS,
    QUARTIC_SHIFT,
    SOFTMAX_BITS,
    LayerNormConstants,
    erf_constants,
    exp_constants,
    layernorm_constants,
)
from fairseq.modules.quantization.integer.functional import GELU_LIMIT, SQUARES_LIMIT, layernorm_shift, root_shift
from fairseq.modules.quantization.integer.layers import copy_parameter
from fairseq.modules.quantization.integer.straight_through import (
    SymmetricQuantFunction,
    fixedpoint_mul,
    floor_ste,
    read_integers,
    round_ste,
)

FORCE_DEQUANT = ("none", "gelu", "softmax", "layernorm", "nonlinear")


def effective_quant_mode(quant_mode: str, force_dequant: str, layer: str) -> str:
    """``quant_mode``, or "none" where ``force_dequant`` names ``layer``; ValueError for values not accepted."""
    check_quant_mode(quant_mode)
    if force_dequant not in FORCE_DEQUANT:
        raise ValueError(f"force_dequant must be one of {', '.join(FORCE_DEQUANT)}, got {force_dequant!r}")
    return "none" if force_dequant in ("nonlinear", layer) else quant_mode


def shift_ste(q: Tensor, n: Tensor) -> Tensor:
    """round(q * 2**n) in float64, half to even, with gradient 2**n."""
    result: Tensor = round_ste.apply(torch.ldexp(q, n))
    return result


class IntGELU(nn.Module):
    """GELU by a polynomial for erf; see :func:`functional.gelu
    <fairseq.modules.quantization.integer.functional.gelu>` for the equation and its error.

    Args:
        quant_mode: "none" or "symmetric".
        force_dequant: "gelu" or "nonlinear" makes this layer compute in float.
        degree: of the polynomial, 2 (I-BERT's) or 4 (half the error).
    """

    def __init__(self, quant_mode: str = "none", force_dequant: str = "none", *, degree: int = 2):
        super().__init__()
        if degree not in (2, 4):
            raise ValueError(f"degree must be 2 or 4, got {degree!r}")
        self.quant_mode, self.degree = effective_quant_mode(quant_mode, force_dequant, "gelu"), degree

    def extra_repr(self) -> str:
        return f"quant_mode={self.quant_mode}, degree={self.degree}"

    def forward(self, x: Tensor, scaling_factor: Tensor | None = None) -> Pair:
        """GELU of ``x``.

        Args:
            x: integers times ``scaling_factor``, any shape; integers up to 2**35.
            scaling_factor: one number, or one for each entry of the last dimension.

        Returns:
            (y, scaling_factor): float64, integers up to 16 bits wider than the input's; "none": (y, None).

        Raises:
            OverflowError: an input integer past 2**35.
            ValueError: a missing scaling factor, or an ``x`` that is not a multiple of it.
        """
        if self.quant_mode == "none":
            return F.gelu(x), None
        scale = check_scale(scaling_factor, x, "IntGELU")
        q = read_integers(x, scale, "IntGELU")
        check_magnitude(q, GELU_LIMIT, "IntGELU", "requantize the input to fewer bits")
        erf, one = self._erf(q, scale / 2**0.5)
        scale = scale * (1 / one) / 2
        return (q * (erf + one) * scale).reshape(x.shape), scale

    def _erf(self, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Integers of erf(q * scale), and the integer that stands for 1."""
        constants = erf_constants(scale, self.degree)
        fine = shift_ste(torch.minimum(q.abs(), constants.clip), constants.shift)
        power = (constants.b - torch.minimum(fine, constants.b)) ** 2
        if self.degree == 4:
            power = round_ste.apply(power / 2**QUARTIC_SHIFT) ** 2
        magnitude = shift_ste(constants.c - power, -constants.drop)
        return torch.sign(q.detach()) * magnitude, constants.one.double()


class IntSoftmax(nn.Module):
    """Softmax over the last dimension, as integers of scale 2**-output_bit; see :func:`functional.softmax
    <fairseq.modules.quantization.integer.functional.softmax>` for the steps and the error.

    The exponentials go through ``act``, a 16-bit QuantAct whose range is specified, [0, 1]: nothing needs calibration.

    Args:
        output_bit: 2 to 16.
        quant_mode: "none" or "symmetric".
        force_dequant: "softmax" or "nonlinear" makes this layer compute in float.
    """

    def __init__(self, output_bit: int, quant_mode: str = "none", force_dequant: str = "none"):
        super().__init__()
        self.output_bit = check_width(output_bit, "output_bit", 2, SOFTMAX_BITS)
        self.quant_mode = effective_quant_mode(quant_mode, force_dequant, "softmax")
        self.act = QuantAct(SOFTMAX_BITS, quant_mode=self.quant_mode)

    def extra_repr(self) -> str:
        return f"output_bit={self.output_bit}, quant_mode={self.quant_mode}"

    def forward(self, x: Tensor, scaling_factor: Tensor | None = None) -> Pair:
        """Softmax of ``x``.

        Args:
            x: (..., n), integers times ``scaling_factor``; -inf where masked, which gives exactly 0.
            scaling_factor: one number.

        Returns:
            (y, 2**-output_bit): float32, integers from 0 to 2**output_bit - 1; "none": (y, None).

        Raises:
            ValueError: a missing scaling factor, an ``x`` that is not a multiple of it, or a row that is masked whole.
        """
        if self.quant_mode == "none":
            return F.softmax(x, dim=-1), None
        scale = check_scale(scaling_factor, x, "IntSoftmax", single=True)
        masked = x.detach() == -torch.inf
        if bool(masked.all(dim=-1).any()):
            raise ValueError("IntSoftmax: a row is -inf throughout, so nothing is left to give probability to")
        lowest = x.detach().masked_fill(masked, torch.inf).amin(dim=-1, keepdim=True)
        q = read_integers(torch.where(masked, lowest, x), scale, "IntSoftmax")
        exp, exp_scale = self._exp(q - q.detach().amax(dim=-1, keepdim=True), scale)
        exp = exp.masked_fill(masked, 0) * exp_scale
        exp, exp_scale = self.act(exp, exp_scale, specified_min=0.0, specified_max=1.0)
        exp = read_integers(exp, exp_scale, "IntSoftmax")
        result = round_ste.apply(exp * 2**self.output_bit / exp.sum(dim=-1, keepdim=True))
        scale = torch.full_like(scale, 2.0**-self.output_bit)
        return (result.clamp(max=2**self.output_bit - 1) * scale).to(carrier_dtype(self.output_bit)), scale

    def _exp(self, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Integers of exp(q * scale), q <= 0, and their scale."""
        constants = exp_constants(scale)
        fine = -shift_ste(torch.minimum(-q, constants.clip), constants.shift)
        z = torch.floor(-fine.detach() / constants.ln2)
        p = fine + z * constants.ln2
        value = p * (p + constants.b) + constants.c
        return shift_ste(value, -z.clamp(max=EXP_HALVINGS).to(torch.int64)), 1 / constants.c.double()


class IntLayerNorm(nn.Module):
    """Layer normalization on integers; see :func:`functional.layernorm
    <fairseq.modules.quantization.integer.functional.layernorm>` for the steps and the error.

    ``set_param(layernorm)`` takes over shape, eps, weight and bias. The output has one scaling factor, which follows
    from weight and bias: it needs no calibration, and no output saturates.

    Args:
        output_bit: 2 to 32.
        overflow_handling: True shifts each row to the right as far as its sum of squares needs; False never does, and
            raises OverflowError where that is not enough.
        quant_mode: "none" or "symmetric".
        force_dequant: "layernorm" or "nonlinear" makes this layer compute in float.
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self, output_bit: int, overflow_handling: bool = True, quant_mode: str = "none", force_dequant: str = "none"
    ):
        super().__init__()
        self.output_bit, self.overflow_handling = check_width(output_bit, "output_bit"), overflow_handling
        self.quant_mode = effective_quant_mode(quant_mode, force_dequant, "layernorm")
        self.normalized_shape: tuple[int, ...] | None = None
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return f"output_bit={self.output_bit}, quant_mode={self.quant_mode}"

    def set_param(self, layernorm: nn.LayerNorm) -> None:
        """Copy shape, eps, weight and bias, the last two of which may be None."""
        self.normalized_shape, self.eps = tuple(layernorm.normalized_shape), layernorm.eps
        self.weight = None if layernorm.weight is None else copy_parameter(layernorm.weight)
        self.bias = None if layernorm.bias is None else copy_parameter(layernorm.bias)

    def forward(self, x: Tensor, scaling_factor: Tensor | None = None) -> Pair:
        """Normalize ``x`` over its last dimensions, ``normalized_shape``, of C entries.

        Args:
            x: ``(..., *normalized_shape)``, integers times ``scaling_factor``, integers up to 2**51 / C.
            scaling_factor: one number.

        Returns:
            (y, scaling_factor): float32 up to 23 bits, else float64; "none": (y, None).

        Raises:
            OverflowError: an integer past 2**51 / C; without overflow handling, a sum of squares past 2**50.
            RuntimeError: before ``set_param``.
            ValueError: another shape, a missing scaling factor, an ``x`` that is not a multiple of it.
        """
        shape = self.normalized_shape
        if shape is None:
            raise RuntimeError("IntLayerNorm has no shape yet: call set_param(layernorm) first")
        if self.quant_mode == "none":
            return F.layer_norm(x, shape, self.weight, self.bias, self.eps), None
        if tuple(x.shape[-len(shape) :]) != shape:
            raise ValueError(f"IntLayerNorm normalizes the last dimensions {shape}, got an input of {tuple(x.shape)}")
        scale = check_scale(scaling_factor, x, "IntLayerNorm", single=True)
        q = read_integers(x, scale, "IntLayerNorm").flatten(x.ndim - len(shape))  # (..., C)
        weight = q.new_ones(q.shape[-1]) if self.weight is None else self.weight.double().flatten()
        bias = q.new_zeros(q.shape[-1]) if self.bias is None else self.bias.double().flatten()
        constants = layernorm_constants(scale, weight.detach(), bias.detach(), self.eps, self.output_bit)
        normal = self._normalize(q, constants)
        weight = SymmetricQuantFunction.apply(weight, LAYERNORM_WEIGHT_BITS, False, constants.weight_scale).double()
        product = normal * weight + round_ste.apply(bias / constants.product_scale)
        y = fixedpoint_mul.apply(
            product * constants.product_scale,
            constants.product_scale,
            self.output_bit,
            self.quant_mode,
            constants.output_scale,
        )
        y = (y.double() * constants.output_scale).to(carrier_dtype(self.output_bit))
        return y.reshape(x.shape), constants.output_scale

    def _normalize(self, q: Tensor, constants: LayerNormConstants) -> Tensor:
        """Integers of (q - mean) / sqrt(variance + eps) / sqrt(C), at scale 2**-24."""
        size = q.shape[-1]
        check_magnitude(q, FLOAT64_LIMIT // size, "IntLayerNorm (sum over the row)", "quantize the input to fewer bits")
        y = size * q - q.sum(dim=-1, keepdim=True)
        digits = torch.frexp(y.detach().abs().amax(dim=-1, keepdim=True)).exponent.to(torch.int64)
        row_shift = layernorm_shift(digits, constants, self.overflow_handling)
        small = shift_ste(y, -row_shift)
        eps = torch.full_like(y[..., :1], constants.eps_mantissa)
        eps = shift_ste(eps, -(constants.eps_exponent + 2 * row_shift)).detach()
        squares = (small * small).sum(dim=-1, keepdim=True) + eps
        check_magnitude(squares, SQUARES_LIMIT, "IntLayerNorm (the sum of squares)", "set overflow_handling=True")
        lift = root_shift(torch.frexp(squares.detach()).exponent.to(torch.int64))
        root = floor_ste.apply(torch.sqrt(torch.ldexp(squares, 2 * lift).clamp(min=1)))
        normal: Tensor = round_ste.apply(shift_ste(y, LAYERNORM_BITS + lift - row_shift) / root)
        return normal
