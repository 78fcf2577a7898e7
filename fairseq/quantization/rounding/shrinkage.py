"""shrinkage: how much of a correction to make, found by trying that of one half of the pictures on the other half."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.float_product import float_product
from fairseq.quantization.rounding.second_moment import damping
from fairseq.quantization.rounding.statistics import Shrinkage, Statistics

LEAST_RIDGE, MOST_RIDGE = 4.0**-3, 4.0**5
"""Between which the damping is searched for, as a multiple of the number of inputs over that of the samples."""
OUTPUTS = 256
"""At most so many outputs of a layer, evenly spaced, are looked at."""


def tried_out(weight: Tensor, statistics: Statistics) -> Statistics:
    """``statistics`` with the shrinkage that its halves tell for a weight, (out, in); without them, which are large."""
    if statistics.halves is None:
        return statistics
    return statistics._replace(halves=None, shrinkage=shrinkage_between(weight.detach(), statistics.halves))


def shrinkage_between(weight: Tensor, halves: tuple[Statistics, Statistics]) -> Shrinkage:
    """With which the correction that one half of the pictures asks for takes off most of the other half's error.

    For the change D that one half asks for, E|D x - (y* - y)|^2 over the other one is tr(D H D^T) - 2 tr(D E[(y* - y)
    x^T]^T) and what no change takes off. So the best share of D is known in closed form; the damping is searched for in
    steps of 4, from 1 on, as long as it gets better: first less of it, and more only where less was no better, or where
    1 took off nothing. The layers before were corrected on both halves, so that neither is quite unseen.

    Args:
        weight: (out, in).
        halves: with a drift, or something missing.
    """
    rows = slice(None, None, -(-len(weight) // OUTPUTS))
    wanted = [half.wanted(weight, rows).float() for half in halves]
    units = [damping(half.second_moment.diagonal(), weight).float() for half in halves]

    def gain(ridge: float) -> tuple[float, Shrinkage]:
        """How much is taken off, and with what share."""
        fit = energy = 0.0
        for own, other in ((0, 1), (1, 0)):
            h = halves[own].second_moment.to(torch.float32, copy=True)
            h.diagonal().add_(units[own] * (ridge * len(h) / halves[own].samples))
            lower, failed = torch.linalg.cholesky_ex(h)
            del h
            if failed:
                return 0.0, Shrinkage(ridge, 0.0)
            change = torch.cholesky_solve(wanted[own].T, lower).T
            fit += float((change * wanted[other]).sum())
            energy += float((float_product(halves[other].second_moment.float(), change) * change.T).sum())
        share = min(fit / energy, 1.0) if fit > 0 and energy > 0 else 0.0
        return share * (2 * fit - share * energy), Shrinkage(ridge, share)

    best, found = first = gain(1.0)
    for step in (0.25, 4.0):
        if first[0] > 0 and found.ridge < 1:
            break
        ridge = step
        while LEAST_RIDGE <= ridge <= MOST_RIDGE:
            taken_off, shrinkage = gain(ridge)
            if taken_off > best:
                best, found = taken_off, shrinkage
            elif best > 0:
                break
            ridge *= step
    return found
