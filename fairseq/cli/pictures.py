"""Pictures in folders, with and without labels, read when they are needed; their mistakes are those of a person."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from fairseq.cli.output import UserError, first_line
from fairseq.quantization.architectures.forward import vision_config
from fairseq.quantization.calibration.images import SUFFIXES

Reader = Callable[[], Image.Image]


def read_image(source: Any, name: str) -> Image.Image:
    """Decode one picture to RGB; ``source`` is a path or an open file."""
    try:
        image = ImageOps.exif_transpose(Image.open(source))  # a phone's picture, upright
        if image.mode.startswith("I"):  # 16 bits a pixel
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except UnidentifiedImageError:  # its text holds the address of an open file
        raise UserError(f"{name}: not a readable picture") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{name}: not a readable picture ({first_line(error)})") from None


def pictures_in(folder: Path) -> list[Reader]:
    """All pictures in a folder and below it, in the order of their names."""
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"--images {folder}: no picture in it")
    return [functools.partial(read_image, file, str(file)) for file in files]


def labelled_images(folder: Path, table: Path, classes: int) -> tuple[list[Reader], Tensor]:
    """Pictures named in a CSV with the columns file and class_index, and their labels, int64 of shape (N,)."""
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    try:
        with table.open(newline="", encoding="utf-8-sig") as opened:  # with or without a byte order mark
            reader = csv.DictReader(opened, skipinitialspace=True)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {table}: {first_line(error)}") from None
    if not rows or not {"file", "class_index"} <= set(columns):
        raise UserError(
            f"--labels {table}: needs the columns file and class_index, and at least one row; "
            f"it has {', '.join(columns) or 'no columns'} and {len(rows)} rows"
        )
    labels = []
    for number, row in enumerate(rows, start=2):
        text, file = (row["class_index"] or "").strip(), row["file"] or ""
        if not text.isdecimal() or int(text) >= classes:
            raise UserError(
                f"--labels {table}, line {number}: class_index must be from 0 to {classes - 1}, got {text!r}"
            )
        labels.append(int(text))
        if not (folder / file).is_file():
            raise UserError(f"--labels {table}, line {number}: {folder / file} is not a file")
    files = [folder / row["file"] for row in rows]
    return [functools.partial(read_image, file, str(file)) for file in files], torch.tensor(labels)


def batches(images: Sequence[Reader], processor: Any, size: int) -> Iterator[Tensor]:
    """Decode, preprocess and stack: pixel_values of shape (B, 3, H, W), float32, B at most ``size``."""
    for start in range(0, len(images), size):
        pictures = [read() for read in images[start : start + size]]
        yield processor(images=pictures, return_tensors="pt")["pixel_values"]


def all_pixels(images: Sequence[Reader], processor: Any, size: int) -> Tensor:
    """:func:`batches` as one tensor, (N, C, H, W).

    Raises:
        UserError: the processor makes pictures of several sizes.
    """
    parts = list(batches(images, processor, size))
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = sorted({f"{part.shape[-2]}x{part.shape[-1]}" for part in parts})
        raise UserError(f"--images: the image processor makes pictures of several sizes ({', '.join(shapes[:4])}, ...)")
    return torch.cat(parts)


def noise(model: nn.Module, count: int) -> Tensor:
    """The same noise each time, of the shape that a model's config names: (count, C, H, W), float32."""
    config = vision_config(model)
    size = getattr(config, "image_size", None)
    if size is None:
        raise UserError(f"the config of {type(model).__name__} names no picture size; pass --images")
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(count, getattr(config, "num_channels", 3), *shape, generator=torch.Generator().manual_seed(0))
