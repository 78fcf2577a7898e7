"""observe_ranges: how far the numbers of each channel reach, over the calibration pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import call
from fairseq.quantization.integer_only.head_spec import AttentionSpec
from fairseq.quantization.integer_only.reading import ModelParts

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


Ranges = Mapping[Any, Range]


def observe_ranges(model: nn.Module, parts: ModelParts, pixels: Tensor) -> Ranges:
    """By (block, role, "in" or "out") the range of what each layer reads and gives; by "stream" and others of those.

    Blocks are numbers. ("head", readout, "in" or "out") are of the layer of a readout; attention pooling is a block
    called ("head", readout), with a "stream" of its own. "embedded" is what a LayerNorm before the first block reads.

    Args:
        model: of float or packed layers, in eval mode; inputs are as the layer gets them, before its ``input_factor``.
        parts: of it.
        pixels: (N, C, H, W).
    """
    found: dict[Any, Range] = {}

    def note(key: Any, value: Tensor) -> None:
        found[key] = Range.of(value).joined(found.get(key))

    def layer(*key: Any) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            note((*key, "in"), args[0])
            note((*key, "out"), output)

        return hook

    def block(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note("stream", args[0] if args else kwargs["hidden_states"])
        note("stream", output[0] if isinstance(output, tuple) else output)

    def inside(pooling: Any, key: tuple[str, ...], value: Tensor) -> None:
        note((pooling, *key), value)

    def last(_: nn.Module, args: Any, output: Any) -> None:
        h = output[0] if isinstance(output, tuple) else output
        for name, spec in parts.head.readouts.items():
            if isinstance(spec, AttentionSpec):
                spec.attended(h, functools.partial(inside, ("head", name)))

    handles = [model.get_submodule(parts.names[-1]).register_forward_hook(last)]
    for name, readout in parts.head.readouts.items():
        if isinstance(readout, AttentionSpec):
            for role in ("fc1", "fc2"):
                handles.append(getattr(readout, role).register_forward_hook(layer(("head", name), role)))
        elif readout.linear is not None:
            handles.append(readout.linear.register_forward_hook(layer("head", name)))
    if parts.before is not None:
        first = model.get_submodule(parts.before)
        handles.append(first.register_forward_pre_hook(lambda _, args: note("embedded", args[0])))
    for i, (name, spec) in enumerate(zip(parts.names, parts.specs)):
        handles += [part.register_forward_hook(layer(i, role)) for role, part in spec.layers.items()]
        handles.append(model.get_submodule(name).register_forward_hook(block, with_kwargs=True))
    try:
        for batch in pixels.split(BATCH):
            call(model, {"pixel_values": batch})
    finally:
        for handle in handles:
            handle.remove()
    return found
