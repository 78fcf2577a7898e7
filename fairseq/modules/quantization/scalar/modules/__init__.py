"""Layers that emulate n-bit integers and can be trained: IntLinear, IntConv2d, IntEmbedding, ActivationQuantizer."""

from fairseq.modules.quantization.scalar.modules.activation import ActivationQuantizer
from fairseq.modules.quantization.scalar.modules.weight import IntConv2d, IntEmbedding, IntLinear, QuantizedWeight

__all__ = ["ActivationQuantizer", "IntConv2d", "IntEmbedding", "IntLinear", "QuantizedWeight"]
