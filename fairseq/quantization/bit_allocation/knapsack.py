"""The optimizer: one width for each layer, of all that fit the one with the smallest error, or the smallest of all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fairseq.modules.quantization.scalar.ops import check_bits

MAX_CELLS = 2**18
"""Entries of the table of :func:`choose_bits`."""

Errors = Mapping[str, Mapping[int, float]]
"""Layer name -> width -> error."""


def choose_bits(
    errors: Errors, sizes: Mapping[str, int], average_bits: float | None = None, max_error: float | None = None
) -> dict[str, int]:
    """The width of each layer: a multiple-choice knapsack, solved by dynamic programming over the size.

    A table holds, for each total size, the smallest error of the layers so far, and each layer extends it by each of
    its widths. The unit of size is the greatest common divisor of what the layers' choices cost, which keeps the table
    short for a transformer (its layers have few shapes), so the result is the optimum. Only if more than 2**18 entries
    were needed, the unit is larger and costs are rounded up: the budget still holds, and less than (layers / 2**18) of
    the span of sizes is left unused.

    Args and Raises: see :func:`~fairseq.quantization.bit_allocation.assignment.assign_bits`.
    """
    _check_problem(errors, sizes, average_bits, max_error)
    options = {name: _useful(errors[name]) for name in errors}
    narrow = {name: min(errors[name]) for name in errors}
    costs = {name: [(bits - narrow[name]) * sizes[name] for bits, _ in options[name]] for name in errors}
    full = sum(cost[-1] for cost in costs.values())
    unit = max(math.gcd(*(c for cost in costs.values() for c in cost)), -(-full // MAX_CELLS), 1)
    steps = {name: [-(-c // unit) for c in cost] for name, cost in costs.items()}
    cells = sum(step[-1] for step in steps.values())
    if average_bits is not None:
        total = sum(sizes.values())
        _check_average(average_bits, narrow, {name: max(errors[name]) for name in errors}, sizes, total)
        slack = average_bits * total - sum(narrow[name] * sizes[name] for name in errors)
        cells = cells if slack >= full else min(cells, math.floor(slack / unit + 1e-6))
    best, taken = _knapsack([[e for _, e in options[name]] for name in errors], list(steps.values()), cells)
    if max_error is None:
        end = int(best.argmin())
    elif best.min() > max_error * (1 + 1e-9):
        raise ValueError(
            f"max_error={max_error} cannot be kept: the widest choices have a summed error of {best.min():.6g}"
        )
    else:
        end = int((best <= max_error * (1 + 1e-9)).argmax())
    bits = {}
    for i, name in reversed(list(enumerate(errors))):
        choice = int(taken[i, end])
        bits[name] = options[name][choice][0]
        end -= steps[name][choice]
    return {name: bits[name] for name in errors}


def _knapsack(errors: list[list[float]], steps: list[list[int]], cells: int) -> tuple[np.ndarray, np.ndarray]:
    """For each total of steps, 0 to ``cells``: the smallest sum of errors, and the choice of each layer on the way."""
    best = np.full(cells + 1, np.inf)
    best[0] = 0
    taken = np.zeros((len(errors), cells + 1), np.uint8)
    for i, (layer, cost) in enumerate(zip(errors, steps)):
        new = np.full(cells + 1, np.inf)
        for choice, (error, step) in enumerate(zip(layer, cost)):
            if step > cells:
                break
            candidate = best[: cells + 1 - step] + error
            better = candidate < new[step:]
            new[step:][better] = candidate[better]
            taken[i, step:][better] = choice
        best = new
    return best, taken


def _useful(errors: Mapping[int, float]) -> list[tuple[int, float]]:
    """(width, error) from narrow to wide, without the widths that are no better than a narrower one."""
    useful: list[tuple[int, float]] = []
    for bits in sorted(errors):
        if not useful or errors[bits] < useful[-1][1]:
            useful.append((bits, errors[bits]))
    return useful


def _check_problem(
    errors: Errors, sizes: Mapping[str, int], average_bits: float | None, max_error: float | None
) -> None:
    if (average_bits is None) == (max_error is None):
        raise ValueError(f"pass exactly one of average_bits and max_error; got {average_bits!r} and {max_error!r}")
    key, limit = ("average_bits", average_bits) if max_error is None else ("max_error", max_error)
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise TypeError(f"{key} must be a number, got {limit!r}")
    if not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"{key} must be finite and not negative, got {limit}")
    if not errors or errors.keys() != sizes.keys():
        raise ValueError(
            f"errors and sizes must name the same layers, at least one; got {len(errors)} and {len(sizes)}, "
            f"different in {sorted(errors.keys() ^ sizes.keys())[:4]}"
        )
    for name, layer in errors.items():
        check_size(name, sizes[name])
        if not layer or not all(math.isfinite(error) and error >= 0 for error in layer.values()):
            raise ValueError(f"{name}: errors must be finite numbers of at least 0, one per width; got {dict(layer)}")
        for bits in layer:
            check_bits(bits)


def _check_average(
    average_bits: float, narrow: Mapping[str, int], wide: Mapping[str, int], sizes: Mapping[str, int], total: int
) -> None:
    low, high = (sum(bits[name] * sizes[name] for name in sizes) / total for bits in (narrow, wide))
    if not low <= average_bits <= high:
        raise ValueError(f"average_bits must be from {low:g} to {high:g}, what the choices allow; got {average_bits}")


def check_size(name: str, size: Any) -> None:
    """ValueError unless ``size`` can be the number of weights of the layer ``name``."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: the number of weights must be an int of at least 1, got {size!r}")
