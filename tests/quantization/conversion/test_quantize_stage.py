"""quantize_stage: what is put in the place of a layer that is quantized already."""

import torch
from torch import nn

from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.architectures.plan import LayerPlan
from fairseq.quantization.config import LayerConfig
from fairseq.quantization.conversion.quantize_layer import QuantizedLayer
from fairseq.quantization.conversion.quantize_stage import replace_layer


def test_only_a_weight_at_an_edge_goes_to_the_grid():
    torch.manual_seed(0)
    settings = LayerConfig(bits=4, method="channel", activations=None)
    old = EmulatedLinear.from_linear(nn.Linear(8, 4), 4, "channel")
    model, (scale, zero_point), integers = nn.Sequential(old), old.grid(), old.integers()
    real = old.weight.detach().clone()
    integers[0, 0] += 1 if integers[0, 0] < 15 else -1  # as if it had been rounded to the other side
    done = QuantizedLayer(integers, scale, zero_point, old.bias.detach(), settings, None, {})
    replace_layer(model, LayerPlan("0", None, "vision", None, settings), done, None, real)
    new = model[0]
    assert torch.equal(new.integers(), integers)
    moved = new.weight != real
    assert moved.sum() == 1
    assert new.weight[0, 0] == weight_to_real(integers, scale, zero_point)[0, 0]
