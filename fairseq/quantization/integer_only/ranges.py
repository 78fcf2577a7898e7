"""Ranges: how far the numbers of each channel reach, over the calibration pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import call
from fairseq.quantization.integer_only.head_spec import AttentionSpec, HeadSpec

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


@contextmanager
def observing_head(ranges: Ranges, last: nn.Module, head: HeadSpec) -> Iterator[None]:
    """Inside, what the layers of ``head`` read and give widens their ``ranges``.

    ("head", readout, "in" or "out") are of the layer of a readout; attention pooling is a block called ("head",
    readout), with a "stream" of its own.

    Args:
        last: the block that the head reads.
    """
    pooling = {("head", name): spec for name, spec in head.readouts.items() if isinstance(spec, AttentionSpec)}
    layers = {
        name: spec.linear
        for name, spec in head.readouts.items()
        if not isinstance(spec, AttentionSpec) and spec.linear is not None
    }

    def inside(block: Any, key: tuple[str, ...], value: Tensor) -> None:
        note(ranges, (block, *key), value)

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        for block, spec in pooling.items():
            spec.attended(h, functools.partial(inside, block))

    with ExitStack() as stack:
        handle = last.register_forward_hook(hook)
        stack.callback(handle.remove)
        stack.enter_context(observing(ranges, "head", layers))
        for block, spec in pooling.items():
            stack.enter_context(observing(ranges, block, {"fc1": spec.fc1, "fc2": spec.fc2}))
        yield


def entrance_ranges(model: nn.Module, blocks: Sequence[str], before: str | None, pixels: Tensor) -> Ranges:
    """Of the hidden states before, between and behind the ``blocks`` of ``model``, "stream"; of what ``before`` reads.

    The latter is "embedded", of a LayerNorm before the first block, if there is one. ``model`` is in eval mode.

    Args:
        pixels: (N, C, H, W).
    """
    found: Ranges = {}

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note(found, "stream", args[0] if args else kwargs["hidden_states"])
        note(found, "stream", output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in blocks]
    if before is not None:
        norm = model.get_submodule(before)
        handles.append(norm.register_forward_pre_hook(lambda _, args: note(found, "embedded", args[0])))
    try:
        for batch in pixels.split(BATCH):
            call(model, {"pixel_values": batch})
    finally:
        for handle in handles:
            handle.remove()
    return found
