"""Fake quantization with a straight-through gradient, also to a learned scale, and Quant-Noise on top of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.scalar import ops


class _StraightThrough(torch.autograd.Function):
    """Forward: ops.fake_quantize. Backward: 1 where the input is inside the representable range, 0 outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int) -> Tensor:
        low, high = ops.representable_range(*ops.broadcast_qparams(scale, zero_point, x, axis), bits)
        ctx.save_for_backward((x >= low) & (x <= high))
        return ops.fake_quantize(x, scale, zero_point, bits, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None, None, None


class _LearnedScale(torch.autograd.Function):
    """The same, with the gradient of the scale; see :func:`fake_quantize_ste`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int, sharing: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bits, ctx.axis, ctx.sharing = bits, axis, sharing
        return ops.fake_quantize(x, scale, zero_point, bits, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        step, zero = ops.broadcast_qparams(scale, zero_point, x, ctx.axis)
        low, high = ops.representable_range(step, zero, ctx.bits)
        inside = (x >= low) & (x <= high)
        steps = x.to(step.dtype) / step
        qmin, qmax = ops.quantized_range(ctx.bits)
        slope = torch.where(inside, steps.round() - steps, torch.where(x < low, qmin - zero, qmax - zero))
        gradient = (grad_outputs[0].to(step.dtype) * slope).sum_to_size(step.shape).reshape(scale.shape)
        return grad_outputs[0] * inside, gradient * scale_gradient_factor(ctx.sharing, ctx.bits), None, None, None, None


def scale_gradient_factor(sharing: int, bits: int) -> float:
    """1 / sqrt(sharing * (2**(bits - 1) - 1)): what the gradient of a scale is multiplied by, so that it moves as a
    share of itself about as much as the weights do. Esser et al., 2020, section 2.2."""
    return float((max(sharing, 1) * (2 ** (bits - 1) - 1)) ** -0.5)


def fake_quantize_ste(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int = 0, sharing: int | None = None
) -> Tensor:
    """:func:`ops.fake_quantize <fairseq.modules.quantization.scalar.ops.fake_quantize>` that lets gradients through.

    The gradient is that of clamp(x, low, high), low and high being the ends of the grid: the piecewise-linear
    function that the staircase follows. Bengio et al., 2013, https://arxiv.org/abs/1308.3432.

    A scale that requires a gradient gets that of learned step size quantization (LSQ): with v = x / scale it is
    round(v) - v inside the grid and the integer at its end, less the zero point, outside; summed, and multiplied by
    :func:`scale_gradient_factor`. Esser et al., 2020, https://arxiv.org/abs/1902.08153, equations 3 and 5.

    Args:
        x: any shape, floating.
        scale, zero_point, bits, axis: as for ``ops.fake_quantize``.
        sharing: how many elements share a scale, for that factor; None for all of ``x`` by the number of scales.
    """
    if torch.is_grad_enabled() and scale.requires_grad:
        count = x.numel() // scale.numel() if sharing is None else sharing
        learned: Tensor = _LearnedScale.apply(x, scale, zero_point, bits, axis, count)
        return learned
    if not (torch.is_grad_enabled() and x.requires_grad):
        return ops.fake_quantize(x, scale, zero_point, bits, axis)
    result: Tensor = _StraightThrough.apply(x, scale, zero_point, bits, axis)
    return result


def quant_noise(x: Tensor, quantized: Tensor, p: float) -> Tensor:
    """Each element of ``quantized`` with probability ``p``, otherwise that of ``x``: same shape, gradients of both.

    Fan et al., 2021, Training with Quantization Noise, https://arxiv.org/abs/2004.07320.
    """
    if p >= 1:
        return quantized
    if p <= 0:
        return x
    return torch.where(torch.rand(x.shape, dtype=torch.float32, device=x.device) < p, quantized, x)


def check_noise(p: float, update_step: int) -> None:
    """ValueError unless ``p`` is a probability and ``update_step`` a positive int."""
    if not 0 <= p <= 1:
        raise ValueError(f"p is the probability that an element is quantized in training, from 0 to 1; got {p}")
    if isinstance(update_step, bool) or not isinstance(update_step, int) or update_step < 1:
        raise ValueError(f"update_step is a number of training forwards, an int of at least 1; got {update_step!r}")
