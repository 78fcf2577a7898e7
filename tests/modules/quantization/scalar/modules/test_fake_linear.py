"""FakeQuantizedLinear: the weight it holds and the state it keeps."""

import copy

import pytest
import torch
from torch import nn

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules import FakeQuantizedLinear, IntLinear


@pytest.mark.parametrize("method", ops.METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_holds_the_quantized_weight(bits, method, bias, device):
    linear = nn.Linear(9, 4, bias=bias).to(device)
    before = copy.deepcopy(linear.state_dict())
    layer = FakeQuantizedLinear.from_float(linear, bits, method)
    axis = 0 if method == "histogram" else None
    expected, scale, zero_point = ops.emulate_int(linear.weight, bits, method, axis=axis)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.scale, scale)
    assert torch.equal(layer.zero_point, zero_point)
    assert scale.numel() == (1 if method == "tensor" else 4)
    x = torch.randn(3, 9, device=device)
    assert torch.equal(layer(x), nn.functional.linear(x, expected, linear.bias))
    assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())
    assert not layer.weight.requires_grad
    for row in layer.weight:
        assert len(row.unique()) <= 2**bits


@pytest.mark.parametrize("method", ["tensor", "channel"])
def test_emulation_for_training_uses_the_same_values(method):
    linear = nn.Linear(9, 4)
    trained = IntLinear.from_float(linear, p=0, update_step=1, bits=4, method=method).eval()
    assert torch.equal(trained.quantized_weight(), FakeQuantizedLinear.from_float(linear, 4, method).weight)


def test_half_and_device_moves_keep_the_scale(device):
    layer = FakeQuantizedLinear.from_float(nn.Linear(9, 4), 8, "channel")
    before = layer.scale.clone()
    layer.half().to(device)
    assert layer.weight.dtype == torch.float16
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale.cpu(), before)
    assert layer.scale.device.type == device.type


def test_nan_names_the_layer():
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(ValueError, match=r"encoder\.3\.weight has 4 NaN or Inf among its 4 values"):
        FakeQuantizedLinear.from_float(linear, 8, "tensor", "encoder.3")
