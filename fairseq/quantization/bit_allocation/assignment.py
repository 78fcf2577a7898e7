"""BitAssignment: a bit width for each layer, chosen for a size or for an error, and kept in a file.

errors = measure(model, pixel_values, config)
sizes = {name: model.get_parameter(f"{name}.weight").numel() for name in errors}
assignment = assign_bits(errors, sizes, average_bits=4.5)
ViTQuantizer(overrides=assignment.overrides)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fairseq.quantization.bit_allocation.knapsack import Errors, check_errors, check_limit, check_size, choose_bits
from fairseq.quantization.config import merge_bits
from fairseq.quantization.files import write_file
from fairseq.quantization.json_files import read_json


@dataclass(frozen=True)
class BitAssignment:
    """A bit width for each layer; ``print`` it, ``save`` it, edit the file and ``load`` it again.

    Attributes:
        bits: layer name -> 2 to 8.
        sizes: layer name -> the number of weights.
        errors: layer name -> width -> the output error that was measured; {} where nothing is known.
        given: the user's own overrides, which ``overrides`` carries on.

    Raises:
        ValueError: what came and what is accepted, with the layer's name; an override in ``given`` that skips one of
            these layers or gives it another width.
    """

    bits: Mapping[str, int]
    sizes: Mapping[str, int]
    errors: Errors = field(default_factory=dict)
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

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
            check_size(name, self.sizes[name])
        self._check_given()

    def _check_given(self) -> None:
        """Each width comes through ``overrides``: an override of the user does not contradict it."""
        settings = self.given.values() if isinstance(self.given, Mapping) else [None]
        if not all(isinstance(own, Mapping) for own in settings):
            raise ValueError(f'overrides must map globs to settings, such as {{"*fc1": {{...}}}}; got {self.given!r}')
        overrides = self.overrides
        for name, bits in self.bits.items():
            own = next(own for pattern, own in overrides.items() if fnmatchcase(name, pattern))
            if own.get("skip") or own["bits"] != bits:
                what = "skips it" if own.get("skip") else f"says {own['bits']} bits"
                raise ValueError(f"{name}: an override in given {what}, and bits has {bits}; change one of the two")

    @property
    def average_bits(self) -> float:
        """Bits per weight, over all weights of these layers (scales and zero points not counted)."""
        return sum(bits * self.sizes[name] for name, bits in self.bits.items()) / sum(self.sizes.values())

    @property
    def predicted_error(self) -> float:
        """The sum of the layers' errors at their widths; NaN where one is not known."""
        return sum(self._error(name) for name in self.bits)

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """What ``ViTQuantizer(overrides=...)`` takes: the user's own, and for each of these layers its width, too."""
        return merge_bits(self.given, self.bits)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, a line per layer; ``bits`` is what to edit. A file is replaced as a whole or not at all.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        layers = {
            name: {"bits": bits, "weights": self.sizes[name], "errors": dict(self.errors.get(name, {}))}
            for name, bits in self.bits.items()
        }
        given = {pattern: dict(own) for pattern, own in self.given.items()}
        parts = [_lines("overrides", given)] if given else []
        text = "{\n" + ",\n".join([*parts, _lines("layers", layers)]) + "\n}\n"
        write_file(path, text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BitAssignment:
        """Read what :meth:`save` wrote, edited or not.

        Raises:
            ValueError: it is not such a file; the message names the file and the layer.
        """
        content = read_json(path, finite=False)  # an error may be infinite
        try:
            read = {name: _read_layer(name, layer) for name, layer in content["layers"].items()}
            return cls(
                {name: bits for name, (bits, _, _) in read.items()},
                {name: size for name, (_, size, _) in read.items()},
                {name: errors for name, (_, _, errors) in read.items()},
                content.get("overrides", {}),
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


def _lines(key: str, entries: Mapping[str, Any]) -> str:
    """An object in JSON, an entry a line."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())
    return f'  "{key}": {{\n{lines}\n  }}'


def _read_layer(name: str, layer: Any) -> tuple[Any, Any, dict[int, float]]:
    if not isinstance(layer, dict) or not {"bits", "weights"} <= set(layer) <= {"bits", "weights", "errors"}:
        raise ValueError(f'{name}: expected {{"bits": ..., "weights": ..., "errors": {{...}}}}, got {layer!r}')
    errors = layer.get("errors", {})
    if not isinstance(errors, dict) or not all(b.isdecimal() and isinstance(e, int | float) for b, e in errors.items()):
        raise ValueError(f"{name}: errors must map bits to numbers, got {errors!r}")
    return layer["bits"], layer["weights"], {int(bits): float(error) for bits, error in errors.items()}


def assign_bits(
    errors: Errors,
    sizes: Mapping[str, int],
    average_bits: float | None = None,
    max_error: float | None = None,
    given: Mapping[str, Mapping[str, Any]] | None = None,
) -> BitAssignment:
    """Choose a width for each layer: the smallest summed error within a size, or the smallest size within an error.

    The optimum; see :func:`~fairseq.quantization.bit_allocation.knapsack.choose_bits`.

    Args:
        errors: layer name -> width -> error, as :func:`measure` returns it; a width that is no better than a narrower
            one is not chosen.
        sizes: layer name -> number of weights, for the same layers.
        average_bits: at most this many bits per weight.
        max_error: at most this sum of errors.
        given: the user's own overrides, for the assignment to carry on.

    Raises:
        TypeError, ValueError: not exactly one of the two limits; one that cannot be kept (the message says what can);
            malformed errors or sizes; a chosen width that ``given`` contradicts.
    """
    if (average_bits is None) == (max_error is None):
        raise ValueError(f"pass exactly one of average_bits and max_error; got {average_bits!r} and {max_error!r}")
    key, limit = ("average_bits", average_bits) if max_error is None else ("max_error", max_error)
    check_limit(key, limit)
    check_errors(errors, sizes)
    costs = {name: {bits: bits * sizes[name] for bits in own} for name, own in errors.items()}
    budget = None
    if average_bits is not None:
        total = sum(sizes.values())
        low, high = (sum(f(own.values()) for own in costs.values()) / total for f in (min, max))
        if not low <= average_bits <= high:
            raise ValueError(
                f"average_bits must be from {low:g} to {high:g}, what the choices allow; got {average_bits}"
            )
        budget = math.floor(average_bits * total + 1e-6)
    return assignment(choose_bits(errors, costs, budget, max_error), errors, sizes, given)


def assignment(
    bits: Mapping[str, int],
    errors: Errors,
    sizes: Mapping[str, int],
    given: Mapping[str, Mapping[str, Any]] | None = None,
) -> BitAssignment:
    """The assignment of widths that were chosen; see :func:`assign_bits`."""
    return BitAssignment(bits, {name: sizes[name] for name in errors}, errors, given or {})
