"""How much an error at each token of each layer's output matters to the model's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.forward import (
    CLASSES,
    OUTPUTS,
    Pixels,
    class_dimension,
    evaluating,
    output_of,
    picture_batch,
)
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.block_inputs import first
from fairseq.quantization.calibration.precision import multiplies_in_half, products, where

UNIFORM_SHARE = 0.1
"""Of a token's weight; the rest follows the gradient. Some tokens would count for nothing without it."""
BATCH_SIZE = 2
PROBES = 4
"""Where few tokens count, as in the last blocks the class token, gradients for more than one v tell more."""


def token_weights(
    model: nn.Module,
    pixel_values: Pixels,
    names: list[str],
    seed: int = 0,
    progress: Callable[[int], None] = lambda pictures: None,
    gradients: Callable[[Mapping[str, Tensor]], None] = lambda gradients: None,
    again: Collection[str] = (),
) -> dict[str, Tensor]:
    """How much an error at each token of each layer's output changes the model's output.

    The squared norm of the gradient of v . output at that token, v ~ N(0, 1): in expectation the squared Frobenius norm
    of the Jacobian of the output, see :func:`output_of`. Over the classes v has a mean of zero, as a softmax sees no
    constant. It is what keeps a class token, one of 197, from being rounded for the sake of the patches, and patches of
    the last block from being rounded with care although nothing reads them.

    Args:
        model: the float model; it stays as it is.
        pixel_values: (N, C, H, W).
        names: of Linear layers and of blocks; of a block that returns several tensors the first counts.
        seed: of v.
        progress: is called with the number of pictures that are done, batch by batch.
        gradients: is called with the gradients of v . output for each batch and v, by name, in their outputs' shapes,
            and with none at the end.
        again: those of ``names`` of which ``gradients`` gets those for :data:`PROBES` v; the weights are of the first.

    Returns:
        By name, one weight per token, (N * tokens,), mean 1, on the CPU. A layer that was not called once, or whose
        gradient is zero or not finite, has weight 1 everywhere: an empty tensor. Of several processes each gets those
        of its own pictures; their mean is 1 over all.
    """
    if not names:
        return {}
    if any(parameter.is_inference() for parameter in model.parameters()):
        model = copied(model)  # made in inference mode: autograd refuses its tensors, and takes copies
    like, half = where(model), multiplies_in_half(model)
    own = processes.share(len(pixel_values))
    generators = [torch.Generator().manual_seed(seed + more) for more in (0, 1)]  # of the first v, and of others
    skipped = 0  # pictures whose v was drawn, of other processes
    probes = PROBES if again else 1
    squares: dict[str, Tensor] = {}  # (N, tokens) each, allocated once: small results between large ones tear the heap
    for start in range(own.start, own.stop, BATCH_SIZE):
        rows = slice(start, min(start + BATCH_SIZE, own.stop))
        batch = picture_batch(model, pixel_values, rows, like)
        batch["pixel_values"] = batch["pixel_values"].detach().clone().requires_grad_()
        count = rows.stop - start
        outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, a, y, seen=outputs[name]: seen.append(first(y)))
            for name in names
        ]
        try:
            with evaluating(model), torch.enable_grad(), products(model, half), _without_gradients(model, names):
                kind, result = output_of(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        for _ in range(skipped, start, BATCH_SIZE):
            for number in range(probes):
                torch.randn((BATCH_SIZE, *result.shape[1:]), generator=generators[number > 0])
        skipped = start + BATCH_SIZE
        dimension = class_dimension(kind, result, batch["pixel_values"])
        if kind in OUTPUTS and kind not in CLASSES:  # of features: their mean is no part of what a norm lets through
            dimension = -1
        called = [name for name in names if _per_picture(outputs[name], count)]
        for number in range(probes):
            probe = torch.randn(result.shape, generator=generators[number > 0])
            if dimension is not None:
                probe -= probe.mean(dimension, keepdim=True)
            wanted = [name for name in called if number == 0 or name in again]
            if not result.requires_grad or not wanted:  # it depends on no picture
                continue
            with torch.enable_grad():
                total = (result.float() * probe.to(like.device)).sum()
            values = torch.autograd.grad(
                total, [outputs[name][0] for name in wanted], allow_unused=True, retain_graph=number + 1 < probes
            )
            found = {name: value for name, value in zip(wanted, values, strict=True) if value is not None}
            del values
            for name, gradient in found.items() if number == 0 else ():
                square = gradient.float().square().sum(-1).view(count, -1)
                if name not in squares:
                    squares[name] = torch.full((len(own), square.shape[1]), torch.nan)
                squares[name][start - own.start : rows.stop - own.start] = square.cpu()
            gradients(found)
            del found
        progress(count)
    gradients({})  # also of a process without pictures, before the others are met again
    return _normalized(squares, names)


@contextmanager
def _without_gradients(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside, the weights of the Linear layers among ``names`` take no gradient, for which inputs would be kept."""
    modules = [model.get_submodule(name) for name in names]
    weights = [module.weight for module in modules if isinstance(module, nn.Linear)]
    changed = [weight for weight in weights if weight.requires_grad and weight.is_leaf]
    for weight in changed:
        weight.requires_grad = False
    try:
        yield
    finally:
        for weight in changed:
            weight.requires_grad = True


def _normalized(squares: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The weights, of squares (N, tokens) each; their mean is 1 over all pictures of all processes."""
    parts = processes.gathered({name: x.double().mean(1).tolist() for name, x in squares.items()})
    weights = {}
    for name in names:
        means = [value for part in parts for value in part.get(name, ())]  # of each picture
        mean = math.fsum(means) / len(means) if means else 0.0
        if name in squares and math.isfinite(mean) and mean > 0:
            weights[name] = squares.pop(name).mul_((1 - UNIFORM_SHARE) / mean).add_(UNIFORM_SHARE).flatten()
        else:
            weights[name] = torch.empty(0)
    return weights


def _per_picture(outputs: list[Tensor], count: int) -> bool:
    """Whether a layer was called once, with ``count`` pictures first, and the pictures or a parameter changes it."""
    return len(outputs) == 1 and outputs[0].requires_grad and outputs[0].shape[0] % count == 0
