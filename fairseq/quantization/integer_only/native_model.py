"""NativeViT: an IntegerViT as the native kernels take it, and what they cannot take."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.integer.attention import MEAN_FRACTION, ROW_SHIFT
from fairseq.modules.quantization.integer.dyadic import Requantize, round_shift
from fairseq.modules.quantization.integer.normalization import UNIT_BITS
from fairseq.modules.quantization.integer.piecewise import INPUT_BITS
from fairseq.modules.quantization.integer.rows import HALF, LARGEST
from fairseq.modules.quantization.packed.kernels import memory, native, native_calls, structures
from fairseq.modules.quantization.packed.panels import WIDTH, to_panels
from fairseq.quantization.integer_only.block import IntegerBlock
from fairseq.quantization.integer_only.head import AttentionPooling, IntegerHead, Readout
from fairseq.quantization.integer_only.layers import (
    WIDE,
    IntegerActivation,
    IntegerAttention,
    IntegerGELU,
    IntegerLinear,
    IntegerNorm,
    Spread,
)

LARGEST_SCALE = 2**15
"""Of a row."""
KEY_SCALE_BITS = 14
"""Of what stands for a key's scale of 1 where activations are static."""
MOST_COLUMNS = 256
"""Of a head, whose sums of bytes fit 16 bits in every lane."""
SMALL = 15
"""The largest code of 4 bits less its zero, for whose products some processors have a faster instruction."""
HIGH = 32
"""Results are taken from the high halves of products of 64 bits."""
PARTS = (
    IntegerBlock, IntegerLinear, IntegerNorm, IntegerActivation, IntegerAttention, Requantize, Spread, IntegerHead,
    Readout, AttentionPooling, nn.ModuleDict, nn.ModuleList, nn.Sequential,
)  # fmt: skip


class NotNative(Exception):
    """What the kernels cannot compute, in words."""


class NativeViT:
    """The constants of a model as the kernels take them.

    Args:
        model: an :class:`~.model.IntegerViT` on the CPU, which is read once.

    Raises:
        NotNative: numbers that do not fit the kernels' products of 64 bits, or parts of other classes.
    """

    def __init__(self, model: Any):
        self.kept: list[Any] = []
        self.dynamic = model.bits == WIDE
        _check_functions(model)
        _check_parts(model)
        _check_shapes(model)
        self.head: IntegerHead = model.head
        plain = _plain(model)
        readers = [model.patches, model.blocks, *([] if plain is None else [plain.linear])]
        layers = [m for part in readers for m in part.modules() if isinstance(m, IntegerLinear)]
        panels = [to_panels(layer.weight, 8) for layer in layers]
        regions = memory.on_large_pages([p.numel() for p in panels])
        for region, p in zip(regions, panels):
            region.copy_(p.flatten())
        self.panels = dict(zip(layers, regions))
        self.kept.append(regions)
        blocks = [self._block(block, f"block {i}") for i, block in enumerate(model.blocks)]
        pointers = (ctypes.POINTER(structures.IntegerBlock) * len(blocks))(*map(ctypes.pointer, blocks))
        self.kept += [blocks, pointers]
        first: Any = model.blocks[0]
        last = None if plain is None else cast(IntegerNorm, plain.norm)
        ends: Any = (
            (structures.IntegerNorm(), structures.Rows()) if last is None
            else (self._norm(last, "the last norm"), self._rows(last.output))
        )  # fmt: skip
        before = (
            None if model.before is None else ctypes.pointer(self._norm(model.before, "the norm before the blocks"))
        )
        self.norms = self._norms_of_tokens() if plain is None else {}
        heads = len(first.attention.multiplier)
        tokens, width = model.constants.shape
        self.model = structures.IntegerModel(
            self._linear(model.patches, "the patch embedding", 1),
            structures.IntegerLinear() if plain is None else self._linear(cast(Any, plain.linear), "the classifier"),
            self._array(model.constants, torch.int32), pointers, len(blocks), len(model.pixel_start), *model.size,
            *model.patch, tokens, width, heads, len(first.query.weight) // heads, len(first.fc1.weight), *ends, before,
        )  # fmt: skip

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (B, channels, H, W) on the CPU -> int32 by output."""
        found = native_calls.integers(self.model, pixels.contiguous(), native.level_number())
        if self.model.classifier.outputs:
            (name,) = self.head.outputs
            return {name: found}
        outputs: dict[str, Tensor] = self.head(found.to(torch.int64), self.norms)
        return outputs

    def _norms_of_tokens(self) -> dict[str, Any]:
        """What computes the norms of readouts on kernels, by the name of the readout, but for those with a Spread."""
        norms = {name: cast(Any, readout).norm for name, readout in self.head.readouts.items()}
        return {
            name: functools.partial(_normed, self._norm(norm, f"{name}, norm"))
            for name, norm in norms.items()
            if norm is not None and isinstance(norm.output, Requantize)
        }

    def _array(self, values: Tensor, dtype: torch.dtype) -> int:
        array = values.to(dtype).contiguous().clone()
        self.kept.append(array)
        return array.data_ptr()

    def _requantize(
        self, by: Requantize, columns: int, largest: int | Tensor, scale: int, name: str
    ) -> structures.Requantize:
        """Constants for integers up to ``largest``, of all columns or each, times scales of rows up to ``scale``.

        Shifts become 32 at least: multipliers take what they have room for, the integers the rest.
        """
        multiplier, shift, offset = _constants(by, columns)
        reach = torch.as_tensor(largest).expand(columns)
        half, limit = 2 ** (by.bits - 1), 2**31 - 1
        live = (multiplier != 0) & (reach > 0)  # others give a constant
        constant = (offset >> shift).clamp(-half, half - 1) << HIGH
        multiplier, missing = (torch.where(live, t, 0) for t in (multiplier, (HIGH - shift).clamp(min=0)))
        room = torch.tensor([(limit // (max(abs(int(m)), 1) * scale)).bit_length() - 1 for m in multiplier])
        lift = max(int((missing - room).max()), 0)
        raised = (missing - lift).clamp(min=0)
        fits = int(reach.max()) << lift <= limit and bool((multiplier.abs() * scale <= limit).all())
        shift = torch.where(live, shift + lift + raised - HIGH, 0)
        if not fits or int(shift.max()) >= HIGH:
            raise NotNative(f"the constants of {name} leave no room in products of 64 bits")
        raised_offset = torch.where(live, offset.double() * torch.exp2((lift + raised).double()), 0)
        if float(raised_offset.abs().max()) >= 2.0**61:
            raise NotNative(f"the offsets of {name} leave no room in products of 64 bits")
        offset = torch.where(live, offset << (lift + raised), constant)
        padding = (0, -columns % WIDTH + WIDTH)  # a head's last vector may begin anywhere
        return structures.Requantize(
            self._array(F.pad(multiplier << raised, padding), torch.int32),
            self._array(F.pad(shift, padding), torch.int32),
            self._array(F.pad(offset, padding), torch.int64), lift, -half, half - 1,
        )  # fmt: skip

    def _requantize_lines(self, by: Requantize, columns: int, values: Tensor, gains: Tensor) -> structures.Requantize32:
        """Constants for what the lines of an activation give; empty ones where 16 or 32 bits have no room for that."""
        multiplier, shift, offset = _constants(by, columns)
        lines = torch.stack((values, values + round_shift(gains * 255, 8)))  # both ends of each
        reach = int(lines.abs().max())
        whole = reach < 2**15 and int(values[0]) == 0 and int(shift.max()) < HIGH and int(offset.abs().max()) < 2**31
        if not whole or bool((reach * multiplier.abs() + offset.abs() >= 2**31).any()):
            return structures.Requantize32()
        padding, half = (0, -columns % WIDTH + WIDTH), 2 ** (by.bits - 1)
        arrays = (self._array(F.pad(t, padding), torch.int32) for t in (multiplier, offset, shift))
        return structures.Requantize32(*arrays, -half, half - 1)

    def _linear(self, layer: IntegerLinear, name: str, scale: int | None = None) -> structures.IntegerLinear:
        scale = scale or (LARGEST_SCALE if self.dynamic else 1)
        outputs, inputs = layer.weight.shape
        weight = layer.weight.to(torch.int64)
        unsigned = layer.sums is not None
        if unsigned and not torch.equal(cast(Tensor, layer.sums).to(torch.int64), HALF * weight.sum(1)):
            raise NotNative(f"the sums of {name} are not those of its weight")
        largest = weight.abs().sum(1) * (2 * HALF - 1 if unsigned else HALF)
        return structures.IntegerLinear(
            panels=self.panels[layer].data_ptr(), sums=self._array(weight.sum(1), torch.int32),
            inputs=inputs, outputs=outputs, output=self._requantize(layer.output, outputs, largest, scale, name),
            centre=HALF if unsigned else 0, small=int(weight.abs().max()) <= SMALL,
        )  # fmt: skip

    def _norm(self, norm: IntegerNorm, name: str) -> structures.IntegerNorm:
        by = _first(norm.output)
        columns = len(by.multiplier)
        return structures.IntegerNorm(self._requantize(by, columns, 2**UNIT_BITS, 1, name), int(norm.eps))

    def _rows(self, output: nn.Module, unsigned: bool = False) -> structures.Rows:
        kind = structures.ROW_KINDS.index(("unsigned" if unsigned else "signed") if self.dynamic else "bytes")
        if not isinstance(output, nn.Sequential):
            return structures.Rows(kind=kind)
        if self.dynamic:
            raise NotNative("columns become several bytes, and activations are dynamic")
        spread = cast(Spread, output[1])
        arrays = (self._array(t, torch.int32) for t in (spread.columns, spread.added, spread.shift))
        alone = self._array(_alone(spread), torch.int32)
        return structures.Rows(*arrays, kind, spread.zero, alone)

    def _attention(self, attention: IntegerAttention, size: int, name: str) -> structures.IntegerAttention:
        heads = len(attention.multiplier)
        if size > MOST_COLUMNS or any(t.shape != (heads, 1, 1) for t in (attention.multiplier, attention.shift)):
            raise NotNative(f"{name} has heads of more than {MOST_COLUMNS} channels, or more than one scale for each")
        shift = attention.shift.flatten() + (-ROW_SHIFT if self.dynamic else KEY_SCALE_BITS)
        lift = max(HIGH - int(shift.min()), 0)
        large = int(attention.multiplier.abs().max()) >= 2**16
        if large or (LARGEST + 1) ** 2 * size << lift >= 2**31 or int(shift.max()) + lift >= 2 * HIGH:
            raise NotNative(f"the scores of {name} leave no room in products of 64 bits")
        output = self._requantize(
            _first(attention.output), heads * size, LARGEST << MEAN_FRACTION, LARGEST_SCALE if self.dynamic else 1, name
        )
        return structures.IntegerAttention(
            self._array(attention.multiplier.flatten(), torch.int32), self._array(shift + lift - HIGH, torch.int32),
            output, lift, self.dynamic,
        )  # fmt: skip

    def _block(self, block: IntegerBlock, name: str) -> structures.IntegerBlock:
        linears = (
            self._linear(getattr(block, role), f"{name}, {role}")
            for role in ("query", "key", "value", "output", "fc1", "fc2")
        )
        rows = (
            self._rows(block.norm1.output), self._rows(block.attention.output), self._rows(block.norm2.output),
            self._rows(block.activation.output, unsigned=True),
        )  # fmt: skip
        size = len(block.query.weight) // len(block.attention.multiplier)
        values, gains = block.activation.entries.to(torch.int64)
        return structures.IntegerBlock(
            *linears, self._norm(block.norm1, f"{name}, norm1"), self._norm(block.norm2, f"{name}, norm2"), *rows,
            self._attention(block.attention, size, f"{name}, attention"),
            structures.Lines(
                self._array((values & 0xFFFF) | gains << 16, torch.int32), self._array(values, torch.int16),
                self._array(gains, torch.int16),
            ),
            self._requantize(
                _first(block.activation.output), len(block.fc1.weight), 2 ** (INPUT_BITS - 1), 1, f"{name}, activation"
            ),
            self._requantize_lines(_first(block.activation.output), len(block.fc1.weight), values, gains),
        )  # fmt: skip


def _constants(by: Requantize, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplier, shift, and offset with half a unit of the result, which rounds: int64 (columns,)."""
    multiplier, shift = (t.to(torch.int64).expand(columns) for t in (by.multiplier, by.shift))
    offset = torch.zeros_like(shift) if by.offset is None else by.offset.expand(columns)
    return multiplier, shift, offset + ((torch.ones_like(shift) << shift) >> 1)


def _alone(spread: Spread) -> Tensor:
    """Of each byte, how many from it on are of columns side by side, whole: int64 (inputs,)."""
    columns = spread.columns.to(torch.int64)
    places = torch.arange(len(columns))
    whole = (spread.added == 0) & (spread.shift == 0)
    begins = torch.ones(len(columns) + 1, dtype=torch.bool)  # of a run, and behind the last one
    begins[1:-1] = (columns[1:] != columns[:-1] + 1) | (whole[1:] != whole[:-1])
    ends = torch.where(begins[1:], places + 1, len(columns)).flip(0).cummin(0).values.flip(0)
    return torch.where(whole, ends - places, 0)


def _check_functions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, IntegerAttention | IntegerGELU) and module.functions != "default":
            raise NotNative(f"its functions are those of {module.functions!r}, which the reference computes")


def _check_parts(model: nn.Module) -> None:
    for module in model.modules():
        if module is not model and type(module) not in PARTS:
            raise NotNative(f"a part is a {type(module).__name__}")
    devices = {t.device.type for t in _tensors(model)}
    if devices - {"cpu"}:
        raise NotNative(f"it is on {', '.join(sorted(devices))}")
    if any(t.is_inference() for t in _tensors(model)):
        raise NotNative("its tensors are of the inference mode, and do not know whether they were written to")


def _check_shapes(model: Any) -> None:
    """NotNative unless every part has the sizes that those beside it have: kernels look at no size twice."""
    tokens, width = model.constants.shape
    patches = (model.size[0] // model.patch[0]) * (model.size[1] // model.patch[1])
    whole = all(size % patch == 0 for size, patch in zip(model.size, model.patch)) and tokens >= max(patches, 1)
    if not len(model.blocks) or not whole:
        raise NotNative("it has no blocks, or its patches do not divide its pictures")
    channels = len(model.pixel_start) * model.patch[0] * model.patch[1]
    heads, inner, hidden = _sizes(model.blocks[0])
    if not heads or inner % heads:
        raise NotNative(f"{inner} columns do not divide into {heads} heads")
    found: list[tuple[int, ...]] = [model.patches.weight.shape]
    wanted: list[tuple[int, ...]] = [(width, channels)]

    def reads(output: nn.Module, columns: int, *layers: IntegerLinear) -> None:
        spread = cast(Spread, output[1]) if isinstance(output, nn.Sequential) else None
        found.append(_first(output).multiplier.shape)
        wanted.append((columns,))
        if spread is not None and not (0 <= int(spread.columns.min()) <= int(spread.columns.max()) < columns):
            raise NotNative("bytes of columns that are not there")
        for layer in layers:
            found.append(layer.weight.shape[1:])
            wanted.append((columns if spread is None else len(spread.columns),))

    for block in model.blocks:
        found += [_sizes(block), block.activation.entries.shape]
        wanted += [(heads, inner, hidden), (2, 256)]
        reads(block.norm1.output, width, block.query, block.key, block.value)
        reads(block.attention.output, inner, block.output)
        reads(block.norm2.output, width, block.fc1)
        reads(block.activation.output, hidden, block.fc2)
        found += [layer.weight.shape[:1] for layer in (block.key, block.value, block.output, block.fc2)]
        wanted += [(inner,), (inner,), (width,), (width,)]
    plain = _plain(model)
    for readout in model.head.readouts.values():
        if readout.norm is not None:
            reads(readout.norm.output, width, *([] if plain is None else [cast(IntegerLinear, plain.linear)]))
    if model.before is not None:
        reads(model.before.output, width)
    if [tuple(shape) for shape in found] != wanted:
        raise NotNative("its blocks have different numbers of heads or sizes of layers")


def _normed(norm: structures.IntegerNorm, h: Tensor) -> Tensor:
    """As an IntegerNorm, int64 (..., C) of 22 bits -> int64."""
    return native_calls.integer_norm(norm, h, native.level_number()).to(torch.int64)


def _plain(model: Any) -> Readout | None:
    """The only readout of a head that the kernels compute, too."""
    return next(iter(model.head.readouts.values())) if model.head.is_plain() else None


def _sizes(block: IntegerBlock) -> tuple[int, int, int]:
    """Heads, columns of queries, and columns between the layers of the MLP."""
    return len(block.attention.multiplier), len(block.query.weight), len(block.fc1.weight)


def _first(output: nn.Module) -> Requantize:
    return cast(Requantize, output[0] if isinstance(output, nn.Sequential) else output)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
