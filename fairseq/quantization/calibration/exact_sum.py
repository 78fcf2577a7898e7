"""ExactSum: a sum of float32 tensors that does not depend on the order, and so not on how many processes share it."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.quantization.calibration import processes

PRECISION = 36
"""Binary digits to which addends are kept, below the largest number that a row could have in the first of them."""


class ExactSum:
    """Adds matrices or vectors of float32, always of one shape, in this process and in the others.

    Addends are rounded to whole multiples of a unit, one for each row, in float64, where sums of such are exact up to
    2**53 units. That leaves room for 2**17 addends as large as the first; beyond that, sums are rounded as any are.

    Args:
        unit: (rows, 1) of a matrix or (rows,), the same in all processes; see :func:`unit_of`.
        columns: of a matrix.
    """

    def __init__(self, unit: Tensor, columns: int | None = None):
        shape = (len(unit),) if columns is None else (len(unit), columns)
        self._unit, self._sum = unit, torch.zeros(shape, dtype=torch.float64, device=unit.device)

    @property
    def device(self) -> torch.device:
        return self._sum.device

    def add(self, x: Tensor) -> None:
        """Add a float32 tensor."""
        self._sum += x.double().div_(self._unit).round_()

    def result(self) -> Tensor:
        """The sum over all processes, float64; such sums of one unit add up exactly. It ends the sum."""
        return processes.total(self._sum).mul_(self._unit)


def unit_of(largest: Tensor) -> Tensor:
    """Powers of two, float64, for rows whose numbers in one addend are at most ``largest``, (rows,)."""
    bound = largest.double()
    bound = torch.where(bound > 0, bound, bound.max().clamp(min=torch.finfo(torch.float32).tiny))
    return torch.ldexp(torch.ones_like(bound), torch.frexp(bound)[1] - PRECISION)
