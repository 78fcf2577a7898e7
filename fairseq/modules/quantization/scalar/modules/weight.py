"""IntLinear, IntConv2d and IntEmbedding: float weights, seen through n-bit integers, for training with Quant-Noise."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq.modules.quantization.scalar.modules.quantized_weight import QuantizedWeight

__all__ = ["IntConv2d", "IntEmbedding", "IntLinear"]


class IntLinear(QuantizedWeight, nn.Linear):
    """``nn.Linear`` whose weight is seen through ``bits`` wide integers. See :class:`QuantizedWeight`.

    Args:
        in_features, out_features, bias: as ``nn.Linear``.
        p: probability that an element is quantized in training, 0 to 1.
        update_step: training forwards between two observations of the range.
        bits: 2 to 8.
        method: "tensor", "channel" (one scale per output channel) or "histogram" (one scale, least squared error).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0,
        update_step: int = 3000,
        bits: int = 8,
        method: str = "histogram",
    ):
        nn.Linear.__init__(self, in_features, out_features, bias)
        self._init_quantization(p, update_step, bits, method)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.noisy_weight(), self.bias)


class IntConv2d(QuantizedWeight, nn.Conv2d):
    """``nn.Conv2d`` whose weight is seen through ``bits`` wide integers; "channel" is one scale per output channel.

    Args: those of ``nn.Conv2d`` up to ``padding_mode``, then as :class:`IntLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        p: float = 0,
        bits: int = 8,
        method: str = "histogram",
        update_step: int = 1000,
    ):
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )  # fmt: skip
        self._init_quantization(p, update_step, bits, method)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.noisy_weight(), self.bias)


class IntEmbedding(QuantizedWeight, nn.Embedding):
    """``nn.Embedding`` whose table is seen through ``bits`` wide integers; "channel" is one scale per row.

    Args: those of ``nn.Embedding`` (``sparse`` gradients are not supported: ValueError), then as :class:`IntLinear`.
    ``max_norm`` renormalizes the float table, before it is quantized.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        p: float = 0,
        update_step: int = 1000,
        bits: int = 8,
        method: str = "histogram",
    ):
        if sparse:
            raise ValueError(
                "IntEmbedding has no sparse gradients, since the whole table is quantized; use sparse=False"
            )
        nn.Embedding.__init__(
            self, num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight
        )  # fmt: skip
        self._init_quantization(p, update_step, bits, method)

    def forward(self, input: Tensor) -> Tensor:
        if self.max_norm is not None:
            with torch.no_grad():
                torch.embedding_renorm_(self.weight, input.contiguous(), self.max_norm, self.norm_type)
        return F.embedding(
            input, self.noisy_weight(), self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )  # fmt: skip
