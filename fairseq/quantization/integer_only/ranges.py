"""Ranges: how far the numbers of each channel reach, over the calibration pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import call

BATCH = 8


class Range(NamedTuple):
    """The least and largest value of each channel, float64 (C,)."""

    low: Tensor
    high: Tensor

    @property
    def reach(self) -> Tensor:
        """The largest magnitude of each channel."""
        return torch.maximum(-self.low, self.high)

    def joined(self, other: Range | None) -> Range:
        """That of both."""
        if other is None:
            return self
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    @classmethod
    def of(cls, x: Tensor) -> Range:
        """That of the last dimension of ``x``."""
        low, high = torch.aminmax(x.detach().double().flatten(0, -2), dim=0)
        return cls(low, high)


Ranges = dict[Any, Range]
"""By (block, role, "in" or "out") the range of what each layer reads and gives; by "stream" that of hidden states."""


def note(ranges: Ranges, key: Any, value: Tensor) -> None:
    """Widen the range of ``key`` by what ``value`` holds."""
    ranges[key] = Range.of(value).joined(ranges.get(key))


@contextmanager
def observing(ranges: Ranges, block: Any, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, what ``layers``, by role, read and give widens their ``ranges``.

    Inputs are as the layer gets them, before its ``input_factor``.
    """

    def hook_of(role: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            note(ranges, (block, role, "in"), args[0])
            note(ranges, (block, role, "out"), output)

        return hook

    handles = [layer.register_forward_hook(hook_of(role)) for role, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_range(model: nn.Module, blocks: list[str], pixels: Tensor) -> Range:
    """Of the hidden states before, between and behind the ``blocks`` of ``model``, in eval mode.

    Args:
        pixels: (N, C, H, W).
    """
    found: Ranges = {}

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note(found, "stream", args[0] if args else kwargs["hidden_states"])
        note(found, "stream", output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in blocks]
    try:
        for batch in pixels.split(BATCH):
            call(model, {"pixel_values": batch})
    finally:
        for handle in handles:
            handle.remove()
    return found["stream"]
