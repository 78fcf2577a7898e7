"""Whether a native block gives what its layers give: looked at once for each class and configuration, on data."""

from __future__ import annotations

import copy
import math
import threading
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.forward import evaluating
from fairseq.quantization.engine.native_block import NativeBlock
from fairseq.quantization.engine.plan import FusedPlan, attention_function, attention_of, settings_of, unfused_class

PLAIN = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
"""Settings of a module that decide what it computes, and can be compared."""
IMAGES, TOKENS = 2, 33
"""Of the hidden states that the two are compared on."""
HALF = 2.0**-8
"""Relative error of a number rounded to bfloat16, as the native attention rounds its factors."""

_checked: dict[Any, str | None] = {}
_lock = threading.RLock()


def disagreement(block: nn.Module, plan: FusedPlan) -> str | None:
    """How the native block of ``block`` differs from its layers, or None; found out once per class and configuration.

    Args:
        block: of packed layers on the CPU; it stays as it is.
        plan: of the block.
    """
    key = _configuration(block, plan)
    with _lock:
        if key not in _checked:
            with plain_context():
                _checked[key] = _compare(block, plan)
        return _checked[key]


def _configuration(block: nn.Module, plan: FusedPlan) -> Any:
    """What decides whether the two compute the same: the code of all parts, and what they are set to."""
    kinds = [(path, unfused_class(type(part))) for path, part in block.named_modules()]
    code = [(path, kind, kind.forward, kind.__call__) for path, kind in kinds]
    values = [(name, holder[name]) for holder, name in settings_of(block)]
    settings = [(name, value) for name, value in values if isinstance(value, PLAIN)]
    layers = [cast(PackedLinear, block.get_submodule(path)) for path in plan.layers]
    shapes = [(layer.config, layer.sizes(), layer.bias is None, layer.input_factor is None) for layer in layers]
    used = attention_function(attention_of(block))
    return tuple(code), tuple(settings), tuple(shapes), plan.epsilons, plan.heads, plan.scaling, used


def _compare(block: nn.Module, plan: FusedPlan) -> str | None:
    try:
        layers = copy.deepcopy(block)
    except Exception as failure:
        return f"it cannot be copied to be looked at: {type(failure).__name__}: {failure}"
    layers.__class__ = unfused_class(type(layers))
    for part in layers.modules():  # whoever looks in is not to see this
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    width = len(layers.get_submodule(plan.norms[0]).get_parameter("weight"))
    x = torch.randn(IMAGES, TOKENS, width, generator=torch.Generator().manual_seed(0))
    like = layers.get_submodule(plan.norms[0]).get_parameter("weight").dtype
    roundings: list[float] = []
    for path in plan.layers:
        cast(PackedLinear, layers.get_submodule(path)).register_forward_pre_hook(
            lambda layer, args: roundings.append(_rounding_noise(args[0]))
        )
    try:
        with evaluating(layers):
            output = layers(x.to(like))
        expected = (output[0] if isinstance(output, tuple) else output).double() - x
        got = NativeBlock(layers, plan).run(x).double() - x
    except Exception as failure:
        return f"the check of its native block fails with {type(failure).__name__}: {failure}"
    if expected.shape != got.shape or len(roundings) != len(plan.layers):
        return f"its layers give {tuple(expected.shape)} in {len(roundings)} calls, not what a native block gives"
    least = torch.finfo(like).eps * torch.linalg.vector_norm(x)  # of a block that adds nothing
    error = float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected).clamp(min=least))
    bound = 2 * (math.hypot(*roundings) + 2 * HALF + 4 * torch.finfo(like).eps)
    if not error <= bound:
        return (
            f"its native block differs from its layers by {error:.1%} of what the block adds; {bound:.1%} is rounding"
        )
    return None


def _rounding_noise(x: Tensor) -> float:
    """By how much, in relation to its size, an input differs from itself rounded to 8 bits with other rounding errors.

    Each is uniform within a step, of variance step^2 / 12, and two of them are independent; a step is the largest
    magnitude of a token over 127.
    """
    x = x.double().flatten(0, -2)
    step = x.abs().amax(-1) / 127
    return float((step.square().mean() / 6).sqrt() / x.square().mean().sqrt().clamp(min=1e-30))
