"""IntegerInputs: calibration pictures on their way through an integer model, whose blocks are made as they come by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.blocks import class_of
from fairseq.quantization.architectures.forward import call, evaluating
from fairseq.quantization.architectures.observe import Arguments
from fairseq.quantization.calibration.block_inputs import BlockInputs
from fairseq.quantization.calibration.statistics import BATCH_SIZE
from fairseq.quantization.engine.reading import read
from fairseq.quantization.engine.spec import BlockSpec
from fairseq.quantization.integer_only.block import IntegerBlock
from fairseq.quantization.integer_only.build import Builder
from fairseq.quantization.integer_only.head_spec import HeadSpec
from fairseq.quantization.integer_only.model import IntegerViT
from fairseq.quantization.integer_only.ranges import observing, observing_head


class IntegerInputs(BlockInputs):
    """The pictures at the entrance of one block after the other, as the integer model gives them there.

    What is stored stands for integers of the residual stream, exactly in float32: so a block is rounded on what all
    integer blocks before it have made of the pictures. Within the block its float or packed layers run. When it is
    final, an integer block is made of it, over the ranges that it has on these inputs.

    Args:
        model, result, pixel_values, blocks: see :class:`BlockInputs`.
        entrance: an integer model, of which the embedding is asked.
        builder: its ranges of layers are written here.
        follows: whether what is stored is the integer model's; else the packed one's, which takes less time.

    Attributes:
        made: the integer blocks so far.
        stream: int32 (B, T, C) of 22 bits for each batch, what is stored; empty unless ``follows``.
    """

    skips = False

    def __init__(
        self,
        model: nn.Module,
        result: nn.Module,
        pixel_values: Tensor,
        blocks: list[str],
        entrance: IntegerViT,
        builder: Builder,
        follows: bool = True,
    ):
        super().__init__(model, result, pixel_values, blocks)
        if not self.chained:
            raise ValueError(
                f"{type(model).__name__} cannot become integers alone: its blocks do not hand their outputs to the next"
            )
        self.builder = builder
        self.made: list[IntegerBlock] = []
        self.stream: list[Tensor] = []
        if follows:
            batches = pixel_values.split(BATCH_SIZE)
            with torch.no_grad():
                self._store([entrance.embed(entrance.round_pixels(batch)) for batch in batches])

    def finish(self, head: HeadSpec) -> None:
        """Make the blocks that are left, and observe the ranges of what the layers of ``head`` read and give."""
        last = self.model.get_submodule(self.blocks[-1])
        with self._behind_blocks(), observing_head(self.builder.ranges, last, head), evaluating(self.model):
            for batch in self._pictures(self.model):
                call(self.model, batch)

    def _store(self, stream: list[Tensor]) -> None:
        self.stream = [h.to(torch.int32) for h in stream]
        for i, h in enumerate(stream):
            (before, *_), _ = self.stored[i]
            self.stored.replace(i, (h.double() * self.builder.step).to(before))

    def _advance(self) -> None:
        name = self.blocks[self.position]
        block = self.model.get_submodule(name)
        spec = cast(BlockSpec, read(block, cast(Any, class_of(type(block)))))
        with observing(self.builder.ranges, len(self.made), spec.layers):
            super()._advance()
        made = self.builder.block(len(self.made), spec, name)
        self.made.append(made)
        if self.stream:
            with torch.no_grad():
                self._store([made(h.to(torch.int64)) for h in self.stream])

    def _stopped(self, name: str) -> Iterator[Arguments]:
        inside = f"{name}.".startswith(tuple(f"{block}." for block in self.blocks))
        with nullcontext() if inside else self._behind_blocks():
            yield from super()._stopped(name)

    @contextmanager
    def _behind_blocks(self) -> Iterator[None]:
        """Inside, the last block answers each batch with what is stored of it, which is what all blocks make of it."""
        while self.position < len(self.blocks):
            self._advance()
        numbers = itertools.cycle(range(len(self.stored)))

        def answer(_: nn.Module, args: Any, output: Any) -> Any:
            h = self.stored[next(numbers)][0][0]
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = self.model.get_submodule(self.blocks[-1]).register_forward_hook(answer)
        try:
            yield
        finally:
            handle.remove()
