"""IntGELU, IntSoftmax, IntLayerNorm: the float layer, the int64 reference, gradients, overflow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairseq.modules.quantization.integer import IntGELU, IntLayerNorm, IntSoftmax, functional
from fairseq.modules.quantization.integer.arithmetic import divide, isqrt
from fairseq.modules.quantization.integer.constants import ERF

SYMMETRIC = {"quant_mode": "symmetric"}
LAYERNORM_ERROR = 6.2e-5  # documented, and tested in test_functional.py
GRADIENT_ERROR = 16 * 2.0**-15  # a polynomial's constants and results have 15 bits; each enters with a factor below 4
scales = st.floats(2.0**-40, 4.0).map(lambda scale: torch.tensor([scale], dtype=torch.float64))
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def integers(x, scale):
    return torch.round(x.detach().double() / scale).long()


def draw(seed, shape, bits):
    """Integers up to ``bits`` wide, large and small ones alike."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.randint(1, bits, shape, generator=generator)
    return torch.randint(-(2**62), 2**62, shape, generator=generator) >> (62 - width)


def quant_layernorm(layernorm, output_bit=32, **arguments):
    layer = IntLayerNorm(output_bit, **SYMMETRIC, **arguments)
    layer.set_param(layernorm)
    return layer.to(next(iter(layernorm.parameters()), torch.empty(0)).device)


@given(seed=st.integers(0, 9999), shape=shapes, scale=scales, bits=st.integers(3, 36), degree=st.sampled_from([2, 4]))
def test_gelu_equals_the_integer_reference(seed, shape, scale, bits, degree):
    q = draw(seed, shape, bits)
    y, out_scale = IntGELU(**SYMMETRIC, degree=degree)(q * scale, scale)
    expected, expected_scale = functional.gelu(q, scale, degree)
    assert torch.equal(integers(y, out_scale), expected)
    assert torch.equal(out_scale, expected_scale)
    assert y.dtype == torch.float64


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("step", [2.0**-16, 1.3 * 2.0**-14, 0.37 * 2.0**-13, 1e-3, 0.07])
def test_gelu_and_exp_equal_the_reference_on_every_integer(step, degree):
    """Dense, where the polynomials bend: every rounding of theirs shows somewhere."""
    scale, q = torch.tensor([step], dtype=torch.float64), torch.arange(-50_000, 50_000)
    y, out_scale = IntGELU(**SYMMETRIC, degree=degree)(q * scale, scale)
    assert torch.equal(integers(y, out_scale), functional.gelu(q, scale, degree)[0])
    q = -q.abs()
    assert torch.equal(IntSoftmax(8)._exp(q.double(), scale)[0].long(), functional.exp(q, scale)[0])


@given(seed=st.integers(0, 9999), shape=shapes, scale=scales, bits=st.integers(3, 31), output_bit=st.integers(2, 16))
def test_softmax_equals_the_integer_reference(seed, shape, scale, bits, output_bit):
    q = draw(seed, shape, bits)
    y, out_scale = IntSoftmax(output_bit, **SYMMETRIC).eval()(q * scale, scale)
    expected, expected_scale = functional.softmax(q, scale, output_bit)
    assert torch.equal(integers(y, out_scale), expected)
    assert torch.equal(out_scale, expected_scale)
    assert y.dtype == torch.float32


@given(
    seed=st.integers(0, 9999),
    shape=shapes,
    scale=scales,
    bits=st.integers(3, 40),
    output_bit=st.sampled_from([4, 8, 16, 22, 24, 32]),
    eps=st.sampled_from([0.0, 1e-12, 1e-5, 1.0]),
)
def test_layernorm_equals_the_integer_reference(seed, shape, scale, bits, output_bit, eps):
    q = draw(seed, shape, bits)
    layernorm = nn.LayerNorm(shape[-1], eps=eps)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layernorm.weight.copy_(torch.randn(shape[-1], generator=generator))
        layernorm.bias.copy_(torch.randn(shape[-1], generator=generator) * (seed % 3))
        layernorm.weight[seed % shape[-1]] = 0
        if shape[-1] == 1:
            layernorm.weight.fill_(1)
    y, out_scale = quant_layernorm(layernorm, output_bit)(q * scale, scale)
    expected, expected_scale = functional.layernorm(q, scale, layernorm.weight, layernorm.bias, eps, output_bit)
    assert torch.equal(integers(y, out_scale), expected)
    assert torch.equal(out_scale, expected_scale)
    assert y.dtype == (torch.float32 if output_bit <= 23 else torch.float64)


@pytest.mark.parametrize("size", [1, 7, 197, 768])
def test_wide_rows_equal_the_reference_on_every_device(size, device):
    generator = torch.Generator().manual_seed(size)
    q = torch.randint(-(2**21), 2**21, (2, 3, size), generator=generator).to(device)
    scale = torch.tensor([1e-5], dtype=torch.float64, device=device)
    x, layernorm = (q * scale).float(), nn.LayerNorm(size).to(device)
    y, s = quant_layernorm(layernorm)(x, scale)
    assert torch.equal(integers(y, s), functional.layernorm(q, scale, layernorm.weight, layernorm.bias)[0])
    y, s = IntSoftmax(8, **SYMMETRIC).to(device)(x, scale)
    assert torch.equal(integers(y, s), functional.softmax(q, scale)[0])
    assert y.device.type == s.device.type == device.type
    y, s = IntGELU(**SYMMETRIC)(x, scale)
    assert torch.equal(integers(y, s), functional.gelu(q, scale)[0])


@given(st.integers(2, 2**26 - 1), st.integers(1, 2**25), st.integers(0, 2**24), st.integers(-1, 1))
def test_what_the_layers_ask_of_float64_is_exact(root, half, k, off):
    """floor(sqrt(n)) for n below 2**52, and round(a / b) beside a tie; sums of squares are shifted below 2**52."""
    n = torch.tensor([root * root - 1, root * root, min(root * root + 1, 2**52 - 1)])
    assert torch.equal(torch.floor(torch.sqrt(n.double())).long(), isqrt(n))
    a, b = torch.tensor([half * (2 * k + 1) + off]), torch.tensor([2 * half])
    assert torch.equal(torch.round(a.double() / b.double()).long(), divide(a, b))
    digits = torch.arange(52)
    assert (digits + 2 * functional.root_shift(digits) <= 52).all()
    assert (digits + 2 * functional.root_shift(digits) >= 51).all()


def test_none_and_force_dequant_are_the_float_layers(device):
    x, layernorm = torch.randn(2, 3, 5, device=device), nn.LayerNorm(5, eps=0.1).to(device)
    with torch.no_grad():
        layernorm.weight.normal_()
    for name, layer, expected in (
        ("gelu", IntGELU, F.gelu(x)),
        ("softmax", lambda **a: IntSoftmax(8, **a), F.softmax(x, -1)),
        ("layernorm", lambda **a: IntLayerNorm(32, **a), layernorm(x)),
    ):
        for arguments in ({}, {**SYMMETRIC, "force_dequant": name}, {**SYMMETRIC, "force_dequant": "nonlinear"}):
            module = layer(**arguments)
            if name == "layernorm":
                module.set_param(layernorm)
            y, scale = module(x)
            assert scale is None
            assert torch.equal(y, expected)
        for other in {"none", "gelu", "softmax", "layernorm"} - {name}:
            assert layer(**SYMMETRIC, force_dequant=other).quant_mode == "symmetric"
        with pytest.raises(ValueError, match="force_dequant must be one of none, gelu, softmax, layernorm, nonlinear"):
            layer(force_dequant="all")
        with pytest.raises(NotImplementedError, match="asymmetric"):
            layer(quant_mode="asymmetric")


def test_layernorm_past_24_bits_is_exact_enough():
    """A 32-bit output held in float32 was off by 3.8 in I-BERT's layer."""
    generator = torch.Generator().manual_seed(0)
    layernorm, scale = nn.LayerNorm(768), torch.tensor([1e-5])
    q = torch.randint(-(2**21), 2**21, (1, 4, 768), generator=generator)
    y, out_scale = quant_layernorm(layernorm)((q * scale.double()).float(), scale)
    # the float32 scale and inputs change nothing: their integers are read back exactly
    assert (y - F.layer_norm(q * scale.double(), (768,))).abs().max() <= LAYERNORM_ERROR
    assert integers(y, out_scale).abs().max() > 2**24


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_layernorm_of_constant_rows_and_zero_weights_is_finite(eps):
    layernorm = nn.LayerNorm(4, eps=eps)
    with torch.no_grad():
        layernorm.weight.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
        layernorm.bias.copy_(torch.tensor([0.5, 0.25, 0.0, 1.0]))
    x = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 1.0, 2.0, 5.0]]).requires_grad_()
    y, scale = quant_layernorm(layernorm)(x, torch.tensor([0.5]))
    y.sum().backward()
    bias = layernorm.bias.double()  # rounded once to the scale of the product, which is finer, and once to the output's
    assert ((y[0] - bias).abs() <= scale).all()
    assert ((y[1, ::2] - bias[::2]).abs() <= scale).all()
    assert torch.isfinite(x.grad).all()


def test_layernorm_without_weight_or_over_two_dimensions():
    x, scale = torch.randint(-500, 500, (3, 4, 5)) * 0.25, torch.tensor([0.25])
    with torch.no_grad():
        two = nn.LayerNorm((4, 5))
        two.weight.normal_()
    for layernorm in (nn.LayerNorm(5, elementwise_affine=False), nn.LayerNorm(5, bias=False), two):
        y, _ = quant_layernorm(layernorm)(x, scale)
        expected = F.layer_norm(
            x.double(),
            layernorm.normalized_shape,
            *(p if p is None else p.double() for p in (layernorm.weight, layernorm.bias)),
            layernorm.eps,
        )
        assert (y - expected).abs().max() <= LAYERNORM_ERROR


def test_layernorm_refusals():
    layernorm, s = nn.LayerNorm(4), torch.tensor([1.0])
    layer = quant_layernorm(layernorm)
    with pytest.raises(RuntimeError, match=r"call set_param\(layernorm\) first"):
        IntLayerNorm(32)(torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"normalizes the last dimensions \(4,\), got an input of \(1, 3\)"):
        layer(torch.ones(1, 3), s)
    with pytest.raises(ValueError, match="one scaling factor"):
        layer(torch.ones(1, 4), torch.ones(4))
    with pytest.raises(ValueError, match="needs the scaling factor"):
        layer(torch.ones(1, 4))
    wide = torch.tensor([[2.0**40, -(2.0**40), 0, 0]]).double()
    layer(wide, s)
    with pytest.raises(OverflowError, match=r"IntLayerNorm \(the sum of squares\).*overflow_handling=True"):
        quant_layernorm(layernorm, overflow_handling=False)(wide, s)
    with pytest.raises(OverflowError, match="sum over the row"):
        layer(wide * 2**10, s)
    small = torch.tensor([[5.0, -3.0, 0, 1]])
    assert torch.equal(quant_layernorm(layernorm, overflow_handling=False)(small, s)[0], layer(small, s)[0])


def test_layernorm_state_and_casts():
    layernorm = nn.LayerNorm(4)
    with torch.no_grad():
        layernorm.weight.normal_()
    layer, fresh = quant_layernorm(layernorm), quant_layernorm(nn.LayerNorm(4))
    fresh.load_state_dict(layer.state_dict())
    x, s = torch.tensor([[5.0, -3.0, 0, 1]]), torch.tensor([0.5])
    assert torch.equal(fresh(x, s)[0], layer(x, s)[0])
    assert copy.deepcopy(layer).half()(x, s)[0].dtype == torch.float64


def test_gelu_refusals():
    with pytest.raises(OverflowError, match=r"IntGELU: 34359738369 is past the limit of \+-34359738368"):
        IntGELU(**SYMMETRIC)(torch.tensor([2.0**35 + 1], dtype=torch.float64), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="degree must be 2 or 4"):
        IntGELU(degree=3)
    with pytest.raises(ValueError, match="IntGELU is quantized and needs the scaling factor"):
        IntGELU(**SYMMETRIC)(torch.ones(2))


def test_softmax_masks_with_minus_infinity(device):
    x = torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf], [0.0, 0.0, 0.0, 0.0]], device=device).requires_grad_()
    y, scale = IntSoftmax(8, **SYMMETRIC).to(device)(x, torch.tensor([0.25]))
    assert y[0, 1] == y[0, 3] == 0
    assert (y[0] - torch.softmax(x[0], 0)).abs().max() <= 2**-8
    assert integers(y, scale)[1].tolist() == [64] * 4
    (y * torch.randn(4, device=device)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0, [1, 3]] == 0).all()
    with pytest.raises(ValueError, match="a row is -inf throughout"):
        IntSoftmax(8, **SYMMETRIC)(torch.full((1, 3), -torch.inf), torch.tensor([0.25]))
    with pytest.raises(ValueError, match="NaN or Inf"):
        IntSoftmax(8, **SYMMETRIC)(torch.tensor([[1.0, float("nan")]]), torch.tensor([0.25]))
    with pytest.raises(ValueError, match="output_bit must be from 2 to 16"):
        IntSoftmax(17)


def numeric_gradient(surrogate, x, weights, h=1e-5):
    """Central differences of (surrogate(x) * weights).sum(), one entry at a time."""
    result = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = h
        step = step.reshape(x.shape)
        result.view(-1)[i] = ((surrogate(x + step) - surrogate(x - step)) * weights).sum() / (2 * h)
    return result


def gradient(layer, x, scale, weights):
    x = x.clone().requires_grad_()
    (layer(x, scale)[0] * weights).sum().backward()
    return x.grad


@pytest.mark.parametrize("degree", [2, 4])
def test_gelu_gradient_is_that_of_the_polynomial(degree):
    a, b = ERF[degree]

    def surrogate(x):
        u = x / 2**0.5
        return x / 2 * (1 + torch.sign(u) * (a * (u.abs().clamp(max=-b) + b) ** degree + 1))

    for step in (1e-6, 1e-4, 0.03):
        scale = torch.tensor([step], dtype=torch.float64)
        x = torch.cat([torch.arange(-5, -0.05, 0.093), torch.arange(0.05, 5, 0.087)]).double()
        x = torch.round(x / scale) * scale
        weights = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).double()
        got = gradient(IntGELU(**SYMMETRIC, degree=degree), x, scale, weights)
        assert ((got - numeric_gradient(surrogate, x, weights)).abs() <= weights.abs() * GRADIENT_ERROR).all()


def test_softmax_gradient_is_that_of_the_polynomial():
    def surrogate(x):
        x = x - x.amax(-1, keepdim=True)
        z = torch.floor(-x / 0.6931471805599453)
        p = x + z * 0.6931471805599453
        e = (0.35815147 * p**2 + 0.96963238 * p + 1) * 2**-z
        return e / e.sum(-1, keepdim=True)

    scale = torch.tensor([1e-4], dtype=torch.float64)
    x = torch.round(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double() / scale) * scale
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).double()
    top = x == x.amax(-1, keepdim=True)  # its exponential is the constant 1
    got = gradient(IntSoftmax(16, **SYMMETRIC), x, scale, weights)
    assert torch.allclose(got[~top], numeric_gradient(surrogate, x, weights)[~top], atol=1e-3)


def test_layernorm_gradients_are_those_of_the_float_layer():
    generator = torch.Generator().manual_seed(0)
    layernorm = nn.LayerNorm(9).double()
    with torch.no_grad():
        layernorm.weight.copy_(torch.randn(9, generator=generator))
    scale = torch.tensor([1e-4], dtype=torch.float64)
    x = torch.round(torch.randn(4, 9, generator=generator).double() / scale) * scale
    weights = torch.randn(4, 9, generator=generator).double()
    layer = quant_layernorm(layernorm)
    got = gradient(layer, x, scale, weights)
    assert torch.allclose(got, numeric_gradient(layernorm, x, weights), atol=1e-3)
    (layernorm(x) * weights).sum().backward()
    assert torch.allclose(layer.weight.grad, layernorm.weight.grad, atol=1e-3)
    assert torch.allclose(layer.bias.grad, layernorm.bias.grad, atol=1e-6)
