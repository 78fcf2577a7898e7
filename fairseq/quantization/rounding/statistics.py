"""Statistics of what a layer reads and gives, Sample, OutputMoment and Shrinkage, and Rounded, what a weight became."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shrinkage(NamedTuple):
    """How a correction of a weight is damped, and how much of it is taken.

    Attributes:
        ridge: of the damping, a multiple of the number of inputs over that of the samples that the correction is from.
        share: from 0 to 1.
    """

    ridge: float
    share: float


class Sample(NamedTuple):
    """Some of the tokens that a layer reads.

    Attributes:
        tokens: (tokens, in), float32.
        weights: (tokens,), float32: how much each counts, its own weight and that of those that it stands for.
    """

    tokens: Tensor
    weights: Tensor


class OutputMoment(NamedTuple):
    """E[g g^T] but for a factor, g the gradient of a random projection of the model's output at a layer's outputs.

    By as much as (g . e)^2 on average, and that factor, an error e of the outputs changes the model's output, squared.

    Attributes:
        blocks: along the diagonal, (n, n) each, float32; outputs of different blocks count as uncorrelated.
        samples: how many tokens of equal weight tell as much.
    """

    blocks: tuple[Tensor, ...]
    samples: float

    def rescaled(self, factor: Tensor) -> OutputMoment:
        """Of a layer whose outputs are now ``factor``, (out,), times as large, and count as much in all."""
        sizes = [len(block) for block in self.blocks]
        pairs = zip(self.blocks, factor.to(self.blocks[0]).split(sizes), strict=True)
        return self._replace(blocks=tuple(block / f[:, None] / f for block, f in pairs))


class Statistics(NamedTuple):
    """What a layer's inputs x were on the calibration images, each token with its weight.

    Attributes:
        second_moment: E[x x^T], float32 or float64 (in, in).
        mean: E[x], (in,).
        low, high: the range for one static grid over all x.
        static_sqnr: the signal over the error of x on that grid, in dB.
        drift: E[(x* - x) x^T], (in, in), x* what the layer reads in the float model; None where that is not known.
        drift_mean: E[x* - x], (in,), likewise.
        missing: E[(y* - y) x^T], (out, in), y* what the float model's block gives and y what this one gives with the
            layer in float; of the layer whose output a block adds last, and then in the place of the drift.
        missing_mean: E[y* - y], (out,), likewise.
        samples: how many tokens of equal weight tell as much: (sum of the weights)^2 / (sum of their squares).
        halves: second moment, drift or what is missing, and samples of either half of the pictures, to try out a
            correction on; None where that is not wanted, or there are too few.
        shrinkage: what came of that; None for constants.
        outputs: which errors of the layer's outputs matter; None where that is not known, or not wanted.
    """

    second_moment: Tensor
    mean: Tensor
    low: float = 0.0
    high: float = 0.0
    static_sqnr: float = 0.0
    drift: Tensor | None = None
    drift_mean: Tensor | None = None
    samples: float = 1.0
    missing: Tensor | None = None
    missing_mean: Tensor | None = None
    halves: tuple[Statistics, Statistics] | None = None
    shrinkage: Shrinkage | None = None
    outputs: OutputMoment | None = None

    @property
    def target_moved(self) -> bool:
        """Whether it is known how the layer should give something else than it does."""
        return self.drift is not None or self.missing is not None

    def wanted(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """E[(y* - y) x^T] of some outputs of ``weight``, (out, in): y what the layer gives, or the block it ends."""
        if self.missing is not None:
            return self.missing[rows]
        assert self.drift is not None
        wide = torch.promote_types(weight.dtype, self.drift.dtype)
        return weight[rows].to(wide) @ self.drift.to(wide)


class Rounded(NamedTuple):
    """real = scale * (integers - zero_point); the shapes of ``weights.observe_weight`` and ``weight_to_int``."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
