"""Statistics of what layers read: second moments, ranges, and the drift from the float model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from fairseq.modules.quantization.scalar.ops import fake_quantize, histogram_range, range_to_qparams
from fairseq.quantization.rounding.quality import sqnr
from fairseq.quantization.rounding.statistics import Statistics

RANGE_VALUES = 2**16
"""Values per batch from which the range of a static activation is taken."""


def collect(
    inputs: Iterable[Tensor],
    weights: list[Tensor],
    names: list[str],
    bits: int | None = None,
    exact: Iterable[Tensor] | None = None,
) -> list[Statistics]:
    """Statistics of one tensor that several layers read, for each of them with its own token weights.

    Args:
        inputs: (tokens, in) for each batch.
        weights: of all tokens, one tensor per layer; an empty one for 1 everywhere.
        names: of the layers, for errors.
        bits: find the range for static activations of this width; None for none.
        exact: the same tensor in the float model, batch by batch, for ``Statistics.drift``.

    Raises:
        ValueError: an input that is not finite.
    """
    moments: list[Tensor] = []
    means: list[Tensor] = []
    values: list[Tensor] = []
    drifts: list[Tensor] = []
    drift_means: list[Tensor] = []
    at, totals, squares = 0, [0.0] * len(names), [0.0] * len(names)
    for batch, wanted in zip(inputs, itertools.repeat(None) if exact is None else exact, strict=False):
        x = batch.float()
        if not torch.isfinite(x).all():
            raise ValueError(f"{names[0]}: its input is not finite on the calibration images")
        if not moments:
            moments = [x.new_zeros(x.shape[1], x.shape[1]) for _ in names]
            means = [x.new_zeros(x.shape[1]) for _ in names]
            if wanted is not None:
                drifts, drift_means = [m.clone() for m in moments], [m.clone() for m in means]
        lost = None if wanted is None else wanted.to(x.device, x.dtype) - x
        for i, every in enumerate(weights):
            w = every[at : at + len(x)].to(x.device) if len(every) else x.new_ones(len(x))
            weighted = x * w.unsqueeze(1)
            moments[i].addmm_(x.T, weighted)
            means[i] += weighted.sum(0)
            if lost is not None:
                drifts[i].addmm_(lost.T, weighted)
                drift_means[i].addmv_(lost.T, w)
            totals[i] += float(w.sum())
            squares[i] += float(w.square().sum())
        at += len(x)
        if bits is not None:
            flat = x.flatten()
            values += [flat[:: max(1, len(flat) // RANGE_VALUES)].clone(), torch.stack(torch.aminmax(flat))]
    span = (0.0, 0.0, 0.0)
    if bits is not None:
        sample = torch.cat(values)
        low, high = histogram_range(sample, bits)
        rounded = fake_quantize(sample, *range_to_qparams(low, high, bits), bits)
        span = float(low), float(high), sqnr(sample, rounded)
    return [
        Statistics(
            moments[i] / total, means[i] / total, *span,
            drifts[i] / total if drifts else None, drift_means[i] / total if drifts else None,
            total**2 / squares[i],
        )
        for i, total in enumerate(totals)
    ]  # fmt: skip
