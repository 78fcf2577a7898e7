"""gptaq: GPTQ of the weight that makes up for what rounding the layers before did to the inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding.gptq import gptq
from fairseq.quantization.rounding.second_moment import cholesky, damped
from fairseq.quantization.rounding.statistics import Rounded, Statistics

CORRECTION = 0.7
"""How much of the drift of the inputs is made up for, where the pictures are too few to try it."""
BLOCK_CORRECTION = 0.5
"""How much of what a block is missing, likewise."""
LEAST_RIDGE, MOST_RIDGE = 4.0**-3, 4.0**5
"""Between which the damping is searched for, as a multiple of the number of inputs over that of the samples."""
OUTPUTS = 256
"""Outputs of a layer, evenly spaced, on which they are tried."""


class Shrinkage(NamedTuple):
    """How a correction is damped, a multiple of inputs over samples, and how much of it is taken, 0 to 1."""

    ridge: float
    share: float


def gptaq(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """:func:`gptq` of the weight that makes up for the drift of the inputs, too: see :func:`drift_corrected`."""
    assert statistics is not None
    return gptq(drift_corrected(weight, statistics), statistics, config)


def drift_corrected(weight: Tensor, statistics: Statistics, correction: float = CORRECTION) -> Tensor:
    """The weight, (out, in), whose product with the inputs x comes near that of ``weight`` with the float model's x*.

    The layers before have changed x. E|V x - W x*|^2 is least for V = W + W E[(x* - x) x^T] H^-1 (the aim of Li et al.,
    GPTAQ, 2025; here in closed form before rounding). What some hundred pictures tell of it holds for others in part:
    how much H is damped, and what share of the correction is taken, is what serves either half of the pictures best
    when the other half has made the correction. Without halves H is damped by the number of inputs over that of the
    samples, and ``correction`` is the share.

    The layer whose output a block adds last makes up for all that the block is missing, what came in otherwise than in
    the float model included: V = W + E[(y* - y) x^T] H^-1, shrunk likewise, without halves to
    :data:`BLOCK_CORRECTION`. So nothing runs beside the block, as the linear map of QwT does (Fu et al., Quantization
    without Tears, 2024).
    """
    shrinkage = Shrinkage(1.0, correction if statistics.missing is None else BLOCK_CORRECTION)
    if statistics.halves is not None:
        shrinkage = shrinkage_between(weight, statistics.halves)
    h = damped(statistics.second_moment, weight, shrinkage.ridge * weight.shape[1] / statistics.samples)
    change = _solved(_wanted(weight, statistics), h)
    return (weight.to(h.dtype) + shrinkage.share * change).to(weight.dtype)


def shrinkage_between(weight: Tensor, halves: tuple[Statistics, Statistics]) -> Shrinkage:
    """With which the correction that one half of the pictures gives takes off most of the other half's error.

    For the change D that one half gives, E|D x - (y* - y)|^2 over the other one is tr(D H D^T) - 2 tr(D E[(y* - y)
    x^T]^T) and what no change takes off, so that the best share of D is known in closed form; the damping is searched
    for, from 1 on, as long as it gets better.

    Args:
        weight: (out, in).
        halves: with a drift, or something missing.
    """
    rows = slice(None, None, -(-len(weight) // OUTPUTS))
    wanted = [_wanted(weight, half, rows).float() for half in halves]

    def gain(ridge: float) -> tuple[float, Shrinkage]:
        """How much is taken off, and with what share."""
        fit = energy = 0.0
        for own, other in ((0, 1), (1, 0)):
            half = halves[own]
            h = damped(half.second_moment, weight, ridge * weight.shape[1] / half.samples).float()
            lower, failed = torch.linalg.cholesky_ex(h)
            if failed:
                return 0.0, Shrinkage(ridge, 0.0)
            change = torch.cholesky_solve(wanted[own].T, lower).T
            fit += float((change * wanted[other]).sum())
            energy += float(((change @ halves[other].second_moment.float()) * change).sum())
        share = min(fit / energy, 1.0) if fit > 0 and energy > 0 else 0.0
        return share * (2 * fit - share * energy), Shrinkage(ridge, share)

    best, found = gain(1.0)
    for step in (0.25, 4.0):
        ridge = step
        while LEAST_RIDGE <= ridge <= MOST_RIDGE:
            taken_off, shrinkage = gain(ridge)
            if taken_off > best:
                best, found = taken_off, shrinkage
            elif best > 0:
                break
            ridge *= step
    return found


def drift_change(weight: Tensor, drift: Tensor, h: Tensor) -> Tensor:
    """W E[(x* - x) x^T] H^-1 for the second moment ``h``, damped already: float64 (out, in)."""
    return _solved(_of_drift(weight, drift), h)


def _wanted(weight: Tensor, statistics: Statistics, rows: slice = slice(None)) -> Tensor:
    """E[(y* - y) x^T] of some outputs, (out, in): y what the layer gives, or the block that it ends."""
    if statistics.missing is not None:
        return statistics.missing[rows]
    assert statistics.drift is not None
    return _of_drift(weight[rows], statistics.drift)


def _of_drift(weight: Tensor, drift: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, drift.dtype)
    return weight.to(wide) @ drift.to(wide)


def _solved(wanted: Tensor, h: Tensor) -> Tensor:
    """``wanted`` H^-1, (out, in), in the dtype of ``h``."""
    return torch.cholesky_solve(wanted.T.to(h.dtype), cholesky(h)).T
