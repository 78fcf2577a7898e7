"""How far a student is from its teacher: in its outputs, in the hidden states of its blocks, in its attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq.quantization.architectures.forward import class_dimension


@dataclass(frozen=True)
class Losses:
    """What a student is trained on, as weights of three losses, each a number without unit.

    Attributes:
        outputs: of logits the Kullback-Leibler divergence from the teacher's, at ``temperature`` and multiplied by its
            square (Hinton et al., 2015, https://arxiv.org/abs/1503.02531); of embeddings, hidden states or maps without
            classes the squared error as a share of the teacher's energy.
        features: of what each encoder block gives, the squared error as such a share; the mean over blocks.
        attention: of the scaled products of queries and keys, before biases and positions that rotate, the divergence
            of their softmax from the teacher's, for each head and query; the mean.
        temperature: above 0.

    Raises:
        TypeError, ValueError: a weight that is no number or below 0, no output loss, a temperature not above 0.
    """

    outputs: float = 1.0
    features: float = 1.0
    attention: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("outputs", "features", "attention", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if self.outputs == 0 or self.temperature == 0:
            raise ValueError(
                "outputs and temperature must be above 0: without the outputs nothing trains what comes after the "
                f"blocks; got outputs={self.outputs}, temperature={self.temperature}"
            )


def output_loss(name: str, student: Tensor, teacher: Tensor, temperature: float, pixel_values: Tensor) -> Tensor:
    """Of the outputs called ``name``, of one shape; see :class:`Losses`. A scalar, float32.

    Args:
        pixel_values: what both were called with, which tells maps of classes from others.
    """
    dimension = class_dimension(name, teacher, pixel_values)
    if dimension is None:
        return relative_error(student, teacher)
    return temperature**2 * _divergence(student / temperature, teacher / temperature, dimension)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The mean over blocks of :func:`relative_error`, of hidden states (N, tokens, features) or the like."""
    return torch.stack([relative_error(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], heads: Sequence[int]) -> Tensor:
    """The mean over blocks of the divergence of what queries attend to.

    Args:
        student, teacher: for each block the query and the key, one after the other, (N, tokens, features) each.
        heads: of each block.
    """
    losses = []
    for block, count in enumerate(heads):
        pairs = (side[2 * block : 2 * block + 2] for side in (student, teacher))
        of_student, of_teacher = (_scores(query, key, count) for query, key in pairs)
        losses.append(_divergence(of_student, of_teacher, -1))
    return torch.stack(losses).mean()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared error as a share of the energy of ``teacher``: a scalar, float32."""
    energy = teacher.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return F.mse_loss(student.float(), teacher.float()) / energy


def _scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """(N, tokens, heads * d) each -> (N, heads, tokens, tokens)."""
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (query, key))  # (N, heads, tokens, d)
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def _divergence(student: Tensor, teacher: Tensor, dimension: int) -> Tensor:
    """KL(teacher, student) of two sets of logits, the mean over all but that dimension."""
    s, t = (F.log_softmax(x.float(), dimension) for x in (student, teacher))
    return (t.exp() * (t - s)).sum(dimension).mean()
