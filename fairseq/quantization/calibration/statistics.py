"""Statistics of what layers read: second moments, ranges, and the drift from the float model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fairseq.modules.quantization.scalar.ops import fake_quantize, histogram_range, range_to_qparams
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.exact_sum import ExactSum, unit_of
from fairseq.quantization.rounding.gptq import Statistics
from fairseq.quantization.rounding.quality import sqnr

BATCH_SIZE = 8
"""Pictures that run through a model together; a share of a process is a whole number of such batches."""
TOGETHER = processes.SHARE // BATCH_SIZE
"""Batches that are summed in float32 before they are added to the others."""
RANGE_VALUES = 2**17
"""Values per batch from which the range of a static activation is taken."""
TILE = 768
"""Rows of a symmetric product that are computed together, from the diagonal on."""


def collect(
    inputs: Iterable[Tensor],
    weights: list[Tensor],
    names: list[str],
    bits: int | None = None,
    exact: Iterable[Tensor] | None = None,
    half: bool = False,
) -> list[Statistics]:
    """Statistics of one tensor that several layers read, for each of them with its own token weights.

    Where several processes work together, each has the inputs of its own pictures, and gets the statistics of all:
    those that one process alone would get, to the last bit, see :class:`ExactSum`.

    Args:
        inputs: (tokens, in) for each batch of :data:`BATCH_SIZE` pictures.
        weights: of all tokens, one tensor per layer; an empty one for 1 everywhere.
        names: of the layers, for errors.
        bits: find the range for static activations of this width; None for none.
        exact: the same tensor in the float model, batch by batch, for ``Statistics.drift``.
        half: multiply in bfloat16 and add in float32.

    Raises:
        ValueError: an input that is not finite.
    """
    sums = [_Sums() for _ in names]
    values: list[Tensor] = []
    finite, started, at = True, False, 0
    pairs = zip(inputs, itertools.repeat(None) if exact is None else exact, strict=False)
    while finite and (group := list(itertools.islice(pairs, TOGETHER))):
        batches = []
        for batch, wanted in group:
            x = batch.float()
            finite = finite and bool(torch.isfinite(x).all())
            lost = None if wanted is None else wanted.to(x.device, x.dtype) - x
            ws = [w[at : at + len(x)].to(x.device) if len(w) else x.new_ones(len(x)) for w in weights]
            batches.append((x, lost, ws))
            at += len(x)
            if bits is not None:
                flat = x.flatten()
                values += [flat[:: max(1, len(flat) // RANGE_VALUES)].clone(), torch.stack(torch.aminmax(flat))]
        if not finite:
            break
        for i, one in enumerate(sums):
            one.multiply([(x, lost, ws[i]) for x, lost, ws in batches], half)
        if not started:
            started = _start(sums, batches[0][0].device)
        for one in sums:
            one.add()
    if not started:
        _start(sums if finite else [], torch.empty(0).device)
    if not all(processes.gathered(finite)):
        raise ValueError(f"{names[0]}: its input is not finite on the calibration images")
    span = (0.0, 0.0, 0.0)
    if bits is not None:
        sample = processes.concatenated(torch.cat(values) if values else None)
        assert sample is not None
        low, high = histogram_range(sample, bits)
        rounded = fake_quantize(sample, *range_to_qparams(low, high, bits), bits)
        span = float(low), float(high), sqnr(sample, rounded)
    return [one.statistics(span) for one in sums]


class _Sums:
    """Sums over the tokens, of one layer: of x x^T, x, and where it is known how the float model's x* differs, of
    (x* - x) x^T and x* - x; each token with its weight.
    """

    def __init__(self) -> None:
        self.group: list[Tensor] = []  # of some batches
        self.sums: list[ExactSum] = []  # of all batches before
        self.weights: list[float] = []
        self.squares: list[float] = []

    def multiply(self, batches: list[tuple[Tensor, Tensor | None, Tensor]], half: bool) -> None:
        """Sum some batches: what is read, (tokens, in); what the float model reads, less that; weights, (tokens,)."""
        x, lost, _ = batches[0]
        size = x.shape[1]
        if not self.group:
            shapes = [(size, size), (size,)] * (1 if lost is None else 2)
            self.group = [x.new_empty(shape) for shape in shapes]
        for part in self.group:
            part.zero_()
        for x, lost, w in batches:
            weighted = x * w.unsqueeze(1)
            self.group[1] += weighted.sum(0)
            self.weights.append(float(w.sum()))
            self.squares.append(float(w.square().sum()))
            if half:
                x, weighted = x.bfloat16(), weighted.bfloat16()
            for start in range(0, size, TILE):
                rows = slice(start, start + TILE)
                _add_product(self.group[0][rows, start:], x[:, rows], weighted[:, start:])
            if lost is not None:
                self.group[3].addmv_(lost.T, w)
                _add_product(self.group[2], lost.bfloat16() if half else lost, weighted)

    def add(self) -> None:
        """Add these batches to all before."""
        for whole, part in zip(self.sums, self.group, strict=True):
            whole.add(part)

    def statistics(self, span: tuple[float, float, float]) -> Statistics:
        """Of all tokens, in all processes; ``span`` is low, high and SQNR of a static range."""
        self.group.clear()
        total, squares = (
            math.fsum(value for part in processes.gathered(values) for value in part)
            for values in (self.weights, self.squares)
        )
        moment, mean, *others = (self.sums.pop(0).result(total) for _ in range(len(self.sums)))
        for start in range(0, len(moment), TILE):  # below the diagonal it is what is above
            rows, rest = slice(start, start + TILE), slice(start + TILE, None)
            moment[rest, rows] = moment[rows, rest].T
        drift, drift_mean = others if others else (None, None)
        return Statistics(moment, mean, *span, drift, drift_mean, total**2 / squares)


def _start(sums: list[_Sums], device: torch.device) -> bool:
    """Begin sums in the units that the first process takes from its first batches; always True."""
    units = [[unit_of(part).cpu() for part in one.group] for one in sums] if processes.rank() == 0 else None
    for one, found in zip(sums, processes.first(units)):
        one.sums = [ExactSum(unit.to(device)) for unit in found]
    return True


def _add_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to a float32 ``result``; in bfloat16 the product of a batch is rounded once."""
    if left.dtype == torch.bfloat16:
        result += left.T @ right
    else:
        result.addmm_(left.T, right)
