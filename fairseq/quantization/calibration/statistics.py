"""Statistics of what layers read: second moments, ranges, and the drift from the float model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fairseq.modules.quantization.scalar.ops import fake_quantize, histogram_range, range_to_qparams
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.exact_sum import ExactSum, unit_of
from fairseq.quantization.rounding.quality import sqnr
from fairseq.quantization.rounding.statistics import Statistics

BATCH_SIZE = 4
"""Pictures that run through a model together; a share of a process is a whole number of such batches."""
TOGETHER = processes.SHARE // BATCH_SIZE
"""Batches that are summed in float32 before they are added to the others."""
RANGE_VALUES = 2**16
"""Values per batch from which the range of a static activation is taken."""
TILE = 384
"""Rows of a symmetric product that are computed together, from the diagonal on."""


def collect(
    inputs: Iterable[Tensor],
    weights: list[Tensor],
    names: list[str],
    bits: int | None = None,
    exact: Iterable[Tensor] | None = None,
    half: bool = False,
    missing: Iterable[Tensor] | None = None,
    halves: bool = False,
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
        missing: instead of ``exact`` what the block that ends with the layer is missing, (tokens, out), batch by batch,
            for ``Statistics.missing``.
        halves: of ``exact`` or ``missing`` also ``Statistics.halves``. Every other two batches are of one half.

    Raises:
        ValueError: an input that is not finite.
    """
    sums = [_Sums(half, halves) for _ in names]
    values: list[Tensor] = []
    finite, started, at, device = True, False, 0, torch.empty(0).device
    nothing: Iterable[None] = itertools.repeat(None)
    group: list[_Batch] = []
    for batch, wanted, less in zip(inputs, exact or nothing, missing or nothing, strict=False):
        x, device = batch.float(), batch.device
        finite = bool(torch.isfinite(x).all())
        if not finite:
            break
        lost = None if wanted is None else wanted.to(x.device, x.dtype) - x
        if less is not None:
            lost = less.to(x.device, x.dtype)
        ws = [w[at : at + len(x)].to(device) if len(w) else x.new_ones(len(x)) for w in weights]
        at += len(x)
        if bits is not None:
            flat = x.flatten()
            values += [flat[:: max(1, len(flat) // RANGE_VALUES)].clone(), torch.stack(torch.aminmax(flat))]
        for one, w in zip(sums, ws, strict=True):
            one.look(x, lost, w)
        group.append(_Batch(x, lost, ws).rounded(half))
        del batch, wanted, less, x, lost  # the next batch needs as much
        if len(group) == TOGETHER:
            started = started or _start(sums, device)
            for i, one in enumerate(sums):
                one.add(group, i)
            group.clear()
    if group and finite:
        started = started or _start(sums, device)
        for i, one in enumerate(sums):
            one.add(group, i)
    if not started:
        _start(sums if finite else [], device)
    if not all(processes.gathered(finite)):
        raise ValueError(f"{names[0]}: its input is not finite on the calibration images")
    span = (0.0, 0.0, 0.0)
    if bits is not None:
        sample = processes.concatenated(torch.cat(values) if values else None)
        assert sample is not None
        low, high = histogram_range(sample, bits)
        rounded = fake_quantize(sample, *range_to_qparams(low, high, bits), bits)
        span = float(low), float(high), sqnr(sample, rounded)
    found = [one.statistics(span) for one in sums]
    if missing is None:
        return found
    return [_of_missing(one) for one in found]


def _of_missing(found: Statistics) -> Statistics:
    """What was summed as a drift is what a block is missing."""
    halves = None if found.halves is None else (_of_missing(found.halves[0]), _of_missing(found.halves[1]))
    missing, mean = found.drift, found.drift_mean
    return found._replace(drift=None, drift_mean=None, missing=missing, missing_mean=mean, halves=halves)


class _Batch(NamedTuple):
    """What some tokens are: read, (tokens, in); what the float model reads, less that, or what is missing, (tokens,
    out); their weights for each layer."""

    x: Tensor
    lost: Tensor | None
    weights: list[Tensor]

    def rounded(self, half: bool) -> _Batch:
        """In bfloat16 if ``half``."""
        if not half:
            return self
        return _Batch(self.x.bfloat16(), None if self.lost is None else self.lost.bfloat16(), self.weights)


class _Sums:
    """Sums over the tokens, of one layer: of x x^T, x, and where it is known how the float model's x* differs, of
    (x* - x) x^T and x* - x; each token with its weight.

    Args:
        half: matrices are multiplied in bfloat16.
        halves: where x* is known, matrices are of each half of the pictures.
    """

    def __init__(self, half: bool, halves: bool):
        self.half, self.halves = half, halves
        self.vectors: list[Tensor] = []  # of the batches since the last add: x, x* - x, and the squares of both
        self.means: list[ExactSum] = []  # of x and x* - x
        self.parts: list[_Part] = []

    def look(self, x: Tensor, lost: Tensor | None, w: Tensor) -> None:
        """Take from a batch what needs no product of matrices."""
        read = [x] if lost is None else [x, lost]
        vectors = [t.T @ w for t in read] + [torch.einsum("ti,ti,t->i", t, t, w) for t in read]
        self.vectors = [a + b for a, b in zip(self.vectors, vectors)] if self.vectors else vectors

    def units(self) -> list[Tensor]:
        """Of x, x* - x and both times x, from the first batches; |sum of a b|^2 <= (sum of a^2) (sum of b^2)."""
        means, squares = self.vectors[: len(self.vectors) // 2], self.vectors[len(self.vectors) // 2 :]
        products = [(square * squares[0].max()).sqrt() for square in squares]
        return [unit_of(x.abs()).cpu() for x in (*means, *products)]

    def start(self, units: list[Tensor]) -> None:
        """Begin in these units."""
        kinds = len(units) // 2
        self.means = [ExactSum(unit) for unit in units[:kinds]]
        self.parts = [_Part(units[kinds:]) for _ in range(kinds if self.halves else 1)]

    def add(self, group: list[_Batch], layer: int) -> None:
        """Add some batches, with the weights that tokens have for this layer."""
        for mean, vector in zip(self.means, self.vectors):
            mean.add(vector)
        self.vectors = []
        size = -(-len(group) // len(self.parts))
        for number, part in enumerate(self.parts):
            if batches := group[number * size : (number + 1) * size]:
                part.add(batches, layer)

    def statistics(self, span: tuple[float, float, float]) -> Statistics:
        """Of all tokens, in all processes; ``span`` is low, high and SQNR of a static range."""
        weights = [part.weights_and_squares() for part in self.parts]
        total, squares = (math.fsum(values) for values in zip(*weights, strict=True))
        halved = len(self.parts) > 1 and all(weight > 0 for weight, _ in weights)
        divisors = [total, *(weight for weight, _ in weights)] if halved else [total]
        means = [mean.result().div_(total).float() for mean in self.means]
        found = [self._matrices(kind, len(mean), len(means[0]), divisors) for kind, mean in enumerate(means)]
        drift, drift_mean = (found[1][0], means[1]) if len(means) > 1 else (None, None)
        halves = None
        if halved:
            one, other = (
                Statistics(moment, means[0], drift=lost, samples=weight**2 / square)
                for moment, lost, (weight, square) in zip(found[0][1:], found[1][1:], weights, strict=True)
            )
            halves = one, other
        return Statistics(found[0][0], means[0], *span, drift, drift_mean, total**2 / squares, halves=halves)

    def _matrices(self, kind: int, rows: int, columns: int, divisors: list[float]) -> list[Tensor]:
        """The sum over all parts, then those of each, over as many of ``divisors`` as there are: float32."""
        device = self.means[0].device
        matrices = [torch.empty(rows, columns, dtype=torch.float32, device=device) for _ in divisors]
        for start in range(0, rows, TILE):
            sums = [part.moments[kind].pop(0).result() for part in self.parts]
            whole = sums[0] if len(sums) == 1 else sums[0] + sums[1]
            for matrix, one, divisor in zip(matrices, [whole, *sums], divisors):
                matrix[start : start + TILE, -one.shape[1] :] = one.div(divisor)
        if kind == 0:
            for matrix in matrices:
                for start in range(0, rows, TILE):
                    here, rest = slice(start, start + TILE), slice(start + TILE, None)
                    matrix[rest, here] = matrix[here, rest].T
        return matrices


class _Part:
    """Of some of the pictures the sums of x x^T and (x* - x) x^T, rows by rows, and of the weights.

    Args:
        units: of both, one for each row.
    """

    def __init__(self, units: list[Tensor]):
        self.moments: list[list[ExactSum]] = []
        self.weights: list[float] = []
        self.squares: list[float] = []
        for kind, unit in enumerate(units):
            widths = (len(units[0]) if kind else len(unit) - at for at in range(0, len(unit), TILE))
            self.moments.append([ExactSum(u[:, None], n) for u, n in zip(unit.split(TILE), widths, strict=True)])

    def add(self, batches: list[_Batch], layer: int) -> None:
        """Add some batches, with the weights that tokens have for this layer."""
        weights = [batch.weights[layer] for batch in batches]
        self.weights += [float(w.sum()) for w in weights]
        self.squares += [float(w.square().sum()) for w in weights]
        weighted = [b.x * w.unsqueeze(1).to(b.x.dtype) for b, w in zip(batches, weights, strict=True)]
        for kind, tiles in enumerate(self.moments):
            left = [batch.x if kind == 0 else cast(Tensor, batch.lost) for batch in batches]
            for number, tile in enumerate(tiles):
                rows = slice(number * TILE, (number + 1) * TILE)
                after = slice(None) if kind else slice(number * TILE, None)  # below the diagonal x x^T is as above
                tile.add(_product([(a[:, rows], b[:, after]) for a, b in zip(left, weighted, strict=True)]))

    def weights_and_squares(self) -> tuple[float, float]:
        """The sums of the weights, and of their squares, over all processes."""
        one, other = (
            math.fsum(value for part in processes.gathered(values) for value in part)
            for values in (self.weights, self.squares)
        )
        return one, other


def _start(sums: list[_Sums], device: torch.device) -> bool:
    """Begin sums in the units that the first process takes from its first batches; always True."""
    units = [one.units() for one in sums] if processes.rank() == 0 else None
    for one, found in zip(sums, processes.first(units)):
        one.start([unit.to(device) for unit in found])
    return True


def _product(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of left^T right, float32; of bfloat16 each product is rounded once."""
    left, right = pairs[0]
    result = left.new_zeros(left.shape[1], right.shape[1], dtype=torch.float32)
    for left, right in pairs:
        if left.dtype == torch.float32:
            result.addmm_(left.T, right)
        else:
            result += left.T @ right
    return result
