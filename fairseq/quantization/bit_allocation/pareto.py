"""Pareto: how well a model keeps its classes at many sizes, with one width for all layers and with mixed widths."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from fairseq.quantization.architectures.forward import evaluating
from fairseq.quantization.bit_allocation.pareto_plot import picture
from fairseq.quantization.bit_allocation.point import Point
from fairseq.quantization.bit_allocation.replay import batches, output_error, run
from fairseq.quantization.bit_allocation.search import Widths
from fairseq.quantization.bit_allocation.twins import stored_bytes
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert
from fairseq.quantization.evaluation.compare import agreement
from fairseq.quantization.evaluation.report import QuantizationReport
from fairseq.quantization.files import write_file
from fairseq.quantization.json_files import read_json, record

AVERAGES = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
BATCH_SIZE = 16


@dataclass(frozen=True)
class Pareto:
    """Size against agreement: ``print`` it, ``save`` it as JSON, ``plot`` it.

    Attributes:
        model: the name of its class.
        float_bytes: of the float model.
        calibrated, evaluated: how many pictures each point was calibrated on, and how many others it was judged by.
        points: as they were measured.
    """

    model: str
    float_bytes: int
    calibrated: int
    evaluated: int
    points: tuple[Point, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        """The points than which no other is at most as large and better, from small to large."""
        best: list[Point] = []
        finite = (point for point in self.points if math.isfinite(point.error))
        for point in sorted(finite, key=lambda point: (point.bytes, point.error)):
            if not best or point.error < best[-1].error:
                best.append(point)
        return tuple(best)

    def __str__(self) -> str:
        lines = [f"{'widths':<8}  {'bits':>5}  {'MB':>7}  {'agreement':>9}  {'error':>8}"]
        for point in sorted(self.points, key=lambda point: point.bytes):
            kept = "-" if point.agreement is None else f"{point.agreement:.1%}"
            lines.append(
                f"{'mixed' if point.mixed else 'one':<8}  {point.bits:>5.2f}  {point.bytes / 1e6:>7.2f}  {kept:>9}  "
                f"{point.error:>8.3g}"
            )
        lines.append(
            f"{self.model}, {self.float_bytes / 1e6:.1f} MB in float; calibrated on {self.calibrated} pictures, "
            f"compared with the float model on {self.evaluated} others"
        )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        write_file(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Pareto:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            content = read_json(path, finite=False)  # an error may be infinite
            points = tuple(record(Point, point) for point in content.pop("points"))
            return record(cls, content, points=points)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what Pareto.save writes: {error}") from error

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw size against agreement, or against the error where there are no classes.

        Args:
            path: of the picture; its suffix is the format, such as .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is not installed.
            FileNotFoundError: the folder does not exist.
            ValueError: matplotlib does not know the suffix.
        """
        write_file(path, picture(self.points, str(self).splitlines()[-1], Path(path).suffix[1:] or "png"))


def pareto(
    model: nn.Module,
    calibration: Tensor,
    evaluation: Tensor,
    config: QuantizationConfig,
    averages: Sequence[float] | None = None,
) -> Pareto:
    """Quantize ``model`` at every single width and at mixed ones, and see how far each is from the float model.

    Args:
        model: the float model; it stays as it is.
        calibration: pictures, (N, C, H, W).
        evaluation: others.
        config: all but the widths.
        averages: bits per weight of the mixed ones; None for those of :data:`AVERAGES` that the choices allow.

    Raises:
        TypeError, ValueError: an average that the choices do not allow, or as
            :class:`~fairseq.quantization.bit_allocation.search.Widths`.
    """
    widths = Widths(model, calibration, config)
    low, high = widths.span
    possible = [average for average in AVERAGES if low <= average <= high] if averages is None else averages
    mixed, choices = [widths.on_average(average) for average in possible], widths.twins.choices
    del widths  # the twins of all widths
    configs = [replace(config, bits=bits, execution="packed") for bits in choices]
    configs += [replace(config, overrides=chosen.overrides, execution="packed") for chosen in mixed]
    expected = _outputs(model, evaluation)
    points = []
    for own in tqdm(configs, desc="Quantizing at each size", unit="model", leave=False):
        quantized, report = convert(model, own, calibration)
        (got, classes), (wanted, _) = _outputs(quantized, evaluation), expected
        match = None
        if classes is not None:
            kept = (agreement(a, b, classes) * len(a) for a, b in zip(wanted, got, strict=True))
            match = math.fsum(kept) / len(evaluation)
        overrides = {} if own.overrides == config.overrides else dict(own.overrides)
        error = output_error(wanted, got, classes)
        points.append(Point(_average(report), stored_bytes(quantized), match, error, overrides))
    return Pareto(type(model).__name__, stored_bytes(model), len(calibration), len(evaluation), tuple(points))


def _average(report: QuantizationReport) -> float:
    """Bits per weight of the Linear layers that are quantized; of embeddings the widths were not chosen."""
    sizes = [(layer.bits or 0, math.prod(layer.shape)) for layer in report.quantized if layer.component != "embeddings"]
    return sum(bits * size for bits, size in sizes) / sum(size for _, size in sizes)


def _outputs(model: nn.Module, pixel_values: Tensor) -> tuple[list[Tensor], int | None]:
    """The outputs for some pictures, batch by batch, float64 on the CPU, and their dimension of classes."""
    with evaluating(model):
        found = [run(model, inputs) for inputs in batches(model, pixel_values, BATCH_SIZE)]
    return [output.cpu() for output, _ in found], found[0][1]
