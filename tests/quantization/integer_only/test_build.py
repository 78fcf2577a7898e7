"""The constants of an integer model: layers, tables, grids of bytes and of pixels."""

import types

import pytest
import torch
from torch.nn import functional as F

from fairseq.modules.quantization.integer.piecewise import piecewise
from fairseq.quantization.engine.reference_block import activate
from fairseq.quantization.engine.spec import Norm
from fairseq.quantization.integer_only.build import (
    Builder,
    Grid,
    Weight,
    activation_table,
    byte_grid,
    linear,
    spread_grid,
)
from fairseq.quantization.integer_only.convert import pixel_grid
from fairseq.quantization.integer_only.layers import Spread
from fairseq.quantization.integer_only.ranges import Range
from fairseq.quantization.integer_only.reading import LIMITS


@pytest.mark.parametrize(
    ("name", "bound"), [("gelu", 4e-4), ("gelu_tanh", 4e-4), ("quick_gelu", 7e-4), ("silu", 2e-3), ("relu", 2e-4)]
)
def test_tables_on_all_their_inputs(name, bound):
    limit = LIMITS[name]
    unit = limit / 2**15
    t = torch.arange(-(2**17), 2**17)
    got = piecewise(t, activation_table(name, limit).long()) * unit
    assert (got - activate(name, t.double() * unit)).abs().max() < bound


def test_a_layer_is_the_product_of_its_integers_to_half_a_step():
    draw = torch.Generator().manual_seed(0)
    q, w = (torch.randint(-128, 128, (5, 40), generator=draw) for _ in range(2))
    weight = Weight(w, torch.rand(5, generator=draw).double() / 50, torch.randn(5, generator=draw).double())
    m = torch.randint(1, 2**15, (5, 1), generator=draw)
    for source, rows in (
        (Grid(torch.tensor([0.03]).double(), -7, 8), None),
        (Grid(torch.tensor([1e-4]).double(), 0, 16), m),
        (Grid(torch.tensor([1e-4]).double(), 900, 16, unsigned=True), m),
    ):
        if source.bits == 8:
            real = (q - source.zero) * source.step
        else:
            real = (q + 128 * source.unsigned) * source.byte_step * m - source.zero * source.step
        got = linear(weight, source, 1e-3, 22, "layer")(q.to(torch.int8), rows)
        expected = (real @ (w.double().T * weight.scale) + weight.bias) / 1e-3
        assert (got - expected).abs().max() <= 0.5 + 2**-16 * expected.abs().max()


def test_a_column_that_reaches_far_becomes_several_bytes_and_stays_exact():
    low, high = torch.full((64,), -0.5).double(), torch.full((64,), 1.0).double()
    high[5] = 2.4
    grid = spread_grid(Range(low, high))
    assert grid.copies.tolist() == [4 if i == 5 else 1 for i in range(64)]
    assert grid.step * 255 == 1.5
    assert byte_grid(Range(low, high), []).copies is None  # 1.93 times as fine is not worth it
    high[5] = 3.5
    grid = byte_grid(Range(low, high), [])
    spread = Spread(grid.copies, grid.zero)
    z = torch.randint(-85, 171, (9, 64), generator=torch.Generator().manual_seed(0))
    z[:, 5] = torch.tensor([0, 1, 2, 3, -1, 100, 677, 680, -339])
    q = spread(z)
    assert q.shape == (9, 67)
    assert -128 <= q.min() <= q.max() <= 127
    sums = torch.zeros_like(z).index_add_(1, spread.columns.long(), q - grid.zero)
    assert torch.equal(sums, z)


def test_the_grid_of_pixels_is_the_processors_where_it_fits():
    mean, deviation = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.5])
    bytes_ = torch.randint(5, 250, (4, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    pixels = (bytes_ / 255 - mean[:, None, None]) / deviation[:, None, None]
    processor = types.SimpleNamespace(image_mean=mean.tolist(), image_std=deviation.tolist())
    start, step = pixel_grid(pixels, processor)
    assert torch.equal(((pixels - start[:, None, None]) / step[:, None, None]).round().long(), bytes_)
    for other in (None, types.SimpleNamespace(image_mean=[0.0] * 3, image_std=[1.0] * 3)):
        start, step = pixel_grid(pixels, other)
        assert torch.equal(start, pixels.double().transpose(0, 1).flatten(1).amin(1))
        assert ((start + 255 * step) - pixels.double().transpose(0, 1).flatten(1).amax(1)).abs().max() < 1e-12


def test_the_patch_embedding_is_the_convolution():
    draw = torch.Generator().manual_seed(0)
    convolution = torch.nn.Conv2d(3, 6, 4, 4, bias=False)
    start, step = torch.tensor([-2.0, -1.5, -1.0]).double(), torch.tensor([0.02, 0.01, 0.015]).double()
    pixels = torch.randint(0, 256, (2, 3, 4, 4), generator=draw)
    builder = Builder(True, {"stream": Range(torch.tensor([-4.0]).double(), torch.tensor([4.0]).double())})
    got = builder.patches(convolution, start, step)((pixels - 128).to(torch.int8).flatten(1)) * builder.step
    real = start[:, None, None] + step[:, None, None] * pixels
    expected = F.conv2d(real, convolution.weight.double(), stride=4).flatten(1)
    scale = (convolution.weight.double() * step[:, None, None]).abs().amax((1, 2, 3)) / 127
    bound = 0.5 * scale * (pixels - 128).abs().flatten(1).sum(-1, keepdim=True) + 1e-4  # half a step of each weight
    assert ((got - expected).abs() <= bound * 1.01).all()


def stream(reach):
    return {"stream": Range(torch.tensor([-reach]).double(), torch.tensor([reach]).double())}


@pytest.mark.parametrize("epsilon", [1e-12, 0.5])
def test_a_norm_is_the_layer_norm_to_half_a_step(epsilon):
    draw = torch.Generator().manual_seed(0)
    weight, bias, h = (
        torch.randn(24, generator=draw),
        torch.randn(24, generator=draw),
        torch.randn(9, 24, generator=draw),
    )
    builder = Builder(True, {**stream(4.0), (0, "query", "in"): Range(bias.double(), bias.double())})
    layer = types.SimpleNamespace(input_factor=torch.linspace(0.5, 2, 24))
    norm, grid = builder.norm(Norm("layer", weight, bias, epsilon), 24, (0, "query"), [layer], "norm1")
    got = norm((h.double() / builder.step).round().long()) * grid.step
    expected = F.layer_norm(h.double(), (24,), weight.double(), bias.double(), epsilon) * layer.input_factor
    assert (got - expected).abs().max() < 0.5 * float(grid.step) + 1e-4


def test_layer_scale_is_in_the_constants_of_a_branch():
    draw = torch.Generator().manual_seed(0)
    q, w = (torch.randint(-128, 128, (5, 40), generator=draw) for _ in range(2))
    weight = Weight(w, torch.full((5,), 0.01).double(), torch.randn(5, generator=draw).double())
    scale = torch.tensor([0.5, -2.0, 0.0, 1.0, 1e-5])
    builder, source = Builder(True, stream(900.0)), Grid(torch.tensor([0.01]).double(), 0, 8)
    got = builder.branch(weight, source, scale, "output")(q.to(torch.int8)) * builder.step
    expected = (0.0001 * (q @ w.T).double() + weight.bias) * scale
    assert (got - expected).abs().max() < 0.5 * builder.step + 1e-5 * expected.abs().max()
