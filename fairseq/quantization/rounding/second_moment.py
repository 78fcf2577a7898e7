"""The second moment H of a layer's inputs: damped, factorized, and inverted."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

DAMPING = 0.3
"""Added to the diagonal of H, as a share of its mean: some hundred pictures leave H uncertain."""
BLOCK = 256
"""Columns of a triangular matrix that are inverted together."""


def damped(second_moment: Tensor, weight: Tensor, share: float = DAMPING) -> Tensor:
    """H in float64, symmetric, with a ``share`` of its mean added to its diagonal; the identity if all inputs were 0.

    The same for every input channel in the units in which the columns of ``weight``, (out, in), have one norm: so that
    it does not matter how equalization shares a channel's scale between the weight and the input.
    """
    h = (second_moment + second_moment.T).to(torch.float64).mul_(0.5)
    unit = damping(h.diagonal(), weight)
    h.diagonal().add_(share * unit if bool((unit > 0).all()) else 1.0)
    return h


def damping(diagonal: Tensor, weight: Tensor) -> Tensor:
    """What :func:`damped` adds a share of to the diagonal of H: float64 (in,), 0 if that is 0."""
    norms = weight.to(torch.float64).square().mean(0)
    norms = norms.clamp(min=1e-3 * float(norms.mean())) if bool((norms > 0).any()) else torch.ones_like(norms)
    return (diagonal * norms).mean() / norms


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with H^-1 = U^T U, float64 (in, in): the inverse of V, upper triangular, with H = V V^T.

    Holds two such matrices at a time: for the widest layers they are what memory peaks with.
    """
    upper = cholesky(h.flip(0, 1)).flip(0, 1)
    for start in range(0, len(upper), BLOCK):
        here, before = slice(start, start + BLOCK), slice(0, start)
        own = upper[here, here]
        own.copy_(torch.linalg.solve_triangular(own, torch.eye(len(own)).to(own), upper=True))
        upper[before, here] = -(upper[before, before] @ (upper[before, here] @ own))
    return upper


def cholesky(h: Tensor) -> Tensor:
    """The lower triangular L with H = L L^T, float64 (in, in); the damping grows tenfold until H can be factorized."""
    h = h.to(torch.float64)
    lower, failed = torch.linalg.cholesky_ex(h)
    more = DAMPING * float(h.diagonal().abs().mean())
    while failed:
        del lower
        firmer = h.clone()
        firmer.diagonal().add_(more)
        lower, failed = torch.linalg.cholesky_ex(firmer)
        more *= 10
    return cast(Tensor, lower)
