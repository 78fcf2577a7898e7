"""I-BERT's layers at I-BERT's import path; they live in :mod:`fairseq.modules.quantization.integer`."""

from fairseq.modules.quantization.integer import (
    IntGELU,
    IntLayerNorm,
    IntSoftmax,
    QuantAct,
    QuantEmbedding,
    QuantLinear,
    freeze_model,
    unfreeze_model,
)

__all__ = [
    "IntGELU",
    "IntLayerNorm",
    "IntSoftmax",
    "QuantAct",
    "QuantEmbedding",
    "QuantLinear",
    "freeze_model",
    "unfreeze_model",
]
