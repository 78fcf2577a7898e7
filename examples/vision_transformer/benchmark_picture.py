"""The picture of a benchmark: what each configuration costs and gives, and how near it comes to the roofline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLORS = {"8": "tab:blue", "4": "tab:orange"}  # by the first letter of a configuration's name
Point = tuple[float, float, float, str]  # x, y, radius in dots of 1/72 inch, text


def draw(result: dict[str, Any], file: Path) -> None:
    """Write a .png of what ``benchmark.py`` measured: two plots, one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 10), dpi=150, layout="constrained")
    canvas, plots = FigureCanvasAgg(figure), figure.subplots(2)
    points = [draw_speed(plots[0], result), draw_roofline(plots[1], result)]
    for axes in plots:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    figure.set_layout_engine("none")
    for axes, named in zip(plots, points, strict=True):
        label(axes, named, canvas.get_renderer())
    figure.savefig(file, format="png")


def draw_speed(axes: Any, result: dict[str, Any]) -> list[Point]:
    """Accuracy against speed with the size as the area of a point; without accuracy, size against speed."""
    batch = max(result["batches"], key=int)
    timings = result["batches"][batch]
    fixed, accuracy = result["configurations"], result["pictures"] > 0
    megabytes = {name: fixed[name]["weight_bytes"] / 1e6 for name in timings}
    points = []
    for name, timing in timings.items():
        x, y = timing["images_per_second"], 100 * fixed[name]["top1"] if accuracy else megabytes[name]
        area = 900 * megabytes[name] / max(megabytes.values()) if accuracy else 90
        axes.scatter(x, y, area, color=color(name), alpha=0.75, linewidths=0)
        points.append((x, y, math.sqrt(area) / 2, f"{name}\n{megabytes[name]:.1f} MB" if accuracy else name))
    axes.margins(0.2)
    machine = result["machine"]
    title = f"{result['model']}: {machine['processor']}, batch {batch}, threads: {machine['threads']}"
    axes.set_xlabel("images per second")
    axes.set_ylabel(f"top-1 accuracy, {result['pictures']} pictures (%)" if accuracy else "weights (MB)")
    axes.set_title(title + "\nthe area of a point is the size of the weights" * accuracy, size=9)
    if not accuracy:
        axes.set_ylim(0, 1.15 * max(megabytes.values()))
    return points


def draw_roofline(axes: Any, result: dict[str, Any]) -> list[Point]:
    """Operations of the Linear layers per second against those per byte of weights, under the machine's two limits.

    A configuration is a line from the smallest to the largest batch, whose point is the largest and has its name.
    """
    machine, batches = result["machine"], sorted(result["batches"], key=int)
    peak, bandwidth = machine["int8_peak_tops"], machine["memory_gb_per_second"]  # Tera-operations, GB a second
    points, lines = [], []
    for name, fixed in result["configurations"].items():
        per_byte = [int(batch) * result["operations_per_picture"] / fixed["weight_bytes"] for batch in batches]
        speeds = [result["batches"][batch][name]["images_per_second"] for batch in batches]
        reached = [speed * result["operations_per_picture"] / 1e12 for speed in speeds]
        sizes = [90 if batch == batches[-1] else 30 for batch in batches]
        axes.plot(per_byte, reached, color=color(name), alpha=0.4)
        axes.scatter(per_byte, reached, sizes, color=color(name), alpha=0.75, linewidths=0)
        points.append((per_byte[-1], reached[-1], math.sqrt(sizes[-1]) / 2, name))
        lines += zip(per_byte, reached, strict=True)
    ridge = 1000 * peak / bandwidth  # operations per byte, from which on memory is no limit
    left, right = 0.5 * min(ridge, *(x for x, _ in lines)), 4 * max(ridge, *(x for x, _ in lines))
    axes.plot([left, ridge, right], [bandwidth * left / 1000, peak, peak], color="black", lw=1.2)
    axes.annotate(f"{peak:.2f} TOPS: {machine['int8_peak_of']}", (right, peak), xytext=(0, 4),
                  textcoords="offset points", ha="right", size=8)  # fmt: skip
    axes.annotate(f"memory: {bandwidth:.1f} GB/s", (left, bandwidth * left / 1000), xytext=(6, -8),
                  textcoords="offset points", va="top", size=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(0.5 * min(y for _, y in lines), 2 * peak))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("operations of the Linear layers per byte of weights")
    axes.set_ylabel("Tera-operations per second")
    kernels = machine["instruction_set"] or "no native kernels"
    sizes_of = "batch " + (batches[0] if len(batches) == 1 else f"{batches[0]} (small) to {batches[-1]} (large)")
    axes.set_title(f"roofline: {kernels}, threads: {machine['threads']}, {sizes_of}", size=9)
    return points


def color(name: str) -> str:
    """Of a configuration, by its bits."""
    return COLORS.get(name[0], "tab:gray")


def label(axes: Any, points: list[Point], renderer: Any) -> None:
    """Write each text by its point (x, y, radius in dots of 1/72 inch), where it covers no point and no other text."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    taken, dot = [], axes.figure.dpi / 72
    for x, y, radius, _ in points:
        (left, bottom), r = axes.transData.transform((x, y)), radius * dot
        taken.append(Bbox.from_extents(left - r, bottom - r, left + r, bottom + r))
    sides = [(1, 0), (0, 1), (0, -1), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7)]
    spots = [(gap, *side) for gap in (2, 10, 22, 36, 52, 70) for side in sides]
    for x, y, radius, text in points:
        for gap, dx, dy in spots:
            note = axes.annotate(
                text, (x, y), xytext=((radius + gap) * dx, (radius + gap) * dy), textcoords="offset points", size=8,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                arrowprops={"arrowstyle": "-", "color": "gray", "lw": 0.6, "shrinkB": 0} if gap > 10 else None,
            )  # fmt: skip
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)  # without its line
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 < box.y1 < axes.bbox.y1
            if (gap, dx, dy) == spots[-1] or (inside and not any(box.overlaps(other) for other in taken)):
                break
            note.remove()
        taken.append(box)
