"""observe_ranges: how far the numbers of each channel reach, over the calibration pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import call
from fairseq.quantization.engine.spec import BlockSpec

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


def observe_ranges(
    model: nn.Module, blocks: list[str], specs: tuple[BlockSpec, ...], head: nn.Module, pixels: Tensor
) -> Ranges:
    """By (block, role, "in" or "out") the range of what each layer reads and gives; by "stream" and "logits" of those.

    Args:
        model: of float or packed layers, in eval mode; inputs are as the layer gets them, before its ``input_factor``.
        blocks, specs, head: of it.
        pixels: (N, C, H, W).
    """
    found: dict[Any, Range] = {}

    def note(key: Any, value: Tensor) -> None:
        found[key] = Range.of(value).joined(found.get(key))

    def layer(i: Any, role: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            note((i, role, "in"), args[0])
            note((i, role, "out"), output)

        return hook

    def block(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note("stream", args[0] if args else kwargs["hidden_states"])
        note("stream", output[0] if isinstance(output, tuple) else output)

    handles = [head.register_forward_hook(layer("head", "classifier"))]
    for i, (name, spec) in enumerate(zip(blocks, specs)):
        handles += [part.register_forward_hook(layer(i, role)) for role, part in spec.layers.items()]
        handles.append(model.get_submodule(name).register_forward_hook(block, with_kwargs=True))
    try:
        for batch in pixels.split(BATCH):
            call(model, {"pixel_values": batch})
    finally:
        for handle in handles:
            handle.remove()
    return found
