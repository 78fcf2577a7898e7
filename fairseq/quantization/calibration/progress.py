"""Progress: a bar over everything that quantization takes time for, with an estimate of what is left."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from tqdm import tqdm

from fairseq.quantization.architectures.plan import LayerPlan, ModelPlan
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.statistics import BATCH_SIZE

GRADIENTS, PASSES, MOMENTS, ROUNDING = 3.0, 3.0, 1.5, 12.0
"""Costs in multiplications: of token weights and of passes through a block, per token and weight; of statistics, per
token and input channel squared; of rounding, per weight and input channel."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Progress:
    """What is done of a quantization, in estimated multiplications; of several processes the first shows it.

    Args:
        model: the float model.
        plan: of it.
        pictures: how many there are in this process; 0 without calibration.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan, pictures: int = 0):
        self.pictures = pictures
        self.shapes = {}
        for layer in plan.chosen:
            weight = model.get_submodule(layer.name).get_parameter("weight")
            self.shapes[layer.name] = (weight.shape[0], weight.shape[1])
        hidden = (args[0].shape[-2] for args, _ in plan.observed.calls.values() if args and args[0].ndim > 1)
        self.tokens = next(hidden, 1)  # of a picture
        weights = sum(rows * columns for rows, columns in self.shapes.values())
        self.gradients = GRADIENTS * self.tokens * weights  # of a picture
        total = pictures * self.gradients + sum(self._reading(n) * pictures + self._rounding(n) for n in self.shapes)
        shown = processes.rank() == 0
        self.bar = tqdm(total=total, desc="Quantizing", bar_format=BAR, delay=1, leave=False, disable=not shown or None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def weighted(self, pictures: int) -> None:
        """So many pictures more have their token weights."""
        self.bar.update(pictures * self.gradients)

    def reading(self, inputs: Iterable[Tensor], layers: Sequence[LayerPlan]) -> Iterator[Tensor]:
        """The inputs of some layers, batch by batch, while their statistics are taken."""
        left, each = self.pictures, sum(self._reading(layer.name) for layer in layers)
        for batch in inputs:
            yield batch
            self.bar.update(min(left, BATCH_SIZE) * each)
            left -= min(left, BATCH_SIZE)

    def rounded(self, layer: LayerPlan) -> None:
        """A layer is done."""
        self.bar.update(self._rounding(layer.name))

    def say(self, text: str) -> None:
        """A line above the bar, where that is shown."""
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)

    def learns(self, epochs: float) -> None:
        """All blocks are going to learn so long from the pictures."""
        self.bar.total += epochs * self.pictures * self.gradients

    def learned(self, share: float) -> None:
        """So much of what all blocks learn is done, in epochs of all pictures and blocks."""
        self.bar.update(share * self.pictures * self.gradients)

    def skipped(self, layer: LayerPlan) -> None:
        """A layer was done in an earlier run."""
        self.bar.update(self._reading(layer.name) * self.pictures + self._rounding(layer.name))

    def _reading(self, name: str) -> float:
        rows, columns = self.shapes[name]
        return self.tokens * (PASSES * rows * columns + MOMENTS * columns**2)

    def _rounding(self, name: str) -> float:
        rows, columns = self.shapes[name]
        return (ROUNDING if self.pictures else 1.0) * rows * columns**2
