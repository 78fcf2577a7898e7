"""Layers that emulate n-bit integers: for training (Int*, ActivationQuantizer), for inference (FakeQuantizedLinear)."""

from fairseq.modules.quantization.scalar.modules.activation import ActivationQuantizer
from fairseq.modules.quantization.scalar.modules.fake_linear import FakeQuantizedLinear
from fairseq.modules.quantization.scalar.modules.weight import IntConv2d, IntEmbedding, IntLinear, QuantizedWeight

__all__ = ["ActivationQuantizer", "FakeQuantizedLinear", "IntConv2d", "IntEmbedding", "IntLinear", "QuantizedWeight"]
