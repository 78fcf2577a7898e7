"""Pictures made of nothing but random numbers, to calibrate on where there are no others.

Discs and rounded rectangles of all sizes cover each other, plain or textured, over a background of 1/f noise: such
"dead leaves" have edges, surfaces and a spectrum like those of photographs. (Lee, Mumford and Huang, Occlusion models
for natural images, 2001; Baradad et al., Learning to see by looking at noise, 2021.)
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

SMALLEST, LARGEST = 0.02, 0.5
"""Radius of a leaf, as a share of the picture's side; the density falls with its square."""
FEWEST, MOST = 10, 300
"""Leaves of a picture."""
TEXTURED = 0.15
"""Share of the leaves that have a texture."""


def synthetic_images(count: int = 128, size: int = 224, seed: int = 0) -> list[Image.Image]:
    """``count`` pictures, RGB, ``size`` by ``size`` pixels; the same seed gives the same ones.

    ``quantize_model(model, calibration=synthetic_images(), processor=processor)``

    Raises:
        TypeError, ValueError: ``count`` or ``size`` is not an int of at least 1.
    """
    for name, value in {"count": count, "size": size}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int of at least 1, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for _ in range(count):
        pixels = (_leaves(size, generator).clamp(0, 1) * 255).round().to(torch.uint8)
        pictures.append(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
    return pictures


def _leaves(size: int, generator: torch.Generator) -> Tensor:
    """One picture, (3, size, size), about 0 to 1."""

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    steps = torch.arange(size) / size
    y, x = steps[:, None], steps[None, :]
    picture = 0.5 + uniform(0, 0.2) * _noise(size, uniform(1, 2), generator)
    base = torch.rand(3, generator=generator)  # half of the leaves are near one color
    for _ in range(round(FEWEST * (MOST / FEWEST) ** uniform())):
        radius = min(LARGEST, SMALLEST / uniform(SMALLEST, 1))
        angle, aspect = uniform(0, math.pi), uniform(0.4, 1)
        right, down = x - uniform(), y - uniform()
        u = (right * math.cos(angle) + down * math.sin(angle)) / radius
        v = (down * math.cos(angle) - right * math.sin(angle)) / (radius * aspect)
        power = 2 if uniform() < 0.6 else 8  # an ellipse or a rounded rectangle
        color = torch.rand(3, generator=generator)
        if uniform() < 0.5:
            color = (color + base) / 2
        leaf = color[:, None, None] + uniform(-0.1, 0.1) * u  # shaded
        if uniform() < TEXTURED:
            leaf = leaf + uniform(0, 0.2) * _noise(size, 1.5, generator)
        picture = torch.where((u.abs().clamp(max=2) ** power + v.abs().clamp(max=2) ** power) < 1, leaf, picture)
    return picture


def _noise(size: int, power: float, generator: torch.Generator) -> Tensor:
    """Noise with the amplitude frequency**-power, mean 0 and variance 1, its channels alike: (3, size, size)."""
    frequency = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size)[None, :] ** 2).sqrt()
    amplitude = frequency.clamp(min=1 / size) ** -power
    amplitude[0, 0] = 0
    white = torch.randn(3, size, size, generator=generator)
    white = 0.4 * white + 0.6 * white.mean(0)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(size, size))
    return noise / noise.std().clamp(min=1e-6)
