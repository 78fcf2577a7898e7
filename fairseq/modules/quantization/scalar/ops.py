"""The quantization equation: a tensor's range, its scale and zero point, its n-bit integers, and back.

    real = scale * (q - zero_point),    q an integer in [0, 2**bits - 1]

``scale`` is a positive float (float32; float64 for float64 tensors) and ``zero_point`` an int32; both have shape (1,)
for a whole tensor or (C,) for one per slice along ``axis``. The range always includes 0, so that 0.0 is exact.
Rounding is half to even. Jacob et al., 2018, https://arxiv.org/abs/1712.05877, equation 1.

The path of a tensor, each step public::

    tensor_range / channel_range / histogram_range     real tensor -> (low, high)
    range_to_qparams                                   (low, high) -> (scale, zero_point)
    quantize_to_int                                    real -> integers
    dequantize                                         integers -> real
    quantize                                           the last two in one
    emulate_int                                        all of them in one
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

METHODS = ("tensor", "channel", "histogram")
MIN_BITS, MAX_BITS = 2, 8
HISTOGRAM_BINS = 2048
ROWS_AT_ONCE = 512  # histograms searched together: their running sums, 6 MB, stay in the cache

QParams = tuple[Tensor, Tensor]
"""(scale, zero_point)"""


def check_bits(bits: int) -> int:
    """Return ``bits`` if it is an int from 2 to 8; TypeError or ValueError otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int from {MIN_BITS} to {MAX_BITS}, got {bits!r} ({type(bits).__name__})")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {bits}")
    return bits


def check_method(method: str) -> str:
    """Return ``method`` if it is one of :data:`METHODS`; ValueError otherwise."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return method


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
    if not torch.isfinite(w).all():
        count = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{name} has {count} NaN or Inf among its {w.numel()} values; it must be finite")
    return w


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and of the arithmetic for tensors of ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def quantized_range(bits: int) -> tuple[int, int]:
    """The smallest and largest integer of an unsigned ``bits`` wide grid: (0, 2**bits - 1)."""
    return 0, 2**bits - 1


# ---------------------------------------------------------------------------------------------- range of a tensor


def tensor_range(w: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of ``w``, widened to include 0; each of shape (1,), in the compute dtype."""
    low, high = torch.aminmax(w.detach())
    return _include_zero(low.reshape(1), high.reshape(1))


def channel_range(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """The same for each slice along ``axis`` (0: the output channel of a Linear weight); each of shape (C,)."""
    low, high = torch.aminmax(_rows(w.detach(), axis), dim=1)
    return _include_zero(low, high)


def histogram_range(w: Tensor, bits: int, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The clipping range with the smallest squared error, for the whole tensor or for each slice along ``axis``.

    The values are counted in :data:`HISTOGRAM_BINS` equal bins over their full range. Candidate ranges, the full one
    among them, are compared by the squared error that the ``bits`` wide grid over them makes on the histogram; the
    winner is then measured against the full range on the values themselves, so that the result is **never worse in
    squared error than min-max**. First both ends are cut at one distance
    from 0, then each end alone is refined, twice.

    Args:
        w: floating tensor of any shape, finite.
        bits: 2 to 8.
        axis: None for one range, else the axis whose slices get a range each.

    Returns:
        (low, high), low <= 0 <= high, each of shape (1,) or (C,), in the compute dtype.
    """
    w = w.detach()
    rows = w.reshape(1, -1) if axis is None else _rows(w, axis)
    rows = rows.to(compute_dtype(w.dtype))
    low, high = zip(*(_row_clipping(part, bits, w.dtype) for part in rows.split(ROWS_AT_ONCE)), strict=True)
    return torch.cat(low), torch.cat(high)


def _include_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(low.dtype)
    return low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0)


def _rows(w: Tensor, axis: int) -> Tensor:
    """``w`` as a matrix with one row per slice along ``axis``."""
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis must be from {-w.ndim} to {w.ndim - 1} for a tensor of shape {tuple(w.shape)}: {axis}")
    return w.movedim(axis, 0).reshape(w.shape[axis], -1)


def _row_clipping(rows: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The better, row by row, of the clip found on the histogram and the full range: low and high, (R,)."""
    full = _include_zero(*torch.aminmax(rows, dim=1))
    clipped = _search_clipping(rows, full, bits)
    better = _squared_error(rows, clipped, bits, dtype) < _squared_error(rows, full, bits, dtype)
    return torch.where(better, clipped[0], full[0]), torch.where(better, clipped[1], full[1])


def _squared_error(rows: Tensor, limits: tuple[Tensor, Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    """The true squared error per row of quantizing with these ranges and rounding the result to ``dtype``: (R,)."""
    scale, zero_point = (p.unsqueeze(1) for p in range_to_qparams(*limits, bits))
    error = _fake_quantize(rows, scale, zero_point, bits, dtype).to(rows.dtype).sub_(rows)
    # A power of two as unit, the exponent of the largest error, keeps the squares of huge and tiny tensors finite.
    unit = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent
    return torch.ldexp(error, -unit).square_().sum(dim=1, dtype=torch.float64)


def _search_clipping(rows: Tensor, full: tuple[Tensor, Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """The best of the candidate ranges on each row's histogram."""
    low, high = full
    moments = _Histogram(rows, low, high)
    candidates = 32
    # Geometric, because a tensor with outliers wants a range far below its maximum: 1, ..., 0.02 of it.
    cut = torch.logspace(0, -1.7, 2 * candidates, dtype=rows.dtype, device=rows.device)
    largest = torch.maximum(-low, high).unsqueeze(-1)
    ends = torch.stack([-low, high]).unsqueeze(-1)  # (2, R, 1), each >= 0
    fraction = torch.where(ends > 0, largest / ends * cut, 1).clamp(
        max=1
    )  # (2, R, K): both ends within +-cut * largest
    best = moments.best(fraction, bits)  # (2, R)
    width = float(cut[0] / cut[1]) ** 1.5
    for _ in range(2):
        around = torch.logspace(-1, 1, candidates, base=width, dtype=rows.dtype, device=rows.device)
        for end in (0, 1):
            fraction = best.unsqueeze(-1).repeat(1, 1, candidates)  # (2, R, K)
            fraction[end] = (fraction[end] * around).clamp(max=1)
            fraction[:, :, 0] = best  # never lose what was found
            best = moments.best(fraction, bits)
        width = width ** (4 / candidates)
    return low * best[0], high * best[1]


class _Histogram:
    """Each row's values, counted; the squared error of any grid over them follows from running sums alone.

    Bin centres c stand for the values. S0, S1 and S2 are the sums of 1, c and c**2 over the bins below an edge.
    """

    def __init__(self, rows: Tensor, low: Tensor, high: Tensor):
        count, bins = len(rows), HISTOGRAM_BINS
        largest = torch.maximum(-low, high)
        unit = torch.where(largest > 0, largest, 1)[:, None]  # so that squares of huge and tiny values stay finite
        self.low, self.high = low[:, None] / unit, high[:, None] / unit  # (R, 1), in [-1, 1]
        self.width = ((self.high - self.low) / bins).clamp(min=torch.finfo(rows.dtype).tiny)
        index = ((rows / unit - self.low) / self.width).to(torch.int64).clamp_(0, bins - 1)
        index += torch.arange(count, device=rows.device).unsqueeze(1) * bins
        counts = torch.bincount(index.flatten(), minlength=count * bins).view(count, bins).to(torch.float64)
        centres = self.low.double() + self.width * (torch.arange(bins, device=rows.device) + 0.5)  # (R, bins)
        self.sums = []  # S0, S1, S2, each (R, bins + 1)
        for _ in range(3):
            self.sums.append(torch.cat([counts.new_zeros(count, 1), counts.cumsum(1)], 1))
            counts *= centres

    def best(self, fraction: Tensor, bits: int) -> Tensor:
        """Of the candidate fractions of (low, high), (2, R, K), each row's pair with the smallest error: (2, R)."""
        low, high, top = self.low * fraction[0], self.high * fraction[1], quantized_range(bits)[1]  # (R, K)
        scale = ((high - low) / top).clamp(min=torch.finfo(low.dtype).tiny)  # as range_to_qparams makes them
        zero_point = (-low / scale).round()
        error = self._level_error(scale, zero_point, top) if bits <= 4 else self._clip_error(scale, zero_point, top)
        chosen = error.argmin(dim=1)  # the first of equals
        return fraction.gather(2, chosen.expand(2, -1).unsqueeze(-1)).squeeze(-1)

    def _level_error(self, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        """Few levels: the exact error, (R, K), less the same constant for all (the sum of squares).

        A level q makes q**2 S0 - 2 q S1 over its bins. Summed by parts, the last level serves everything and each
        edge, half way between two levels, moves what is below it down by one step.
        """
        levels = torch.arange(top, device=scale.device)
        halfway = scale.unsqueeze(-1) * (levels + 0.5 - zero_point.unsqueeze(-1))  # (R, K, L - 1)
        s0, s1 = self._below(halfway, self.sums[:2])
        last = scale * (top - zero_point)
        error = last**2 * self.sums[0][:, -1:] - 2 * last * self.sums[1][:, -1:]
        return error + 2 * scale * (s1 - halfway * s0).sum(-1)

    def _clip_error(self, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        """Many levels: scale**2 / 12 for each value inside, and the exact error of those that are clipped, (R, K)."""
        ends = torch.stack([-zero_point, top - zero_point], -1) * scale.unsqueeze(-1)  # (R, K, 2)
        s0, s1, s2 = self._below(ends, self.sums)
        inside = s0[..., 1] - s0[..., 0]
        total = [s[:, -1:] for s in self.sums]
        below, above = ends[..., 0], ends[..., 1]
        error = s2[..., 0] - 2 * below * s1[..., 0] + below**2 * s0[..., 0]
        error += total[2] - s2[..., 1] - 2 * above * (total[1] - s1[..., 1]) + above**2 * (total[0] - s0[..., 1])
        return error + inside * scale**2 / 12

    def _below(self, value: Tensor, sums: list[Tensor]) -> list[Tensor]:
        """The running ``sums`` below each ``value``, each (R, K, V); rounded to the nearest edge of a bin."""
        edge = ((value - self.low.unsqueeze(-1)) / self.width.unsqueeze(-1)).round_().clamp_(0, HISTOGRAM_BINS)
        edge = edge.to(torch.int64).flatten(1)
        return [s.gather(1, edge).view(value.shape) for s in sums]


# ------------------------------------------------------------------------------------------- the equation itself


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


def quantize(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8, axis: int = 0) -> Tensor:
    """Round ``w`` onto the grid and return it as real numbers again: same shape, dtype and device.

    Equals ``dequantize(quantize_to_int(w, ...), ..., dtype=w.dtype)`` without the integers in between.
    """
    check_bits(bits)
    scale, zero_point = broadcast_qparams(scale, zero_point, w, axis)
    return _fake_quantize(w.to(compute_dtype(w.dtype)), scale, zero_point, bits, w.dtype)


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
    limit = torch.finfo(dtype).max
    return ((q - zero_point) * scale).clamp_(-limit, limit).to(dtype)


def _fake_quantize(w: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return _to_real(_round_to_grid(w, scale, zero_point, bits), scale, zero_point, dtype)


# ------------------------------------------------------------------------------------------ everything in one call


def observe(w: Tensor, bits: int, method: str, axis: int | None = None, name: str = "w") -> QParams:
    """The scale and zero point that ``method`` gives for ``w``.

    Args:
        w: finite floating tensor of any shape, device and memory layout.
        bits: 2 to 8.
        method: "tensor" (min and max of everything), "channel" (of each slice along ``axis``, default 0) or
            "histogram" (the clip with the smallest squared error; of everything, or of each slice along ``axis``).
        axis: None for the method's default. "tensor" takes none.
        name: how errors call the tensor.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """
    check_bits(bits)
    check_method(method)
    check_tensor(w, name)
    if method == "channel":
        if w.ndim == 0:
            raise ValueError(f"{name} has no dimensions, so no channels; use method 'tensor' or 'histogram'")
        return range_to_qparams(*channel_range(w, 0 if axis is None else axis), bits)
    if method == "histogram":
        return range_to_qparams(*histogram_range(w, bits, axis), bits)
    if axis is not None:
        raise ValueError(f"method 'tensor' has one scale for everything and takes no axis, got axis={axis}")
    return range_to_qparams(*tensor_range(w), bits)


def emulate_int(
    w: Tensor,
    bits: int,
    method: str,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    name: str = "w",
) -> tuple[Tensor, Tensor, Tensor]:
    """Round ``w`` to ``bits`` wide integers and back to real numbers.

    Args:
        w: finite tensor, float16, bfloat16, float32 or float64, of any shape, device and memory layout.
        bits: 2 to 8.
        method: "tensor", "channel" or "histogram"; see :func:`observe`.
        scale: reused if given, together with ``zero_point``; otherwise both are observed from ``w``.
        zero_point: integers in [0, 2**bits - 1], the shape of ``scale``.
        axis: the axis with a scale each, for "channel" (default 0) and "histogram" (default: one scale in all).
        name: how errors call the tensor.

    Returns:
        (fake-quantized w of the same shape and dtype, scale, zero_point); scale and zero_point of shape (1,) or (C,).

    Raises:
        TypeError, ValueError: what came and what is accepted.

    Example:
        >>> w = torch.tensor([[-1.0, 0.0, 0.52, 2.0]])
        >>> emulate_int(w, 4, "tensor")
        (tensor([[-1.0000,  0.0000,  0.6000,  2.0000]]), tensor([0.2000]), tensor([5], dtype=torch.int32))
    """
    if (scale is None) != (zero_point is None):
        raise ValueError("scale and zero_point go together: give both or neither")
    if scale is None or zero_point is None:
        scale, zero_point = observe(w, bits, method, axis, name)
    else:
        check_bits(bits)
        check_method(method)
        check_tensor(w, name)
        _check_qparams(scale, zero_point, bits, one=method == "tensor" or (method == "histogram" and axis is None))
    return quantize(w, scale, zero_point, bits, 0 if axis is None else axis), scale, zero_point


def _check_qparams(scale: Tensor, zero_point: Tensor, bits: int, one: bool) -> None:
    if one and scale.numel() != 1:
        raise ValueError(f"this method has one scale for the whole tensor, got scale of shape {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    qmin, qmax = quantized_range(bits)
    if not bool(((zero_point == zero_point.round()) & (zero_point >= qmin) & (zero_point <= qmax)).all()):
        raise ValueError(f"zero_point must hold integers from {qmin} to {qmax} at {bits} bits, got {zero_point}")


Emulation = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""``(w, scale=None, zero_point=None)`` -> (fake-quantized w, scale, zero_point)."""


def _kernel(bits: int, method: str) -> Emulation:
    def emulate(
        w: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return emulate_int(w, bits, method, scale, zero_point)

    emulate.__name__ = emulate.__qualname__ = f"emulate_int{bits}_{method}"
    emulate.__doc__ = f':func:`emulate_int` with ``bits={bits}`` and ``method="{method}"``.'
    return emulate


emulate_int8_tensor = _kernel(8, "tensor")
emulate_int8_channel = _kernel(8, "channel")
emulate_int8_histogram = _kernel(8, "histogram")
emulate_int4_tensor = _kernel(4, "tensor")
emulate_int4_channel = _kernel(4, "channel")
emulate_int4_histogram = _kernel(4, "histogram")
