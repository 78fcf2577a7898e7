"""IntegerBlock: an encoder block on the integers of the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fairseq.modules.quantization.integer.normalization import STREAM_BITS
from fairseq.quantization.integer_only.layers import (
    IntegerActivation,
    IntegerAttention,
    IntegerGELU,
    IntegerLinear,
    IntegerNorm,
    to_bytes,
)


def add(h: Tensor, branch: Tensor) -> Tensor:
    """h + branch, saturating at 22 bits."""
    half = 2 ** (STREAM_BITS - 1)
    return (h + branch).clamp(-half, half - 1)


def add_mlp(block: Any, h: Tensor) -> Tensor:
    """h + fc2(activation(fc1(norm2(h)))), of the parts of ``block``: int64 (..., C) of 22 bits -> the same."""
    hidden = block.activation(block.fc1(*to_bytes(block.norm2(h), block.bits)))
    return add(h, block.fc2(*to_bytes(hidden, block.bits, unsigned=True)))


class IntegerBlock(nn.Module):
    """h + output(attention(norm1(h))), then h + fc2(activation(fc1(norm2(h)))).

    Args:
        bits: of what layers read: 16, rounded to bytes row by row, or 8, which are bytes.
        parts: by the names of the attributes.
    """

    activation: Any

    def __init__(
        self,
        bits: int,
        norm1: IntegerNorm,
        query: IntegerLinear,
        key: IntegerLinear,
        value: IntegerLinear,
        attention: IntegerAttention,
        output: IntegerLinear,
        norm2: IntegerNorm,
        fc1: IntegerLinear,
        activation: IntegerActivation | IntegerGELU,
        fc2: IntegerLinear,
    ):
        super().__init__()
        self.bits = bits
        self.norm1, self.query, self.key, self.value = norm1, query, key, value
        self.attention, self.output = attention, output
        self.norm2, self.fc1, self.activation, self.fc2 = norm2, fc1, activation, fc2

    def forward(self, h: Tensor) -> Tensor:
        """int64 (B, T, C) of 22 bits -> the same."""
        read = to_bytes(self.norm1(h), self.bits)
        attended = self.attention(self.query(*read), self.key(*read), self.value(*read))
        h = add(h, self.output(*to_bytes(attended, self.bits)))
        return add_mlp(self, h)
