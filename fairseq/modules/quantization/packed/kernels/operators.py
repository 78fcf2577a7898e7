"""The native kernels as operators of torch, which torch.compile and torch.export take as they are.

A plain call bypasses them: what they check and point to anew each time is kept with the layer there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.kernels import arguments, native, native_calls, patch_products, structures

PARTS = 9  # tensors of a layer


@torch.library.custom_op("fairseq::native_linear", mutates_args=())
def native_linear(x: Tensor, parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """float32 (rows, in) -> (rows, out); ``parts`` and ``sizes`` as for :class:`arguments.Prepared`.

    Graphs that were saved by earlier versions have fewer sizes.
    """
    layer = arguments.Prepared(tuple(parts), sizes)
    return native_calls.run_linear(layer.linear, x, native.level_number())


@native_linear.register_fake
def _(x: Tensor, parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], sizes[1])


@torch.library.custom_op("fairseq::straight_through", mutates_args=())
def straight_through(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """``y``, (..., out), whose gradient goes to ``x``, (..., in), by ``weight``, (out, in), and nowhere else."""
    return y.clone()


@straight_through.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(y)


def _keep_weight(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _by_weight(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient @ ctx.saved_tensors[0], None, None


straight_through.register_autograd(_by_weight, setup_context=_keep_weight)


@torch.library.custom_op("fairseq::native_block", mutates_args=())
def native_block(
    x: Tensor,
    parts: Sequence[Tensor | None],
    sizes: Sequence[int],
    norms: Sequence[Tensor],
    epsilons: Sequence[float],
    scaling: float,
    heads: int,
) -> Tensor:
    """An encoder block: float32 (images, tokens, width) -> the same.

    ``parts`` and ``sizes`` are those of the query, key, value, output, fc1 and fc2 layers, one after the other, and
    ``norms`` weight and bias of the two LayerNorms; the rest as for :func:`arguments.make_block`.
    """
    names = [name for name in structures.LAYERS if name != "gate"]
    count = len(sizes) // len(names)
    layers = {
        name: arguments.Prepared(tuple(parts[i * PARTS :][:PARTS]), sizes[count * i :][:count])
        for i, name in enumerate(names)
    }
    pairs = {f"norm{i + 1}": ("layer", norms[2 * i], norms[2 * i + 1], epsilons[i]) for i in range(2)}
    return native_calls.run_block(arguments.make_block(layers, pairs, heads, scaling), x, native.level_number())


@native_block.register_fake
def _(
    x: Tensor,
    parts: Sequence[Tensor | None],
    sizes: Sequence[int],
    norms: Sequence[Tensor],
    epsilons: Sequence[float],
    scaling: float,
    heads: int,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fairseq::native_patches", mutates_args=())
def native_patches(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution over patches: float32 (N, C, H, W) -> (N, H // height, W // width, out); with its gradients."""
    return patch_products.run_patches(pixels, weight, bias, native.level_number())


@native_patches.register_fake
def _(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = pixels.shape[2] // weight.shape[2], pixels.shape[3] // weight.shape[3]
    return pixels.new_empty(pixels.shape[0], rows, columns, weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _patches_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    pixels, weight, bias = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad)
    sizes, stride, none = None if bias is None else list(bias.shape), list(weight.shape[2:]), [0, 0]
    gradient = gradient.permute(0, 3, 1, 2).contiguous()
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        gradient, pixels, weight, sizes, stride, none, [1, 1], False, none, 1, wanted
    )
    return found


native_patches.register_autograd(_patches_backward, setup_context=_keep)
