"""The report as a page to look at: one HTML file that needs nothing else, from what was measured."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq.quantization.evaluation.layer_report import LayerReport
from fairseq.quantization.evaluation.report_plot import COLORS
from fairseq.quantization.files import write_file

TEMPLATE = "page.html"
NUMBERS = ("shape", "bits", "weight SQNR", "output SQNR", "block alone", "size")
"""Columns of the table that are aligned to the right."""
FASTER, SMALLER = 1.05, 0.95
"""From which ratio of times, and up to which of sizes, a model is said to be faster or smaller."""


@dataclass(frozen=True)
class Change:
    """A picture whose class is another in the quantized model.

    Attributes:
        picture: a data URL.
        name: of the picture.
        before, after: the first classes of either model, (name, probability).
    """

    picture: str
    name: str
    before: Sequence[tuple[str, float]]
    after: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Page:
    """What a page shows; an empty part is not there.

    Attributes:
        title: of the page.
        summary: sentences under it.
        figures: (what, value), the main ones.
        layers: rows of the table, and of its picture.
        shares: of each layer in the quantized model's bytes, 0 to 1.
        alone: by block, or layer outside of blocks, the change that it makes by itself, see
            :func:`~fairseq.quantization.evaluation.alone.errors_alone`.
        outputs: (output, relative error, measure, value).
        pictures: how many were compared.
        changes: pictures whose class changed, at most so many as are to be seen.
        changed: how many there are; None if the models have no classes.
        maps: (picture, before, after), data URLs.
        scatter: a data URL.
        others: (name, bytes, kept, milliseconds), rows beside the scatter plot.
        kept_in_float: why -> the names of layers.
        facts: (what, value): the command, versions, the machine.
    """

    title: str
    summary: Sequence[str]
    figures: Sequence[tuple[str, str]] = ()
    layers: Sequence[LayerReport] = ()
    shares: Sequence[float] = ()
    alone: Mapping[str, float] = field(default_factory=dict)
    outputs: Sequence[tuple[str, str, str, str]] = ()
    pictures: int = 0
    changes: Sequence[Change] = ()
    changed: int | None = None
    maps: Sequence[tuple[str, str, str]] = ()
    scatter: str = ""
    others: Sequence[tuple[str, str, str, str]] = ()
    kept_in_float: Mapping[str, Sequence[str]] = field(default_factory=dict)
    facts: Sequence[tuple[str, str]] = ()

    def html(self) -> str:
        """The page.

        Raises:
            ImportError: jinja2 is not installed.
        """
        try:
            jinja = importlib.import_module("jinja2")
        except ImportError as error:
            raise ImportError('the page needs jinja2: pip install -e ".[report]"') from error
        environment = jinja.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja.StrictUndefined
        )
        template = environment.from_string((Path(__file__).parent / TEMPLATE).read_text(encoding="utf-8"))
        text: str = template.render(
            page=self, columns=_columns(self), rows=_rows(self), bars=_bars(self), colors=COLORS, numbers=NUMBERS
        )
        return text

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all.

        Raises:
            FileNotFoundError: the folder does not exist.
            ImportError: jinja2 is not installed.
        """
        write_file(path, self.html().encode())


def summary(kept: str | None, size: float, speed: float | None, where: str, alone: Mapping[str, float]) -> list[str]:
    """What a quantized model is, in a sentence or two.

    Args:
        kept: "98.4% of the classes of 64 pictures"; None if nothing was compared.
        size: of the quantized model by the float one's.
        speed: the float model's time by the quantized one's, or None.
        where: it was measured.
        alone: see :class:`Page`.
    """
    said = [f"keeps {kept}"] if kept else []
    said.append(f"takes {size:.1%} of the memory")
    if speed is not None:
        said.append(f"is {speed:.1f}x faster {where}" if speed >= FASTER else f"is not faster {where} ({speed:.2f}x)")
    last = f" and {said[-1]}" if said[1:] else ""
    sentences = [f"It {', '.join([said[0], *said[1:-1]])}{last}."]
    if size > SMALLER and speed is not None and speed < FASTER:
        sentences.append("It will not help here: it is neither smaller nor faster.")
    worst = sorted(alone, key=lambda name: alone[name], reverse=True)[:3]
    if len(alone) > 3 and alone[worst[0]] > 0:
        sentences.append("By themselves, " + ", ".join(worst[:-1]) + f" and {worst[-1]} change the output most.")
    return sentences


def _columns(page: Page) -> list[tuple[str, str]]:
    """(title, what it is) of the columns that have something."""
    rows = range(len(page.layers))
    return [(title, why) for title, (why, cell) in COLUMNS.items() if any(cell(page, i)[0] for i in rows)]


def _rows(page: Page) -> list[list[tuple[str, Any]]]:
    titles = [title for title, _ in _columns(page)]
    return [[COLUMNS[title][1](page, i) for title in titles] for i in range(len(page.layers))]


def _bars(page: Page) -> list[dict[str, Any]]:
    """Of each part, its bar: the change by itself as a share of the largest, and the bits of its layers."""
    largest = max(page.alone.values(), default=0.0)
    bars = []
    for name, error in page.alone.items():
        inside = [layer.bits for layer in page.layers if (layer.block or layer.name) == name and layer.bits]
        bits = min(inside, default=None)
        bars.append({"name": name, "error": error, "width": error / largest if largest else 0.0, "bits": bits})
    return bars


def _number(name: str, style: str) -> Any:
    def cell(page: Page, i: int) -> tuple[str, Any]:
        value = getattr(page.layers[i], name)
        if value is None:
            return "", -math.inf
        return ("no error" if value == math.inf else format(value, style)), value

    return cell


def _text(name: str) -> Any:
    return lambda page, i: (str(getattr(page.layers[i], name) or ""),) * 2


def _alone(page: Page, i: int) -> tuple[str, Any]:
    layer = page.layers[i]
    value = page.alone.get(layer.block or layer.name)
    return ("", -1.0) if value is None else (f"{value:.2%}", value)


COLUMNS: dict[str, tuple[str, Any]] = {
    "layer": ("its name in the model", _text("name")),
    "part": ("attention, MLP, classifier or embeddings", _text("component")),
    "shape": (
        "outputs x inputs",
        lambda page, i: ("{}x{}".format(*page.layers[i].shape), math.prod(page.layers[i].shape)),
    ),
    "bits": ("of a weight; none in float", _number("bits", "d")),
    "scales": ("what shares a scale", _text("method")),
    "activations": ("how the input is rounded", _text("activations")),
    "weight SQNR": ("signal to noise of the weight, dB", _number("weight_sqnr", ".1f")),
    "output SQNR": ("signal to noise of the output on the calibration pictures, dB", _number("output_sqnr", ".1f")),
    "block alone": ("change of the model's output by this block alone", _alone),
    "size": (
        "share of the quantized model",
        lambda page, i: (f"{page.shares[i]:.1%}", page.shares[i]) if page.shares else ("", 0.0),
    ),
    "note": ("", lambda page, i: (page.layers[i].note or page.layers[i].skipped or "",) * 2),
}
"""Title -> what it is, and of the layer i its text and what it is sorted by."""
