"""CIFAR-10's pictures for ``train_cifar10.py`` and ``distill_cifar10.py``: read, cropped, mixed and normalized."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.4914, 0.4822, 0.4465)  # of the training pictures, per channel, in [0, 1]
STD = (0.2470, 0.2435, 0.2616)


class Pictures(NamedTuple):
    """uint8 pixels of shape (N, 3, 32, 32), int64 labels of shape (N,), and the class names."""

    pixels: Tensor
    labels: Tensor
    names: list[str]


def read_split(data: Path, split: str) -> Pictures:
    """Decode every JPEG of one split into memory, in the order of its path."""
    archive, folder = data / f"{split}.zip", data / split
    if archive.is_file():
        with zipfile.ZipFile(archive) as opened:
            files = sorted(n for n in opened.namelist() if n.lower().endswith((".jpg", ".jpeg")))
            decoded = [(Path(n).parent.name, np.asarray(Image.open(opened.open(n)).convert("RGB"))) for n in files]
    elif folder.is_dir():
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        decoded = [(p.parent.name, np.asarray(Image.open(p).convert("RGB"))) for p in paths]
    else:
        raise SystemExit(f"error: found neither {archive} nor the folder {folder}; --data must hold one of them")
    names = sorted({name for name, _ in decoded})
    if not decoded or {pixels.shape for _, pixels in decoded} != {(32, 32, 3)}:
        raise SystemExit(f"error: {data} must hold 32x32 JPEG pictures in one folder per class for '{split}'")
    pixels = torch.from_numpy(np.stack([p for _, p in decoded])).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return Pictures(pixels, torch.tensor([names.index(n) for n, _ in decoded]), names)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, zero mean and unit variance over the training set."""
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture its own horizontal flip and its own 32x32 crop out of a 4-pixel reflected border."""
    batch, size = len(pixels), pixels.shape[-1]
    padded = F.pad(pixels.float(), (4, 4, 4, 4), mode="reflect").to(pixels.dtype)  # (B, 3, 40, 40)
    rows, columns = torch.randint(0, 9, (2, batch, 1), generator=generator) + torch.arange(size)  # (B, 32) each
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    images = torch.arange(batch).view(-1, 1, 1)
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    return padded[images.to(pixels.device), :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutmix(pixels: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """One box of each picture is another picture's: the pixels, the other's labels, and the share that is its own."""
    size, batch = pixels.shape[-1], len(pixels)
    side = size * math.sqrt(1 - float(torch.rand((), generator=generator)))
    centre = torch.rand(2, generator=generator) * size
    (top, bottom), (left, right) = (
        (max(0, round(float(c) - side / 2)), min(size, round(float(c) + side / 2))) for c in centre
    )
    other = torch.randperm(batch, generator=generator).to(pixels.device)
    mixed = pixels.clone()
    mixed[:, :, top:bottom, left:right] = pixels[other, :, top:bottom, left:right]
    return mixed, labels[other], 1 - (bottom - top) * (right - left) / size**2
