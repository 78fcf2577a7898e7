"""Rounding with a straight-through gradient: that of the piecewise-linear function which the staircase follows.

Bengio et al., 2013, https://arxiv.org/abs/1308.3432. Where a grid ends, the function is flat and the gradient 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fairseq.modules.quantization.integer.arithmetic import batch_frexp, scale_integers
from fairseq.modules.quantization.integer.carrier import (
    carrier_dtype,
    check_magnitude,
    check_scale,
    check_width,
    recoverable_limit,
    symmetric_limit,
)
from fairseq.modules.quantization.integer.ranges import grid_position


class floor_ste(Function):
    """``floor_ste.apply(x)``: floor(x), with gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """As the class says."""
        return torch.floor(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """The gradient that the class describes."""
        return grad_outputs[0]


class round_ste(Function):
    """``round_ste.apply(x)``: round(x), half to even, with gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """As the class says."""
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """The gradient that the class describes."""
        return grad_outputs[0]


class SymmetricQuantFunction(Function):
    """``SymmetricQuantFunction.apply(x, k, percentile_mode, scale, axis=0)``: clamp(round(x / scale), -n, n).

    n = 2**(k - 1) - 1. The gradient is that of clamp(x / scale, -n, n): 1 / scale inside, 0 outside.

    Args:
        x: finite floating tensor of any shape.
        k: the width, 2 to 32 bits.
        percentile_mode: False. Percentiles choose a range, and with it the scale, before this is called.
        scale: > 0, of shape (1,), or (C,) for the slices along ``axis``; see symmetric_linear_quantization_params.
        axis: the axis of several scales: 0 for a weight (output channel), -1 for an activation.

    Returns:
        Integer-valued float32 (k <= 23) or float64 of the shape of ``x``.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, percentile_mode: bool, scale: Tensor, axis: int = 0) -> Tensor:
        """As the class says."""
        if percentile_mode:
            raise ValueError(
                "percentile_mode must be False: take the range from get_percentile_min_max, and the scale from "
                "symmetric_linear_quantization_params"
            )
        n = symmetric_limit(check_width(k, "k"))
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"scale must be positive and finite, got {scale}")
        q = torch.round(grid_position(x, scale, axis))
        ctx.save_for_backward(q.abs() <= n, scale)
        ctx.axis = axis
        return q.clamp(-n, n).to(carrier_dtype(k))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """The gradient that the class describes."""
        inside, scale = ctx.saved_tensors
        return grid_position(grad_outputs[0] * inside, scale, ctx.axis), None, None, None, None


class fixedpoint_mul(Function):
    """Requantization: integers of one scale, and optionally those of a second tensor to be added, at a new scale.

    ``fixedpoint_mul.apply(pre_act, pre_act_scaling_factor, bit_num, quant_mode, z_scaling_factor, identity=None,
    identity_scaling_factor=None)``. With q = pre_act / pre_act_scaling_factor and m / 2**e the dyadic number of 31 bits
    nearest to pre_act_scaling_factor / z_scaling_factor, it computes round(q * m / 2**e), half to even, in int64; adds
    the same of identity; and clamps to +-(2**(bit_num - 1) - 1). I-BERT, section 3.2.

    The gradient is that of clamp((pre_act + identity) / z_scaling_factor, -n, n).

    Args:
        pre_act, identity: x of an (x, scaling_factor) pair, same shape; see
            :mod:`~fairseq.modules.quantization.integer.carrier`.
        bit_num: 2 to 32.
        quant_mode: "symmetric".
        pre_act_scaling_factor, z_scaling_factor, identity_scaling_factor: one number, or one for each entry of the
            last dimension.

    Returns:
        Integer-valued float32 (bit_num <= 23) or float64.

    Raises:
        OverflowError: an input integer that its carrier does not hold exactly.
        ValueError: an input that is not a multiple of its scale, or a quant_mode other than "symmetric".
    """

    @staticmethod
    def forward(
        ctx: Any,
        pre_act: Tensor,
        pre_act_scaling_factor: Tensor,
        bit_num: int,
        quant_mode: str,
        z_scaling_factor: Tensor,
        identity: Tensor | None = None,
        identity_scaling_factor: Tensor | None = None,
    ) -> Tensor:
        """As the class says."""
        if quant_mode != "symmetric":
            raise ValueError(f"fixedpoint_mul: quant_mode must be 'symmetric', got {quant_mode!r}")
        if (identity is None) != (identity_scaling_factor is None):
            raise ValueError("identity and identity_scaling_factor go together: give both or neither")
        n = symmetric_limit(check_width(bit_num, "bit_num"))
        z_scale = check_scale(z_scaling_factor, pre_act, "fixedpoint_mul")
        z = _rescale(pre_act, pre_act_scaling_factor, z_scale)
        if identity is not None:
            z = z + _rescale(identity, identity_scaling_factor, z_scale)
        ctx.save_for_backward(z.abs() <= n, z_scale)
        ctx.adds = identity is not None
        return z.clamp(-n, n).to(carrier_dtype(bit_num))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """The gradient that the class describes."""
        inside, z_scale = ctx.saved_tensors
        grad = grad_outputs[0] * inside / z_scale
        return grad, None, None, None, None, grad if ctx.adds else None, None


def _rescale(x: Tensor, scale: Tensor | None, z_scale: Tensor) -> Tensor:
    scale = check_scale(scale, x, "fixedpoint_mul")
    q = read_integers(x, scale, "fixedpoint_mul").to(torch.int64)
    return scale_integers(q, *batch_frexp(scale / z_scale))


def read_integers(x: Tensor, scale: Tensor, name: str) -> Tensor:
    """The integers q of x = q * scale, as float64: round(x / scale), with gradient 1 / scale.

    Args:
        x: floating tensor.
        scale: float64, (1,) or (C,) for the last dimension; checked by the caller.
        name: the layer, for the message.

    Raises:
        OverflowError: an integer past what the dtype of ``x`` gives back exactly.
        ValueError: NaN or Inf, or an x that is not a multiple of ``scale``.
    """
    position = x.to(torch.float64) / scale
    q: Tensor = round_ste.apply(position)
    if not bool(torch.isfinite(q.detach()).all()):
        raise ValueError(f"{name}: the input holds NaN or Inf; it must be finite")
    advice = f"{x.dtype} carries no larger integer; quantize to fewer bits, or pass float64 outputs on uncast"
    check_magnitude(q, recoverable_limit(x.dtype), name, advice)
    off = (position - q).detach().abs() - 4 * torch.finfo(x.dtype).eps * q.detach().abs()
    if off.numel() and bool((off > 1e-3).any()):
        raise ValueError(
            f"{name}: the input is not a multiple of its scaling factor (off by {float(off.max()):.3f} steps); "
            "pass the factor that came with it, or put a QuantAct in front"
        )
    return q
