"""Layers that emulate n-bit integers and can be trained: IntLinear, IntConv2d, IntEmbedding, ActivationQuantizer."""

from fairseq.modules.quantization.scalar.modules.activation import ActivationQuantizer
from fairseq.modules.quantization.scalar.modules.emulated_linear import EmulatedLinear
from fairseq.modules.quantization.scalar.modules.quantized_weight import QuantizedWeight
from fairseq.modules.quantization.scalar.modules.weight import IntConv2d, IntEmbedding, IntLinear

__all__ = ["ActivationQuantizer", "EmulatedLinear", "IntConv2d", "IntEmbedding", "IntLinear", "QuantizedWeight"]
