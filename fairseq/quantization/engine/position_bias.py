"""What BEiT and Swin add to products of queries and keys by the relative position of their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_own(attention: Any, block: Any) -> bool:
    """Whether a block of BEiT has a table of its own."""
    return _module(attention, block) is not None


def of_beit(block: Any, attention: Any, resolution: tuple[int, int], interpolate: bool, tokens: int) -> Tensor:
    """Its bias for pictures of ``resolution``: (heads, tokens, tokens)."""
    patch = patch_of(block, attention)
    window = (resolution[0] // patch, resolution[1] // patch)
    bias: Tensor = _module(attention, block)(window, interpolate, dim_size=tokens)
    return bias[0].contiguous()


def patch_of(block: Any, attention: Any) -> int:
    """The side of a patch."""
    return int(block.patch_size if hasattr(block, "patch_size") else attention.config.patch_size)


def window_of(block: Any, attention: Any) -> tuple[int, int]:
    """Height and width in patches of the pictures that its table was made for."""
    height, width = _module(attention, block).window_size
    return int(height), int(width)


def of_windows(attention: Any) -> Tensor:
    """That of Swin, from its table, or of SwinV2, whose table is what a small MLP makes of distances."""
    module = getattr(attention, "relative_position_bias", None)
    if module is not None:
        bias: Tensor = module()[0]
        return bias
    continuous = getattr(attention, "continuous_position_bias_mlp", None)
    index: Tensor = attention.relative_position_index
    if continuous is not None:
        table = continuous(attention.relative_coords_table).view(-1, attention.num_attention_heads)
    else:
        table = attention.relative_position_bias_table
    bias = table[index.view(-1)].view(*_square(index), -1).permute(2, 0, 1)
    return bias if continuous is None else 16 * torch.sigmoid(bias)


def _square(index: Tensor) -> tuple[int, int]:
    side = round(index.numel() ** 0.5)
    return side, side


def _module(attention: Any, block: Any) -> Any:
    """Where a block has it, in one version or another."""
    return getattr(block, "relative_position_bias", None) or getattr(attention, "relative_position_bias", None)
