"""Task: what a block reads and should give, batch by batch, and which batches are held back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import evaluating
from fairseq.quantization.architectures.observe import Arguments, copied
from fairseq.quantization.calibration.block_inputs import Stored, first
from fairseq.quantization.calibration.precision import products
from fairseq.quantization.calibration.statistics import BATCH_SIZE
from fairseq.quantization.calibration.storage import Storage

HELD_BACK = 8
"""Every eighth batch is not learned from; it decides whether what was learned stays."""


class Task:
    """What a block reads and should give, batch by batch, and how much each token counts.

    Args:
        inputs: what the quantized block is called with.
        outputs: what the float block gives, on the float model's way.
        weights: one per token, (tokens,) for each batch; None for 1 everywhere.
        model: where hidden states go.
        half: whether products are in bfloat16.
        views: of each picture, which follow one another; they are held back together.
    """

    def __init__(
        self,
        inputs: Stored,
        outputs: Storage,
        weights: list[Tensor] | None,
        model: nn.Module,
        half: bool,
        views: int = 1,
    ):
        self.inputs, self.outputs, self.weights, self.model, self.half = inputs, outputs, weights, model, half
        count, size = len(inputs), math.lcm(BATCH_SIZE, views) // BATCH_SIZE
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]  # whole pictures each
        held = parts[HELD_BACK - 1 :: HELD_BACK] or parts[-2:-1]  # the last may be short
        self.held_back = [batch for part in held for batch in part]
        self.learned_from = [i for i in range(count) if i not in self.held_back]

    def steps(self, batch_size: int) -> int:
        """How many steps an epoch has."""
        return -(-len(self.learned_from) // max(1, batch_size // BATCH_SIZE))

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
        """One epoch: the numbers of the batches of each step."""
        order = torch.randperm(len(self.learned_from), generator=generator).tolist()
        size = max(1, batch_size // BATCH_SIZE)
        for start in range(0, len(order), size):
            yield [self.learned_from[i] for i in order[start : start + size]]

    def loss(self, block: nn.Module, batch: int) -> Tensor:
        """The weighted squared error of what ``block`` gives for one batch, a mean over its tokens."""
        args, keywords = _as(copied(self.inputs[batch]), block)
        with products(self.model, self.half):
            got = first(block(*args, **keywords))
        wanted = self.outputs[batch]
        error = (got.to(torch.promote_types(got.dtype, torch.float32)) - wanted).square().mean(-1).flatten()
        weights = None if self.weights is None else self.weights[batch]
        return error.mean() if weights is None else (error * weights.to(error.device, error.dtype)).mean()

    @torch.no_grad()
    def error(self, block: nn.Module, batches: Sequence[int]) -> float:
        """The mean of the loss over some batches."""
        with evaluating(block):
            return math.fsum(float(self.loss(block, batch)) for batch in batches) / len(batches)


def token_weights(weights: Tensor | None, outputs: Storage) -> list[Tensor] | None:
    """The weights of a block's output tokens batch by batch; None if all are 1."""
    if weights is None or not len(weights):
        return None
    sizes = [x.shape[:-1].numel() for x in outputs]
    return list(weights.split(sizes)) if sum(sizes) == len(weights) else None


def _as(arguments: Arguments, block: nn.Module) -> Arguments:
    """Arguments whose floating tensors have the dtype of a block's parameters."""
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), None)

    def cast_(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
            return value.to(dtype)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(map(cast_, value))
        return value

    args, keywords = arguments
    return tuple(map(cast_, args)), {key: cast_(value) for key, value in keywords.items()}
