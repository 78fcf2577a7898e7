"""The forms in which models take pictures, beside (N, C, H, W): cut into patches, or several for each prompt; and back.

SigLIP 2 takes (N, patches, values) and the shape of each; Qwen2-VL the patches of all pictures in a row, by squares of
those that it merges, and the same; Idefics 3 and SmolVLM (prompts, pictures, C, H, W), with empty ones where a prompt
has fewer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """How a model that takes patches in a row cuts them: channels, patches to a side of a square, frames of a film."""

    channels: int = 3
    merge: int = 1
    frames: int = 1

    @classmethod
    def of(cls, config: Any) -> Form:
        """By the config of a vision tower."""
        names = ("num_channels", "in_channels", "in_chans")
        channels = next((n for name in names if isinstance(n := getattr(config, name, None), int)), 3)
        return cls(channels, getattr(config, "spatial_merge_size", 1), getattr(config, "temporal_patch_size", 1))


def in_patches(pixel_values: Tensor, size: int) -> dict[str, Tensor]:
    """(N, C, H, W) -> pixel_values (N, patches, size * size * C), their mask, and spatial_shapes (N, 2).

    Sides are shortened to multiples of ``size``.
    """
    n, channels, height, width = pixel_values.shape
    rows, columns = height // size, width // size
    cut = pixel_values[..., : rows * size, : columns * size].reshape(n, channels, rows, size, columns, size)
    patches = cut.permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, -1)
    mask = torch.ones(n, rows * columns, dtype=torch.int32, device=pixel_values.device)
    shapes = torch.tensor([[rows, columns]], device=pixel_values.device).repeat(n, 1)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def in_a_row(pixel_values: Tensor, size: int, form: Form) -> dict[str, Tensor]:
    """(N, C, H, W) -> pixel_values (N * patches, C * frames * size * size) and image_grid_thw (N, 3).

    Sides are shortened to multiples of ``size * form.merge``, and a picture is repeated to all frames of a film.
    """
    merge, frames = form.merge, form.frames
    n, channels, height, width = pixel_values.shape
    rows, columns = (side // (size * merge) for side in (height, width))
    cut = pixel_values[..., : rows * merge * size, : columns * merge * size]
    cut = cut.reshape(n, channels, rows, merge, size, columns, merge, size)
    patches = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, frames, -1, -1)
    grid = torch.tensor([[1, rows * merge, columns * merge]], device=pixel_values.device).repeat(n, 1)
    return {"pixel_values": patches.reshape(n * rows * merge * columns * merge, -1), "image_grid_thw": grid}


def in_batches(inputs: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Inputs of pictures, ``size`` pictures at a time, in the form in which they are."""
    grid = inputs.get("image_grid_thw")
    if grid is None:
        for start in range(0, len(inputs["pixel_values"]), size):
            yield {name: x[start : start + size] for name, x in inputs.items()}
        return
    ends = grid.prod(1).cumsum(0).tolist()
    for start in range(0, len(grid), size):
        rows = slice(ends[start - 1] if start else 0, ends[min(start + size, len(grid)) - 1])
        yield {"pixel_values": inputs["pixel_values"][rows], "image_grid_thw": grid[start : start + size]}


def pictures_of(inputs: Mapping[Any, Any], form: Form) -> list[Tensor] | None:
    """What a processor made, as pictures (C, H, W), of a film its first frame; None if it is in no form of these.

    Raises:
        ValueError: image_grid_thw and the patches do not go together.
    """
    values, grid = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    if not isinstance(values, Tensor):
        return None
    if values.ndim == 2 and isinstance(grid, Tensor):
        counts = grid.prod(1).tolist()
        square = values.shape[1] / (form.channels * form.frames)
        if sum(counts) != len(values) or math.isqrt(int(square)) ** 2 != square:
            raise ValueError(
                f"pixel_values of shape {tuple(values.shape)} are no patches of {form.channels} channels and "
                f"{form.frames} frames for image_grid_thw {grid.tolist()}"
            )
        sizes = grid[:, 1:].tolist()
        return [_joined(patches, h, w, form) for patches, (h, w) in zip(values.split(counts), sizes, strict=True)]
    if values.ndim == 5:
        return [picture for picture in values.flatten(0, 1) if bool((picture != 0).any())]
    return None


def _joined(patches: Tensor, rows: int, columns: int, form: Form) -> Tensor:
    """The patches of one picture in a row -> (C, H, W)."""
    channels, merge, frames = form
    size = math.isqrt(patches.shape[1] // (channels * frames))
    cut = patches[: rows * columns].reshape(
        rows // merge, columns // merge, merge, merge, channels, frames, size, size
    )[:, :, :, :, :, 0]  # fmt: skip
    return cut.permute(4, 0, 2, 5, 1, 3, 6).reshape(channels, rows * size, columns * size)
