"""Learned scales: their gradient, what no longer observes the weight, and their state."""

import copy

import pytest
import torch
from torch import nn

from fairseq.modules.quantization.scalar import ops
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.modules.straight_through import fake_quantize_ste

GRIDS = [("tensor", None), ("channel", None), ("channel", 32), ("histogram", 40)]


def make(method="channel", group_size=None, activations="dynamic", learned=True, dtype=torch.float32):
    torch.manual_seed(0)
    span = (-1.7, 3.2) if activations == "static" else None
    layer = EmulatedLinear.from_linear(
        nn.Linear(75, 21, dtype=dtype), 3, method, group_size, activations=activations, input_range=span
    )
    if learned:
        layer.learn_scale()
    return layer


def tokens(dtype=torch.float32):
    return torch.randn(4, 5, 75, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_the_gradient_of_a_scale_is_that_of_lsq(axis):
    """Equation 3 of the paper, element by element in Python, and the factor of equation 5."""
    x = torch.linspace(-2, 2.5, 24, dtype=torch.float64).view(4, 6) + 0.0123
    count = 1 if axis is None else x.shape[axis]
    scale = torch.linspace(0.2, 0.4, count, dtype=torch.float64).requires_grad_()
    zero_point = torch.linspace(2, 5, count).to(torch.int32)
    weights = torch.linspace(-1, 2, 24, dtype=torch.float64).view(4, 6)
    leaf = x.clone().requires_grad_()
    out = fake_quantize_ste(leaf, scale, zero_point, 3, axis or 0)
    (out * weights).sum().backward()
    assert torch.equal(out, ops.fake_quantize(x, scale, zero_point, 3, axis or 0))
    expected, outside = [0.0] * count, 0
    for i in range(4):
        for j in range(6):
            c = 0 if axis is None else (i, j)[axis]
            v, z = float(x[i, j]) / float(scale.detach()[c]), int(zero_point[c])
            slope = -z if v < -z else 7 - z if v > 7 - z else round(v) - v
            outside += not -z <= v <= 7 - z
            assert float(leaf.grad[i, j]) == (float(weights[i, j]) if -z <= v <= 7 - z else 0)
            expected[c] += slope * float(weights[i, j]) / (24 / count * 3) ** 0.5
    assert 0 < outside < 24
    torch.testing.assert_close(scale.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "group_size"), GRIDS)
def test_a_learned_grid_stays_while_the_weight_moves(method, group_size):
    layer, x = make(method, group_size), tokens()
    assert {"scale", "weight", "bias"} == {name for name, _ in layer.named_parameters()}
    before, weight = layer.scale.detach().clone(), layer.weight.detach().clone()
    layer.train()
    for _ in range(3):
        layer.zero_grad()
        layer(x).square().sum().backward()
        with torch.no_grad():
            layer.weight *= 3
    assert torch.equal(layer.eval().scale, before)
    assert layer.scale.grad.shape == layer.scale.shape
    assert (layer.scale.grad != 0).all()
    observed = make(method, group_size, learned=False).eval()
    observed.weight.data = weight * 27
    assert not torch.equal(observed.integers(), layer.integers())  # which clips nearly all now
    assert bool((observed.scale > 20 * before).all())


def test_the_scale_of_a_static_input_is_learned_by_the_elements_of_one_picture():
    x = tokens(torch.float64)
    layer = make(activations="static", dtype=torch.float64)
    scale, zero_point = layer.input_scale, layer.input_zero_point
    assert isinstance(scale, nn.Parameter)
    layer(x).sum().backward()
    alone = scale.detach().clone().requires_grad_()
    q = fake_quantize_ste(x, alone, zero_point + 128, 8, sharing=5 * 75)
    nn.functional.linear(q, layer.quantized_weight(), layer.bias).sum().backward()
    torch.testing.assert_close(scale.grad, alone.grad)
    factor = (5 * 75 * 127) ** -0.5
    everything = scale.detach().clone().requires_grad_()
    q = fake_quantize_ste(x, everything, zero_point + 128, 8)
    nn.functional.linear(q, layer.quantized_weight(), layer.bias).sum().backward()
    torch.testing.assert_close(everything.grad / (4 * 5 * 75 * 127) ** -0.5, scale.grad / factor)


def test_a_scale_below_zero_counts_as_the_smallest_number_and_comes_back():
    layer, x = make("tensor"), tokens()
    before = layer.integers()
    with torch.no_grad():
        layer.scale.fill_(-0.25)
    assert bool((layer.grid()[0] > 0).all())
    layer(x).square().sum().backward()
    assert layer.scale.grad.isfinite().all()
    with torch.no_grad():
        layer.scale.copy_(make("tensor", learned=False).scale)
    assert torch.equal(layer.integers(), before)


def test_state_goes_both_ways_between_learned_and_observed():
    learned, observed = make(activations="static"), make(activations="static", learned=False)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter *= 1.25
    observed.load_state_dict(learned.state_dict())
    assert torch.equal(observed.integers(), learned.integers())
    assert torch.equal(observed(tokens()), learned(tokens()))
    back = make(activations="static")
    scale = back.scale
    back.load_state_dict(observed.state_dict())
    assert back.scale is scale  # the optimizer's
    assert torch.equal(back.scale, learned.scale)
    assert torch.equal(copy.deepcopy(learned).integers(), learned.integers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_learned_scale_keeps_its_dtype(dtype):
    layer = make(activations="static")
    layer(tokens()).sum().backward()
    scales = [scale.detach().clone() for scale in (layer.scale, layer.input_scale)]
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    for now, before in zip((layer.scale, layer.input_scale), scales, strict=True):
        assert isinstance(now, nn.Parameter)
        assert torch.equal(now, before)
    layer(tokens().to(dtype)).sum().backward()
    assert layer.scale.grad.dtype == torch.float32
