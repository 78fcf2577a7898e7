"""OutputMoments: which errors of each layer's outputs change the model's output, from gradients there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.exact_sum import ExactSum, unit_of
from fairseq.quantization.calibration.storage import Storage
from fairseq.quantization.rounding.statistics import OutputMoment

LARGEST = 768
"""Outputs of a block along the diagonal at most; of a layer with more, blocks of one size are taken, in order."""


class OutputMoments:
    """Sums of g g^T over tokens, g the gradient of a random projection of the model's output at a layer's outputs.

    Of several processes each adds the gradients of its own pictures, and gets the sums over all: those that one process
    alone would get, to the last bit, see :class:`~.exact_sum.ExactSum`. Finished sums lie in a temporary file.

    Args:
        names: of the layers that are wanted; gradients of others are left out.
        half: multiply in bfloat16.
    """

    def __init__(self, names: Collection[str], half: bool = False):
        self.names, self.half = frozenset(names), half
        self._sums: dict[str, list[ExactSum]] = {}
        self._squares: dict[str, list[tuple[float, float]]] = {}  # sums of |g|^2 and of |g|^4
        self._started = False
        self._found: dict[str, tuple[range, float]] = {}
        self._stored = Storage("what errors of outputs count")

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add those of one batch, by name, (..., out); layers that the first batch does not have are left out."""
        rows = {name: g.detach().flatten(0, -2).float() for name, g in gradients.items() if name in self.names}
        if not self._started:
            self._start(rows)
        for name, sums in self._sums.items():
            if (g := rows.get(name)) is None:
                continue
            norms = g.square().sum(1).double()
            self._squares[name].append((float(norms.sum()), float(norms.square().sum())))
            g = g.bfloat16() if self.half else g
            for one, part in zip(sums, g.tensor_split(len(sums), 1), strict=True):
                one.add((part.T @ part).float())

    def finish(self) -> None:
        """Add up over all processes; nothing is added afterwards."""
        if not self._started:
            self._start({})
        for name, sums in self._sums.items():
            parts = processes.gathered(self._squares[name])
            total, squares = (math.fsum(x) for x in zip(*(pair for part in parts for pair in part), strict=True))
            blocks = [one.result() for one in sums]
            scale = sum(float(block.diagonal().sum()) for block in blocks) / sum(len(block) for block in blocks)
            if math.isfinite(scale) and scale > 0 and math.isfinite(squares):
                start = len(self._stored)
                for block in blocks:
                    self._stored.append(block.div_(scale).float())
                self._found[name] = range(start, len(self._stored)), total**2 / squares
        self._sums.clear()

    def of(self, name: str) -> OutputMoment | None:
        """Of one layer, whose diagonal has a mean of 1; None where it was not wanted, or gradients do not tell."""
        if name not in self._found:
            return None
        places, samples = self._found[name]
        return OutputMoment(tuple(self._stored[place] for place in places), samples)

    def tensors(self) -> dict[str, Tensor]:
        """All that is finished, by names of its own, for :meth:`load`."""
        found: dict[str, Tensor] = {}
        for name, (places, samples) in self._found.items():
            found |= {f"{name}:{number}": self._stored[place].cpu() for number, place in enumerate(places)}
            found[f"{name}:samples"] = torch.tensor(samples, dtype=torch.float64)
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Be what another one was that gave these :meth:`tensors`."""
        for key, samples in tensors.items():
            name, _, part = key.rpartition(":")
            if part == "samples":
                start = len(self._stored)
                while (block := tensors.get(f"{name}:{len(self._stored) - start}")) is not None:
                    self._stored.append(block)
                self._found[name] = range(start, len(self._stored)), float(samples)

    def _start(self, rows: Mapping[str, Tensor]) -> None:
        """Begin sums in the units that the first process takes from its first batch."""
        units = {name: _units(g) for name, g in rows.items()} if processes.rank() == 0 else None
        device = next((g.device for g in rows.values()), torch.device("cpu"))
        for name, found in processes.first(units).items():
            self._sums[name] = [ExactSum(unit[:, None].to(device), len(unit)) for unit in found]
            self._squares[name] = []
        self._started = True


def _units(g: Tensor) -> list[Tensor]:
    """One for each output, in blocks, on the CPU; |sum of a b|^2 <= (sum of a^2) (sum of b^2)."""
    squares = g.square().sum(0)
    units = unit_of((squares * squares.max()).sqrt()).cpu()
    return list(units.tensor_split(-(-len(units) // LARGEST)))
