"""Scales that are parameters: how a buffer becomes one, stays positive, and keeps its dtype when its module moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.scalar.modules.replace import moved


def become_parameter(module: nn.Module, name: str) -> None:
    """Make a parameter of a floating buffer, under the same name; nothing where it is one already."""
    if name in module._buffers:
        value = module._buffers[name]
        assert value is not None
        del module._buffers[name]
        module.register_parameter(name, nn.Parameter(value.detach().clone()))


def positive(scale: Tensor) -> Tensor:
    """A learned scale, but the smallest normal number where it is not above that; the gradient passes there, too."""
    return _Positive.apply(scale) if torch.is_grad_enabled() and scale.requires_grad else _clamped(scale)


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, scale: Tensor) -> Tensor:
        return _clamped(scale)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def _clamped(scale: Tensor) -> Tensor:
    return scale.detach().clamp(min=torch.finfo(scale.dtype).tiny)


@contextmanager
def scales_kept(module: nn.Module, *names: str) -> Iterator[None]:
    """Inside, what :meth:`torch.nn.Module._apply` does to these tensors is undone, but for the device."""
    kept = {name: value.detach() for name in names if (value := getattr(module, name)) is not None}
    yield
    for name, value in kept.items():
        now = getattr(module, name)
        if now is None:
            continue
        value = moved(value, now.device)
        if not isinstance(now, nn.Parameter):
            setattr(module, name, value)
        elif now.dtype != value.dtype:
            now.grad = None  # it was rounded, too
            now.data = value
