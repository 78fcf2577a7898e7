"""examine: an integer-only model run on noise, each operation looked at and each intermediate measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.integer.checked import Widths, checked
from fairseq.modules.quantization.integer.dyadic import Requantize
from fairseq.modules.quantization.integer.no_float import NoFloat
from fairseq.quantization.integer_only.layers import WIDE, IntegerLinear
from fairseq.quantization.integer_only.model import PIXELS, IntegerViT

PICTURES = 2
REQUANTIZED = "requantize, input"


@dataclass(frozen=True)
class Examination:
    """What :func:`examine` saw.

    Attributes:
        activations: "dynamic" or "static".
        functions: "default", "ibert" or "ivit".
        pictures: how many it was run on.
        operations: how many operations that took, none of which had a floating number in it.
        widths: of the intermediates by name: bits documented, and bits taken.
        layers, weights: number of Linear layers, and of their integers.
        multipliers: number of multipliers of requantization, each with a shift and an offset.
        multiplier_bits, offset_bits: of the largest, with its sign.
        shifts: the least and the largest.
        logit_exponent: a logit, or a number of the output that stands for all, is its integer / 2**logit_exponent.
        exponents: those of all outputs, by name.
        bytes: of all constants in memory.
    """

    activations: str
    functions: str
    pictures: int
    operations: int
    widths: Widths
    layers: int
    weights: int
    multipliers: int
    multiplier_bits: int
    offset_bits: int
    shifts: tuple[int, int]
    logit_exponent: int
    exponents: dict[str, int]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(model: IntegerViT, seed: int = 0) -> Examination:
    """Run ``model`` on pictures of noise, and look at every operation and every intermediate.

    Raises:
        FloatingOperation: an operation with a floating number, between the pixels and the integers of the logits.
        OverflowError: an intermediate past its documented width.
    """
    shape = (PICTURES, len(model.pixel_start), *model.size)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, PIXELS, shape, generator=generator, dtype=torch.uint8).to(model.constants.device)
    with NoFloat() as seen:
        model.integer_logits(pixels)
    with checked() as widths:
        model.integer_logits(pixels)
    requantize = [module for module in model.modules() if isinstance(module, Requantize)]
    names = {module.name for module in requantize}
    common = {name: width for name, width in widths.items() if name not in names}
    inputs = [width for name, width in widths.items() if name in names]
    common[REQUANTIZED] = max(bits for bits, _ in inputs), max(used for _, used in inputs)
    layers = [module.weight.numel() for module in model.modules() if isinstance(module, IntegerLinear)]
    shifts = [module.shift for module in requantize]
    return Examination(
        activations="dynamic" if model.bits == WIDE else "static",
        functions=model.blocks[0].attention.functions,  # type: ignore[union-attr, arg-type]
        pictures=PICTURES,
        operations=seen.count,
        widths=common,
        layers=len(layers),
        weights=sum(layers),
        multipliers=sum(module.multiplier.numel() for module in requantize),
        multiplier_bits=_bits(module.multiplier for module in requantize),
        offset_bits=_bits(module.offset for module in requantize if module.offset is not None),
        shifts=(min(int(t.min()) for t in shifts), max(int(t.max()) for t in shifts)),
        logit_exponent=int(model.logit_exponent),
        exponents={name: int(exponent) for name, exponent in model.head.exponents().items()},
        bytes=sum(tensor.nbytes for tensor in model.state_dict().values()),
    )


def _bits(tensors: Iterable[Tensor]) -> int:
    """Of the largest integer, with its sign."""
    return max(max(int(t.max()), ~int(t.min())).bit_length() + 1 for t in tensors)
