"""Calibration: images through the model, block by block, to what rounding needs to know of each layer's inputs.

Memory holds the hidden states of all images at one place of the model, and the statistics of the layers that are being
rounded. Labels are never needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.scalar.ops import fake_quantize, histogram_range, range_to_qparams
from fairseq.quantization.architectures.forward import call, evaluating, output_of, picture_inputs
from fairseq.quantization.rounding.gptq import Statistics
from fairseq.quantization.rounding.quality import sqnr

UNIFORM_SHARE = 0.1
"""Of a token's weight; the rest follows the gradient. Some tokens would count for nothing without it."""
BATCH_SIZE = 4
GRADIENT_BATCH_SIZE = 2
SAMPLE = 512
"""Tokens on which static inputs are equalized."""
RANGE_VALUES = 2**16
"""Values per batch from which the range of a static activation is taken."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def token_weights(model: nn.Module, pixel_values: Tensor, names: list[str], seed: int = 0) -> dict[str, Tensor]:
    """How much an error at each token of each layer's output changes the model's output.

    The squared norm of the gradient of v . logits at that token, v ~ N(0, 1) of zero mean: in expectation the squared
    Frobenius norm of the Jacobian of the logits. It is what keeps a class token, one of 197, from being rounded for the
    sake of the patches, and patches of the last block from being rounded with care although nothing reads them.

    Args:
        model: the float model; it stays as it is.
        pixel_values: (N, C, H, W).
        names: of Linear layers.
        seed: of v.

    Returns:
        By name, one weight per token, (N * tokens,), mean 1, on the CPU. A layer that was not called once, or whose
        gradient is zero or not finite, has weight 1 everywhere: an empty tensor.
    """
    if not names:
        return {}
    device, dtype = _where(model)
    generator = torch.Generator().manual_seed(seed)
    inputs = picture_inputs(model, pixel_values)
    squares: dict[str, Tensor] = {}  # (N, tokens) each, allocated once: small results between large ones tear the heap
    for start in range(0, len(pixel_values), GRADIENT_BATCH_SIZE):
        batch = {key: _moved(x[start : start + GRADIENT_BATCH_SIZE], device, dtype) for key, x in inputs.items()}
        batch["pixel_values"].requires_grad_()
        count = len(batch["pixel_values"])
        outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, a, y, seen=outputs[name]: seen.append(y))
            for name in names
        ]
        try:
            with evaluating(model), torch.enable_grad():
                _, result = output_of(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        probe = torch.randn(result.shape, generator=generator)
        probe -= probe.mean(-1, keepdim=True)
        called = [name for name in names if len(outputs[name]) == 1]
        total = (result.float() * probe.to(device)).sum()
        gradients = torch.autograd.grad(total, [outputs[name][0] for name in called], allow_unused=True)
        for name, gradient in zip(called, gradients, strict=True):
            if gradient is not None:
                square = gradient.float().square().sum(-1).view(count, -1)
                if name not in squares:
                    squares[name] = torch.full((len(pixel_values), square.shape[1]), torch.nan)
                squares[name][start : start + count] = square.cpu()
    weights = {}
    for name in names:
        values = squares[name].flatten() if name in squares else torch.empty(0)
        mean = values.mean() if len(values) else torch.zeros(())
        usable = bool(torch.isfinite(mean)) and float(mean) > 0
        weights[name] = (1 - UNIFORM_SHARE) * values / mean + UNIFORM_SHARE if usable else torch.empty(0)
    return weights


class Stream:
    """The calibration images on their way through ``model``, at the entrance of one block after the other.

    Where every block hands its output to the next (and nothing else changes between them), each block runs on stored
    hidden states. Otherwise, and for layers outside of blocks, the whole model runs up to the layer that is asked for.

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
            self.stored = list(self._stopped(blocks[0]))

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
        for index, (args, keywords) in enumerate(self.stored):
            with evaluating(block), torch.no_grad():
                output = _first(block(*args, **keywords))
                same = output.shape == args[0].shape and output.dtype == args[0].dtype
                self.stored[index] = (args[0].copy_(output) if same else output, *args[1:]), keywords
        self.position += 1

    def _stopped(self, name: str) -> Iterator[Arguments]:
        """Run until ``name`` is reached; yield its arguments, batch by batch."""
        module = self.model.get_submodule(name)
        if self.stored and name.startswith(f"{self.blocks[self.position]}."):
            block = self.model.get_submodule(self.blocks[self.position])
            runs: Iterator[Callable[[], Any]] = (partial(block, *a, **k) for a, k in self.stored)
        else:
            runs = (partial(call, self.model, batch) for batch in self._batches(self.model))

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

    def _batches(self, model: nn.Module, size: int = BATCH_SIZE) -> Iterator[dict[str, Tensor]]:
        """The inputs of ``size`` pictures at a time, where the model is."""
        device, dtype = _where(model)
        for start in range(0, len(self.inputs_of_all["pixel_values"]), size):
            yield {key: _moved(x[start : start + size], device, dtype) for key, x in self.inputs_of_all.items()}

    def _chained(self, model: nn.Module) -> bool:
        """Whether each block's first argument is the very output of the one before, and the others never change."""
        calls: list[Arguments] = []
        outputs: list[Any] = []
        hooks = []
        for name in self.blocks:
            module = model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda m, a, y: outputs.append(_first(y))))
        try:
            with evaluating(model), torch.no_grad():
                call(model, next(self._batches(model, 1)))
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != len(self.blocks) or not all(args for args, _ in calls):
            return False
        chained = all(args[0] is output for (args, _), output in zip(calls[1:], outputs, strict=False))
        (_, *rest), keywords = calls[0]
        return chained and all(
            len(args) == len(rest) + 1
            and all(a is b for a, b in zip(args[1:], rest, strict=True))
            and k.keys() == keywords.keys()
            and all(k[key] is keywords[key] for key in k)
            for args, k in calls
        )


def collect(
    inputs: Iterable[Tensor],
    weights: list[Tensor],
    names: list[str],
    bits: int | None = None,
    exact: Iterable[Tensor] | None = None,
) -> list[Statistics]:
    """Statistics of one tensor that several layers read, for each of them with its own token weights.

    Args:
        inputs: (tokens, in) for each batch.
        weights: of all tokens, one tensor per layer; an empty one for 1 everywhere.
        names: of the layers, for errors.
        bits: find the range for static activations of this width; None for none.
        exact: the same tensor in the float model, batch by batch, for ``Statistics.drift``.

    Raises:
        ValueError: an input that is not finite.
    """
    moments: list[Tensor] = []
    means: list[Tensor] = []
    values: list[Tensor] = []
    drifts: list[Tensor] = []
    drift_means: list[Tensor] = []
    at, totals, squares = 0, [0.0] * len(names), [0.0] * len(names)
    for batch, wanted in zip(inputs, itertools.repeat(None) if exact is None else exact, strict=False):
        x = batch.float()
        if not torch.isfinite(x).all():
            raise ValueError(f"{names[0]}: its input is not finite on the calibration images")
        if not moments:
            moments = [x.new_zeros(x.shape[1], x.shape[1]) for _ in names]
            means = [x.new_zeros(x.shape[1]) for _ in names]
            if wanted is not None:
                drifts, drift_means = [m.clone() for m in moments], [m.clone() for m in means]
        lost = None if wanted is None else wanted.to(x.device, x.dtype) - x
        for i, every in enumerate(weights):
            w = every[at : at + len(x)].to(x.device) if len(every) else x.new_ones(len(x))
            weighted = x * w.unsqueeze(1)
            moments[i].addmm_(x.T, weighted)
            means[i] += weighted.sum(0)
            if lost is not None:
                drifts[i].addmm_(lost.T, weighted)
                drift_means[i].addmv_(lost.T, w)
            totals[i] += float(w.sum())
            squares[i] += float(w.square().sum())
        at += len(x)
        if bits is not None:
            flat = x.flatten()
            values += [flat[:: max(1, len(flat) // RANGE_VALUES)].clone(), torch.stack(torch.aminmax(flat))]
    span = (0.0, 0.0, 0.0)
    if bits is not None:
        sample = torch.cat(values)
        low, high = histogram_range(sample, bits)
        rounded = fake_quantize(sample, *range_to_qparams(low, high, bits), bits)
        span = float(low), float(high), sqnr(sample, rounded)
    return [
        Statistics(
            moments[i] / total, means[i] / total, *span,
            drifts[i] / total if drifts else None, drift_means[i] / total if drifts else None,
            total**2 / squares[i],
        )
        for i, total in enumerate(totals)
    ]  # fmt: skip


class _Reached(Exception):
    """A forward pass came to the layer whose input is wanted."""

    def __init__(self, args: tuple[Any, ...], keywords: dict[str, Any]):
        super().__init__()
        self.arguments = args, keywords


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _moved(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def _where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(p for p in model.parameters() if p.is_floating_point() and p.numel())
    return parameter.device, parameter.dtype
