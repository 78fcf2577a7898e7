"""qronos: the drift of the inputs made up for in full, at first by the rest of the weight as it was."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding.gptaq import solved
from fairseq.quantization.rounding.gptq import compensated
from fairseq.quantization.rounding.statistics import Rounded, Statistics

DAMPING = 1e-6
"""Added to the diagonal of H, as a share of its largest eigenvalue."""
STEPS = 30
"""Of the power iteration that finds that eigenvalue."""


def qronos(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """Zhang et al., Qronos (2026, algorithm 1): E|V x - W x*|^2 as little as the pictures allow.

    The first column is rounded where it is best beside the others of ``weight``; these are then moved to where they are
    best beside it, V = (W G - q h) H^-1 with G = E[x* x^T], and rounded as :func:`gptq` does, with its ranges and its
    steps downhill. H is hardly damped and nothing is shrunk, so that it takes many pictures to beat
    :func:`~fairseq.quantization.rounding.gptaq.gptaq` on others.
    """
    assert statistics is not None
    assert statistics.drift is not None
    h = (statistics.second_moment + statistics.second_moment.T).to(torch.float64) / 2
    largest = largest_eigenvalue(h)
    h.diagonal().add_(DAMPING * largest if largest > 0 else 1.0)
    wide = weight.to(h.dtype)
    # W G less what the other columns of W already make of x, over H_jj: the drift alone remains
    first = wide + wide @ statistics.drift.to(h.dtype) / h.diagonal()
    target = (wide + solved(statistics.wanted(weight), h)).to(weight.dtype)
    return compensated(target, h, config, first.to(weight.dtype))


def largest_eigenvalue(h: Tensor) -> float:
    """Of a symmetric matrix without negative eigenvalues, (n, n); 0 for one of zeros."""
    vector = h.sum(1)
    for _ in range(STEPS):
        norm = float(torch.linalg.vector_norm(vector))
        if norm == 0:
            return float(h.diagonal().max())
        vector = h @ (vector / norm)
    return float(torch.linalg.vector_norm(vector))
