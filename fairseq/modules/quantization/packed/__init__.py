"""Packed execution: Linear layers that hold n-bit integers in memory and multiply them."""

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.packed.linear import PackedLinear

__all__ = ["LinearConfig", "PackedLinear"]
