"""CudaBlock: an encoder block as nine kernels on a GPU: all but attention in this library's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import arguments, native_calls
from fairseq.modules.quantization.packed.kernels.triton import norm, product, quantize
from fairseq.modules.quantization.packed.kernels.triton.codes import byte_codes
from fairseq.modules.quantization.packed.kernels.triton.quantize import Rows
from fairseq.modules.quantization.packed.kernels.triton.support import capability
from fairseq.modules.quantization.packed.kernels.triton.tiles import Tile, tile_for
from fairseq.quantization.engine.known_block import KnownBlock
from fairseq.quantization.engine.plan import FusedPlan
from fairseq.quantization.engine.spec import BlockSpec, Call, Norm, reason_not_two_norms

PROJECTIONS = ("query", "key", "value", "qkv")
"""Roles of the layers, or of the one layer, that give queries, keys and values."""


class Layer(NamedTuple):
    """What the kernels take for a packed layer.

    Attributes:
        weight: see :class:`product.Weight`; its codes may be packed.
        scale, zero_point: of a static grid of its input; or None.
        factor: (in,), what its input is multiplied by; or None.
    """

    weight: product.Weight
    scale: Tensor | None
    zero_point: Tensor | None
    factor: Tensor | None


class CudaBlock(KnownBlock):
    """An encoder block on a GPU.

    LayerNorm and rounding; query, key and value in one product; PyTorch's attention; rounding; the output layer and the
    sum with hidden states; LayerNorm and rounding; fc1 and the activation; rounding; fc2 and the sum. What is rounded
    once for all calls ("static") comes out of fc1 as integers. Hidden states keep their dtype; attention and what fc1
    gives are of that dtype, too, but of bfloat16 for float32, unless attention is to be exact.

    The layers' integers are shared: those of query, key and value are moved behind one another.
    """

    def __init__(self, block: nn.Module, plan: FusedPlan):
        projections = [cast(PackedLinear, block.get_submodule(plan.roles[r])) for r in PROJECTIONS if r in plan.roles]
        whole = _gathered(projections)
        super().__init__(block, plan)
        spec = self.spec
        if reason := reason_not_on_cuda(spec):
            raise ValueError(f"no kernels on CUDA compute this block: {reason}")
        layers = cast(dict[str, PackedLinear], spec.layers)
        self.projections = [_layer(layer, bias=spec.query_bias) for layer in projections]
        if whole is not None and len(projections) > 1:
            self.projections = [_joined(self.projections, whole)]
        self.output, self.fc2 = _layer(layers["output"], spec.scale1), _layer(layers["fc2"], spec.scale2)
        self.fc1 = _layer(layers["fc1"])
        self.norms = _norm(spec.norm("norm1"), layers["query"]), _norm(spec.norm("norm2"), layers["fc1"])
        copied = (t for layer in (*layers.values(), block) for t in (*layer.buffers(), *layer.parameters()))
        self.versions = [(tensor, arguments.version(tensor)) for tensor in {id(t): t for t in copied}.values()]

    def call(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """What a call of the block gives besides hidden states; None if only the layers can run it.

        While a CUDA graph is captured nothing can look at a mask, and the layers run with it.
        """
        if self._capturing() and any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            return None
        call = super().call(x, args, kwargs)
        return None if call is None or call.rows is not None or call.cos is not None else call

    def run(self, x: Tensor, call: Call) -> Tensor:
        """Hidden states, float32, bfloat16 or float16 (images, tokens, width) -> the block's output."""
        narrow = torch.bfloat16 if x.dtype == torch.float32 and not native_calls.attention_is_exact() else x.dtype
        hidden = x.contiguous().flatten(0, 1)  # (M, width)
        first = self.projections[0]
        rows = norm.run(hidden, *self.norms[0], first.scale, first.zero_point)
        projected = [self._product(rows, layer, narrow) for layer in self.projections]  # (M, 3 * columns) or three
        attended = self._attention(call, projected[0].chunk(3, -1) if len(projected) == 1 else projected)
        hidden = self._product(_quantized(attended, self.output), self.output, x.dtype, residual=hidden)
        rows = norm.run(hidden, *self.norms[1], self.fc1.scale, self.fc1.zero_point)
        rows = self._mlp(rows, narrow)
        return self._product(rows, self.fc2, x.dtype, residual=hidden).view(x.shape)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _mlp(self, rows: Rows, dtype: torch.dtype) -> Rows:
        """The input of fc2, as integers."""
        activation, fc2 = self.spec.activation, self.fc2
        if fc2.scale is not None and fc2.zero_point is not None and fc2.factor is None:
            weight, tile = self._whole(rows, self.fc1.weight)
            return product.run_to_rows(rows, weight, tile, activation, product.Next(fc2.scale, fc2.zero_point))
        return _quantized(self._product(rows, self.fc1, dtype, activation), fc2)

    def _product(
        self, rows: Rows, layer: Layer, dtype: torch.dtype, activation: str = "none", residual: Tensor | None = None
    ) -> Tensor:
        weight, tile = self._whole(rows, layer.weight)
        return product.run(rows, weight, tile, dtype, activation, residual)

    def _whole(self, rows: Rows, weight: product.Weight) -> tuple[product.Weight, Tile]:
        """The weight with a byte for each of its integers, and the tile of its product."""
        codes = byte_codes(weight.codes, weight.bits, rows.q.shape[1])
        return weight._replace(codes=codes), tile_for(capability(self.device), len(rows.q), len(codes))

    def _attention(self, call: Call, projected: Sequence[Tensor]) -> Tensor:
        """(M, columns) three times -> (M, columns)."""
        shape = call.images, call.tokens, self.spec.heads, self.spec.head_size
        query, key, value = (
            part.unflatten(0, shape[:2]).unflatten(-1, shape[2:]).transpose(1, 2) for part in projected
        )
        mask = _mask(call, query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, mask, scale=self.spec.scaling)
        return attended.transpose(1, 2).reshape(call.images * call.tokens, -1)


def reason_not_on_cuda(spec: BlockSpec) -> str | None:
    """What a block has that these kernels do not compute, or None."""
    if spec.gating != "none":
        return "its MLP is gated"
    if reason := reason_not_two_norms(spec):
        return reason
    return None if spec.head_scale is None else "it scales the products of each head"


def _gathered(layers: list[PackedLinear]) -> Tensor | None:
    """The integers of layers moved behind one another, as those of one layer; None for layers of different kinds."""
    if len({(layer.config, layer.weight_codes.dtype) for layer in layers}) > 1:
        return None
    whole = torch.cat([layer.weight_codes for layer in layers])
    for layer, part in zip(layers, whole.split([layer.out_features for layer in layers]), strict=True):
        layer.weight_codes = part
    return whole


def _layer(layer: PackedLinear, gain: Tensor | None = None, bias: Tensor | None = None) -> Layer:
    """A packed layer whose output is multiplied by ``gain``, or has a bias besides its own, which is None then."""
    matrix, grid = layer.weight_matrix, layer.input_grid
    codes = matrix.codes
    bias = layer.bias if bias is None else bias
    added = tuple(None if t is None else t.detach().float() for t in (bias, grid.correction))
    scale = matrix.scale
    if gain is not None:
        gain = gain.detach().float()
        scale, added = scale * gain, tuple(None if t is None else t * gain for t in added)
    zero_point = matrix.zero_point.expand(scale.shape).contiguous()
    weight = product.Weight(codes, scale, zero_point, matrix.bits, matrix.centred, *added)
    return Layer(weight, grid.scale, grid.zero_point, layer.input_factor)


def _joined(layers: list[Layer], whole: Tensor) -> Layer:
    """Layers of one input and of one kind as one layer, whose integers are ``whole``."""
    weights = [layer.weight for layer in layers]
    scale, zero_point = (
        torch.cat([part.expand(len(weight.codes)) for part, weight in zip(parts, weights, strict=True)])
        for parts in ([weight.scale for weight in weights], [weight.zero_point for weight in weights])
    )
    bias, correction = (
        None if all(part is None for part in parts) else torch.cat(
            [weight.scale.new_zeros(len(weight.codes)) if part is None else part
             for part, weight in zip(parts, weights, strict=True)]
        )
        for parts in ([weight.bias for weight in weights], [weight.correction for weight in weights])
    )  # fmt: skip
    weight = weights[0]._replace(codes=whole, scale=scale, zero_point=zero_point, bias=bias, correction=correction)
    return layers[0]._replace(weight=weight)


def _norm(norm: Norm, layer: PackedLinear) -> tuple[Tensor, Tensor, float]:
    """Weight, bias and epsilon of a norm, times what the layer behind it multiplies its input by."""
    assert norm.weight is not None
    assert norm.bias is not None
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    if layer.input_factor is not None:
        factor = layer.input_factor.float()
        weight, bias = weight * factor, bias * factor
    return weight.contiguous(), bias.contiguous(), norm.epsilon


def _quantized(x: Tensor, layer: Layer) -> Rows:
    return quantize.run(x, layer.scale, layer.zero_point, layer.factor)


def _mask(call: Call, dtype: torch.dtype) -> Tensor | None:
    """What is added to products of queries and keys: (images or 1, heads or 1, tokens, tokens), or None."""
    mask = None if call.bias is None else call.bias.to(dtype)[None]
    if call.mask is not None:
        repeated = call.mask.to(dtype)[torch.arange(call.images, device=call.mask.device) % len(call.mask), None]
        mask = repeated if mask is None else mask + repeated
    return mask
