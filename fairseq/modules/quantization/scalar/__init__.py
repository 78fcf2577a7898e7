"""Scalar quantization: the equation (``ops``), trainable emulation (``modules``) and the in-place entry (``utils``)."""

from fairseq.modules.quantization.scalar.utils import quantize_model_

__all__ = ["quantize_model_"]
