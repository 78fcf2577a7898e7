"""I-BERT's integer-only layers, and beside each the int64 reference that defines it.

``carrier`` holds the rule by which integers travel in float tensors; ``activation``, ``layers`` and ``nonlinear`` hold
the layers; ``functional`` the references; ``constants``, ``arithmetic``, ``ranges`` and ``straight_through`` what both
are made of.

Example::

    act, linear = QuantAct(8, quant_mode="symmetric"), QuantLinear(8, quant_mode="symmetric")
    linear.set_param(nn.Linear(16, 4))
    x, scale = act(torch.randn(2, 16))  # x / scale holds integers from -127 to 127
    y, scale = linear(x, scale)  # y / scale holds int32 accumulators, (2, 4)
"""

from fairseq.modules.quantization.integer.activation import QuantAct, freeze_model, unfreeze_model
from fairseq.modules.quantization.integer.arithmetic import batch_frexp
from fairseq.modules.quantization.integer.layers import QuantEmbedding, QuantLinear
from fairseq.modules.quantization.integer.nonlinear import IntGELU, IntLayerNorm, IntSoftmax
from fairseq.modules.quantization.integer.ranges import (
    get_percentile_min_max,
    linear_quantize,
    symmetric_linear_quantization_params,
)
from fairseq.modules.quantization.integer.straight_through import (
    SymmetricQuantFunction,
    fixedpoint_mul,
    floor_ste,
    round_ste,
)

__all__ = [
    "IntGELU",
    "IntLayerNorm",
    "IntSoftmax",
    "QuantAct",
    "QuantEmbedding",
    "QuantLinear",
    "SymmetricQuantFunction",
    "batch_frexp",
    "fixedpoint_mul",
    "floor_ste",
    "freeze_model",
    "get_percentile_min_max",
    "linear_quantize",
    "round_ste",
    "symmetric_linear_quantization_params",
    "unfreeze_model",
]
