"""The native kernels as operators of torch, which torch.compile and torch.export take as they are.

A plain call bypasses them: what they check and point to anew each time is kept with the layer there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.kernels import native, structures

PARTS = 9  # tensors of a layer


@torch.library.custom_op("fairseq::native_linear", mutates_args=())
def native_linear(x: Tensor, parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """float32 (rows, in) -> (rows, out); ``parts`` and ``sizes`` as for :class:`native.Prepared`.

    Graphs that were saved before there were weight-only layers have three sizes.
    """
    layer = native.Prepared(tuple(parts), sizes)
    return native.run_linear(layer.linear, x, native.level_number())


@native_linear.register_fake
def _(x: Tensor, parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], sizes[1])


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
    ``norms`` weight and bias of the two LayerNorms; the rest as for :func:`native.make_block`.
    """
    names = [name for name in structures.LAYERS if name != "gate"]
    count = len(sizes) // len(names)
    layers = {
        name: native.Prepared(tuple(parts[i * PARTS :][:PARTS]), sizes[count * i :][:count])
        for i, name in enumerate(names)
    }
    pairs = {f"norm{i + 1}": ("layer", norms[2 * i], norms[2 * i + 1], epsilons[i]) for i in range(2)}
    return native.run_block(native.make_block(layers, pairs, heads, scaling), x, native.level_number())


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
