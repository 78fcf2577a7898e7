"""The kernels of packed layers: several backends, and the one function that chooses among them."""

from fairseq.modules.quantization.packed.kernels.choose import (
    ENVIRONMENT,
    Kernels,
    choose,
    reason_not_native,
    reason_not_triton,
    runs_native,
)
from fairseq.modules.quantization.packed.kernels.round_tokens import round_tokens
from fairseq.modules.quantization.scalar import tokens

tokens.FASTER.append(round_tokens)

__all__ = ["ENVIRONMENT", "Kernels", "choose", "reason_not_native", "reason_not_triton", "runs_native"]
