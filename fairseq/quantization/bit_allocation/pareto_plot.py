"""The picture of size against agreement."""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq.quantization.bit_allocation.point import Point

KINDS = {
    False: ("one width for all layers", "#999999", "o"),
    True: ("a width for each layer", "#0055aa", "D"),
}


def check_format(path: Path) -> None:
    """See whether such a picture can be drawn, before it takes minutes to measure what is on it.

    Raises:
        ImportError, ValueError: matplotlib is missing, or does not write files of such a name.
    """
    known = _matplotlib("backend_bases").FigureCanvasBase.filetypes
    if path.suffix and path.suffix[1:] not in known:
        raise ValueError(f"{path}: a picture must be one of {', '.join(f'.{kind}' for kind in sorted(known))}")


def picture(points: Sequence[Point], title: str, suffix: str) -> bytes:
    """The content of a picture file: a line for each kind of widths, a mark and its bits for each point.

    matplotlib's global state (pyplot, the backend) stays untouched.

    Args:
        points: at least one. Where one has no agreement, the error is drawn.
        title: below the picture.
        suffix: a format that matplotlib writes, such as "png", "svg" or "pdf".

    Raises:
        ImportError, ValueError: matplotlib is missing, does not write such files, or there is nothing to draw.
    """
    if not points:
        raise ValueError("there is no point to draw")
    figure = _matplotlib("figure").Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    classes = all(point.agreement is not None for point in points)
    for mixed, (label, color, marker) in KINDS.items():
        own = sorted((point for point in points if point.mixed == mixed), key=lambda point: point.bytes)
        if not own:
            continue
        x = [point.bytes / 1e6 for point in own]
        y = [100 * (point.agreement or 0.0) if classes else point.error for point in own]
        axes.plot(x, y, color=color, marker=marker, markersize=5, linewidth=1.4, label=label)
        for point, at, height in zip(own, x, y, strict=True):
            axes.annotate(
                f"{point.bits:.3g}", (at, height), textcoords="offset points", xytext=(0, 7 if mixed else -13),
                ha="center", fontsize=8, color=color,
            )  # fmt: skip
    axes.set_xlabel(f"size of the weights in MB (marks: bits per weight)\n{title}", fontsize=9)
    axes.set_ylabel("pictures with the float model's class in %" if classes else "error")
    if not classes:
        axes.set_yscale("log")
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right" if classes else "upper right")
    content = io.BytesIO()
    figure.savefig(content, format=suffix, dpi="figure")
    return content.getvalue()


def _matplotlib(part: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{part}")
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install -e ".[plot]"') from error
