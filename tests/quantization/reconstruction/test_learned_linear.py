"""LearnedLinear begins as the layer it is made of, and its gradients are those of what it computes."""

import pytest
import torch
from bounds import sum_error
from packed_layers import float_linear, make, tokens
from pairwise import pairwise

from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.quantization.reconstruction.learned_linear import LearnedLinear


def emulated(bits, method, activations, activation_bits, group_size, symmetric):
    return EmulatedLinear.from_linear(
        float_linear(), bits, method, group_size, symmetric, activations, activation_bits=activation_bits,
        input_range=(-1.5, 2.0) if activations == "static" else None,
    ).eval()  # fmt: skip


@pairwise(
    bits=[2, 3, 4, 8], activations=["dynamic4", "dynamic8", "static", None], grid=["tensor", "channel", "group"],
    symmetric=[False, True],
)  # fmt: skip
def test_it_begins_as_the_layer(bits, activations, grid, symmetric):
    kind, width = (activations, 8) if activations in ("static", None) else (activations[:-1], int(activations[-1]))
    layer = emulated(bits, "tensor" if grid == "tensor" else "channel", kind, width, 32 if grid == "group" else None,
                     symmetric)  # fmt: skip
    twin = LearnedLinear(layer, float_linear().weight)
    integers, scale, bias, _, stretch = twin.learned()
    assert torch.equal(integers, layer.integers())
    assert torch.equal(scale, layer.scale)
    assert torch.equal(bias, layer.bias)
    assert stretch == 1.0
    x = tokens(5, layer.in_features)
    if activations == "dynamic8":  # which it leaves out
        layer.activations = None
    terms = x.abs().double() @ layer.quantized_weight().abs().double().T + layer.bias.abs()
    assert bool(((twin(x) - layer(x)).abs() <= 4 * sum_error(layer.in_features, terms)).all())


def test_packed_and_emulated_begin_alike():
    packed = make(bits=3, method="channel", activations=None)
    twin = LearnedLinear(packed)
    assert torch.equal(twin.integers(), packed.integers())
    assert torch.equal(twin.weight(), packed.dequantize())


def test_a_weight_begins_where_it_was_within_its_integer():
    layer = emulated(2, "channel", None, 8, None, False)
    twin = LearnedLinear(layer, float_linear().weight)
    exact = float_linear().weight / layer.scale.view(-1, 1) + layer.zero_point.view(-1, 1)
    near = (exact - layer.integers()).abs() < 0.4
    assert near.any()
    assert not near.all()
    assert torch.allclose(twin.latent[near], exact[near], atol=1e-5)
    assert bool(((twin.latent - layer.integers()).abs() <= 0.4501).all())


def test_gradients():
    layer = emulated(3, "channel", "static", 4, 32, False)
    twin = LearnedLinear(layer)
    with torch.no_grad():
        twin.latent[0, 0], twin.latent[0, 1] = -0.6, twin.top + 0.7  # outside of the grid
        twin.latent[0, 2], twin.latent[0, 3] = -0.4, twin.top + 0.4  # these round to its ends
    x = tokens(7, layer.in_features)
    probe = tokens(7, layer.out_features, seed=9)
    (twin(x) * probe).sum().backward()
    assert twin.latent.grad[0, 0] == twin.latent.grad[0, 1] == 0
    rounded = twin._on_fixed_grid(x).detach()
    scales = (twin.scale * twin.log_scale.detach().exp()).repeat_interleave(32, 1)[:, : layer.in_features]
    wanted = (probe.T @ rounded) * scales
    wanted[0, :2] = 0
    assert torch.allclose(twin.latent.grad, wanted, rtol=1e-4, atol=1e-5)
    per_weight = (probe.T @ rounded) * twin.weight().detach()  # d weight / d log_scale = weight
    groups = torch.stack([part.sum(1) for part in per_weight.split(32, dim=1)], dim=1)
    assert torch.allclose(twin.log_scale.grad, groups, rtol=1e-4, atol=1e-4)
    # LSQ, equation 3, with the zero point: round(v) - v inside of the grid, the end of it outside
    scale, zero = layer.input_scale, layer.input_zero_point + 8
    steps, ends = x / scale, (-zero.float(), 15.0 - zero.float())
    slope = torch.where(
        steps.round() < ends[0], ends[0], torch.where(steps.round() > ends[1], ends[1], steps.round() - steps)
    )
    expected = ((probe @ twin.weight().detach()) * slope * scale).sum()
    assert torch.allclose(twin.log_stretch.grad.squeeze(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_steps_change_integers_scale_and_bias(bits):
    layer = emulated(bits, "tensor", None, 8, None, False)
    twin = LearnedLinear(layer)
    with torch.no_grad():
        twin.latent += 0.8
        twin.log_scale += 0.1
        twin.bias += 1
    integers, scale, bias, *_ = twin.learned()
    assert torch.equal(integers, (layer.integers().int() + 1).clamp(max=2**bits - 1).to(torch.uint8))
    assert torch.allclose(scale, layer.scale * torch.tensor(0.1).exp())
    assert torch.allclose(bias, layer.bias + 1)
