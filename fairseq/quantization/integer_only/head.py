"""What a model gives of the residual stream behind its last block: tokens, normed, pooled and multiplied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.integer.checked import bounded
from fairseq.quantization.integer_only.block import add_mlp
from fairseq.quantization.integer_only.layers import (
    IntegerActivation,
    IntegerAttention,
    IntegerGELU,
    IntegerLinear,
    IntegerNorm,
    to_bytes,
)

Tokens = tuple[tuple[int, int], ...]
"""Ranges of tokens, the first and the one behind the last; each is pooled to its mean."""
LOGIT_BITS = 24
"""Of outputs, so that a float32 holds every one of them, and the sum of two."""


def mean(x: Tensor, start: int, stop: int) -> Tensor:
    """The mean of tokens rounded half up, floor((2 sum + n) / 2n): int64 (B, T, C) of 24 bits -> (B, C) of 24 bits.

    The sum of n tokens is below 2**23 n, at most 2**39 for the 2**16 tokens that attention takes.
    """
    count = stop - start
    if count == 1:
        return x[:, start]
    total = bounded(x[:, start:stop].sum(dim=1), 40, "mean of tokens, sum")
    return torch.div(2 * total + count, 2 * count, rounding_mode="floor")


def pool(x: Tensor, tokens: Tokens) -> Tensor:
    """The means of ranges of tokens side by side: int64 (B, T, C) -> (B, C * ranges)."""
    return torch.cat([mean(x, start, stop) for start, stop in tokens], dim=-1)


class Readout(nn.Module):
    """Tokens of the residual stream, normed and pooled, or pooled and normed, and what a layer makes of them.

    Buffers:
        exponent: int32; what an integer stands for is it / 2**exponent.

    Args:
        bits: of what the layer reads, 16 or 8.
        tokens: what is pooled; None for every token as it is.
        norm: or None. Its integers have 24 bits, or are what the layer reads where ``read`` is None.
        norm_first: of every token, before pooling.
        read: what gives pooled integers those that the layer reads, or None.
        linear: or None.
    """

    exponent: Tensor

    def __init__(
        self,
        bits: int,
        exponent: int,
        tokens: Tokens | None,
        norm: IntegerNorm | None,
        norm_first: bool = False,
        read: nn.Module | None = None,
        linear: IntegerLinear | None = None,
    ):
        super().__init__()
        self.bits, self.tokens, self.norm_first = bits, tokens, norm_first
        self.norm, self.read, self.linear = norm, read, linear
        self.register_buffer("exponent", torch.tensor(exponent, dtype=torch.int32))

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}, norm_first={self.norm_first}"

    def forward(self, h: Tensor, norm: nn.Module | None = None) -> Tensor:
        """int64 (B, T, C) of 22 bits -> int32 (B, outputs) or (B, T, C) of 24 bits.

        Args:
            norm: what computes the same as the norm, such as a kernel; None for that itself.
        """
        norm = norm or self.norm
        x = h if norm is None or not self.norm_first else norm(h)
        x = x if self.tokens is None else pool(x, self.tokens)
        x = x if norm is None or self.norm_first else norm(x)
        x = x if self.read is None else self.read(x)
        x = x if self.linear is None else self.linear(*to_bytes(x, self.bits))
        return bounded(x, LOGIT_BITS, "output").to(torch.int32)

    def is_plain(self) -> bool:
        """Whether it is the LayerNorm of the first token and one layer, which the native kernels know."""
        parts = self.norm is not None and self.read is None and self.linear is not None
        return parts and not self.norm_first and self.tokens == ((0, 1),)


class AttentionPooling(nn.Module):
    """Attention of one query, the same for all pictures, to normed tokens; y + fc2(activation(fc1(norm2(y)))) of that.

    Buffers:
        query: int16 (1, columns): the query as attention reads it, of 16 or 8 bits.
        exponent: int32, as that of a :class:`Readout`.

    Args:
        bits: of what layers read, 16 or 8.
        parts: by the names of the attributes; ``output`` gives y, of 22 bits.
    """

    query: Tensor
    exponent: Tensor

    def __init__(
        self,
        bits: int,
        exponent: int,
        query: Tensor,
        norm: IntegerNorm,
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
        self.bits, self.norm, self.key, self.value = bits, norm, key, value
        self.attention, self.output = attention, output
        self.norm2, self.fc1, self.activation, self.fc2 = norm2, fc1, activation, fc2
        self.register_buffer("query", query.to(torch.int16))
        self.register_buffer("exponent", torch.tensor(exponent, dtype=torch.int32))

    def forward(self, h: Tensor, norm: nn.Module | None = None) -> Tensor:
        """int64 (B, T, C) of 22 bits -> int32 (B, C) of 22 bits; ``norm`` as for :class:`Readout`."""
        read = to_bytes((norm or self.norm)(h), self.bits)
        query = self.query.to(torch.int64).expand(h.shape[0], 1, -1)
        attended = self.attention(query, self.key(*read), self.value(*read))[:, 0]
        y = self.output(*to_bytes(attended, self.bits))
        return add_mlp(self, y).to(torch.int32)

    def is_plain(self) -> bool:
        """See :meth:`Readout.is_plain`."""
        return False


class IntegerHead(nn.Module):
    """The outputs of a model, each a :class:`Readout`, an :class:`AttentionPooling`, or the mean of several.

    A mean is the exact sum of integers of one exponent, which is 2**log2(count) less for the sum: no rounding.

    Args:
        readouts: by name.
        outputs: name of an output -> the readouts that it is the mean of, 1 or 2 of the same exponent.
    """

    def __init__(self, readouts: Mapping[str, nn.Module], outputs: Mapping[str, Sequence[str]]):
        super().__init__()
        self.readouts = nn.ModuleDict(readouts)
        self.outputs = {name: tuple(sources) for name, sources in outputs.items()}

    def forward(self, h: Tensor, norms: Mapping[str, nn.Module] | None = None) -> dict[str, Tensor]:
        """int64 (B, T, C) of 22 bits -> int32 of 25 bits at most, by output.

        Args:
            norms: what computes the same as the norms of readouts, by name; those that are missing compute themselves.
        """
        norms = norms or {}
        found = {name: readout(h, norms.get(name)) for name, readout in self.readouts.items()}
        return {
            name: sum(found[source] for source in sources[1:]) + found[sources[0]]
            for name, sources in self.outputs.items()
        }

    def exponents(self) -> dict[str, Tensor]:
        """Of each output, int32: what an integer stands for is it / 2**exponent."""
        exponents = {name: readout.get_buffer("exponent") for name, readout in self.readouts.items()}
        return {name: exponents[sources[0]] + len(sources) - 1 for name, sources in self.outputs.items()}

    def is_plain(self) -> bool:
        """Whether the native kernels compute it as a whole."""
        readouts = list(self.readouts.values())
        single = [sources for sources in self.outputs.values() if len(sources) == 1]
        return len(readouts) == len(self.outputs) == len(single) == 1 and bool(readouts[0].is_plain())  # type: ignore[operator]
