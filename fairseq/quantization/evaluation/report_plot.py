"""The picture of a report's layers."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from fairseq.quantization.evaluation.layer_report import LayerReport

COLORS: dict[int | None, str] = {
    2: "#882255", 3: "#cc3311", 4: "#ee7733", 5: "#b8a31a", 6: "#009988", 7: "#33aadd", 8: "#0055aa", None: "#999999",
}  # fmt: skip
"""By bits, warm to cool; None is float."""
WEIGHT = {"marker": "o", "markersize": 5}
OUTPUT = {"marker": "D", "markersize": 4.5, "markerfacecolor": "white"}
EXACT = {"marker": ">", "markersize": 5}
WIDTH, HEAD, ROW = 12.0, 1.6, 0.155
"""In inches: the picture's width, and its height without layers and for each layer."""


def picture(layers: Sequence[LayerReport], shares: Sequence[float], title: str, suffix: str) -> bytes:
    """The content of a picture file: a row per layer, SQNR to the left, its share of the size to the right.

    matplotlib's global state (pyplot, the backend) stays untouched.

    Args:
        layers: at least one, top to bottom. Without any SQNR, only the sizes are drawn.
        shares: of the quantized model's bytes, 0 to 1, one for each layer.
        title: above the legend.
        suffix: a format that matplotlib writes, such as "png", "svg" or "pdf".

    Raises:
        ImportError, ValueError: matplotlib is missing, does not write such files, or there is nothing to draw.
    """
    if not layers:
        raise ValueError("the report has no layers to draw")
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install -e ".[plot]"') from error
    rows = len(layers)
    panels: list[tuple[Any, int]] = [(partial(_draw_share, shares=shares), 2)]
    if any(value is not None for layer in layers for value in (layer.weight_sqnr, layer.output_sqnr)):
        panels.insert(0, (_draw_sqnr, 3))
    figure = figure_module.Figure(figsize=(WIDTH, HEAD + ROW * rows), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.02)
    widths = [width for _, width in panels]
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, (draw, _) in zip(axes, panels):
        _prepare(panel, layers)
        draw(panel, layers)
    axes[0].set_yticks(range(rows), [layer.name for layer in layers], fontsize=7)
    axes[0].set_ylim(rows - 0.4, -0.6)
    entries = _legend(layers)
    figure.legend(
        handles=entries, title=title, title_fontsize=11, loc="outside upper center", ncols=len(entries),
        fontsize=9, columnspacing=1.4, frameon=False,
    )  # fmt: skip
    content = io.BytesIO()
    figure.savefig(content, format=suffix, dpi="figure")
    return content.getvalue()


def _prepare(panel: Any, layers: Sequence[LayerReport]) -> None:
    """Light bands for every other encoder block, and the scale above and below."""
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    for row, layer in enumerate(layers):
        if blocks.index(layer.block) % 2 == 0:
            panel.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", linewidth=0, zorder=0)
    panel.tick_params(axis="x", top=True, labeltop=True, labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color="#d9d9d9", linewidth=0.6, zorder=0.5)
    panel.spines[["left", "right"]].set_visible(False)


def _draw_sqnr(panel: Any, layers: Sequence[LayerReport]) -> None:
    """The two ratios of each layer, joined; an infinite one is an arrow at the right edge."""
    for row, layer in enumerate(layers):
        color = _color(layer.bits)
        values = [value for value in (layer.weight_sqnr, layer.output_sqnr) if value is not None]
        finite = [value for value in values if math.isfinite(value)]
        panel.plot(finite, [row] * len(finite), color=color, linewidth=1)
        for value, style in ((layer.weight_sqnr, WEIGHT), (layer.output_sqnr, OUTPUT)):
            if value in finite:
                panel.plot([value], [row], color=color, zorder=3, **style)
        if math.inf in values:
            edge = {"transform": panel.get_yaxis_transform(), "clip_on": False}
            panel.plot([1], [row], color=color, zorder=3, **EXACT, **edge)
    panel.set_xlabel("SQNR in dB", fontsize=9)


def _draw_share(panel: Any, layers: Sequence[LayerReport], shares: Sequence[float]) -> None:
    colors = [_color(layer.bits) for layer in layers]
    panel.barh(range(len(shares)), [100 * share for share in shares], height=0.7, color=colors, zorder=2)
    panel.set_xlabel("share of the quantized model's bytes in %", fontsize=9)


def _legend(layers: Sequence[LayerReport]) -> list[Any]:
    """The colours and markers that the picture has."""
    patch = importlib.import_module("matplotlib.patches").Patch
    line = importlib.import_module("matplotlib.lines").Line2D
    widths = {layer.bits for layer in layers}
    colors = [(bits, f"{bits} bits") for bits in sorted(bits for bits in widths if bits is not None)]
    entries = [patch(color=_color(bits), label=label) for bits, label in colors]
    if None in widths:
        entries.append(patch(color=_color(None), label="float"))
    weights, outputs = ([getattr(layer, f) for layer in layers] for f in ("weight_sqnr", "output_sqnr"))
    for label, style, shown in (
        ("weight", WEIGHT, any(v is not None for v in weights)),
        ("output", OUTPUT, any(v is not None for v in outputs)),
        ("no error", EXACT, math.inf in weights + outputs),
    ):
        if shown:
            entries.append(line([], [], color="#444444", linestyle="", label=label, **style))
    return entries


def _color(bits: int | None) -> str:
    return COLORS.get(bits, "black")
