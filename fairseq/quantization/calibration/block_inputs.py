"""BlockInputs: calibration pictures on their way through a model, at the entrance of one block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import call, evaluating, picture_inputs
from fairseq.quantization.architectures.observe import Arguments, copied, equal

BATCH_SIZE = 4
SAMPLE = 512
"""Tokens on which inputs are equalized."""


class BlockInputs:
    """The calibration images on their way through ``model``, at the entrance of one block after the other.

    Where every block hands its output to the next (and nothing else changes between them), each block runs on stored
    hidden states; shapes may differ from block to block. Otherwise, and for layers outside of blocks, the whole model
    runs up to the layer that is asked for. What was stored is never written: a block gets copies, and may edit those.

    Args:
        model: the float model.
        result: its copy that is being quantized, block by block; what lies behind the current block is not run.
        pixel_values: (N, C, H, W).
        blocks: the names of its encoder blocks, in order.
    """

    def __init__(self, model: nn.Module, result: nn.Module, pixel_values: Tensor, blocks: list[str]):
        self.model, self.inputs_of_all = result, picture_inputs(model, pixel_values)
        self.blocks, self.position = blocks, 0
        self.stored: list[Arguments] = []
        if blocks and self._chained(model):
            # the first argument is copied: it may be part of the model, such as a parameter
            self.stored = [((copied(args[0]), *args[1:]), kw) for args, kw in self._stopped(blocks[0])]

    def inputs(self, name: str) -> Iterator[Tensor]:
        """What the layer called ``name`` is called with, (tokens, in) for each batch of images."""
        for args, _ in self._stopped(name):
            yield args[0].detach().flatten(0, -2)

    def sample(self, name: str) -> Tensor:
        """Some hundred tokens of these inputs, evenly spaced over all images: (tokens, in), float32."""
        batches = [x.float() for x in self.inputs(name)]
        step = max(1, sum(map(len, batches)) // SAMPLE)
        return torch.cat([x[::step] for x in batches])

    def advance_to(self, block: str) -> None:
        """Run the stored hidden states up to the entrance of ``block``, through blocks that are final by now."""
        while self.stored and self.blocks[self.position] != block:
            self._advance()

    def _advance(self) -> None:
        block = self.model.get_submodule(self.blocks[self.position])
        for index, arguments in enumerate(self.stored):
            (before, *rest), keywords = arguments
            args, fresh = copied(arguments)
            with evaluating(block), torch.no_grad():
                output = _first(block(*args, **fresh))
            if output.shape == before.shape and output.dtype == before.dtype:
                output = before.copy_(output)  # our own memory: new results between others tear the heap
            self.stored[index] = (output, *rest), keywords
        self.position += 1

    def _stopped(self, name: str) -> Iterator[Arguments]:
        """Run until ``name`` is reached; yield its arguments, batch by batch, which are not to be written."""
        module = self.model.get_submodule(name)
        here = f"{self.blocks[self.position]}." if self.position < len(self.blocks) else None
        if self.stored and here is not None and name.startswith(here):
            block = self.model.get_submodule(self.blocks[self.position])
            runs: Iterator[Callable[[], Any]] = (partial(block, *a, **k) for a, k in map(copied, self.stored))
        else:
            runs = (partial(call, self.model, batch) for batch in self._pictures(self.model))

        def stop(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            raise _Reached(args, keywords)

        for run in runs:
            hook = module.register_forward_pre_hook(stop, with_kwargs=True)
            try:
                with evaluating(self.model), torch.no_grad():
                    run()
                raise ValueError(f"{name} is not reached by a forward pass of the model, so it cannot be calibrated")
            except _Reached as reached:
                arguments = reached.arguments
            finally:
                hook.remove()
            yield arguments

    def _pictures(self, model: nn.Module, size: int = BATCH_SIZE) -> Iterator[dict[str, Tensor]]:
        """The inputs of ``size`` pictures at a time, where the model is."""
        device, dtype = where(model)
        for start in range(0, len(self.inputs_of_all["pixel_values"]), size):
            yield {key: moved(x[start : start + size], device, dtype) for key, x in self.inputs_of_all.items()}

    def _chained(self, model: nn.Module) -> bool:
        """Whether each block is called with the output of the one before, as it was, and all else stays the same."""
        calls: list[Arguments] = []
        outputs: list[tuple[Any, Any]] = []  # each block's, and what was in it
        links: list[bool] = []

        def enter(module: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
            links.append(bool(args) and (not outputs or (args[0] is outputs[-1][0] and equal(args[0], outputs[-1][1]))))
            calls.append(copied((args[1:], keywords)))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append((_first(output), copied(_first(output))))

        blocks = [model.get_submodule(name) for name in self.blocks]
        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
        hooks += [block.register_forward_hook(leave) for block in blocks]
        try:
            with evaluating(model), torch.no_grad():
                call(model, next(self._pictures(model, 1)))
        finally:
            for hook in hooks:
                hook.remove()
        return len(calls) == len(blocks) and all(links) and all(equal(other, calls[0]) for other in calls)


class _Reached(Exception):
    """A forward pass came to the layer whose input is wanted."""

    def __init__(self, args: tuple[Any, ...], keywords: dict[str, Any]):
        super().__init__()
        self.arguments = args, keywords


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def moved(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(p for p in model.parameters() if p.is_floating_point() and p.numel())
    return parameter.device, parameter.dtype
