"""The quantization grid: range -> (scale, zero_point), real -> integer, integer -> real.

    real = scale * (q - zero_point),    q an integer in [0, 2**bits - 1]

``scale`` is a positive float (float32; float64 for float64 tensors) and ``zero_point`` an int32; both have shape (1,)
for a whole tensor or (C,) for one per slice along ``axis``. The range always includes 0, so that 0.0 is exact.
Rounding is half to even. Jacob et al., 2018, https://arxiv.org/abs/1712.05877, equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8

QParams = tuple[Tensor, Tensor]
"""(scale, zero_point)"""


def check_bits(bits: int) -> int:
    """Return ``bits`` if it is an int from 2 to 8; TypeError or ValueError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int from {MIN_BITS} to {MAX_BITS}, got {bits!r} ({type(bits).__name__})")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {bits}")
    return bits


def check_tensor(w: Tensor, name: str = "w") -> Tensor:
    """Return ``w`` if it can be quantized: floating point, with data, not empty, finite.

    Raises:
        TypeError: not a tensor, or not float16, bfloat16, float32 or float64.
        ValueError: on the meta device, empty, or holding NaN or Inf.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(w).__name__}")
    if w.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {w.dtype}")
    if w.is_meta:
        raise ValueError(f"{name} is on the meta device and holds no data; load its weights first")
    if w.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(w.shape)}")
    if not torch.isfinite(torch.stack(w.detach().aminmax())).all():  # NaN is both; one pass, where isfinite takes four
        count = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{name} has {count} NaN or Inf among its {w.numel()} values; it must be finite")
    return w


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and of the arithmetic for tensors of ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def quantized_range(bits: int) -> tuple[int, int]:
    """The smallest and largest integer of an unsigned ``bits`` wide grid: (0, 2**bits - 1)."""
    return 0, 2**bits - 1


def range_to_qparams(low: Tensor, high: Tensor, bits: int) -> QParams:
    """The scale and zero point of the ``bits`` wide grid over [low, high].

    scale = (high - low) / (2**bits - 1), zero_point = round(-low / scale). A range without width (an all-zero
    tensor) or too small for a float gets the smallest normal number as its scale, which keeps 0.0 exact.

    Args:
        low: finite, <= 0, any shape, float32 or float64.
        high: finite, >= 0, same shape.
        bits: 2 to 8.

    Returns:
        scale (dtype of ``low``, > 0, finite) and zero_point (int32, in [0, 2**bits - 1]), both of the shape of ``low``.

    Raises:
        ValueError: low > 0, high < 0, or not finite.
    """
    qmin, qmax = quantized_range(check_bits(bits))
    if not bool(((low <= 0) & (high >= 0) & torch.isfinite(low) & torch.isfinite(high)).all()):
        raise ValueError(f"a range must be finite and include 0 (low <= 0 <= high), got low={low}, high={high}")
    # Divided first: high - low may be past the largest float.
    scale = (high / qmax - low / qmax).clamp(min=torch.finfo(low.dtype).tiny)
    zero_point = (-low / scale).round().clamp(qmin, qmax)
    return scale, zero_point.to(torch.int32)


def symmetric_qparams(low: Tensor, high: Tensor, bits: int) -> QParams:
    """The same with the zero point in the middle, 2**(bits - 1), so that no product needs a correction for it.

    scale is the smallest one that keeps both ends: max(high / (2**(bits-1) - 1), -low / 2**(bits-1)).
    """
    half = 2 ** (check_bits(bits) - 1)
    range_to_qparams(low, high, bits)  # its checks
    scale = torch.maximum(high / (half - 1), -low / half).clamp(min=torch.finfo(low.dtype).tiny)
    return scale, torch.full_like(scale, half, dtype=torch.int32)


def quantize_to_int(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int, axis: int = 0) -> Tensor:
    """Round ``w`` to integers: clamp(round(w / scale) + zero_point, 0, 2**bits - 1).

    Args:
        w: floating tensor of any shape.
        scale, zero_point: shape (1,) for the whole tensor, or (C,) for the slices along ``axis``.
        bits: 2 to 8.
        axis: used when scale holds more than one value.

    Returns:
        uint8 tensor of the shape of ``w``.
    """
    check_bits(bits)
    scale, zero_point = broadcast_qparams(scale, zero_point, w, axis)
    return _round_to_grid(w.to(compute_dtype(w.dtype)), scale, zero_point, bits).to(torch.uint8)


def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Integers back to real numbers: scale * (q - zero_point), as ``dtype``, at most that dtype's largest number.

    Args:
        q: integer tensor of any shape.
        scale, zero_point: shape (1,), or (C,) for the slices along ``axis``.
    """
    scale, zero_point = broadcast_qparams(scale, zero_point, q, axis)
    return _to_real(q.to(scale.dtype), scale, zero_point, dtype)


def fake_quantize(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8, axis: int = 0) -> Tensor:
    """Round ``w`` onto the grid and return it as real numbers again: same shape, dtype and device.

    Equals ``dequantize(quantize_to_int(w, ...), ..., dtype=w.dtype)`` without the integers in between.
    """
    check_bits(bits)
    scale, zero_point = broadcast_qparams(scale, zero_point, w, axis)
    return round_to_real(w.to(compute_dtype(w.dtype)), scale, zero_point, bits, w.dtype)


def representable_range(scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The real numbers at the two ends of the grid, each of the shape of ``scale``."""
    qmin, qmax = quantized_range(bits)
    return scale * (qmin - zero_point), scale * (qmax - zero_point)


def broadcast_qparams(scale: Tensor, zero_point: Tensor, w: Tensor, axis: int) -> QParams:
    """Check the shapes of scale and zero_point and shape them to broadcast against ``w``."""
    if scale.shape != zero_point.shape:
        raise ValueError(f"scale {tuple(scale.shape)} and zero_point {tuple(zero_point.shape)} must have one shape")
    if scale.numel() == 1:
        return scale.reshape([1] * w.ndim), zero_point.reshape([1] * w.ndim)
    if not -w.ndim <= axis < w.ndim or tuple(scale.shape) != (w.shape[axis],):
        raise ValueError(
            f"scale must have shape (1,), or one value per slice along axis {axis} of a tensor of shape "
            f"{tuple(w.shape)}; got {tuple(scale.shape)}"
        )
    shape = [1] * w.ndim
    shape[axis] = -1
    return scale.reshape(shape), zero_point.reshape(shape)


def _round_to_grid(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return (w / scale).round_().add_(zero_point).clamp_(*quantized_range(bits))


def _to_real(q: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    # The end of the grid may lie half a step past the largest number of a float16 tensor.
    return clamp_to((q - zero_point) * scale, dtype).to(dtype)


def clamp_to(real: Tensor, dtype: torch.dtype) -> Tensor:
    """``real``, in place, cut to what ``dtype`` can hold."""
    limit = torch.finfo(dtype).max
    return real.clamp_(-limit, limit) if limit < torch.finfo(real.dtype).max else real


def round_to_real(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """:func:`fake_quantize` unchecked, for a scale and zero point that broadcast against ``w``; as ``dtype``."""
    return _to_real(_round_to_grid(w, scale, zero_point, bits), scale, zero_point, dtype)
