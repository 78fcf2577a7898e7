"""QuantLinear and QuantEmbedding, I-BERT's layers with weights, on (x, scaling_factor) pairs.

:mod:`~fairseq.modules.quantization.integer.carrier` says which dtype carries which integers, and why. Every layer has
``quant_mode``: "none" computes the float layer, leaves scaling factors aside and returns None as its own; "symmetric"
computes on integers. I-BERT: Kim et al., 2021, https://arxiv.org/abs/2101.01321.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from fairseq.modules.quantization.integer.activation import Pair
from fairseq.modules.quantization.integer.carrier import (
    FLOAT64_LIMIT,
    INT32_LIMIT,
    check_magnitude,
    check_quant_mode,
    check_scale,
    check_width,
    symmetric_limit,
)
from fairseq.modules.quantization.integer.ranges import symmetric_linear_quantization_params
from fairseq.modules.quantization.integer.straight_through import SymmetricQuantFunction, read_integers, round_ste
from fairseq.modules.quantization.scalar import ops


class QuantLinear(nn.Module):
    """A Linear layer on integers: ``weight_bit`` wide weights, int32 accumulators.

    ``set_param(linear)`` takes over the weight and bias, as float parameters. Each forward rounds the weight to its
    symmetric grid and the bias to the scale of the accumulator, s_w * s_x.

    Args:
        weight_bit: 2 to 32.
        bias_bit: 2 to 32, the width that the bias must fit in; None means 32, that of the accumulator.
        per_channel: one weight scale for each output channel, else one for the matrix. The output then has
            ``out_features`` scaling factors.
        quant_mode: "none" or "symmetric".
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self, weight_bit: int, bias_bit: int | None = None, per_channel: bool = False, quant_mode: str = "none"
    ):
        super().__init__()
        self.weight_bit = check_width(weight_bit, "weight_bit")
        self.bias_bit = None if bias_bit is None else check_width(bias_bit, "bias_bit")
        self.per_channel, self.quant_mode = per_channel, check_quant_mode(quant_mode)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return f"weight_bit={self.weight_bit}, per_channel={self.per_channel}, quant_mode={self.quant_mode}"

    def set_param(self, linear: nn.Linear) -> None:
        """Copy the weight, (out_features, in_features), and the bias, (out_features,) or None, of ``linear``."""
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = copy_parameter(linear.weight)
        self.bias = None if linear.bias is None else copy_parameter(linear.bias)

    @property
    def fc_scaling_factor(self) -> Tensor:
        """The scale of the weight's integers: float64, (1,) or (out_features,)."""
        weight = require_weight(self.weight, "QuantLinear", "linear")
        return weight_scale(weight, self.weight_bit, 1 if self.per_channel else None, "QuantLinear weight")

    @property
    def weight_integer(self) -> Tensor:
        """The weight's integers as floats, (out_features, in_features), with a straight-through gradient."""
        weight = require_weight(self.weight, "QuantLinear", "linear")
        q: Tensor = SymmetricQuantFunction.apply(weight, self.weight_bit, False, self.fc_scaling_factor)
        return q

    def forward(self, x: Tensor, prev_act_scaling_factor: Tensor | None = None) -> Pair:
        """x @ weight.T + bias.

        Args:
            x: (..., in_features), integers times ``prev_act_scaling_factor``.
            prev_act_scaling_factor: one number.

        Returns:
            (y, scaling_factor): (..., out_features) float64, and (1,) or (out_features,); "none": (y, None).

        Raises:
            OverflowError: a bias past ``bias_bit`` bits, or an accumulator past 32.
            RuntimeError: before ``set_param``.
            ValueError: a missing scaling factor, or an ``x`` that is not a multiple of it.
        """
        weight = require_weight(self.weight, "QuantLinear", "linear")
        if self.quant_mode == "none":
            return F.linear(x, weight, self.bias), None
        scale = check_scale(prev_act_scaling_factor, x, "QuantLinear", single=True)
        q, w = read_integers(x, scale, "QuantLinear"), self.weight_integer.double()
        limit = FLOAT64_LIMIT // (self.in_features * symmetric_limit(self.weight_bit))
        check_magnitude(q, limit, "QuantLinear (its products, summed in float64)", "quantize its input to fewer bits")
        scale = scale * self.fc_scaling_factor
        accumulator = F.linear(q, w, self._bias_integer(scale))
        check_magnitude(accumulator, INT32_LIMIT, "QuantLinear (int32 accumulator)", "quantize its input to fewer bits")
        return accumulator * scale, scale

    def _bias_integer(self, scale: Tensor) -> Tensor | None:
        if self.bias is None:
            return None
        ops.check_tensor(self.bias.detach(), "QuantLinear bias")
        q: Tensor = round_ste.apply(self.bias.double() / scale)
        bits = 32 if self.bias_bit is None else self.bias_bit
        check_magnitude(
            q,
            symmetric_limit(bits),
            f"QuantLinear bias ({bits} bits)",
            "the bias is large beside the scale of weight times input; use a wider bias_bit or a larger scale",
        )
        return q


class QuantEmbedding(nn.Module):
    """An Embedding of ``weight_bit`` wide integers with one scale for the table; ``set_param`` takes over the table.

    Args:
        weight_bit: 2 to 32.
        momentum: 0.95, there for I-BERT's signature. The scale follows the table itself, so that no other value has a
            meaning, and none is accepted.
        quant_mode: "none" or "symmetric".
    """

    weight: Parameter | None

    def __init__(self, weight_bit: int, momentum: float = 0.95, quant_mode: str = "none"):
        super().__init__()
        if momentum != 0.95:
            raise ValueError(f"momentum has no meaning, the scale follows the table: leave it at 0.95, got {momentum}")
        self.weight_bit, self.quant_mode = check_width(weight_bit, "weight_bit"), check_quant_mode(quant_mode)
        self.register_parameter("weight", None)

    def extra_repr(self) -> str:
        return f"weight_bit={self.weight_bit}, quant_mode={self.quant_mode}"

    def set_param(self, embedding: nn.Embedding) -> None:
        """Copy the table and the settings of ``embedding``.

        Raises:
            NotImplementedError: max_norm or sparse=True in "symmetric"; they work on the float table.
        """
        if self.quant_mode != "none" and (embedding.max_norm is not None or embedding.sparse):
            raise NotImplementedError("QuantEmbedding takes max_norm and sparse=True only with quant_mode='none'")
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.weight = copy_parameter(embedding.weight)
        self.settings: dict[str, Any] = {
            name: getattr(embedding, name)
            for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        }

    @property
    def weight_scaling_factor(self) -> Tensor:
        """The scale of the table's integers: float64, (1,)."""
        weight = require_weight(self.weight, "QuantEmbedding", "embedding")
        return weight_scale(weight, self.weight_bit, None, "QuantEmbedding weight")

    def forward(self, x: Tensor) -> Pair:
        """The rows of the table at the indices ``x``.

        Args:
            x: int64 or int32, any shape.

        Returns:
            (y, scaling_factor): ``(*x.shape, embedding_dim)``, float32 up to 23 bits, else float64; "none": (y, None).

        Raises:
            RuntimeError: before ``set_param``.
        """
        weight = require_weight(self.weight, "QuantEmbedding", "embedding")
        if self.quant_mode == "none":
            return F.embedding(x, weight, **self.settings), None
        scale = self.weight_scaling_factor
        q = F.embedding(x, SymmetricQuantFunction.apply(weight, self.weight_bit, False, scale), **self.settings)
        return (q.double() * scale).to(q.dtype), scale


def copy_parameter(parameter: Tensor) -> Parameter:
    """An independent parameter with the same values."""
    return Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def require_weight(weight: Parameter | None, name: str, argument: str) -> Parameter:
    """Return ``weight``; RuntimeError if there is none yet."""
    if weight is None:
        raise RuntimeError(f"{name} has no weight yet: call set_param({argument}) first")
    return weight


def weight_scale(weight: Tensor, bits: int, dim: int | None, name: str) -> Tensor:
    """The symmetric scale of a weight in float64: (1,), or with ``dim`` = 1 one for each row."""
    values = ops.check_tensor(weight.detach(), name)
    low, high = torch.aminmax(values.reshape(1, -1) if dim is None else values, dim=1)
    return symmetric_linear_quantization_params(bits, low.double(), high.double(), per_channel=dim is not None)
