"""The kernels of packed layers: several backends, and the one function that chooses among them."""

from fairseq.modules.quantization.packed.kernels.choose import (
    ENVIRONMENT,
    Kernels,
    choose,
    reason_not_native,
    reason_not_triton,
    runs_native,
)

__all__ = ["ENVIRONMENT", "Kernels", "choose", "reason_not_native", "reason_not_triton", "runs_native"]
