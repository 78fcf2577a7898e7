"""Pictures: unlabelled pictures, whatever they come as, as the dataset that a trainer reads one by one."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fairseq.quantization.calibration.images import SUFFIXES

ACCEPTED = (
    "a float tensor (N, C, H, W), a folder of pictures, a list of paths, of PIL images or of float tensors (C, H, W), "
    'or a dataset whose items are one of those, {"pixel_values": (C, H, W)}, or a tuple that starts with one'
)


class Pictures(Dataset[dict[str, Tensor]]):
    """Items ``{"pixel_values": (C, H, W)}``, float32, decoded when they are asked for; labels are left out.

    Args:
        images: a float tensor (N, C, H, W), a folder (searched recursively, by name), a list of paths, of PIL images or
            of float tensors, or a dataset with a length whose items are of these kinds, mappings with "pixel_values",
            or tuples that start with a picture.
        processor: makes pixel values of PIL images and files, which are converted to RGB first.
        augment: each time another crop of the size of the picture, out of it with a border of an eighth reflected,
            and a flip from left to right half of the time, with torch's generator.

    Raises:
        TypeError: images of no such kind, or a processor that cannot be called.
        ValueError: there are none, or they need a processor. Of one picture, when it is read: it cannot be, is not
            finite, or not of three dimensions.
    """

    def __init__(self, images: Any, processor: Callable[..., Any] | None = None, augment: bool = False):
        self.images, self.processor, self.augment = _indexed(images), processor, augment
        if processor is not None and not callable(processor):
            raise TypeError(f"processor must be a callable image processor, got {type(processor).__name__}")
        if len(self.images) == 0:
            raise ValueError(f"there is no picture to train on in {_told(images)}; accepted is {ACCEPTED}")
        self[0]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = f"picture {index}"
        pixels = self._pixels(name, self.images[index])
        if pixels.ndim == 4 and len(pixels) == 1:
            pixels = pixels[0]
        if pixels.ndim != 3 or not pixels.is_floating_point():
            raise ValueError(f"{name} must be a float tensor (C, H, W), got {pixels.dtype} of {tuple(pixels.shape)}")
        if not bool(pixels.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite pixel values")
        return {"pixel_values": augmented(pixels.float()) if self.augment else pixels.float()}

    def _pixels(self, name: str, item: Any) -> Tensor:
        from PIL import Image, ImageOps

        if isinstance(item, tuple | list) and len(item):
            return self._pixels(name, item[0])
        if isinstance(item, Mapping) and "pixel_values" in item:
            return self._pixels(name, item["pixel_values"])
        if isinstance(item, Tensor):
            return item
        if not isinstance(item, Image.Image | str | os.PathLike):
            raise TypeError(f"{name} is {_told(item)}; accepted is {ACCEPTED}")
        if self.processor is None:
            raise ValueError(f"{name} is {_told(item)}, which needs the model's image processor: pass processor=...")
        try:
            with item if isinstance(item, Image.Image) else Image.open(item) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} ({_told(item)}) cannot be read as a picture: {error}") from error
        pixels: Tensor = self.processor(images=[upright], return_tensors="pt")["pixel_values"]
        return pixels


def augmented(pixels: Tensor) -> Tensor:
    """A random crop of its own size out of the picture with a reflected border, perhaps flipped: (C, H, W)."""
    height, width = pixels.shape[-2:]
    top, left = height // 8, width // 8
    padded = torch.nn.functional.pad(pixels[None], (left, left, top, top), mode="reflect")[0]
    y, x = (int(torch.randint(0, 2 * border + 1, ())) for border in (top, left))
    crop = padded[:, y : y + height, x : x + width]
    return crop.flip(-1) if bool(torch.rand(()) < 0.5) else crop


def _indexed(images: Any) -> Sequence[Any]:
    if isinstance(images, Tensor):
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"pictures as a tensor are of floats, (N, C, H, W); got {_told(images)}")
        return images  # type: ignore[return-value]
    if isinstance(images, str | os.PathLike):
        folder = Path(images)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder of pictures; accepted is {ACCEPTED}")
        found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if isinstance(images, Mapping) or not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise TypeError(f"pictures to train on must be {ACCEPTED}; got {_told(images)}")
    found_images: Sequence[Any] = images
    return found_images


def hold_back(pictures: int, count: Any, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the pictures to train on, in order, and of ``count`` others, drawn at random.

    Raises:
        TypeError, ValueError: ``count`` is not a number from 0 to below that of the pictures.
    """
    if isinstance(count, bool) or not isinstance(count, numbers.Integral):
        raise TypeError(f"held_back must be a number of pictures, or pictures; got {count!r}")
    if not 0 <= (count := int(count)) < pictures:
        raise ValueError(f"held_back must be from 0 to {pictures - 1}, as there are {pictures} pictures; got {count}")
    order = torch.randperm(pictures, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[count:]), order[:count]


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return repr(str(value)) if isinstance(value, str | os.PathLike) else f"a {type(value).__name__}"
