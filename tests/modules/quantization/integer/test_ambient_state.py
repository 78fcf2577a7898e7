"""The same integers and scaling factors, whatever the caller has set."""

import pytest
import torch
from ambient import AMBIENT
from torch import nn

from fairseq.modules.quantization.integer import (
    IntGELU,
    IntLayerNorm,
    IntSoftmax,
    QuantAct,
    QuantEmbedding,
    QuantLinear,
    functional,
    get_percentile_min_max,
    linear_quantize,
    symmetric_linear_quantization_params,
)
from fairseq.modules.quantization.integer.arithmetic import batch_frexp

X = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
Q = (X * 1000).to(torch.int64)
QF = Q.double()
SCALE = torch.tensor([0.003], dtype=torch.float64)


def with_parameters(layer, float_layer):
    torch.manual_seed(0)
    for parameter in float_layer.parameters():
        nn.init.normal_(parameter)
    layer.set_param(float_layer)
    return layer


LINEAR = with_parameters(QuantLinear(8, per_channel=True, quant_mode="symmetric"), nn.Linear(16, 5))
TABLE = with_parameters(QuantEmbedding(8, quant_mode="symmetric"), nn.Embedding(9, 5))
NORM = with_parameters(IntLayerNorm(24, quant_mode="symmetric"), nn.LayerNorm(16))
SOFTMAX = IntSoftmax(8, "symmetric")
ACT = QuantAct(8, quant_mode="symmetric")
ACT(X)
ACT.eval()
IDS = torch.tensor([[1, 0], [8, 1]])


COMPUTATIONS = {
    "act": lambda: (*ACT(X), *ACT(*ACT(X)), *ACT(X, specified_min=-0.1, specified_max=0.7)),
    "linear": lambda: LINEAR(Q * SCALE, SCALE),
    "embedding": lambda: TABLE(IDS),
    "gelu": lambda: (*IntGELU("symmetric")(Q * SCALE, SCALE), *IntGELU("symmetric", degree=4)(Q * SCALE, SCALE)),
    "fine": lambda: (  # shifted far to the right, and to the left
        *IntGELU("symmetric")((QF * 2.0**20) * (SCALE * 2.0**-40), SCALE * 2.0**-40),
        *SOFTMAX((QF * 2.0**30) * (SCALE * 2.0**-38), SCALE * 2.0**-38),
        *IntGELU("symmetric")(Q * (SCALE * 2.0**20), SCALE * 2.0**20),
        *NORM(Q * (SCALE * 2.0**-30), SCALE * 2.0**-30),
    ),
    "softmax": lambda: SOFTMAX(Q * SCALE, SCALE),
    "layernorm": lambda: NORM(Q * SCALE, SCALE),
    "functional": lambda: (
        *functional.gelu(Q, 0.003),
        *functional.exp(-Q.abs(), 0.003),
        *functional.softmax(Q, 0.003),
        *functional.layernorm(Q, 0.003, torch.ones_like(X[0, 0]), torch.zeros_like(X[0, 0])),
    ),
    "scales": lambda: (
        symmetric_linear_quantization_params(8, -1.3, 0.7),
        symmetric_linear_quantization_params(8, X.amin((0, 1)), X.amax((0, 1)), per_channel=True),
        *batch_frexp(X.abs()),
        *get_percentile_min_max(X, 1.0, 99.0, output_tensor=True),
        linear_quantize(X, SCALE, 0),
    ),
}


@pytest.mark.parametrize("computation", COMPUTATIONS)
@pytest.mark.parametrize("state", AMBIENT)
def test_integers_are_the_same_in_every_ambient_state(state, computation):
    expected = [value.detach() for value in COMPUTATIONS[computation]()]
    with AMBIENT[state]():
        got = [value.detach() for value in COMPUTATIONS[computation]()]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("state", AMBIENT)
def test_a_range_enters_the_running_one_the_same(state):
    acts = [QuantAct(8, quant_mode="symmetric") for _ in range(2)]
    for layer, context in zip(acts, (AMBIENT["no_grad"], AMBIENT[state]), strict=True):
        with context():
            layer(X)
            layer(2 * X)
    for one, other in zip(acts[0].buffers(), acts[1].buffers(), strict=True):
        assert torch.equal(one, other)
