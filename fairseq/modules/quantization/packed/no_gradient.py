"""NoGradient: what an autograd graph sees of packed integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NoGradient(torch.autograd.Function):
    """Runs a layer, or a block of them; the backward pass is an error that says what to do instead."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: Any) -> Tensor:
        ctx.layer_name = layer.name
        result: Tensor = layer._run(input)
        return result.clone() if result._is_view() else result  # views cannot be added to in place, as timm's BEiT does

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.layer_name} holds packed integers and has no gradient; to train or to differentiate, quantize with "
            "ViTQuantizer(..., execution='emulated')"
        )
