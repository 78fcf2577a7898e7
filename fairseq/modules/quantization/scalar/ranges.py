"""The range of a tensor: its minimum and maximum, or the clip with the smallest squared error on a histogram."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.scalar.grid import (
    compute_dtype,
    quantized_range,
    range_to_qparams,
    round_to_real,
    symmetric_qparams,
)

HISTOGRAM_BINS = 2048
ROWS_AT_ONCE = 128  # histograms searched together: their running sums, 6 MB, stay in the cache


def tensor_range(w: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of ``w``, widened to include 0; each of shape (1,), in the compute dtype."""
    low, high = torch.aminmax(w.detach())
    return _include_zero(low.reshape(1), high.reshape(1))


def channel_range(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """The same for each slice along ``axis`` (0: the output channel of a Linear weight); each of shape (C,)."""
    low, high = torch.aminmax(_rows(w.detach(), axis), dim=1)
    return _include_zero(low, high)


def histogram_range(w: Tensor, bits: int, axis: int | None = None, symmetric: bool = False) -> tuple[Tensor, Tensor]:
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
        symmetric: the range is for a symmetric grid; never worse than min-max on such a grid.

    Returns:
        (low, high), low <= 0 <= high, each of shape (1,) or (C,), in the compute dtype.
    """
    w = w.detach()
    rows = w.reshape(1, -1) if axis is None else _rows(w, axis)
    rows = rows.to(compute_dtype(w.dtype))
    low, high = zip(*(_row_clipping(part, bits, w.dtype, symmetric) for part in rows.split(ROWS_AT_ONCE)), strict=True)
    return torch.cat(low), torch.cat(high)


def _include_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(low.dtype)
    return low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0)


def _rows(w: Tensor, axis: int) -> Tensor:
    """``w`` as a matrix with one row per slice along ``axis``."""
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis must be from {-w.ndim} to {w.ndim - 1} for a tensor of shape {tuple(w.shape)}: {axis}")
    return w.movedim(axis, 0).reshape(w.shape[axis], -1)


def _row_clipping(rows: Tensor, bits: int, dtype: torch.dtype, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The better, row by row, of the clip found on the histogram and the full range: low and high, (R,)."""
    full = _include_zero(*torch.aminmax(rows, dim=1))
    clipped = _search_clipping(rows, full, bits)
    errors = (_squared_error(rows, limits, bits, dtype, symmetric) for limits in (clipped, full))
    better = next(errors) < next(errors)
    return torch.where(better, clipped[0], full[0]), torch.where(better, clipped[1], full[1])


def _squared_error(
    rows: Tensor, limits: tuple[Tensor, Tensor], bits: int, dtype: torch.dtype, symmetric: bool
) -> Tensor:
    """The true squared error per row of quantizing with these ranges and rounding the result to ``dtype``: (R,)."""
    to_qparams = symmetric_qparams if symmetric else range_to_qparams
    scale, zero_point = (p.unsqueeze(1) for p in to_qparams(*limits, bits))
    error = round_to_real(rows, scale, zero_point, bits, dtype).to(rows.dtype).sub_(rows)
    # A power of two as unit, the exponent of the largest error, keeps the squares of huge and tiny tensors finite.
    unit = torch.frexp(rows.abs().amax(dim=1, keepdim=True)).exponent
    return torch.ldexp(error, -unit.to(error.dtype)).square_().sum(dim=1, dtype=torch.float64)


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
        # Its dtype is given, here and below: integers and 0.5 make a tensor of the default dtype.
        middle = torch.arange(bins, dtype=rows.dtype, device=rows.device) + 0.5
        centres = self.low.double() + self.width * middle  # (R, bins)
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
        levels = torch.arange(top, dtype=scale.dtype, device=scale.device)
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
