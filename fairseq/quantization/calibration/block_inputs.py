"""BlockInputs: calibration pictures on their way through a model, at the entrance of one block after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fairseq.quantization.architectures.forward import Pixels, call, evaluating, picture_batch
from fairseq.quantization.architectures.observe import Arguments, copied, equal
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.precision import multiplies_in_half, products, where
from fairseq.quantization.calibration.statistics import BATCH_SIZE
from fairseq.quantization.calibration.storage import Storage
from fairseq.quantization.rounding.statistics import Sample

SAMPLE = 1024
"""Tokens on which inputs are equalized, about."""
GOLDEN = (5**0.5 - 1) / 2
ALIKE = 0.01
"""Relative error up to which a layer is called with the same; one that reads something else gets something else."""


class Stored:
    """What a block is called with, batch by batch: hidden states on disk, and whatever else in memory.

    Args:
        what: how errors call the hidden states.
    """

    def __init__(self, what: str):
        self.hidden, self.others = Storage(what), []  # type: tuple[Storage, list[Any]]

    def __len__(self) -> int:
        return len(self.others)

    def __getitem__(self, index: int) -> Arguments:
        """The arguments of one batch, which are not to be written."""
        rest, keywords = self.others[index]
        return ((), keywords) if rest is None else ((self.hidden[index], *rest), keywords)

    def __iter__(self) -> Iterator[Arguments]:
        return (self[index] for index in range(len(self)))

    def append(self, arguments: Arguments) -> None:
        """Add a batch; the hidden states, the first argument, are copied: they may be a parameter of the model."""
        args, keywords = arguments
        if not args:  # hidden states by name stay in memory
            self.hidden.append(torch.empty(0))
            self.others.append((None, copied(((), keywords))[1]))
            return
        hidden, *rest = args
        self.hidden.append(hidden)
        others = (rest, keywords)
        self.others.append(self.others[0] if self.others and equal(self.others[0], others) else others)

    def replace(self, index: int, hidden: Tensor) -> None:
        """Put other hidden states in the place of a batch's."""
        self.hidden[index] = hidden


class BlockInputs:
    """The calibration images on their way through ``model``, at the entrance of one block after the other.

    Where every block hands its output to the next (and nothing else changes between them), each block runs on stored
    hidden states; shapes may differ from block to block. Otherwise, and for layers outside of blocks that read more
    than the last block's output, the whole model runs up to the layer that is asked for. What was stored is never
    written: a block gets copies, and may edit those. Of several processes each has its own pictures.

    Args:
        model: the float model.
        result: its copy that is being quantized, block by block; what lies behind the current block is not run.
        pixel_values: (N, C, H, W).
        blocks: the names of its encoder blocks, in order.

    Attributes:
        half: whether products are in bfloat16, see :func:`~.precision.multiplies_in_half`: of the float model alone,
            what is being quantized multiplies integers.
    """

    skips = True
    """Whether layers behind the blocks may be reached without running these again."""

    def __init__(self, model: nn.Module, result: nn.Module, pixel_values: Pixels, blocks: list[str]):
        self.model, self.pixel_values = result, pixel_values
        self.blocks, self.position = blocks, 0
        self.half = result is model and multiplies_in_half(model)
        own = processes.share(len(pixel_values))
        self.batches = [slice(i, min(i + BATCH_SIZE, own.stop)) for i in range(own.start, own.stop, BATCH_SIZE)]
        self.stored = Stored("hidden states of the calibration images")
        self.kept: dict[str, Storage] = {}
        self.chained = bool(blocks) and self._chained(model)
        if self.chained:
            for arguments in self._stopped(blocks[0]):
                self.stored.append(arguments)

    def inputs(self, name: str) -> Iterator[Tensor]:
        """What the layer called ``name`` is called with, (tokens, in) for each batch of images."""
        if name in self.kept:
            yield from self.kept[name]
            return
        for args, _ in self._stopped(name):
            yield args[0].detach().flatten(0, -2)

    def arguments(self, block: str) -> Stored:
        """What ``block`` is called with, batch by batch, while those before it are final and it is the next."""
        self.advance_to(block)
        if self.chained:
            return self.stored
        found = Stored(f"inputs of {block}")
        for arguments in self._stopped(block):
            found.append(arguments)
        return found

    def outputs(self, block: str) -> Storage:
        """What ``block`` gives, batch by batch, as the model is: for a float model, and after :meth:`pass_through`."""
        if self.chained:
            self.advance_past(block)
            return self.stored.hidden
        found, module = Storage(f"outputs of {block}"), self.model.get_submodule(block)
        for args, keywords in map(copied, self._stopped(block)):
            with evaluating(module), torch.no_grad(), products(self.model, self.half):
                found.append(first(module(*args, **keywords)))
        return found

    def sample(self, name: str, weights: Tensor | None = None) -> Sample:
        """About a thousand tokens of these inputs, spread over all images, half of them by how much they count.

        Args:
            name: of the layer.
            weights: one per token of the own images, (tokens,), mean 1 over all processes; None for 1 everywhere.

        Returns:
            All tokens, if there are no more than that. Several processes get the same.
        """
        found: list[Sample] = []
        at = 0
        for x, rows in zip(self.inputs(name), self.batches, strict=True):
            w = torch.ones(len(x)) if weights is None else weights[at : at + len(x)]
            at += len(x)
            distance = len(x) * len(self.pixel_values) / (rows.stop - rows.start) / SAMPLE
            if distance > 1:
                density = (w + 1) / 2
                index, times = _spaced(density, distance, rows.start // BATCH_SIZE).unique_consecutive(
                    return_counts=True
                )
                x, w = x[index.to(x.device)], (times * w[index] / density[index]).to(w.dtype)
            found.append(Sample(x.float(), w.to(x.device)))
        tokens, counts = (
            processes.concatenated(torch.cat([one[part] for one in found]) if found else None) for part in (0, 1)
        )
        assert tokens is not None
        assert counts is not None
        return Sample(tokens, counts)

    def advance_to(self, block: str) -> None:
        """Run the stored hidden states up to the entrance of ``block``, through blocks that are final by now."""
        while self.chained and self.blocks[self.position] != block:
            self._advance()

    def advance_past(self, block: str) -> None:
        """Run the stored hidden states through ``block``, too, unless they are behind it."""
        while self.chained and self.position <= self.blocks.index(block):
            self._advance()

    def pass_through(self, block: str, names: Sequence[str]) -> None:
        """Run the stored hidden states through a final ``block``, and keep what its layers ``names`` are called with.

        ``inputs`` of these gives that until the next call. Nothing happens where blocks are no chain.
        """
        self.advance_to(block)
        if not self.chained:
            return
        self.kept = {name: Storage(f"inputs of {name}") for name in names}

        def keep(name: str, module: nn.Module, args: Any) -> None:
            x = args[0].detach().flatten(0, -2)
            shorter = x.half() if self.half and x.dtype == torch.float32 else x
            self.kept[name].append(shorter if torch.isfinite(shorter).all() else x)

        hooks = [self.model.get_submodule(n).register_forward_pre_hook(partial(keep, n)) for n in names]
        try:
            self._advance()
        finally:
            for hook in hooks:
                hook.remove()

    def ends_with(self, name: str, tolerance: float = 0.02) -> bool:
        """Whether the current block adds what the layer called ``name`` gives last of all, as seen on some pictures."""
        if not self.chained or not len(self.stored):
            return False
        given: list[Tensor] = []

        def without(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            given.append(output.detach())
            return torch.zeros_like(output)

        layer = self.model.get_submodule(name)
        (whole,) = self._outputs_with(None, range(1))
        (rest,) = self._outputs_with(layer.register_forward_hook(without), range(1))
        return (
            len(given) == 1
            and given[0].shape == whole.shape
            and bool((whole - rest - given[0]).float().norm() <= tolerance * given[0].float().norm())
        )

    def through(self, name: str, reads: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """What the layer called ``name`` reads and what the current block gives, (tokens, features), batch by batch.

        Args:
            name: of a layer of the current block; it runs, and so do its hooks.
            reads: what it reads of its input.
        """
        read: list[Tensor] = []

        def instead(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            read.append(reads(args[0]).detach())
            return (read[-1], *args[1:])

        handle = self.model.get_submodule(name).register_forward_pre_hook(instead)
        for given in self._outputs_with(handle, range(len(self.stored))):
            yield read.pop().flatten(0, -2), given.flatten(0, -2)

    def _outputs_with(self, handle: RemovableHandle | None, batches: range) -> Iterator[Tensor]:
        """What the current block gives for some batches, with a hook that is removed in the end."""
        block = self.model.get_submodule(self.blocks[self.position])
        try:
            for index in batches:
                args, keywords = copied(self.stored[index])
                with evaluating(block), torch.no_grad(), products(self.model, self.half):
                    yield first(block(*args, **keywords))
        finally:
            if handle is not None:
                handle.remove()

    def _advance(self) -> None:
        block = self.model.get_submodule(self.blocks[self.position])
        for index in range(len(self.stored)):
            args, keywords = copied(self.stored[index])
            with evaluating(block), torch.no_grad(), products(self.model, self.half):
                self.stored.replace(index, first(block(*args, **keywords)))
        self.position += 1

    def _stopped(self, name: str) -> Iterator[Arguments]:
        """Run until ``name`` is reached; yield its arguments, batch by batch, which are not to be written."""
        here = f"{self.blocks[self.position]}." if self.position < len(self.blocks) else None
        if len(self.stored) and here is not None and name.startswith(here):
            block = self.model.get_submodule(self.blocks[self.position])
            runs: Iterator[Callable[[], Any]] = (partial(block, *a, **k) for a, k in map(copied, self.stored))
        else:
            runs = (partial(call, self.model, batch) for batch in self._pictures(self.model))
            if len(self.stored) and not name.startswith(tuple(f"{block}." for block in self.blocks)):
                yield from self._behind(name, runs)
                return
        for run in runs:
            yield self._arguments(name, run)

    def _behind(self, name: str, runs: Iterator[Callable[[], Any]]) -> Iterator[Arguments]:
        """What a layer outside of blocks is called with: without running these, if it then comes to the same."""
        skipping = self.skips and name not in self.blocks
        while skipping and self.position < len(self.blocks):
            self._advance()
        for index, run in enumerate(runs):
            if skipping:
                (hidden, *_), _ = self.stored[index]
                with self._answering(hidden):
                    arguments = self._arguments(name, run)
                if index or _alike(arguments, self._arguments(name, run)):
                    yield arguments
                    continue
                skipping = False
            yield self._arguments(name, run)

    @contextmanager
    def _answering(self, hidden: Tensor) -> Iterator[None]:
        """Inside, every block returns ``hidden`` at once."""
        blocks = [self.model.get_submodule(name) for name in self.blocks]
        answer = (hidden,) if self.tuples else hidden
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: answer
        try:
            yield
        finally:
            for block in blocks:
                del vars(block)["forward"]

    def _arguments(self, name: str, run: Callable[[], Any]) -> Arguments:
        """What the module ``name`` is called with in one run, which ends there."""

        def stop(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            raise _Reached(args, keywords)

        hook = self.model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with evaluating(self.model), torch.no_grad(), products(self.model, self.half):
                run()
        except _Reached as reached:
            return reached.arguments
        finally:
            hook.remove()
        raise ValueError(f"{name} is not reached by a forward pass of the model, so it cannot be calibrated")

    def _pictures(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """The inputs of each batch of pictures, where the model is."""
        return (picture_batch(model, self.pixel_values, rows, where(model)) for rows in self.batches)

    def _chained(self, model: nn.Module) -> bool:
        """Whether each block is called with the output of the one before, as it was, and all else stays the same."""
        calls: list[Arguments] = []
        outputs: list[tuple[Any, Any]] = []  # each block's, and what was in it
        links: list[bool] = []

        def enter(module: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
            links.append(bool(args) and (not outputs or (args[0] is outputs[-1][0] and equal(args[0], outputs[-1][1]))))
            calls.append(copied((args[1:], keywords)))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.tuples = isinstance(output, tuple)
            self.skips = self.skips and (not self.tuples or len(output) == 1)
            outputs.append((first(output), copied(first(output))))

        blocks = [model.get_submodule(name) for name in self.blocks]
        hooks = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
        hooks += [block.register_forward_hook(leave) for block in blocks]
        try:
            with evaluating(model), torch.no_grad():
                call(model, picture_batch(model, self.pixel_values, slice(0, 1), where(model)))
        finally:
            for hook in hooks:
                hook.remove()
        return len(calls) == len(blocks) and all(links) and all(equal(other, calls[0]) for other in calls)


class _Reached(Exception):
    """A forward pass came to the layer whose input is wanted."""

    def __init__(self, args: tuple[Any, ...], keywords: dict[str, Any]):
        super().__init__()
        self.arguments = args, keywords


def first(output: Any) -> Any:
    """What a block hands on: its output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def _alike(first: Arguments, second: Arguments) -> bool:
    """Whether a layer was called with the same input, but for rounding."""
    a, b = (arguments[0][0].detach().float() for arguments in (first, second))
    return a.shape == b.shape and bool((a - b).norm() <= ALIKE * b.norm())


def _spaced(weights: Tensor, distance: float, batch: int) -> Tensor:
    """The indices of some of a batch's tokens, int64, one for each ``distance`` that their weights add up to.

    Each batch begins elsewhere within that distance, by the golden ratio, so that in all each token is taken as often
    as it weighs, however few a batch gives.
    """
    reached = weights.double().cumsum(0)
    start = distance * (((batch + 1) * GOLDEN) % 1)
    points = torch.arange(start, max(start, float(reached[-1])), distance, dtype=torch.float64)
    return torch.searchsorted(reached, points, right=True).clamp_(max=len(weights) - 1)
