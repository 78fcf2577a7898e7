"""The pictures of a report page: sizes against what is kept, hidden states as colours, and thumbnails, as data URLs."""

from __future__ import annotations

import base64
import importlib
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.families import component_of, tower_of
from fairseq.quantization.architectures.forward import call, evaluating, vision_config
from fairseq.quantization.architectures.layers import block_of
from fairseq.quantization.architectures.recognition import family_of
from fairseq.quantization.evaluation.compare import moved

THUMBNAIL = 128
"""Pixels of the longer side of a picture on the page."""
GREY = "#808080"
"""Of text in figures, which is read on light and on dark."""


class Point(NamedTuple):
    """A model among others: its name, megabytes, share of classes (or least measure) kept, and milliseconds."""

    name: str
    megabytes: float
    kept: float
    milliseconds: float | None


def scatter(points: Sequence[Point], what: str) -> str:
    """Size against what is kept, each point with its name and time; an SVG data URL.

    Args:
        points: the float model first.
        what: is kept, for the axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError('the page needs matplotlib: pip install -e ".[report]"') from error
    figure = figure_module.Figure(figsize=(7.2, 3.6), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for number, point in enumerate(points):
        axes.plot([point.megabytes], [100 * point.kept], "o" if number else "s", color=f"C{number}", markersize=9)
        time = "" if point.milliseconds is None else f"\n{point.milliseconds:.1f} ms"
        right = point.megabytes > 0.6 * max(p.megabytes for p in points)
        axes.annotate(
            point.name + time, (point.megabytes, 100 * point.kept), (-9 if right else 9, -4),
            textcoords="offset points", ha="right" if right else "left", va="top", fontsize=9, color=GREY,
            parse_math=False,
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.margins(y=0.25)
    axes.set_xlabel("MB in memory", color=GREY)
    axes.set_ylabel(f"{what}, %", color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    return data_url(content.getvalue(), "image/svg+xml")


def data_url(content: bytes, kind: str) -> str:
    """A file within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(picture: Any) -> str:
    """A PIL image, small, as JPEG."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=82)
    return data_url(content.getvalue(), "image/jpeg")


def hidden_states(model: nn.Module, pixel_values: Tensor, block: str) -> Tensor | None:
    """What a block gives for each patch: (N, rows, columns, width), float32 on the CPU; None if there is no such map.

    Tokens before the patches, such as the class token, are left out; models with tokens behind them have none.
    """
    if getattr(vision_config(model), "num_detection_tokens", 0):
        return None
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor):
            seen.append(value)

    hook = model.get_submodule(block).register_forward_hook(look)
    try:
        with evaluating(model), torch.no_grad():
            call(model, moved(model, pixel_values))
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].ndim != 3 or len(seen[0]) != len(pixel_values):
        return None
    tokens = seen[0].float().cpu()
    if not tokens.isfinite().all():
        return None
    grid = _grid(model, tokens.shape[1], pixel_values.shape)
    return None if grid is None else tokens[:, -grid[0] * grid[1] :].unflatten(1, grid)


def last_block(quantized: nn.Module) -> str | None:
    """The name of the last encoder block of the vision tower that holds packed layers."""
    family = family_of(quantized)
    names = (
        block_of(name)
        for name, module in quantized.named_modules()
        if isinstance(module, PackedLinear)
        and tower_of(name, family) == "vision"
        and component_of(name, family) in ("attention", "mlp")
    )
    return next(iter(reversed([name for name in names if name is not None])), None)


def as_colours(expected: Tensor, got: Tensor) -> tuple[str, str]:
    """The first three principal components of a map (rows, columns, width), as colours, and of another in the same.

    The components, their mean and their range are those of the first.
    """
    rows, columns, width = expected.shape
    flat = expected.reshape(-1, width).double()
    mean = flat.mean(0)
    axes = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3]
    axes = F.pad(axes, (0, 0, 0, 3 - len(axes)))  # of a map of one or two patches
    first, second = (((x.reshape(-1, width).double() - mean) @ axes.T) for x in (expected, got))
    low, high = first.amin(0), first.amax(0)
    urls = []
    for values in (first, second):
        colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(255).round().byte()
        image = importlib.import_module("PIL.Image").fromarray(colours.view(rows, columns, -1)[..., :3].numpy(), "RGB")
        scale = max(1, THUMBNAIL // max(rows, columns))
        content = io.BytesIO()
        image.resize((columns * scale, rows * scale), 0).save(content, format="PNG")
        urls.append(data_url(content.getvalue(), "image/png"))
    return urls[0], urls[1]


def _grid(model: nn.Module, tokens: int, shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of patches among so many tokens."""
    patch = getattr(vision_config(model), "patch_size", None)
    if isinstance(patch, int) and 0 < (shape[-2] // patch) * (shape[-1] // patch) <= tokens:
        return shape[-2] // patch, shape[-1] // patch
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None
