"""build: from a model with packed layers and what calibration saw of it to the integers of an IntegerViT."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.integer.attention import ONE, ROW_SHIFT
from fairseq.modules.quantization.integer.dyadic import Requantize, dyadic, power_of_two
from fairseq.modules.quantization.integer.normalization import STREAM_BITS, UNIT_BITS
from fairseq.modules.quantization.integer.piecewise import INPUT_BITS, PIECES, table
from fairseq.modules.quantization.integer.piecewise import UNIT_BITS as TABLE_BITS
from fairseq.modules.quantization.integer.published import GELUS, gelu_constants
from fairseq.modules.quantization.integer.rows import LARGEST
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int
from fairseq.quantization.engine.reference_block import activate
from fairseq.quantization.engine.spec import BlockSpec, Norm
from fairseq.quantization.integer_only.block import IntegerBlock
from fairseq.quantization.integer_only.layers import (
    BYTE,
    MOST_INPUTS,
    VALUE_STEP,
    WIDE,
    IntegerActivation,
    IntegerAttention,
    IntegerGELU,
    IntegerLinear,
    IntegerNorm,
    Spread,
)
from fairseq.quantization.integer_only.model import PIXELS
from fairseq.quantization.integer_only.ranges import Range, Ranges
from fairseq.quantization.integer_only.reading import LIMITS

HEADROOM = 2.0
"""How much further than calibration saw 16-bit integers reach."""
STREAM_HEADROOM = 4.0
LEAST_REACH = 2.0**-12
"""Taken for the reach of what reaches less far, as of a channel that is 0 on all pictures: a unit of the tables of
activations is not much less, and what is finer than that no scale has to tell apart."""
SPREAD_COLUMNS = 16
SPREAD_GAIN = 2.0


class Grid(NamedTuple):
    """What integers stand for: step * (q - zero). Steps of 16-bit integers are those before rounding to bytes.

    Attributes:
        step: float64, (C,) or (1,).
        zero: the integer that stands for 0.
        bits: of the integers, 16 or 8.
        unsigned: of 16 bits none is negative, and the bytes are from 0 to 255 times the row's integer.
        copies: how many bytes each column becomes; None for one each. See :class:`~.layers.Spread`.
    """

    step: Tensor
    zero: int
    bits: int
    copies: Tensor | None = None
    unsigned: bool = False

    @property
    def byte_step(self) -> Tensor:
        """Of the bytes, times the row's integer where there is one."""
        return self.step if self.bits == BYTE else self.step / (255 if self.unsigned else LARGEST)


class Weight(NamedTuple):
    """Integers of a Linear: int64 (out, in) within a byte, float64 scale (out,) and bias (out,)."""

    q: Tensor
    scale: Tensor
    bias: Tensor


def weight_of(layer: nn.Module, name: str) -> Weight:
    """Of a packed layer, its zero point subtracted.

    Raises:
        ValueError: it is not packed, has groups, or its integers do not fit a byte.
    """
    if not isinstance(layer, PackedLinear):
        raise ValueError(f"{name} was left in float; integer arithmetic needs every layer of the encoder and the head")
    matrix = layer.weight_matrix
    if matrix.group_size is not None:
        raise ValueError(f"{name} has groups of {matrix.group_size} columns; integer arithmetic takes one scale a row")
    q = matrix.integers().to(torch.int64) - matrix.zero_point.to(torch.int64).reshape(-1, 1)
    if int(q.min()) < -128 or int(q.max()) > 127:
        raise ValueError(
            f"{name} has integers from {int(q.min())} to {int(q.max())}, which fit no byte: symmetric=True"
        )
    bias = torch.zeros(len(q), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    return Weight(q, matrix.scale.double().expand(len(q)).clone(), bias)


def bytes_of(weight: Tensor, bias: Tensor, name: str) -> Weight:
    """A float64 weight (out, in) as the nearest bytes, a scale a row."""
    scale, zero_point = observe_weight(weight, 8, "channel", symmetric=True, name=name)
    q = weight_to_int(weight, scale, zero_point, 8).to(torch.int64) - zero_point.to(torch.int64)[:, None]
    return Weight(q, scale.double(), bias.double())


def linear(weight: Weight, source: Grid, step: Tensor | float, bits: int, name: str) -> IntegerLinear:
    """A layer that reads ``source`` and gives integers of ``step``."""
    q = weight.q if source.copies is None else weight.q[:, torch.repeat_interleave(source.copies)]
    if q.shape[1] > MOST_INPUTS:
        raise ValueError(f"{name} has {q.shape[1]} inputs, more than {MOST_INPUTS}")
    scale = weight.scale * source.byte_step
    bias = weight.bias - weight.scale * source.step * source.zero * q.sum(-1)
    return IntegerLinear(q, Requantize(scale / step, bias / step, bits, name), source.unsigned)


def wide_grid(reach: Tensor | float) -> Grid:
    """16 bits that reach so far."""
    limit = max(float(torch.as_tensor(reach).max()), LEAST_REACH)
    return Grid(torch.tensor([limit / (2 ** (WIDE - 1) - 1)], dtype=torch.float64), 0, WIDE)


def byte_grid(seen: Range, layers: list[PackedLinear]) -> Grid:
    """8 bits over the range that the layers that read them were calibrated to, if it is one, or over what was seen.

    Where few columns reach so far that the others' steps are twice as fine without them, they become several bytes.
    """
    spread, whole = spread_grid(seen), whole_grid(seen, layers)
    return spread if float(spread.step) * SPREAD_GAIN <= float(whole.step) else whole


def spread_grid(seen: Range) -> Grid:
    """The finest 8 bits with which the columns become at most a part in ``SPREAD_COLUMNS`` more bytes."""
    most = len(seen.low) // SPREAD_COLUMNS
    largest = max(float(seen.reach.max()), LEAST_REACH)
    reaches = seen.reach.unique()  # ascending
    for reach in (*reaches[reaches * (most + 1) > largest], largest):  # a column becomes at most 1 + most bytes
        limit = float(reach)
        low, high = max(float(seen.low.min()), -limit), min(float(seen.high.max()), limit)
        copies = torch.exp2(torch.log2(torch.maximum(seen.low / min(low, -1e-30), seen.high / max(high, 1e-30))).ceil())
        copies = copies.clamp(min=1).to(torch.int64)
        if int(copies.sum()) - len(copies) <= most:
            step = max(high - low, LEAST_REACH) / 255
            return Grid(torch.tensor([step], dtype=torch.float64), round(-128 - low / step), BYTE, copies)
    raise AssertionError("one byte each is always enough for the largest reach")


def whole_grid(seen: Range, layers: list[PackedLinear]) -> Grid:
    """One byte a column."""
    known = {(float(x.input_scale), int(x.input_zero_point)) for x in layers if x.input_scale is not None}  # type: ignore[arg-type]
    if len(known) == 1 and 255 * (grid := next(iter(known)))[0] >= LEAST_REACH:
        step, zero = grid
        return Grid(torch.tensor([step], dtype=torch.float64), zero, BYTE)
    low, high = min(float(seen.low.min()), 0.0), max(float(seen.high.max()), 0.0)
    step = max(high - low, LEAST_REACH) / 255
    return Grid(torch.tensor([step], dtype=torch.float64), round(-128 - low / step), BYTE)


def output_of(grid: Grid, factor: Tensor, offset: Tensor, name: str) -> nn.Module:
    """What gives integers of ``grid``, its zero not in ``offset``."""
    if grid.copies is None:
        return Requantize(factor, offset + grid.zero, grid.bits, name)
    return nn.Sequential(Requantize(factor, offset, WIDE, name), Spread(grid.copies, grid.zero))


def gain_of(norm: Norm, size: int) -> tuple[Tensor, Tensor]:
    """What a LayerNorm multiplies (x - mean) / sqrt(size * (variance + eps)) by and adds: float64 (size,) each."""
    ones = torch.ones(size, dtype=torch.float64)
    gain = (ones if norm.weight is None else norm.weight.detach().double()) * math.sqrt(size)
    return gain, 0 * ones if norm.bias is None else norm.bias.detach().double()


def eps_of(norm: Norm, size: int, step: float) -> int:
    """That of :func:`~fairseq.modules.quantization.integer.normalization.normalize` for integers of ``step``."""
    return min(max(round(size * norm.epsilon / step**2), 1), 2**60)


def factor_of(layers: list[PackedLinear], size: int, name: str) -> Tensor:
    """What the layers multiply their common input by: float64 (size,)."""
    ones = torch.ones(size, dtype=torch.float64)
    factors = [ones] if not layers else [ones if x.input_factor is None else x.input_factor.double() for x in layers]
    if any(not torch.equal(factors[0], other) for other in factors):
        raise ValueError(f"{name}: layers that read the same multiply it by different factors")
    return factors[0]


class Builder:
    """Makes the parts of one model.

    Args:
        dynamic: whether layers read 16-bit integers, rounded to bytes row by row.
        ranges: of each layer, see :mod:`~.ranges`.
    """

    def __init__(self, dynamic: bool, ranges: Ranges, functions: str = "default"):
        self.dynamic, self.ranges, self.functions = dynamic, ranges, functions
        self.width = len(ranges["stream"].low)
        self.exponent = power_of_two(STREAM_HEADROOM * max(float(ranges["stream"].reach.max()), 1e-6), STREAM_BITS)
        self.step = self.embedded_step = 2.0**-self.exponent
        if "embedded" in ranges:
            reach = max(float(ranges["embedded"].reach.max()), 1e-6)
            self.embedded_step = 2.0 ** -power_of_two(STREAM_HEADROOM * reach, STREAM_BITS)
        self.bits = WIDE if dynamic else BYTE

    def grid(
        self, key: tuple[Any, str], layers: list[PackedLinear], factor: Tensor, reach: Tensor | None = None
    ) -> Grid:
        """Of what ``layers`` read, which is multiplied by ``factor``; ``reach``: how far it can at most, if known."""
        low, high = self.ranges[(*key, "in")]
        seen = Range(low * factor, high * factor)
        if not self.dynamic:
            return byte_grid(seen, layers)
        return wide_grid(HEADROOM * seen.reach if reach is None else reach)

    def norm(
        self, norm: Norm, size: int, key: tuple[Any, str], layers: list[PackedLinear], name: str
    ) -> tuple[IntegerNorm, Grid]:
        """A LayerNorm and the grid of what it gives, which nothing can exceed if it has 16 bits."""
        factor = factor_of(layers, size, name)
        gain, bias = (t * factor for t in gain_of(norm, size))
        grid = self.grid(key, layers, factor, (gain.abs() + bias.abs()).max())
        output = output_of(grid, gain / grid.step / 2**UNIT_BITS, bias / grid.step, name)
        return IntegerNorm(eps_of(norm, size, self.step), output), grid

    def block(self, i: int, spec: BlockSpec, name: str) -> IntegerBlock:
        """One encoder block."""
        layers: dict[str, Any] = spec.layers
        reading = [layers[role] for role in ("query", "key", "value") if role in layers]
        weights = {role: weight_of(layer, f"{name}, {role}") for role, layer in layers.items()}
        norm1, source = self.norm(spec.norm("norm1"), spec.width, (i, "query"), reading, f"{name}, norm1")
        projections, attention, attended = self.attention(i, spec, weights, source, name)
        output = self.branch(weights["output"], attended, spec.scale1, f"{name}, output")
        fc1, fc2 = layers["fc1"], layers["fc2"]
        mlp = self.mlp(i, spec.norm("norm2"), spec.width, fc1, fc2, spec.activation, spec.scale2, name)
        query, key, value = projections
        return IntegerBlock(self.bits, norm1, query, key, value, attention, output, *mlp)

    def mlp(
        self, i: Any, norm: Norm, width: int, fc1: Any, fc2: Any, activation: str, scale: Tensor | None, name: str
    ) -> tuple[IntegerNorm, IntegerLinear, IntegerActivation | IntegerGELU, IntegerLinear]:
        """A norm of the residual stream, two layers with an activation between, and what adds to the stream."""
        first, second = weight_of(fc1, f"{name}, fc1"), weight_of(fc2, f"{name}, fc2")
        normed, source = self.norm(norm, width, (i, "fc1"), [fc1], f"{name}, norm2")
        limit = LIMITS[activation]
        unit = limit / 2**TABLE_BITS
        factor = factor_of([fc2], fc2.in_features, name)
        entries = activation_table(activation, limit)
        hidden = self.hidden(i, fc2, factor, -unit * float(entries[0].min()))
        requantize = output_of(hidden, unit * factor / hidden.step, 0 * factor, f"{name}, activation")
        function: IntegerActivation | IntegerGELU = IntegerActivation(entries, requantize)
        if self.functions != "default":
            if activation not in (known := GELUS[self.functions]):
                raise ValueError(
                    f"{name}: its activation is {activation}, and functions={self.functions!r} has none but for "
                    f"{', '.join(known)}"
                )
            function = IntegerGELU(gelu_constants(self.functions, limit), self.functions, requantize)
        return (
            normed,
            linear(first, source, unit, INPUT_BITS, f"{name}, fc1"),
            function,
            self.branch(second, hidden, scale, f"{name}, fc2"),
        )

    def hidden(self, i: Any, fc2: PackedLinear, factor: Tensor, lowest: float) -> Grid:
        """Of what an activation gives, at least -``lowest``: 16 bits without a sign, or 8 with a zero point."""
        if not self.dynamic:
            return self.grid((i, "fc2"), [fc2], factor)
        least = lowest * float(factor.max())
        reach = (HEADROOM * self.ranges[(i, "fc2", "in")].reach * factor).clamp(min=2 * least)  # half is for the zero
        grid = self.grid((i, "fc2"), [fc2], factor, reach)
        return grid._replace(zero=math.ceil(least / float(grid.step)), unsigned=True)

    def attention(
        self, i: int, spec: BlockSpec, weights: dict[str, Weight], source: Grid, name: str
    ) -> tuple[list[IntegerLinear], IntegerAttention, Grid]:
        """The layers for query, key and value, attention, and the grid of what it gives."""
        out = [self.ranges[(i, role, "out")].reach for role in ("query", "key", "value") if role in weights]
        parts = [weights[role] for role in ("query", "key", "value") if role in weights]
        if spec.projections == 1:
            parts = [Weight(*split) for split in zip(*(t.chunk(3) for t in parts[0]))]
            out = list(out[0].chunk(3))
        steps = [self.projection_step(reach, spec.heads) for reach in out]
        if not self.dynamic:
            steps[2] = out[2].clamp(min=LEAST_REACH) / 127  # a step a channel, which the sums keep apart
        layers = [
            linear(part, source, step, self.bits, f"{name}, {role}")
            for part, step, role in zip(parts, steps, ("query", "key", "value"))
        ]
        mixing = self.mixing(
            i, steps, spec.heads, spec.heads * spec.head_size, spec.scaling, [spec.layers["output"]], name
        )
        return layers, *mixing

    def mixing(
        self, i: Any, steps: list[Tensor], heads: int, columns: int, scaling: float, readers: list[Any], name: str
    ) -> tuple[IntegerAttention, Grid]:
        """Attention of queries, keys and values of ``steps``, and the grid of what it gives to ``readers``."""
        per_head = [step.reshape(heads, -1)[:, 0] if step.numel() > 1 else step for step in steps[:2]]
        base = 1.0 if self.functions == "ivit" else math.log(2)  # whose exponential is computed
        unit = per_head[0] * per_head[1] * scaling * ONE / base / (LARGEST**2 if self.dynamic else 1)
        multiplier, shift, _ = dyadic(unit.expand(heads))
        if self.dynamic and bool((shift < ROW_SHIFT).any()):
            raise ValueError(f"{name}: its queries and keys are too large for integer scores")
        factor = factor_of(readers, columns, name)
        grid = self.grid((i, "output"), readers, factor, (steps[2] * (2**15 - 1) * factor).max())
        value = steps[2].expand(columns) / (LARGEST if self.dynamic else 1) * VALUE_STEP
        output = output_of(grid, value * factor / grid.step, 0 * factor, f"{name}, attention")
        by = multiplier[:, None, None], shift[:, None, None]
        return IntegerAttention(*by, self.dynamic, output, self.functions), grid

    def projection_step(self, reach: Tensor, heads: int) -> Tensor:
        """Of queries, keys or values: one for 16 bits, or for bytes one a head, (columns,)."""
        if self.dynamic:
            return wide_grid(HEADROOM * reach).step
        largest = reach.reshape(heads, -1).amax(-1, keepdim=True).clamp(min=LEAST_REACH)
        return (largest / 127).expand(heads, len(reach) // heads).flatten()

    def branch(self, weight: Weight, source: Grid, scale: Tensor | None, name: str) -> IntegerLinear:
        """A layer that adds to the residual stream, times LayerScale."""
        if scale is not None:
            weight = Weight(weight.q, weight.scale * scale.detach().double(), weight.bias * scale.detach().double())
        return linear(weight, source, self.step, STREAM_BITS, name)

    def patches(self, convolution: nn.Conv2d, start: Tensor, step: Tensor) -> IntegerLinear:
        """The patch embedding of pixels less 128, at 8 bits; start and step of the pixels are in weight and bias."""
        w = convolution.weight.detach().double()
        folded = (w * step[:, None, None]).flatten(1)
        bias = (w * (start + PIXELS // 2 * step)[:, None, None]).flatten(1).sum(-1)
        weight = bytes_of(folded, bias, "the patch embedding")  # the convolution's bias is in the constants of tokens
        grid = Grid(torch.ones(1, dtype=torch.float64), 0, BYTE)
        return linear(weight, grid, self.embedded_step, STREAM_BITS, "the patch embedding")

    def before(self, norm: Norm, size: int) -> IntegerNorm:
        """The LayerNorm of embedded tokens, which gives the residual stream."""
        return self.wide_norm(norm, size, self.exponent, STREAM_BITS, "the norm before the blocks", self.embedded_step)

    def wide_norm(
        self, norm: Norm, size: int, exponent: int, bits: int, name: str, step: float | None = None
    ) -> IntegerNorm:
        """A LayerNorm of integers of ``step``, by default the residual stream's, to ``bits`` of 2**-exponent."""
        gain, bias = gain_of(norm, size)
        output = Requantize(gain * 2.0 ** (exponent - UNIT_BITS), bias * 2.0**exponent, bits, name)
        return IntegerNorm(eps_of(norm, size, step or self.step), output)


def activation_table(name: str, limit: float) -> Tensor:
    """int32 (2, 256), see :func:`~fairseq.modules.quantization.integer.piecewise.table`.

    Each inner end is moved by half of what a line leaves in the middle of the pieces beside it, which halves the error.
    """
    ends = torch.linspace(-limit, limit, PIECES + 1, dtype=torch.float64)
    piece = 2 * limit / PIECES
    values, middles = activate(name, ends), activate(name, ends[:-1] + piece / 2)
    left = (values[:-1] + values[1:]) / 2 - middles  # how far the line is above, by piece
    values[1:-1] -= (left[:-1] + left[1:]) / 4
    return table(values * 2**TABLE_BITS / limit)
