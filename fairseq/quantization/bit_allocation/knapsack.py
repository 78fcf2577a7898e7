"""The optimizer: one width for each layer, of all that fit the one with the smallest error, or the cheapest of all."""

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
Costs = Mapping[str, Mapping[int, int]]
"""Layer name -> width -> what it costs, in whole units."""


def choose_bits(
    errors: Errors, costs: Costs, budget: int | None = None, max_error: float | None = None
) -> dict[str, int]:
    """The width of each layer: a multiple-choice knapsack, solved by dynamic programming over the cost.

    A table holds, for each total cost, the smallest error of the layers so far, and each layer extends it by each of
    its widths. The unit of cost is the greatest common divisor of what the layers' choices cost, which keeps the table
    short for a transformer (its layers have few shapes), so the result is the optimum. Only if more than 2**18 entries
    were needed, the unit is larger and costs are rounded up: the budget still holds, and less than (layers / 2**18) of
    the span of costs is left unused.

    Args:
        errors: layer name -> width -> error, finite and not negative; a width that costs no less than another and errs
            no less is not chosen.
        costs: layer name -> width -> cost, for the same layers and widths: bits, bytes, nanoseconds.
        budget: at most this cost; the smallest error.
        max_error: instead of it, at most this sum of errors; the smallest cost.

    Raises:
        ValueError: the cheapest choices cost more than the budget, or the best ones err more than ``max_error``.
    """
    options = {name: _useful(errors[name], costs[name]) for name in errors}
    cheap = {name: costs[name][own[0]] for name, own in options.items()}
    above = {name: [costs[name][bits] - cheap[name] for bits in own] for name, own in options.items()}
    full = sum(cost[-1] for cost in above.values())
    unit = max(math.gcd(*(c for cost in above.values() for c in cost)), -(-full // MAX_CELLS), 1)
    steps = {name: [-(-c // unit) for c in cost] for name, cost in above.items()}
    cells = sum(step[-1] for step in steps.values())
    if budget is not None:
        slack = budget - sum(cheap.values())
        if slack < 0:
            raise ValueError(f"the cheapest choices cost {sum(cheap.values())}, more than {budget}")
        cells = cells if slack >= full else min(cells, slack // unit)
    best, taken = _knapsack([[errors[n][bits] for bits in own] for n, own in options.items()], [*steps.values()], cells)
    if max_error is None:
        end = int(best.argmin())
    elif best.min() > max_error * (1 + 1e-9):
        raise ValueError(
            f"max_error={max_error} cannot be kept: the best choices have a summed error of {best.min():.6g}"
        )
    else:
        end = int((best <= max_error * (1 + 1e-9)).argmax())
    bits = {}
    for i, name in reversed(list(enumerate(errors))):
        choice = int(taken[i, end])
        bits[name] = options[name][choice]
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


def _useful(errors: Mapping[int, float], costs: Mapping[int, int]) -> list[int]:
    """The widths from cheap to dear, without those that are no better than a cheaper one."""
    useful: list[int] = []
    for bits in sorted(errors, key=lambda width: (costs[width], errors[width], width)):
        if not useful or errors[bits] < errors[useful[-1]]:
            useful.append(bits)
    return useful


def check_errors(errors: Errors, sizes: Mapping[str, int]) -> None:
    """ValueError unless both are of the same layers, with errors of known widths and numbers of weights."""
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


def check_limit(key: str, limit: Any) -> None:
    """TypeError or ValueError unless it is a finite number of at least 0."""
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise TypeError(f"{key} must be a number, got {limit!r}")
    if not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"{key} must be finite and not negative, got {limit}")


def check_size(name: str, size: Any) -> None:
    """ValueError unless ``size`` can be the number of weights of the layer ``name``."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: the number of weights must be an int of at least 1, got {size!r}")
