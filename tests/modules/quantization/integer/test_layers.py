"""QuantLinear and QuantEmbedding: the float layer, the int64 reference, gradients, state, overflow."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairseq.modules.quantization.integer import QuantEmbedding, QuantLinear, functional


def quant_linear(linear, weight_bit=8, **arguments):
    layer = QuantLinear(weight_bit, quant_mode="symmetric", **arguments)
    layer.set_param(linear)
    return layer.to(linear.weight.device)


def integers(x, scale):
    return torch.round(x.detach().double() / scale).long()


@pytest.mark.parametrize("bias", [True, False])
def test_none_is_the_float_layer(bias, device):
    linear, x = nn.Linear(5, 3, bias=bias).to(device), torch.randn(2, 5, device=device)
    layer = QuantLinear(8)
    layer.set_param(linear)
    y, scale = layer(x)
    assert scale is None
    assert torch.equal(y, linear(x))
    with torch.no_grad():
        layer.weight.zero_()
    assert linear.weight.abs().max() > 0  # a copy


@given(
    seed=st.integers(0, 999),
    weight_bit=st.sampled_from([2, 4, 8, 16]),
    input_bit=st.sampled_from([2, 8, 12]),
    per_channel=st.booleans(),
    bias=st.booleans(),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    outputs=st.integers(1, 5),
    scale=st.floats(1e-6, 10.0),
)
def test_linear_equals_the_integer_reference(seed, weight_bit, input_bit, per_channel, bias, shape, outputs, scale):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(shape[-1], outputs, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if bias:
            linear.bias.mul_(scale)
    q = torch.randint(-(2 ** (input_bit - 1)) + 1, 2 ** (input_bit - 1), shape, generator=generator)
    s = torch.tensor([scale], dtype=torch.float64)
    layer = quant_linear(linear, weight_bit, per_channel=per_channel)
    y, out_scale = layer((q * s).float(), s)
    limit = 2 ** (weight_bit - 1) - 1
    weight_scale = (
        linear.weight.detach().double().abs().amax(1) if per_channel else linear.weight.detach().double().abs().max()
    )
    weight_scale = (weight_scale / limit).reshape(-1)
    weight = torch.round(linear.weight.detach().double() / weight_scale[:, None]).long()
    expected_bias = torch.round(linear.bias.detach().double() / (weight_scale * s)).long() if bias else None
    assert torch.equal(integers(y, out_scale), functional.linear(q, weight, expected_bias))
    assert torch.allclose(out_scale, weight_scale * s, rtol=1e-12)
    assert torch.equal(layer.weight_integer.long(), weight)
    assert weight.abs().max() == limit
    assert y.dtype == torch.float64


@pytest.mark.parametrize("per_channel", [False, True])
def test_linear_error_against_the_float_layer(per_channel, device):
    """Half a step of the weight for each input, and half a step of the bias."""
    linear = nn.Linear(64, 16).to(device)
    s = torch.tensor([0.01], device=device)
    x = torch.randint(-127, 128, (2, 3, 64), device=device) * s
    layer = quant_linear(linear, per_channel=per_channel)
    y, scale = layer(x, s)
    bound = x.abs().sum(-1, keepdim=True).double() * layer.fc_scaling_factor / 2 + scale
    assert ((y - F.linear(x.double(), linear.weight.double(), linear.bias.double())).abs() <= bound).all()
    assert scale.shape == ((16,) if per_channel else (1,))


def test_accumulators_past_24_bits_are_exact():
    """2**16 * 127 + 1 in a float32 accumulator, or a float32 output, would lose its last bit."""
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[127.0, 1.0, 126.0]]) / 127)
    q = torch.tensor([[2**18, 1, 2]])
    s = torch.tensor([0.1], dtype=torch.float64)
    y, scale = quant_linear(linear)((q * s).float(), s)
    assert integers(y, scale).item() == 127 * 2**18 + 1 + 252 > 2**24


def test_linear_gradients(device):
    """Those of the linear map through the quantized weight, x as it is."""
    linear = nn.Linear(6, 4).to(device)
    layer, s = quant_linear(linear), torch.tensor([0.05], dtype=torch.float64, device=device)
    x = (torch.randint(-100, 100, (5, 6), device=device) * s).requires_grad_()
    v = torch.randn(5, 4, dtype=torch.float64, device=device)
    y, _ = layer(x, s)
    (y * v).sum().backward()
    weight = layer.weight_integer.double().detach() * layer.fc_scaling_factor
    assert torch.allclose(x.grad, v @ weight)
    assert torch.allclose(layer.weight.grad.double(), v.T @ x.detach(), rtol=1e-5)
    assert torch.allclose(layer.bias.grad.double(), v.sum(0), rtol=1e-5)
    assert layer.weight.grad.dtype == torch.float32


def test_linear_overflows_are_raised():
    linear, s = nn.Linear(2, 1), torch.tensor([1.0])
    with torch.no_grad():
        linear.weight.fill_(127)
        linear.bias.fill_(0)
    layer = quant_linear(linear)
    big = torch.tensor([[2.0**31 // 254 - 1] * 2]).double()
    assert layer(big, s)[0].item() == 254 * float(big[0, 0])
    with pytest.raises(
        OverflowError, match=r"QuantLinear \(int32 accumulator\): .* is past the limit of \+-2147483647"
    ):
        layer(big + 2, s)
    with pytest.raises(OverflowError, match="its products, summed in float64"):
        layer(torch.full((1, 2), 2.0**50, dtype=torch.float64), s)
    with pytest.raises(OverflowError, match=r"QuantLinear: .*torch\.float32 carries no larger integer"):
        layer(torch.full((1, 2), 2.0**23), s)
    with torch.no_grad():
        layer.bias.fill_(200)
    layer(torch.ones(1, 2), s)
    layer.bias_bit = 8
    with pytest.raises(OverflowError, match=r"QuantLinear bias \(8 bits\): 200 is past the limit of \+-127"):
        layer(torch.ones(1, 2), s)
    with torch.no_grad():
        layer.bias.fill_(3e9)
    layer.bias_bit = None
    with pytest.raises(OverflowError, match=r"QuantLinear bias \(32 bits\)"):
        layer(torch.ones(1, 2), s)


def test_a_zero_weight_leaves_the_bias(device):
    linear = nn.Linear(3, 2).to(device)
    with torch.no_grad():
        linear.weight[0].zero_()
    for per_channel in (True, False):
        y, scale = quant_linear(linear, per_channel=per_channel)(torch.zeros(1, 3, device=device), torch.tensor([0.1]))
        assert ((y - linear.bias).abs() <= scale).all()
    with torch.no_grad():
        linear.weight.zero_()
    y, scale = quant_linear(linear)(torch.ones(1, 3, device=device), torch.tensor([0.1]))
    assert ((y - linear.bias).abs() <= scale).all()


def test_linear_refusals():
    layer, s = quant_linear(nn.Linear(3, 2)), torch.tensor([0.1])
    with pytest.raises(RuntimeError, match=r"call set_param\(linear\) first"):
        QuantLinear(8)(torch.ones(1, 3))
    with pytest.raises(ValueError, match="needs the scaling factor of its input"):
        layer(torch.ones(1, 3))
    with pytest.raises(ValueError, match="one scaling factor for the whole input, got 3"):
        layer(torch.ones(1, 3), torch.ones(3))
    with pytest.raises(ValueError, match="not a multiple of its scaling factor"):
        layer(torch.randn(4, 3), s)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="QuantLinear weight has 1 NaN or Inf"):
        layer(torch.ones(1, 3), torch.ones(1))
    for arguments in ({"weight_bit": 1}, {"weight_bit": 8, "bias_bit": 40}, {"weight_bit": 8, "quant_mode": "x"}):
        with pytest.raises(ValueError, match="must be"):
            QuantLinear(**arguments)
    with pytest.raises(NotImplementedError, match="asymmetric"):
        QuantLinear(8, quant_mode="asymmetric")


def test_state_copies_and_casts(device):
    linear = nn.Linear(6, 4).to(device)
    layer, s = quant_linear(linear), torch.tensor([0.05], device=device)
    x = torch.randint(-100, 100, (5, 6), device=device) * s
    fresh = quant_linear(nn.Linear(6, 4).to(device))
    fresh.load_state_dict(layer.state_dict())
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, s)[0], layer(x, s)[0])
    half = copy.deepcopy(layer).half()
    y, scale = half(x, s)
    assert scale.dtype == torch.float64
    assert torch.equal(y, quant_linear(copy.deepcopy(linear).half())(x, s)[0])


def quant_embedding(embedding, weight_bit=8):
    layer = QuantEmbedding(weight_bit, quant_mode="symmetric")
    layer.set_param(embedding)
    return layer.to(embedding.weight.device)


@pytest.mark.parametrize("arguments", [{}, {"padding_idx": 1}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_none_is_the_float_layer(arguments, device):
    embedding, index = nn.Embedding(7, 5, **arguments).to(device), torch.tensor([[1, 6, 6], [0, 2, 1]], device=device)
    layer = QuantEmbedding(8)
    layer.set_param(embedding)
    assert layer(index)[1] is None
    assert torch.equal(layer(index)[0], embedding(index))
    (layer(index)[0] ** 2).sum().backward()
    (embedding(index) ** 2).sum().backward()
    assert torch.equal(layer.weight.grad, embedding.weight.grad)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, torch.float32), (8, torch.float32), (16, torch.float32), (32, torch.float64)]
)
def test_embedding_gives_integers_of_the_table(bits, dtype, device):
    embedding, index = nn.Embedding(7, 5).to(device), torch.tensor([[1, 6], [0, 2]], device=device)
    y, scale = quant_embedding(embedding, bits)(index)
    limit = 2 ** (bits - 1) - 1
    table = embedding.weight.detach().double()
    expected = torch.round(table / (table.abs().max() / limit)).long()
    assert expected.abs().max() == limit
    assert torch.equal(integers(y, scale), expected[index])
    assert y.dtype == dtype
    assert scale.shape == (1,)


def test_embedding_gradient_reaches_the_rows_used_but_not_the_padding(device):
    layer = quant_embedding(nn.Embedding(5, 3, padding_idx=1).to(device))
    v = torch.randn(3, 3, device=device)
    (layer(torch.tensor([1, 4, 4], device=device))[0] * v).sum().backward()
    expected = torch.zeros(5, 3, device=device)
    expected[4] = v[1] + v[2]
    # scale and 1 / scale cancel but for three float32 roundings of each term
    bound = 4 * torch.finfo(torch.float32).eps * (v[1].abs() + v[2].abs())
    assert ((layer.weight.grad - expected).abs() <= bound).all()


def test_embedding_refusals():
    with pytest.raises(RuntimeError, match=r"call set_param\(embedding\) first"):
        QuantEmbedding(8)(torch.tensor([0]))
    with pytest.raises(ValueError, match="momentum has no meaning"):
        QuantEmbedding(8, momentum=0.9)
    for arguments in ({"max_norm": 1.0}, {"sparse": True}):
        with pytest.raises(NotImplementedError, match="only with quant_mode='none'"):
            quant_embedding(nn.Embedding(3, 2, **arguments))
    with pytest.raises(NotImplementedError, match="asymmetric"):
        QuantEmbedding(8, quant_mode="asymmetric")
