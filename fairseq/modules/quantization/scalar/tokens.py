"""Activations to 8 bits with one scale per token, computed on the fly: an image never sees its neighbours' range."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 127
"""Largest integer of an activation; the smallest is its negative, so that no correction for a zero point is needed."""


def token_scale(x: Tensor) -> Tensor:
    """The scale of each token: max(abs(x)) / 127 over the last dimension, at least the smallest normal number.

    Args:
        x: (..., features), float32 or float64.

    Returns:
        (..., 1), in the dtype of ``x``. NaN or Inf in a token makes its scale NaN or Inf, and so all its results.
    """
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    return (largest * (1 / LIMIT)).clamp(min=torch.finfo(x.dtype).tiny)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token to integers from -127 to 127, half to even: x is close to q * scale.

    Args:
        x: (..., features), float32 or float64.

    Returns:
        q, the integers as a tensor of the dtype and shape of ``x``, and scale, (..., 1).
    """
    scale = token_scale(x)
    return (x / scale).round(), scale


class _StraightThrough(torch.autograd.Function):
    """Forward: quantize_tokens and back. Backward: 1, since the scale follows the largest value and nothing is cut."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        q, scale = quantize_tokens(x.to(torch.promote_types(x.dtype, torch.float32)))
        return (q * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """``x`` rounded per token to 8 bits and back, with straight-through gradients; shape and dtype of ``x``."""
    result: Tensor = _StraightThrough.apply(x)
    return result
