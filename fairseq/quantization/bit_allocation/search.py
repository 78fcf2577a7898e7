"""The widths that fit what a model may take: bits per weight, bytes, milliseconds, or classes that change."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from fairseq.quantization.bit_allocation.assignment import BitAssignment, assign_bits, assignment
from fairseq.quantization.bit_allocation.knapsack import Errors, check_errors, check_limit, choose_bits
from fairseq.quantization.bit_allocation.sensitivity import measure_twins, split
from fairseq.quantization.bit_allocation.timing import layer_times, model_time
from fairseq.quantization.bit_allocation.twins import Twins
from fairseq.quantization.calibration import processes
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert
from fairseq.quantization.evaluation.compare import compare_models

logger = logging.getLogger(__name__)

STEPS = 5
"""How often a search quantizes, or assembles, a model of other widths."""


class Widths:
    """What each width of each layer costs and errs, measured once, and the assignments that follow from it.

    Args:
        model: the float model; it stays as it is.
        pixel_values: calibration images, (N, C, H, W).
        config: as for :class:`~fairseq.quantization.bit_allocation.twins.Twins`.

    Raises:
        TypeError, ValueError: as :class:`~fairseq.quantization.bit_allocation.twins.Twins`.
    """

    def __init__(self, model: nn.Module, pixel_values: Tensor, config: QuantizationConfig):
        self.model, self.pixel_values, self.config = model, pixel_values, config
        calibration, held_back = split(pixel_values)
        self.twins = Twins(model, calibration, config)
        if not self.twins.layers:
            raise ValueError("no Linear layer is selected, so that there is no width to choose")
        self.sizes = self.twins.weights
        self.errors: Errors = measure_twins(self.twins, held_back)
        check_errors(self.errors, self.sizes)

    @property
    def span(self) -> tuple[float, float]:
        """The least and the most bits per weight that the choices allow."""
        total = sum(self.sizes.values())
        low, high = (sum(f(own) * self.sizes[name] for name, own in self.errors.items()) / total for f in (min, max))
        return low, high

    def on_average(self, bits: float) -> BitAssignment:
        """The smallest error with at most ``bits`` per weight.

        Raises:
            TypeError, ValueError: no number, or not from the least to the most that the choices allow.
        """
        return assign_bits(self.errors, self.sizes, average_bits=bits, given=self.config.overrides)

    def in_bytes(self, limit: int) -> BitAssignment:
        """The smallest error of a packed model of which at most ``limit`` bytes are saved, what is in float included.

        Raises:
            TypeError, ValueError: no number, or fewer bytes than the narrowest choices take; the message says how many.
        """
        check_limit("max_bytes", limit)
        costs, other = self.twins.bytes, self.twins.other_bytes
        least = other + sum(min(own.values()) for own in costs.values())
        if limit < least:
            raise ValueError(f"max_bytes={limit:,}: with the narrowest choices the model takes {least:,} bytes")
        bits = choose_bits(self.errors, costs, math.floor(limit) - other)
        return assignment(bits, self.errors, self.sizes, self.config.overrides)

    def in_milliseconds(self, limit: float, batch_size: int) -> BitAssignment:
        """The smallest error that was found of a packed model that takes at most so long for a batch on this machine.

        Layers are timed one by one, at every width; models of some widths are timed as a whole, between the widest and
        the fastest, and the widest that kept the limit is taken. Of several processes the first one measures.

        Raises:
            TypeError, ValueError: no number, or less than the fastest choices take; the message says how long.
        """
        check_limit("max_milliseconds", limit)
        wanted, first = round(1e6 * limit), processes.rank() == 0
        costs = processes.first(layer_times(self.twins, self.pixel_values, batch_size) if first else None)

        def excess(bits: Mapping[str, int]) -> int:
            """The nanoseconds by which a model of these widths takes longer."""
            taken = model_time(self.twins.assembled(bits), self.pixel_values, batch_size) if first else 0
            logger.info("a batch of %d takes %.3f ms with %s", batch_size, taken / 1e6, _summary(bits))
            return cast(int, processes.first(taken - wanted))

        def layers(bits: Mapping[str, int]) -> int:
            return sum(costs[name][width] for name, width in bits.items())

        widest = {name: max(own) for name, own in costs.items()}
        best = {name: min(own, key=lambda width: own[width]) for name, own in costs.items()}
        over = excess(widest)
        if over <= 0:
            best = widest
        elif (least := excess(best)) > 0:
            raise ValueError(
                f"max_milliseconds={limit:g}: with the fastest choices a batch of {batch_size} takes "
                f"{(least + wanted) / 1e6:.3g} ms on this machine"
            )
        else:
            low, high = layers(best), layers(widest)
            budget = max(low, high - over)
            for _ in range(STEPS):
                attempt = choose_bits(self.errors, costs, budget)
                if excess(attempt) <= 0:
                    best, low = attempt, budget
                else:
                    high = budget
                budget = (low + high) // 2
        return assignment(best, self.errors, self.sizes, self.config.overrides)

    def that_agree(self, max_drop: float) -> BitAssignment:
        """The smallest assignment whose model has the float model's top-1 class on all but ``max_drop`` % of pictures.

        With a class for each pixel or each query of a detector, of all but ``max_drop`` % of those.

        Bisection over the average width; the model is quantized at each. Pictures whose class changes bound the drop of
        accuracy from above, and no labels are needed; but these are the pictures that the model is calibrated on, so
        others may fare a little worse.

        Raises:
            ValueError: not a share of 0 to 100, or not even the widest choice keeps so many.
        """
        check_drop(max_drop)
        low, high = self.span
        best = self.on_average(high)
        drop = self._changed(best)
        if drop > max_drop:
            raise ValueError(
                f"at {high:g} bits {drop:.2f}% of the {len(self.pixel_values)} pictures change their class already, "
                f"more than max_accuracy_drop={max_drop}"
            )
        for _ in range(STEPS):
            middle = (low + high) / 2
            attempt = self.on_average(middle)
            if self._changed(attempt) <= max_drop:
                best, high = attempt, middle
            else:
                low = middle
        return best

    def _changed(self, attempt: BitAssignment) -> float:
        """The percentage of the pictures that get another class."""
        quantized, _ = convert(self.model, replace(self.config, overrides=attempt.overrides), self.pixel_values)
        match = compare_models(self.model, quantized, self.pixel_values).top_k_match
        if match is None:
            raise ValueError("max_accuracy_drop needs a classifier; for other models give average_bits")
        return 100 * (1 - match)


def check_drop(max_drop: Any) -> None:
    """ValueError unless it is a percentage."""
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop <= 100:
        raise ValueError(f"max_accuracy_drop is in percentage points, from 0 to 100; got {max_drop!r}")


def _summary(bits: Mapping[str, int]) -> str:
    counts = {width: list(bits.values()).count(width) for width in sorted(set(bits.values()))}
    return ", ".join(f"{count} layers of {width} bits" for width, count in counts.items())
