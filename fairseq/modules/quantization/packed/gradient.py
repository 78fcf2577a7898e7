"""StraightThrough: the gradient of a packed layer, from its output to its input, and its other transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class StraightThrough(torch.autograd.Function):
    """Runs a packed layer; backwards its rounding counts as the identity, and its weight is the rounded one.

    So what comes before a packed layer can be trained, its integers cannot. The gradient is that of the emulated layer:
    with a static range 0 where the input saturates. (Bengio et al., Estimating or propagating gradients through
    stochastic neurons, 2013.) That is linear, so that it may be differentiated again, and forwards; under
    ``torch.func.vmap`` the layer runs once, on all tokens.
    """

    @staticmethod
    def forward(input: Tensor, layer: Any) -> Tensor:
        result: Tensor = layer._run(input)
        return result.clone() if result._is_view() else result  # views cannot be added to in place, as timm's BEiT does

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        input, ctx.layer = inputs
        kept = [input] if ctx.layer.config.activations == "static" else []
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        result, saved = gradient @ _weight(ctx, gradient), ctx.saved_tensors  # which a checkpoint gives once
        return (result * inside_grid(ctx.layer, *saved) if saved else result), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        saved = ctx.saved_tensors
        tangent = tangent * inside_grid(ctx.layer, *saved) if saved else tangent
        return tangent @ _weight(ctx, tangent).T

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], input: Tensor, layer: Any) -> tuple[Tensor, int]:
        return StraightThrough.apply(input.movedim(in_dims[0], 0), layer), 0


def transformed(input: Tensor) -> bool:
    """Whether torch.func, or differentiation forwards, follows what is done to a layer's input."""
    if forward_ad.unpack_dual(input).tangent is not None:
        return True
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Functionalize for level in levels)


def _weight(ctx: Any, like: Tensor) -> Tensor:
    """(out, in), input factor included."""
    return ctx.layer.dequantize().to(like.dtype)


def inside_grid(layer: Any, input: Tensor) -> Tensor:
    """Which inputs of a layer with a static range do not saturate."""
    factor = layer.input_factor
    return layer.input_grid.contains(input if factor is None else input * factor)
