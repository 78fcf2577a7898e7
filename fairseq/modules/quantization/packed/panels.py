"""Panels: the codes of a weight in the order in which the native products read them; see ``csrc/api.h``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 32
"""Outputs of a panel."""

GROUP = 16
"""Inputs are filled up to a multiple of it."""


def panels_shape(outputs: int, inputs: int, bits: int) -> tuple[int, int, int]:
    """(panels, steps of 4 inputs, bytes of a step) of a weight; below 5 bits two codes share a byte."""
    return -(-outputs // WIDTH), -(-inputs // GROUP) * GROUP // 4, WIDTH * 4 // (2 if is_narrow(bits) else 1)


def is_narrow(bits: int) -> bool:
    """Whether panels hold two codes per byte."""
    return bits <= 4


def to_panels(codes: Tensor, bits: int) -> Tensor:
    """int8 (out, in) -> uint8 of :func:`panels_shape`, filled up with zeros."""
    outputs, inputs = codes.shape
    count, steps, _ = panels_shape(outputs, inputs, bits)
    filled = F.pad(codes, (0, 4 * steps - inputs, 0, WIDTH * count - outputs)).view(torch.uint8)
    ordered = filled.view(count, WIDTH, steps, 4).permute(0, 2, 1, 3)  # (count, steps, WIDTH, 4)
    if is_narrow(bits):
        ordered = ordered[:, :, : WIDTH // 2] | ordered[:, :, WIDTH // 2 :] << 4
    return ordered.reshape(count, steps, -1)


def sums_of(codes: Tensor, bits: int, group_size: int | None = None) -> Tensor | None:
    """The sum of each output's codes, int32 (out,), or of each group of them, int32 (out, groups).

    None below 5 bits, where unpacking adds them up anew.
    """
    if is_narrow(bits):
        return None
    if group_size is None:
        return codes.sum(1, dtype=torch.int32)
    return torch.stack([group.sum(1, dtype=torch.int32) for group in codes.split(group_size, 1)], 1)


def from_panels(panels: Tensor, outputs: int, inputs: int, bits: int) -> Tensor:
    """Undoes :func:`to_panels`: int8 (out, in)."""
    count, steps, _ = panels_shape(outputs, inputs, bits)
    if is_narrow(bits):
        halves = panels.view(count, steps, WIDTH // 2, 4)
        ordered = torch.cat([halves & 15, halves >> 4], 2)
    else:
        ordered = panels.view(count, steps, WIDTH, 4)
    codes = ordered.permute(0, 2, 1, 3).reshape(count * WIDTH, steps * 4)
    return codes[:outputs, :inputs].to(torch.int8).contiguous()
