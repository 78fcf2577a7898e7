"""Whether a native block gives what its layers give: looked at once for each class and configuration, on data."""

from __future__ import annotations

import copy
import math
import threading
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import native_calls
from fairseq.quantization.architectures.blocks import class_of
from fairseq.quantization.architectures.forward import evaluating
from fairseq.quantization.engine import reference_block
from fairseq.quantization.engine.plan import FusedPlan, attention_function, settings_of, unfused_class
from fairseq.quantization.engine.reading import attention_of
from fairseq.quantization.engine.runners import runner_of
from fairseq.quantization.engine.samples import sample

PLAIN = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
"""Settings of a module that decide what it computes, and can be compared."""
HALF = 2.0**-8
"""Relative error of a number rounded to bfloat16, as the native attention rounds its factors."""


class Finding(NamedTuple):
    """What the comparison found.

    Attributes:
        reason: why the native block may not run, or None.
        returns: as of ``FusedPlan``; None where there is a reason.
        failed: whether it could not be made, and may succeed the next time.
    """

    reason: str | None
    returns: int | None = None
    failed: bool = False


_checked: dict[Any, Finding] = {}
_lock = threading.RLock()


def compare(block: nn.Module, plan: FusedPlan) -> Finding:
    """How the native block of ``block`` differs from its layers, if it does: found out once for each configuration.

    Args:
        block: of packed layers, all on one device; it stays as it is.
        plan: of the block.

    Raises:
        ValueError: what the environment says of attention is nothing that it can say.
    """
    native_calls.attention_is_exact()
    key = _configuration(block, plan)
    with _lock:
        found = _checked.get(key)
        if found is None:
            with plain_context():
                found = _compare(block, plan)
            if not found.failed:
                _checked[key] = found
        return found


def _configuration(block: nn.Module, plan: FusedPlan) -> Any:
    """What decides whether the two compute the same: the code of all parts, and what they are set to."""
    kinds = [(path, unfused_class(type(part))) for path, part in block.named_modules()]
    code = [(path, kind, kind.forward, kind.__call__) for path, kind in kinds]
    values = [(name, holder[name]) for holder, name in settings_of(block)]
    settings = [(name, value) for name, value in values if isinstance(value, PLAIN)]
    layers = [cast(PackedLinear, block.get_submodule(path)) for path in plan.layers]
    shapes = [(layer.config, layer.sizes(), layer.bias is None, layer.input_factor is None) for layer in layers]
    tensors = [(name, t.shape) for name, t in (*block.named_parameters(), *block.named_buffers())]
    used = attention_function(attention_of(block))
    device = next(block.buffers()).device
    sizes = plan.epsilons, plan.heads, plan.scaling
    return tuple(code), tuple(settings), tuple(shapes), tuple(tensors), sizes, used, device


def _compare(block: nn.Module, plan: FusedPlan) -> Finding:
    try:
        layers = copy.deepcopy(block)
    except Exception as failure:
        return Finding(f"it cannot be copied to be looked at: {type(failure).__name__}: {failure}", failed=True)
    layers.__class__ = unfused_class(type(layers))
    for part in layers.modules():  # whoever looks in is not to see this
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part.__dict__.pop("forward", None)  # such as that by which transformers 4 collects hidden states
    try:
        return _compared(layers, plan)
    except Exception as failure:
        return Finding(f"the check of its native block fails with {type(failure).__name__}: {failure}", failed=True)


def _compared(layers: nn.Module, plan: FusedPlan) -> Finding:
    """The same for a block that may be run and watched."""
    block, known = runner_of(layers, plan), class_of(type(layers))
    assert known is not None
    x, given = sample(block.calls, known.call)
    x, given = x.to(block.device), _on(given, block.device)
    like = next((p.dtype for p in layers.parameters() if p.is_floating_point()), torch.float32)
    roundings: list[float] = []
    hooks = [
        cast(PackedLinear, layers.get_submodule(path)).register_forward_pre_hook(
            lambda layer, args: roundings.append(_rounding_noise(layer, args[0]))
        )
        for path in plan.layers
    ]
    with evaluating(layers):
        output = layers(x.to(like), **_on(given, like))
    for hook in hooks:
        hook.remove()
    first, *others = output if isinstance(output, tuple) else (output,)
    if first.shape != x.shape or len(roundings) != len(plan.layers):
        return Finding(f"its layers give {tuple(first.shape)} in {len(roundings)} calls, not what a native block gives")
    if any(other is not None for other in others):
        return Finding("it returns more than hidden states")
    call = block.call(x, (), given)
    if call is None:
        return Finding("a plain call of it is not one that a native block runs")
    with evaluating(layers):
        reference = reference_block.run(block.spec, call, x.flatten(0, 1)).view_as(x)
    noise, exact = math.hypot(*roundings), 4 * torch.finfo(like).eps
    ways = {
        "its native block": (block.run(x, call), noise + 2 * HALF + exact),
        "what is known of it": (reference, noise + exact),
    }
    for name, (got, allowed) in ways.items():
        if reason := _difference(name, got.double() - x, first.double() - x, 2 * allowed, torch.finfo(like).eps, x):
            return Finding(reason)
    return Finding(None, len(output) if isinstance(output, tuple) else 0)


def _difference(name: str, got: Tensor, expected: Tensor, bound: float, eps: float, x: Tensor) -> str | None:
    least = eps * torch.linalg.vector_norm(x)  # of a block that adds nothing
    error = float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected).clamp(min=least))
    if error <= bound:
        return None
    return f"{name} differs from its layers by {error:.1%} of what the block adds; {bound:.1%} is rounding"


def _on(given: dict[str, Any], where: torch.dtype | torch.device) -> dict[str, Any]:
    """The arguments with tensors on that device, or floating ones in that dtype."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(where) if isinstance(where, torch.device) or value.is_floating_point() else value
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    return {name: moved(value) for name, value in given.items()}


def _rounding_noise(layer: PackedLinear, x: Tensor) -> float:
    """By how much, in relation to its size, a rounded input differs where what came before was rounded otherwise.

    Numbers that differ by d become other integers, a step away, in d / step of all cases: a variance of d * step, and d
    is up to two roundings to bfloat16, as of attention. It is no more than that of two roundings that have nothing to
    do with each other, a sixth of a step squared. Weight-only layers round to bfloat16 in native blocks.
    """
    x = x.double().flatten(0, -2)
    if layer.input_factor is not None:
        x = x * layer.input_factor.double()
    if layer.config.activations is None:
        variance = 2 * (x.bfloat16() - x).square()
    else:
        step = layer.input_grid.quantize(x)[1]
        variance = torch.minimum(2 * HALF * x.abs() * step, step.square() / 6)
    return float(variance.mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-30))
