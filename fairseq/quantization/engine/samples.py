"""A small call of a block of each kind, to compare on: hidden states, and the other arguments that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fairseq.quantization.engine import position_bias
from fairseq.quantization.engine.calls import Calls

IMAGES, TOKENS, BEFORE = 2, 33, 5
"""Images, tokens of each, and how many of these precede the patches."""

Sample = tuple[Tensor, dict[str, Any]]


def sample(calls: Calls, call: str) -> Sample:
    """Hidden states, float32 (images, tokens, width), and arguments by name, for blocks of that kind of call."""
    tokens, given = SAMPLES[call](calls)
    needed = {name: None for name in calls.required if name not in given}
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, tokens, calls.spec.width, generator=generator), {**needed, **given}


def _images(calls: Calls) -> tuple[int, dict[str, Any]]:
    return TOKENS, {}


def _beit(calls: Calls) -> tuple[int, dict[str, Any]]:
    """The patches that the block has a table for."""
    block: Any = calls.block
    if not position_bias.has_own(calls.attention, block):
        return TOKENS, {}
    height, width = position_bias.window_of(block, calls.attention)
    patch = position_bias.patch_of(block, calls.attention)
    return height * width + 1, {"resolution": (height * patch, width * patch)}


def _timm_beit(calls: Calls) -> tuple[int, dict[str, Any]]:
    table = calls.attention.relative_position_index
    return TOKENS if table is None else len(table), {}


def _dinov3(calls: Calls) -> tuple[int, dict[str, Any]]:
    angles = torch.linspace(-3, 3, (TOKENS - BEFORE) * (calls.spec.head_size // 2)).view(TOKENS - BEFORE, -1).tile(2)
    return TOKENS, {"position_embeddings": (angles.cos(), angles.sin())}


def _eva(calls: Calls) -> tuple[int, dict[str, Any]]:
    half = getattr(calls.attention, "rotate_half", False)
    patches = TOKENS - calls.attention.num_prefix_tokens
    angles = torch.linspace(-3, 3, patches * (calls.spec.head_size // 2)).view(patches, -1)
    angles = angles.tile(2) if half else angles.repeat_interleave(2, -1)
    return TOKENS, {"rope": torch.cat([angles.sin(), angles.cos()], -1)}


def _windows(calls: Calls) -> tuple[int, dict[str, Any]]:
    """Three windows by two, some of them padded."""
    window = int(cast(Any, calls.block).window_size)
    height, width = 2 * window + 1, window + 1
    return height * width, {"input_dimensions": (height, width)}


SAMPLES: dict[str, Callable[[Calls], tuple[int, dict[str, Any]]]] = {
    "images": _images,
    "alone": _images,
    "clip": _images,
    "beit": _beit,
    "timm_beit": _timm_beit,
    "dinov3": _dinov3,
    "eva": _eva,
    "windows": _windows,
}
