"""StraightThrough: the gradient of a packed layer, from its output to its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """Runs a packed layer; backwards its rounding counts as the identity, and its weight is the rounded one.

    So what comes before a packed layer can be trained, its integers cannot. The gradient is that of the emulated layer:
    with a static range 0 where the input saturates. (Bengio et al., Estimating or propagating gradients through
    stochastic neurons, 2013.)
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*([input] if layer.config.activations == "static" else []))
        result: Tensor = layer._run(input)
        return result.clone() if result._is_view() else result  # views cannot be added to in place, as timm's BEiT does

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight = ctx.layer.dequantize().to(gradient.dtype)  # (out, in), input factor included
        result = gradient @ weight
        if ctx.saved_tensors:
            (input,) = ctx.saved_tensors
            factor = ctx.layer.input_factor
            result = result * ctx.layer.input_grid.contains(input if factor is None else input * factor)
        return result, None
