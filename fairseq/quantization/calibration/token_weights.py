"""How much an error at each token of each layer's output matters to the model's output."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fairseq.quantization.architectures.forward import (
    CLASSES,
    OUTPUTS,
    class_dimension,
    evaluating,
    output_of,
    picture_inputs,
)
from fairseq.quantization.calibration.block_inputs import moved, where

UNIFORM_SHARE = 0.1
"""Of a token's weight; the rest follows the gradient. Some tokens would count for nothing without it."""
BATCH_SIZE = 2


def token_weights(model: nn.Module, pixel_values: Tensor, names: list[str], seed: int = 0) -> dict[str, Tensor]:
    """How much an error at each token of each layer's output changes the model's output.

    The squared norm of the gradient of v . output at that token, v ~ N(0, 1): in expectation the squared Frobenius norm
    of the Jacobian of the output, see :func:`output_of`. Over the classes v has a mean of zero, as a softmax sees no
    constant. It is what keeps a class token, one of 197, from being rounded for the sake of the patches, and patches of
    the last block from being rounded with care although nothing reads them.

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
    if any(parameter.is_inference() for parameter in model.parameters()):
        model = copy.deepcopy(model)  # made in inference mode: autograd refuses its tensors, and takes copies
    device, dtype = where(model)
    generator = torch.Generator().manual_seed(seed)
    inputs = picture_inputs(model, pixel_values)
    squares: dict[str, Tensor] = {}  # (N, tokens) each, allocated once: small results between large ones tear the heap
    for start in range(0, len(pixel_values), BATCH_SIZE):
        batch = {key: moved(x[start : start + BATCH_SIZE], device, dtype) for key, x in inputs.items()}
        batch["pixel_values"] = batch["pixel_values"].detach().clone().requires_grad_()
        count = len(batch["pixel_values"])
        outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda m, a, y, seen=outputs[name]: seen.append(y))
            for name in names
        ]
        try:
            with evaluating(model), torch.enable_grad():
                kind, result = output_of(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        probe = torch.randn(result.shape, generator=generator)
        dimension = class_dimension(kind, result, batch["pixel_values"])
        if kind in OUTPUTS and kind not in CLASSES:  # of features: their mean is no part of what a norm lets through
            dimension = -1
        if dimension is not None:
            probe -= probe.mean(dimension, keepdim=True)
        if not result.requires_grad:  # it depends on no picture
            continue
        called = [name for name in names if _per_picture(outputs[name], count)]
        if not called:
            continue
        with torch.enable_grad():
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


def _per_picture(outputs: list[Tensor], count: int) -> bool:
    """Whether a layer was called once, with ``count`` pictures first, and the pictures or a parameter changes it."""
    return len(outputs) == 1 and outputs[0].requires_grad and outputs[0].shape[0] % count == 0
