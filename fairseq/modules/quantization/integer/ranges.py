"""From a range of real numbers to the scale of a symmetric grid, and real numbers onto that grid.

    real = scale * q,    q an integer in [-n, n],  n = 2**(bits - 1) - 1,  scale = max(abs(real)) / n

The largest magnitude maps to n itself. Rounding is half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.carrier import check_magnitude, check_width, symmetric_limit
from fairseq.modules.quantization.scalar import ops


def symmetric_linear_quantization_params(
    num_bits: int, saturation_min: Tensor | float, saturation_max: Tensor | float, per_channel: bool = False
) -> Tensor:
    """The scale of the symmetric grid over a range: max(abs(min), abs(max)) / (2**(num_bits - 1) - 1).

    Args:
        num_bits: 2 to 32.
        saturation_min, saturation_max: finite, same shape; numbers, or tensors of any floating dtype.
        per_channel: one scale for each element of the range, else one scale that covers all of them.

    Returns:
        The scale, > 0 and finite, of shape (1,), or (C,) with ``per_channel``; float64 for float64 tensors and plain
        numbers, else float32. A range of nothing but 0 gets the scale of [-1, 1]: any scale represents it exactly,
        and this one keeps a bias on the same grid in range.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """
    check_width(num_bits, "num_bits")
    low, high = (_range_end(end) for end in (saturation_min, saturation_max))
    if low.shape != high.shape:
        raise ValueError(f"the two ends of a range must have one shape, got {tuple(low.shape)} and {tuple(high.shape)}")
    largest = torch.maximum(low.abs(), high.abs())
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("a range must be finite, got NaN or Inf")
    if not per_channel:
        largest = largest.amax().reshape(1)
    largest = torch.where(largest > 0, largest, 1)
    return (largest / symmetric_limit(num_bits)).clamp(min=torch.finfo(largest.dtype).tiny)


def _range_end(end: Tensor | float) -> Tensor:
    if not isinstance(end, Tensor):
        return torch.tensor([end], dtype=torch.float64, device="cpu")
    return end.detach().to(ops.compute_dtype(end.dtype)).reshape(-1)


def grid_position(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    """x / scale in float64, not rounded; a scale of several values belongs to the slices along ``axis``."""
    scale = scale.to(torch.float64)
    if scale.numel() == 1:
        return x.to(torch.float64) / scale.reshape([1] * x.ndim)
    if not -x.ndim <= axis < x.ndim or scale.numel() != x.shape[axis]:
        raise ValueError(f"{scale.numel()} scales do not fit axis {axis} of a tensor of shape {tuple(x.shape)}")
    shape = [1] * x.ndim
    shape[axis] = -1
    return x.to(torch.float64) / scale.reshape(shape)


def linear_quantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | float, inplace: bool = False, *, axis: int = 0
) -> Tensor:
    """round(input / scale + zero_point), not clamped, as integer-valued floats of the dtype of ``input``.

    Args:
        input: finite floating tensor of any shape.
        scale: > 0, of shape (1,), or (C,) for the slices along ``axis``.
        zero_point: one integer; 0 for a symmetric grid.
        inplace: write the result into ``input``, else into a new tensor.
        axis: the axis that several scales belong to; 0, the output channel of a weight, unless told.

    Raises:
        OverflowError: a result that the dtype of ``input`` does not hold exactly (past 2**24 in float32).
        ValueError: scales that do not fit the shape.
    """
    q = torch.round(grid_position(input, scale, axis) + zero_point)
    check_magnitude(q, int(2 / torch.finfo(input.dtype).eps), "linear_quantize", "use a wider dtype or a larger scale")
    return input.copy_(q) if inplace else q.to(input.dtype)


def get_percentile_min_max(
    input: Tensor, lower_percentile: float, upper_percentile: float, output_tensor: bool = False
) -> tuple[Tensor, Tensor] | tuple[float, float]:
    """The values below which ``lower_percentile`` and ``upper_percentile`` percent of ``input`` lie, by nearest rank.

    Args:
        input: finite floating tensor of any shape.
        lower_percentile, upper_percentile: 0 <= lower <= upper <= 100; 0 gives the minimum, 100 the maximum.
        output_tensor: return tensors without dimensions, else Python floats.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """
    ops.check_tensor(input, "input")
    if not 0 <= lower_percentile <= upper_percentile <= 100:
        raise ValueError(
            f"percentiles must be from 0 to 100, lower <= upper, got {lower_percentile} and {upper_percentile}"
        )
    values, count = input.detach().flatten(), input.numel()
    low = torch.kthvalue(values, count - max(round(count * (1 - lower_percentile / 100)), 1) + 1).values
    high = torch.kthvalue(values, max(round(count * upper_percentile / 100), 1)).values
    return (low, high) if output_tensor else (low.item(), high.item())
