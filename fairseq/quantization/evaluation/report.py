"""QuantizationReport: what a quantization did, layer by layer and in bytes; as text, table, JSON, CSV and picture."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fairseq
from fairseq.quantization.evaluation.layer_report import LayerReport
from fairseq.quantization.evaluation.page import Page
from fairseq.quantization.evaluation.report_plot import picture
from fairseq.quantization.files import write_file
from fairseq.quantization.json_files import read_json, record

__all__ = ["LayerReport", "QuantizationReport", "megabytes"]

MEASURES = ("weight_sqnr", "output_sqnr", "clip", "outlier_ratio", "reconstructed")


@dataclass(frozen=True)
class QuantizationReport:
    """What happened to a model; ``print`` it, or its ``table()``.

    Attributes:
        layers: every Linear of the model, in order; before them the embeddings, if those were to be quantized.
        bytes_before: what all parameters and buffers of the original model take in memory.
        bytes_after: the same of the quantized model.
        execution: "packed", or "emulated", which needs the float weights and makes nothing smaller.
        fused_blocks: encoder blocks that run as one native call each.
        not_fused: encoder block -> why it runs layer by layer; empty where nobody asked for a fused one.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    execution: str = "packed"
    fused_blocks: int = 0
    not_fused: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.skipped is None)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.skipped is not None)

    def share(self, layer: LayerReport) -> float:
        """Which part of the quantized model's bytes is this layer, 0 to 1."""
        return layer.bytes_after / self.bytes_after

    def __str__(self) -> str:
        settings = Counter(f"{layer.bits}-bit {layer.method}" for layer in self.quantized)
        components = Counter(layer.component for layer in self.quantized)
        embeddings = components["embeddings"]
        lines = [
            f"Quantized {len(self.quantized) - embeddings} linear layers"
            + (f" and {embeddings} embeddings" if embeddings else "")
            + (f": {_counts(settings)} ({_counts(components)})" if self.quantized else "")
        ]
        used = [(layer.granularity, layer.range_search) for layer in self.quantized if layer.granularity is not None]
        if used:
            ranges = (f"{count} per {grain} by {search}" for (grain, search), count in Counter(used).items())
            lines.append(f"Ranges: {', '.join(ranges)}")
        for reason, count in Counter(layer.skipped for layer in self.skipped).items():
            names = [layer.name for layer in self.skipped if layer.skipped == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"Left {count} in float, {reason}: {shown}")
        notes = Counter(layer.note for layer in self.layers if layer.note is not None).most_common()
        if notes:
            shown = "; ".join(f"{note} ({count} layer{'s'[: count > 1]})" for note, count in notes[:3])
            lines.append(f"Notes: {shown}" + ("; ..." if len(notes) > 3 else ""))
        if self.fused_blocks:
            lines.append(f"Fused {self.fused_blocks} encoder blocks: one native call each on the CPU")
        for reason, count in Counter(self.not_fused.values()).items():
            first = next(name for name, why in self.not_fused.items() if why == reason)
            blocks = f"{count} encoder block{'s'[: count > 1]}"
            lines.append(f"Not fused: {blocks} ({first}{', ...'[: 5 * (count > 1)]}): {reason}")
        lines.append(self.size())
        return "\n".join(lines)

    def size(self) -> str:
        """One line: the model's size before and after."""
        size = f"Model: {megabytes(self.bytes_before)} before, {megabytes(self.bytes_after)} after"
        if self.execution == "packed":
            return size + f" ({self.bytes_after / self.bytes_before - 1:+.1%})"
        return size + ": emulated, with float weights"

    def table(self) -> str:
        """The layers as aligned text, one a line; columns that hold nothing are left out.

        SQNR is in dB, ``size`` the layer's share of the quantized model, and the last column the note of a layer or why
        it was left in float.
        """
        columns = []
        for title, (align, cell) in COLUMNS.items():
            cells = [cell(self, layer) for layer in self.layers]
            if any(text is not None for text in cells):
                blank = "" if title == "note" else "-"
                texts = [title, *(blank if text is None else text for text in cells)]
                columns.append([f"{text:{align}{max(map(len, texts))}}" for text in texts])
        return "\n".join("  ".join(row).rstrip() for row in zip(*columns))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, one layer a line; :meth:`from_json` reads it.

        A layer has no entry for what is None. An infinite SQNR (nothing was lost) is null, as JSON has no infinity.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        layers = [
            {key: _to_json(value) for key, value in asdict(layer).items() if value is not None} for layer in self.layers
        ]
        head = {
            key: getattr(self, key) for key in ("execution", "fused_blocks", "not_fused", "bytes_before", "bytes_after")
        }  # fmt: skip
        lines = ",\n".join(f"    {json.dumps(layer, allow_nan=False)}" for layer in layers)
        text = json.dumps(head, indent=2)[:-2] + f',\n  "layers": [\n{lines}\n  ]\n}}\n'
        write_file(path, text.encode())

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> QuantizationReport:
        """The report that :meth:`to_json` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            content = read_json(path)
            layers = tuple(
                record(LayerReport, {key: _from_json(key, value) for key, value in layer.items()})
                for layer in content.pop("layers")
            )
            found = record(cls, content, layers=layers)
            if min(found.bytes_before, found.bytes_after) < 1:
                raise ValueError("a model has at least one byte")
            return found
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a report that to_json wrote: {error}") from error

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write CSV with a header and one layer a row; an empty cell is None, ``inf`` an infinite SQNR.

        The columns are those of :class:`LayerReport`, with ``out_features`` and ``in_features`` for ``shape``, and
        ``share`` of the quantized model's bytes, 0 to 1.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        rows = []
        for layer in self.layers:
            row = asdict(layer)
            row["out_features"], row["in_features"] = row.pop("shape")
            rows.append({**row, "share": self.share(layer)})
        writer.writerow(rows[0] if rows else [])
        writer.writerows(row.values() for row in rows)
        write_file(path, text.getvalue().encode())

    def html(self, path: str | os.PathLike[str]) -> None:
        """Write a page to look at: the table, which can be sorted, and what stayed in float; one file, no network.

        ``fairseq-vit report`` makes one with pictures, times and what each block changes by itself.

        Raises:
            ImportError: jinja2 is not installed.
            FileNotFoundError: the folder does not exist.
        """
        Page(
            title="Quantization report",
            summary=[f"{line}." for line in str(self).splitlines() if line.startswith(("Quantized", "Fused", "Model"))],
            layers=self.layers,
            shares=[self.share(layer) for layer in self.layers],
            kept_in_float=self.kept_in_float,
            facts=[("fairseq", fairseq.__version__)],
        ).write(path)

    @property
    def kept_in_float(self) -> dict[str, list[str]]:
        """Why layers were left in float -> their names."""
        found: dict[str, list[str]] = {}
        for layer in self.skipped:
            found.setdefault(str(layer.skipped), []).append(layer.name)
        return found

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the layers, top to bottom: bits as colour, SQNR of weight and output, share of the size.

        Args:
            path: of the picture; its suffix is the format, such as .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is not installed.
            FileNotFoundError: the folder does not exist.
            ValueError: matplotlib does not know the suffix, or the report has no layers.
        """
        shares = [self.share(layer) for layer in self.layers]
        write_file(path, picture(self.layers, shares, self.size(), Path(path).suffix[1:] or "png"))


def megabytes(count: int) -> str:
    """Bytes as text, in units of 10^6."""
    return f"{count / 1e6:.1f} MB"


def _counts(counter: Counter[str] | Counter[str | None]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.items())


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if value == math.inf else str(value)
    return value


def _from_json(key: str, value: Any) -> Any:
    if key in MEASURES:
        return math.inf if value is None else float(value)
    return tuple(value) if key == "shape" else value


def _number(field: str, style: str) -> Callable[[QuantizationReport, LayerReport], str | None]:
    def cell(report: QuantizationReport, layer: LayerReport) -> str | None:
        value = getattr(layer, field)
        return None if value is None else format(value, style)

    return cell


COLUMNS: dict[str, tuple[str, Callable[[QuantizationReport, LayerReport], str | None]]] = {
    "layer": ("<", lambda report, layer: layer.name),
    "component": ("<", lambda report, layer: layer.component),
    "shape": (">", lambda report, layer: f"{layer.shape[0]}x{layer.shape[1]}"),
    "bits": (">", _number("bits", "d")),
    "method": ("<", lambda report, layer: layer.method),
    "granularity": ("<", lambda report, layer: layer.granularity),
    "range": ("<", lambda report, layer: layer.range_search),
    "rounding": ("<", lambda report, layer: layer.rounding),
    "activations": ("<", lambda report, layer: layer.activations),
    "weight SQNR": (">", _number("weight_sqnr", ".1f")),
    "output SQNR": (">", _number("output_sqnr", ".1f")),
    "error left": (">", _number("reconstructed", ".0%")),
    "clip": (">", _number("clip", ".3f")),
    "outliers": (">", _number("outlier_ratio", ".1f")),
    "size": (">", lambda report, layer: f"{report.share(layer):.1%}"),
    "note": ("<", lambda report, layer: layer.note or layer.skipped),
}
"""The columns of ``table()``: title -> alignment, text of a cell."""
