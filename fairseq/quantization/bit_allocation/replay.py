"""A copy of a model that runs from a chosen encoder block on, and the error of its output with one other layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import class_dimension, output_of, picture_inputs
from fairseq.quantization.architectures.picture_forms import in_batches
from fairseq.quantization.architectures.plan import ModelPlan
from fairseq.quantization.bit_allocation.twins import put, sharing


class Replay:
    """A copy of a model, on the same tensors, that runs from a chosen encoder block on.

    The blocks before ``start`` do not run: each returns, in whatever structure, what the last of them returned in
    float. That is right where a block reads nothing but the previous one's output. Each advance checks it on the
    model's output; where it does not hold, every run is a whole one.
    """

    def __init__(self, model: nn.Module, pixel_values: Tensor, batch_size: int, plan: ModelPlan) -> None:
        self.model = sharing(model).eval()
        self.batches = batches(model, pixel_values, batch_size)
        self.plan, self.blocks = plan, plan.blocks()
        self.start, self.batch = 0, 0
        self.chained = True  # as far as is known
        self.before: list[Any] = []  # what block start - 1 returned for each batch
        self.here: list[Any] = []  # what block start returned for each batch, in float
        for place, name in enumerate(self.blocks):
            block = self.model.get_submodule(name)
            vars(block)["forward"] = self._skipping(block.forward, place)
        self.reference = self._run()

    def place(self, name: str) -> int:
        """Of the block that holds a layer; behind the last one for the classifier."""
        layer = self.plan.layers[name]
        if layer.block is None:
            return len(self.blocks) if layer.component == "classifier" else 0
        return self.blocks.index(layer.block)

    def advance(self, start: int) -> None:
        """Let the runs to come begin with block ``start``."""
        while self.chained and self.start < start:
            self.start, self.before, self.here = self.start + 1, self.here, []
            self.chained = len(self.before) == len(self.batches)
            if self.chained:
                self.chained = self._runs_the_same()
            if not self.chained:
                self.start = 0

    def _runs_the_same(self) -> bool:
        """Whether a run from block ``start`` on returns what a whole one does."""
        try:
            got = self._run()
        except Exception:  # a block read more than the previous one's output, of whatever kind or shape
            return False
        return all(relative_error(a, b) < 1e-6 for a, b in zip(self.reference, got))

    def error(self, name: str, layer: nn.Module) -> float:
        """The error of the output with another layer in the place of the one called ``name``, a mean over pictures."""
        before = self.model.get_submodule(name)
        put(self.model, name, layer)
        try:
            got = self._run()
        finally:
            put(self.model, name, before)
        return output_error(self.reference, got, self.classes)

    def _run(self) -> list[Tensor]:
        """The output for each batch, float64."""
        outputs = []
        for batch, inputs in enumerate(self.batches):
            self.batch = batch
            output, self.classes = run(self.model, inputs)
            outputs.append(output)
        return outputs

    def _skipping(self, forward: Callable[..., Any], place: int) -> Callable[..., Any]:
        """The forward of the block at ``place``."""

        def run(*args: Any, **keywords: Any) -> Any:
            if place < self.start:
                return self.before[self.batch]
            output = forward(*args, **keywords)
            if place == self.start and len(self.here) == self.batch:
                self.here.append(output)
            return output

        return run


def batches(model: nn.Module, pixel_values: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """What ``model`` is called with for some pictures at a time, where it is and in its dtype."""
    like = next((p for p in model.parameters() if p.is_floating_point()), pixel_values)
    inputs = picture_inputs(model, pixel_values)
    moved = {k: x.to(like.device, like.dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}
    return list(in_batches(moved, batch_size))


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int | None]:
    """The output for one batch, float64, and its dimension of classes."""
    name, output = output_of(model, inputs)
    return output.double(), class_dimension(name, output, inputs["pixel_values"])


def output_error(reference: Sequence[Tensor], got: Sequence[Tensor], classes: int | None) -> float:
    """The KL divergence along the dimension of classes, (N, classes) or (N, classes, H, W); without, see below.

    Args:
        reference, got: batch by batch; the mean over all pictures.
        classes: the dimension, or None.

    Returns:
        At least 0, or NaN where an output is.
    """
    if classes is None:
        lost = math.fsum((b - a).square().sum().item() for a, b in zip(reference, got, strict=True))
        return lost / max(math.fsum(a.square().sum().item() for a in reference), torch.finfo(torch.float64).tiny)
    total = 0.0
    for a, b in zip(reference, got, strict=True):
        log_p, log_q = a.log_softmax(classes), b.log_softmax(classes)
        total += (log_p.exp() * (log_p - log_q)).sum(classes).mean().item() * len(a)
    return 0.0 if total < 0 else total / sum(map(len, reference))


def relative_error(reference: Tensor, got: Tensor) -> float:
    """The squared error as a share of the reference's square."""
    return output_error([reference], [got], None)
