"""I-BERT's functions at I-BERT's import path; they live in :mod:`fairseq.modules.quantization.integer`."""

from fairseq.modules.quantization.integer import (
    SymmetricQuantFunction,
    batch_frexp,
    fixedpoint_mul,
    floor_ste,
    get_percentile_min_max,
    linear_quantize,
    round_ste,
    symmetric_linear_quantization_params,
)

__all__ = [
    "SymmetricQuantFunction",
    "batch_frexp",
    "fixedpoint_mul",
    "floor_ste",
    "get_percentile_min_max",
    "linear_quantize",
    "round_ste",
    "symmetric_linear_quantization_params",
]
