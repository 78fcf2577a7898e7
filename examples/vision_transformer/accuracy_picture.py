#!/usr/bin/env python3
"""Draw accuracy against bits: what ``evaluate.py --json FILE`` measured, a line for each way to quantize.

    python examples/vision_transformer/evaluate.py ... --configs 8:channel 4:channel 3:channel --json rows.json
    python examples/vision_transformer/evaluate.py ... --calibration 128 --json rows.json
    python examples/vision_transformer/accuracy_picture.py rows.json --output accuracy.png

Of rows of the same settings the last one counts. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import UserError, run
from rows import read_rows

MEASURES = {
    "agreement": "pictures with the float model's class (%)",
    "divergence": "divergence from the float model's softmax",
}
COLORS = ("#999999", "#56b4e9", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#000000")
MARKERS = "osD^vP*X"


def way(row: dict[str, Any]) -> str:
    """How a row's model was quantized, in words, but for its bits."""
    pictures = row["calibration"]
    words = [f"{pictures} pictures" if pictures else "no pictures"]
    words += [] if row["method"] == "channel" else [f"per {row['method']}"]
    words += [f"groups of {row['group_size']}"] if row.get("group_size") else []
    words += ["rotated"] if row.get("rotated") else []
    words += [f"rounding {row['rounding']}"] if row.get("rounding", "auto") != "auto" else []
    words += [f"reconstructed ({row['reconstruct']} epochs)"] if row.get("reconstruct") else []
    if row.get("distill"):
        words.append(f"distilled ({row['distill']} epochs at {row.get('learning_rate')})")
    words += row.get("overrides") or []
    words += ["integers alone"] if row.get("arithmetic") == "integer" else []
    words += [f"functions {row['functions']}"] if row.get("functions", "default") != "default" else []
    words += [f"seed {row['seed']}"] if row.get("seed") else []
    activations, bits = row.get("activations", "dynamic"), row.get("activation_bits", 8)
    if activations == "none":
        words.append("weights only")
    elif (activations, bits) != ("dynamic", 8):
        words.append(f"{bits}-bit {activations} activations")
    return ", ".join(words)


def lines(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each way, in the order in which the ways came, from few bits to many."""
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(way(row), {})[row["bits"]] = row
    return {name: [of[bits] for bits in sorted(of)] for name, of in found.items()}


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Two plots beside each other, for the rows of one model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    plots = figure.subplots(1, 2)
    ways = lines(rows)
    for axes, (measure, label) in zip(plots, MEASURES.items(), strict=True):
        for i, (name, of) in enumerate(ways.items()):
            y = [row[measure] * (100 if measure == "agreement" else 1) for row in of]
            axes.plot([row["bits"] for row in of], y, label=name, color=COLORS[i % len(COLORS)],
                      marker=MARKERS[(i + i // len(COLORS)) % len(MARKERS)], markersize=5, linewidth=1.4)  # fmt: skip
        axes.set_xlabel("bits of the weights")
        axes.set_ylabel(label)
        axes.set_xticks(sorted({row["bits"] for row in rows}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    if all(row["divergence"] > 0 for row in rows):
        plots[1].set_yscale("log")
    plots[1].yaxis.set_major_formatter("{x:g}")
    plots[0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(f"{rows[0]['model']}: {rows[0]['evaluated']} pictures evaluated", fontsize=10)
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what evaluate.py --json has written")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .png")
    args = parser.parse_args()
    if args.output.suffix.lower() != ".png":
        raise UserError(f"--output {args.output}: its name must end in .png")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: must be a file in a folder that there is")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: uv pip install matplotlib")
    rows = [row for file in args.files for row in read_rows(file)]
    kinds = {(row["model"], row["evaluated"], row["evaluated_on"]) for row in rows}
    if len(kinds) != 1:
        found = (
            ", ".join(f"{model} on {count} pictures ({which})" for model, count, which in sorted(kinds)) or "no rows"
        )
        raise UserError(f"one picture shows one model on the same pictures, and there are {found}")
    draw(rows, args.output)
    shown = lines(rows)
    print(f"{args.output}: {sum(map(len, shown.values()))} of {len(rows)} rows, {len(shown)} ways")
    return 0


if __name__ == "__main__":
    run(main)
