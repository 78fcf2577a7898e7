"""IntegerViT: pixels are rounded once, and every operation up to the integers of the logits is one of integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.integer.buffers import keep_dtypes
from fairseq.modules.quantization.scalar.modules.fingerprint import readable
from fairseq.quantization.integer_only.block import IntegerBlock, add
from fairseq.quantization.integer_only.head import IntegerHead
from fairseq.quantization.integer_only.layers import IntegerLinear, IntegerNorm
from fairseq.quantization.integer_only.native import native_outputs, native_pixels

PIXELS = 256
OUTPUTS = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
"""Of models; the first that there is stands for all."""


class IntegerViT(nn.Module):
    """A Vision Transformer on integers, for inference; see ``docs/integer_only.rst``.

    Buffers, besides those of its parts, which are integers:
        pixel_start, pixel_step: float64 (channels,): a pixel is start + step * p, p from 0 to 255.
        constants: int32 (tokens, width): class tokens and position embeddings, in the steps of what they are added to.

    Args:
        config: of the model that this was made from.
        size: height and width of pictures.
        patch: height and width of a patch.
        bits: of what layers read, 16 (dynamic) or 8 (static).
        head: what makes outputs of the residual stream.
        output_class: what :meth:`forward` returns, a mapping; None for the logits alone, as timm's.
        before: LayerNorm of embedded tokens, which gives the residual stream; or None.
    """

    pixel_start: Tensor
    pixel_step: Tensor
    constants: Tensor
    prepared: Any = None  # see native.py

    def __init__(
        self,
        config: Any,
        size: tuple[int, int],
        patch: tuple[int, int],
        bits: int,
        pixel_grid: tuple[Tensor, Tensor],
        patches: IntegerLinear,
        constants: Tensor,
        blocks: Sequence[IntegerBlock],
        head: IntegerHead,
        output_class: Callable[..., Any] | None = None,
        before: IntegerNorm | None = None,
    ):
        super().__init__()
        self.config, self.size, self.patch, self.bits, self.output_class = config, size, patch, bits, output_class
        for name, values in zip(("pixel_start", "pixel_step"), pixel_grid):
            self.register_buffer(name, values.to(torch.float64))
        self.register_buffer("constants", constants.to(torch.int32))
        self.patches, self.before, self.blocks, self.head = patches, before, nn.ModuleList(blocks), head
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or a file: without what the native kernels have made of the parts."""
        return {**self.__dict__, "prepared": None}

    @property
    def main(self) -> str:
        """The name of the output that stands for all: "logits", or what a tower is for."""
        return next(name for name in (*OUTPUTS, *self.head.outputs) if name in self.head.outputs)

    @property
    def logit_exponent(self) -> Tensor:
        """int32; a number of the output :attr:`main`, such as a logit, is its integer / 2**logit_exponent."""
        return self.head.exponents()[self.main]

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **others: Any) -> Any:
        """The outputs of the float model, and the integers that they are.

        Args:
            pixel_values: as for the float model, (B, channels, H, W), rounded first; or uint8, the pixels themselves.
            return_dict: False for a tuple.
            others: whatever else the float model takes, if it is None or False.

        Returns:
            ``logits``: float32 (B, classes), ``integer_logits`` / 2**``logit_exponent``, exact.
            ``integer_logits``: int32 (B, classes). Both in the mapping or tuple that the float model returns. So for
            each other output, such as ``pooler_output`` and ``integer_pooler_output``; ``head.exponents()`` has theirs.

        Raises:
            TypeError, ValueError: pixel values that are no such tensor, are NaN or Inf or of another size, or another
                argument.
        """
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if asked:
            raise ValueError(f"an integer-only model takes pixel_values and return_dict, not {', '.join(asked)}")
        integers = self.integer_outputs(self.round_pixels(pixel_values))
        exponents = self.head.exponents()
        exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()

        def scale(exponent: Tensor) -> Any:
            if torch.compiler.is_compiling():  # no number may be read: the bits of 2**-exponent
                return ((1023 - exponent.to(torch.int64)) << 52).view(torch.float64)
            return math.ldexp(1.0, -int(exponent))

        floats = {
            name: (value.to(torch.float32) * scale(exponents[name])).to(torch.float32)
            for name, value in integers.items()
        }
        if self.output_class is None:
            return floats[self.main]
        if return_dict is False or exporting or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return *floats.values(), *integers.values()
        output = self.output_class(**floats)
        for name, value in integers.items():
            output[f"integer_{name}"] = value
        return output

    def round_pixels(self, pixel_values: Tensor) -> Tensor:
        """The pixels, uint8 (B, channels, H, W): (x - start) / step rounded half to even; the one step that is float.

        Pixels beyond the range saturate. While a graph is recorded, or without numbers, nothing is looked at.
        """
        expected = (len(self.pixel_start), *self.size)
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values must be a tensor, got {type(pixel_values).__name__}")
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must have the shape (batch, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}"
            )
        if pixel_values.dtype == torch.uint8:
            return pixel_values
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be floating, or uint8 for the pixels themselves; {pixel_values.dtype}")
        if (rounded := native_pixels(pixel_values, self.pixel_start, self.pixel_step)) is not None:
            return rounded
        if readable(pixel_values) and not bool(torch.isfinite(pixel_values).all()):
            raise ValueError("pixel_values hold NaN or Inf")
        return self.nearest_pixels(pixel_values)

    def nearest_pixels(self, pixel_values: Tensor) -> Tensor:
        """:meth:`round_pixels` without a look at what it is given, so that it can be recorded; of NaN, any pixel."""
        start, step = (t[:, None, None] for t in (self.pixel_start, self.pixel_step))
        return ((pixel_values.detach().double() - start) / step).round().clamp(0, PIXELS - 1).to(torch.uint8)

    def integer_logits(self, pixels: Tensor) -> Tensor:
        """Of :meth:`integer_outputs` the one that stands for all, int32 (B, classes) or of another size."""
        return self.integer_outputs(pixels)[self.main]

    @torch.no_grad()
    def integer_outputs(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (B, channels, H, W) -> int32 by output. No operation in here is one of floating numbers.

        The native kernels run where they can; what they give equals the rest of this function.
        """
        if self._is_plain() and (found := native_outputs(self, pixels)) is not None:
            return found
        h = self.embed(pixels)
        for block in self.blocks:
            h = block(h)
        found = self.head(h)
        return found

    def _is_plain(self) -> bool:
        """Whether :meth:`embed` is that of this class, which the kernels compute."""
        return "embed" not in self.__dict__ and type(self).embed is IntegerViT.embed

    def embed(self, pixels: Tensor) -> Tensor:
        """uint8 (B, channels, H, W) -> the residual stream, int64 (B, tokens, width) of 22 bits."""
        batch, channels = pixels.shape[:2]
        (height, width), (rows, columns) = self.patch, (self.size[0] // self.patch[0], self.size[1] // self.patch[1])
        centred = (pixels.to(torch.int16) - PIXELS // 2).to(torch.int8)
        cut = centred.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        embedded = self.patches(cut.reshape(batch, rows * columns, -1))  # (B, patches, width)
        constants = self.constants.to(torch.int64).expand(batch, -1, -1)
        first = constants.shape[1] - embedded.shape[1]
        h = torch.cat((constants[:, :first], add(constants[:, first:], embedded)), dim=1)
        return h if self.before is None else self.before(h)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerViT:
        """Move as any module does, but keep the grid of pixels in float64."""
        before = {name: self._buffers[name] for name in ("pixel_start", "pixel_step")}
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        return self


class IntegerOutputs(nn.Module):
    """An IntegerViT as a graph records it: uint8 (B, channels, H, W), or floats to round -> its integer outputs."""

    def __init__(self, model: IntegerViT):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        if pixels.is_floating_point():
            pixels = self.model.nearest_pixels(pixels)
        return tuple(self.model.integer_outputs(pixels).values())
