"""How well integers keep a weight, in decibels, and how hard it was to keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr(signal: Tensor, got: Tensor) -> float:
    """Signal to quantization noise ratio in dB, 10 log10(sum(signal^2) / sum((signal - got)^2)); inf if equal."""
    dtype = torch.promote_types(torch.promote_types(signal.dtype, got.dtype), torch.float32)
    error = signal.to(dtype) - got.to(dtype)
    return decibels(_energy(signal.to(dtype)), _energy(error))


def decibels(signal: float, error: float) -> float:
    """The ratio of two energies in dB: inf without error, -inf for error without signal."""
    if error <= 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(error)) if signal > 0 else -math.inf


def weight_statistics(weight: Tensor, real: Tensor, per_tensor: bool = False) -> dict[str, float]:
    """How well a weight is kept, and how hard it was to keep.

    Args:
        weight: in float, (out, in).
        real: what its integers stand for, (out, in).
        per_tensor: the rows share one range.

    Returns:
        weight_sqnr: see :func:`sqnr`.
        clip: the range of ``real``, zero included, as a share of the range of ``weight``; at most 1.0, nothing clipped.
            The median over the rows, or of the whole tensor if ``per_tensor``.
        outlier_ratio: the largest magnitude in ``weight`` over its standard deviation; 0 if all is zero.
    """
    weight, real = weight.detach(), real.detach()
    full, represented = (_ranges(tensor.flatten()[None] if per_tensor else tensor) for tensor in (weight, real))
    ratio = torch.where(full > 0, represented / full, 1.0)  # (out,) or (1,)
    largest, deviation = float(weight.abs().max()), float(weight.double().std(correction=0))
    return {
        "weight_sqnr": sqnr(weight, real),
        "clip": min(1.0, float(ratio.quantile(0.5))),
        "outlier_ratio": largest / deviation if deviation else math.inf if largest else 0.0,
    }


def _energy(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _ranges(rows: Tensor) -> Tensor:
    """Each row's range, zero included: (rows, n) -> (rows,) in float64."""
    low, high = rows.aminmax(dim=1)
    return high.double().clamp(min=0) - low.double().clamp(max=0)
