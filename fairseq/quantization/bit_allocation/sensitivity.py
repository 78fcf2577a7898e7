"""How much each layer's rounding changes the model's output, and the bit widths that follow from it.

errors = measure(model, pixel_values, config)
sizes = {name: model.get_parameter(f"{name}.weight").numel() for name in errors}
assignment = assign_bits(errors, sizes, average_bits=4.5)
ViTQuantizer(overrides=assignment.overrides)
"""

from __future__ import annotations

import copy
import fnmatch
import glob
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairseq.modules.quantization.scalar.ops import check_bits, check_tensor
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int, weight_to_real
from fairseq.quantization.architectures.forward import class_dimension, output_of, picture_inputs
from fairseq.quantization.architectures.layers import (
    Family,
    block_of,
    component_of,
    encoder_blocks,
    family_of,
    linear_layers,
    tower_of,
)
from fairseq.quantization.architectures.plan import check_model, make_plan
from fairseq.quantization.config import LayerConfig, QuantizationConfig
from fairseq.quantization.conversion.convert import convert
from fairseq.quantization.evaluation.compare import compare_models

CHOICES = (2, 3, 4, 5, 6, 8)
SAME_CURVATURE = 2.5
"""Two widths agree if the output error per weight error differs by no more than this factor."""
MAX_CELLS = 2**18
"""Entries of the table of :func:`assign_bits`."""

Errors = Mapping[str, Mapping[int, float]]


def measure(
    model: nn.Module,
    pixel_values: Tensor,
    config: QuantizationConfig,
    choices: Sequence[int] = CHOICES,
    batch_size: int = 16,
) -> dict[str, dict[int, float]]:
    """The error of the model's output when one layer alone has its weight rounded to nearest, for each width.

    Two widths are run through the model, the second narrowest and the second widest of ``choices``, from the encoder
    block on that holds the layer. For small changes the error is quadratic in the weight's change, so the other widths
    get theirs from the squared error of the rounded weight, which is exact for each width, times the geometric mean of
    the two measured ratios. Where those ratios differ by more than 2.5 times (one outlier can saturate the error of a
    whole layer), or with up to two choices, every width is run.

    On a ViT-Tiny with ImageNet weights and 16 pictures (3 and 6 bits measured), the derived error of a layer was within
    a factor of 1.3 of the measured one for half of the layers and of 1.9 for nine in ten (at 2 bits 1.4 and 2.4; per
    tensor at 8 bits 2.4 for nine in ten); its sum over the layers within 6% (at 2 bits 24% too small per channel, 8%
    per tensor). Every width was run for 3 of 73 layers per channel, for 14 per tensor. Chosen from derived errors
    instead of errors measured at every width, 4.5 bits on average left a divergence on 128 other pictures of 0.095
    against 0.110 per channel, and 0.200 against 0.194 per tensor; 3 bits 2.6 against 2.0, and 2.9 against 3.1.
    The sum of the layers' errors is no forecast of the whole model's error at so few bits: at 4.5 it was 0.07 and 0.15.

    Args:
        model: the float model; it is not written to, its modules neither, whatever happens on the way.
        pixel_values: (N, channels, height, width), floating, finite, preprocessed as the model expects; some dozens.
        config: selects the layers and gives method, group_size and symmetric of each; its bits are not looked at.
        choices: the widths, 2 to 8.
        batch_size: pictures per run.

    Returns:
        For each selected layer, in the model's order, the error at each width: the mean over the pictures of the KL
        divergence, in nats, of the softmax of the logits with the rounded layer from that of the float logits; with a
        class for each pixel or query, over those, too. For a model without classes, the squared error of its last
        hidden state, reconstruction or first floating output, as a share of that one's square; the same of the logit
        where there is but one. Activations are not rounded.

    Raises:
        TypeError, ValueError: what came and what is accepted.
    """
    check_model(model)
    widths = _check_choices(choices)
    _check_pictures(pixel_values, batch_size)
    family = family_of(model)
    plan = make_plan(linear_layers(model), config, family)
    chosen = {name: settings for name, settings in plan.items() if isinstance(settings, LayerConfig)}
    unseen = [name for name in chosen if tower_of(name, family) == "text"]
    if unseen:
        raise ValueError(
            f"towers={config.towers!r} selects {unseen[0]} and other layers of the text tower, and pictures do not "
            "reach them; measure with towers='vision'"
        )
    if not chosen:
        return {}
    replay = _Replay(model, pixel_values, batch_size, family)
    errors: dict[str, dict[int, float]] = {}
    order = sorted((replay.place(name), name) for name in chosen)
    for place, name in tqdm(order, desc="Measuring sensitivity", unit="layer", delay=1, leave=False):
        replay.advance(place)
        errors[name] = _measure_layer(replay, name, chosen[name], widths)
    return {name: errors[name] for name in chosen}


def _measure_layer(replay: _Replay, name: str, settings: LayerConfig, widths: list[int]) -> dict[int, float]:
    """The error of the output at each width: of two it is measured, of the others derived where the two agree."""
    weight = replay.weight(name)
    rounded = {bits: _round_to_nearest(weight, replace(settings, bits=bits), name) for bits in widths}
    measured = {bits: replay.error(name, rounded[bits]) for bits in _anchors(widths)}
    noise = {bits: (w.double() - weight.double()).square().sum().item() for bits, w in rounded.items()}
    ratios = [error / noise[bits] if noise[bits] else 0.0 for bits, error in measured.items()]
    if not 0 < max(ratios) <= SAME_CURVATURE * min(ratios):
        return {bits: measured[bits] if bits in measured else replay.error(name, rounded[bits]) for bits in widths}
    ratio = math.sqrt(ratios[0] * ratios[-1])
    return {bits: measured.get(bits, ratio * noise[bits]) for bits in widths}


def _anchors(widths: list[int]) -> list[int]:
    """The widths to measure."""
    inner = widths[1:-1] if len(widths) > 3 else widths
    return [inner[0], inner[-1]] if len(widths) > 1 else widths


def _round_to_nearest(weight: Tensor, settings: LayerConfig, name: str) -> Tensor:
    scale, zero_point = observe_weight(
        weight, settings.bits, settings.method, settings.group_size, settings.symmetric, name
    )
    integers = weight_to_int(weight, scale, zero_point, settings.bits, settings.group_size)
    return weight_to_real(integers, scale, zero_point, settings.group_size, weight.dtype)


def _check_choices(choices: Sequence[int]) -> list[int]:
    if isinstance(choices, int) or not len(choices):
        raise ValueError(f"choices must hold at least one bit width, such as {CHOICES}; got {choices!r}")
    for bits in choices:
        check_bits(bits)
    return sorted(set(choices))


def _check_pictures(pixel_values: Tensor, batch_size: int) -> None:
    check_tensor(pixel_values, "pixel_values")
    if pixel_values.ndim != 4 or not len(pixel_values):
        raise ValueError(
            f"pixel_values must be (N, channels, height, width), N at least 1; got {tuple(pixel_values.shape)}"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an int of at least 1, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


class _Replay:
    """A copy of a model, on the same tensors, that runs from a chosen encoder block on.

    The blocks before ``start`` do not run: each returns, in whatever structure, what the last of them returned in
    float. That is right where a block reads nothing but the previous one's output. Each advance checks it on the
    model's output; where it does not hold, every run is a whole one.
    """

    def __init__(self, model: nn.Module, pixel_values: Tensor, batch_size: int, family: Family) -> None:
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared).eval()
        like = next(model.parameters())
        inputs = picture_inputs(model, pixel_values)
        moved = {k: x.to(like.device, like.dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}
        starts = range(0, len(pixel_values), batch_size)
        self.batches = [{k: x[start : start + batch_size] for k, x in moved.items()} for start in starts]
        self.family, self.blocks = family, encoder_blocks(model, family)
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
        block = block_of(name)
        if block is None:
            return len(self.blocks) if component_of(name, self.family) == "classifier" else 0
        return self.blocks.index(block)

    def weight(self, name: str) -> Tensor:
        """The float weight of a layer."""
        return self.model.get_parameter(f"{name}.weight").detach()

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
        return all(_relative_error(a, b) < 1e-6 for a, b in zip(self.reference, got))

    def error(self, name: str, weight: Tensor) -> float:
        """The error of the output with this weight in the layer ``name``, the mean over the pictures."""
        layer = self.model.get_submodule(name)
        before = layer._parameters["weight"]
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            got = self._run()
        finally:
            layer._parameters["weight"] = before
        return _output_error(torch.cat(self.reference), torch.cat(got), self.classes)

    def _run(self) -> list[Tensor]:
        """The output for each batch, float64."""
        outputs = []
        for batch, inputs in enumerate(self.batches):
            self.batch = batch
            with torch.no_grad():
                name, output = output_of(self.model, inputs)
            self.classes = class_dimension(name, output, inputs["pixel_values"])
            outputs.append(output.double())
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


def _output_error(reference: Tensor, got: Tensor, classes: int | None) -> float:
    """The KL divergence along the dimension of classes, (N, classes) or (N, classes, H, W); without, see below."""
    if classes is None:
        return _relative_error(reference, got)
    log_p, log_q = reference.log_softmax(classes), got.log_softmax(classes)
    return max(0.0, (log_p.exp() * (log_p - log_q)).sum(classes).mean().item())


def _relative_error(reference: Tensor, got: Tensor) -> float:
    """The squared error as a share of the reference's square."""
    square = reference.square().sum().item()
    return (got - reference).square().sum().item() / max(square, torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class BitAssignment:
    """A bit width for each layer; ``print`` it, ``save`` it, edit the file and ``load`` it again.

    Attributes:
        bits: layer name -> 2 to 8.
        sizes: layer name -> the number of weights.
        errors: layer name -> width -> the output error that was measured; {} where nothing is known.

    Raises:
        ValueError: what came and what is accepted, with the layer's name.
    """

    bits: Mapping[str, int]
    sizes: Mapping[str, int]
    errors: Errors = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.bits or self.bits.keys() != self.sizes.keys():
            raise ValueError(
                "bits and sizes must name the same layers, at least one; "
                f"got {len(self.bits)} and {len(self.sizes)}, different in {sorted(self.bits.keys() ^ self.sizes)[:4]}"
            )
        for name, bits in self.bits.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"a layer name must be a str that is not empty, got {name!r}")
            if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
                raise ValueError(f"{name}: bits must be an int from 2 to 8, got {bits!r}")
            _check_size(name, self.sizes[name])

    @property
    def average_bits(self) -> float:
        """Bits per weight, over all weights of these layers (scales and zero points not counted)."""
        return sum(bits * self.sizes[name] for name, bits in self.bits.items()) / sum(self.sizes.values())

    @property
    def predicted_error(self) -> float:
        """The sum of the layers' errors at their widths; NaN where one is not known."""
        return sum(self._error(name) for name in self.bits)

    @property
    def overrides(self) -> dict[str, dict[str, int]]:
        """What ``ViTQuantizer(overrides=...)`` takes."""
        return {glob.escape(name): {"bits": bits} for name, bits in self.bits.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, a line per layer; ``bits`` is what to edit. A file is replaced as a whole or not at all."""
        path = Path(path)
        layers = (
            f"    {json.dumps(name)}: "
            + json.dumps({"bits": bits, "weights": self.sizes[name], "errors": dict(self.errors.get(name, {}))})
            for name, bits in self.bits.items()
        )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text('{\n  "layers": {\n' + ",\n".join(layers) + "\n  }\n}\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BitAssignment:
        """Read what :meth:`save` wrote, edited or not.

        Raises:
            ValueError: it is not such a file; the message names the file and the layer.
        """
        try:
            layers = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
            read = {name: _read_layer(name, layer) for name, layer in layers.items()}
            return cls(
                {name: bits for name, (bits, _, _) in read.items()},
                {name: size for name, (_, size, _) in read.items()},
                {name: errors for name, (_, _, errors) in read.items()},
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f'{path} must hold {{"layers": {{name: {{"bits": ..., "weights": ...}}}}}}') from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _error(self, name: str) -> float:
        return self.errors.get(name, {}).get(self.bits[name], math.nan)

    def __str__(self) -> str:
        width = max(len("layer"), *map(len, self.bits))
        lines = [f"{'layer':<{width}}  {'weights':>10}  bits  error"]
        lines += [
            f"{name:<{width}}  {self.sizes[name]:>10,}  {bits:>4}  {self._error(name):.2g}"
            for name, bits in self.bits.items()
        ]
        total = sum(self.sizes.values())
        lines.append(
            f"{len(self.bits)} layers, {total:,} weights, {self.average_bits:.2f} bits on average "
            f"({total * self.average_bits / 8e6:.1f} MB); predicted error {self.predicted_error:.3g}"
        )
        return "\n".join(lines)


def _read_layer(name: str, layer: Any) -> tuple[Any, Any, dict[int, float]]:
    if not isinstance(layer, dict) or not {"bits", "weights"} <= set(layer) <= {"bits", "weights", "errors"}:
        raise ValueError(f'{name}: expected {{"bits": ..., "weights": ..., "errors": {{...}}}}, got {layer!r}')
    errors = layer.get("errors", {})
    if not isinstance(errors, dict) or not all(b.isdecimal() and isinstance(e, int | float) for b, e in errors.items()):
        raise ValueError(f"{name}: errors must map bits to numbers, got {errors!r}")
    return layer["bits"], layer["weights"], {int(bits): float(error) for bits, error in errors.items()}


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name}: the number of weights must be an int of at least 1, got {size!r}")


def assign_bits(
    errors: Errors, sizes: Mapping[str, int], average_bits: float | None = None, max_error: float | None = None
) -> BitAssignment:
    """Choose a width for each layer: the smallest summed error within a size, or the smallest size within an error.

    A multiple-choice knapsack, solved by dynamic programming over the size: a table holds, for each total size, the
    smallest error of the layers so far, and each layer extends it by each of its widths. The unit of size is the
    greatest common divisor of what the layers' choices cost, which keeps the table short for a transformer (its layers
    have few shapes), so the result is the optimum. Only if more than 2**18 entries were needed, the unit is larger and
    costs are rounded up: the budget still holds, and less than (layers / 2**18) of the span of sizes is left unused.

    Args:
        errors: layer name -> width -> error, as :func:`measure` returns it; a width that is no better than a narrower
            one is not chosen.
        sizes: layer name -> number of weights, for the same layers.
        average_bits: at most this many bits per weight.
        max_error: at most this sum of errors.

    Raises:
        TypeError, ValueError: not exactly one of the two limits; one that cannot be kept (the message says what can);
            malformed errors or sizes.
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
    return BitAssignment({name: bits[name] for name in errors}, {name: sizes[name] for name in errors}, errors)


def smallest_that_agrees(
    model: nn.Module, pixel_values: Tensor, config: QuantizationConfig, max_drop: float, steps: int = 5
) -> BitAssignment:
    """The smallest assignment whose model keeps the float model's top-1 class on all but ``max_drop`` % of pictures.

    Bisection over the average width. Pictures whose class changes bound the drop of accuracy from above, and no labels
    are needed; but these are the pictures that the model is calibrated on, so others may fare a little worse.

    Raises:
        ValueError: not a share of 0 to 100, or not even the widest choice keeps so many.
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop <= 100:
        raise ValueError(f"max_accuracy_drop is in percentage points, from 0 to 100; got {max_drop!r}")
    errors = measure(model, pixel_values, config)
    sizes = {name: model.get_submodule(name).get_parameter("weight").numel() for name in errors}

    def attempt(average_bits: float) -> tuple[BitAssignment, float]:
        assignment = assign_bits(errors, sizes, average_bits=average_bits)
        overrides = {
            glob.escape(name): {**_settings_of(config, name), "bits": bits} for name, bits in assignment.bits.items()
        }
        quantized, _ = convert(model, replace(config, overrides={**overrides, **config.overrides}), pixel_values)
        match = compare_models(model, quantized, pixel_values).top_k_match
        if match is None:
            raise ValueError("max_accuracy_drop needs a classifier; for other models give average_bits")
        return assignment, 100 * (1 - match)

    low, high = float(min(CHOICES)), float(max(CHOICES))
    best, drop = attempt(high)
    if drop > max_drop:
        raise ValueError(
            f"at {high:g} bits {drop:.2f}% of the {len(pixel_values)} pictures change their class already, "
            f"more than max_accuracy_drop={max_drop}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        assignment, drop = attempt(middle)
        if drop <= max_drop:
            best, high = assignment, middle
        else:
            low = middle
    return best


def _settings_of(config: QuantizationConfig, name: str) -> dict[str, Any]:
    """What an override of the user says of a layer, the widths aside."""
    settings = next((s for pattern, s in config.overrides.items() if fnmatch.fnmatchcase(name, pattern)), {})
    return {key: value for key, value in settings.items() if key != "bits"}


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
        _check_size(name, sizes[name])
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
