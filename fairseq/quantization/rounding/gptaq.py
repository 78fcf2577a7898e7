"""gptaq: the weight that makes up for what rounding the layers before did to the inputs, rounded from both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding.gptq import compensated
from fairseq.quantization.rounding.second_moment import cholesky, damped
from fairseq.quantization.rounding.statistics import Rounded, Shrinkage, Statistics
from fairseq.quantization.rounding.two_sided import two_sided

CORRECTION = 0.7
"""How much of the drift of the inputs is made up for, where it was not tried out."""
BLOCK_CORRECTION = 0.5
"""How much of what a block is missing, likewise."""


def gptaq(weight: Tensor, statistics: Statistics | None, config: LinearConfig) -> Rounded:
    """GPTQ of the weight that makes up for the drift of the inputs, too, and :func:`two_sided` from there.

    See :func:`drift_corrected`.
    """
    assert statistics is not None
    target = drift_corrected(weight, statistics)
    h = damped(statistics.second_moment, target)
    return two_sided(target, h, compensated(target, h, config), config, statistics.outputs)


def drift_corrected(weight: Tensor, statistics: Statistics, correction: float = CORRECTION) -> Tensor:
    """The weight, (out, in), whose product with the inputs x comes near that of ``weight`` with the float model's x*.

    The layers before have changed x. E|V x - W x*|^2 is least for V = W + W E[(x* - x) x^T] H^-1 (the aim of Li et al.,
    GPTAQ, 2025; here in closed form before rounding). What some hundred pictures tell of it holds for others in part:
    how much H is damped, and what share of the correction is taken, says ``statistics.shrinkage``, which was tried out
    (:mod:`~fairseq.quantization.rounding.shrinkage`). Without it H is damped by the number of inputs over that of the
    samples, and ``correction`` is the share.

    The layer whose output a block adds last makes up for all that the block is missing, what came in otherwise than in
    the float model included: V = W + E[(y* - y) x^T] H^-1, shrunk likewise, without trial to
    :data:`BLOCK_CORRECTION`. So nothing runs beside the block, as the linear map of QwT does (Fu et al., Quantization
    without Tears, 2024).
    """
    constant = Shrinkage(1.0, correction if statistics.missing is None else BLOCK_CORRECTION)
    shrinkage = statistics.shrinkage or constant
    h = damped(statistics.second_moment, weight, shrinkage.ridge * weight.shape[1] / statistics.samples)
    change = solved(statistics.wanted(weight), h)
    return (weight.to(h.dtype) + shrinkage.share * change).to(weight.dtype)


def solved(wanted: Tensor, h: Tensor) -> Tensor:
    """``wanted`` H^-1, (out, in), in the dtype of ``h``."""
    return torch.cholesky_solve(wanted.T.to(h.dtype), cholesky(h)).T
