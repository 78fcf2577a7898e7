"""Block reconstruction: integers, scales, biases and norms of one encoder block, learned on what it should give."""

from fairseq.quantization.reconstruction.settings import Reconstruction

__all__ = ["Reconstruction"]
