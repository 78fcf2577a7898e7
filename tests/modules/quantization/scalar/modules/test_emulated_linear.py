"""EmulatedLinear: the twin of PackedLinear, with the same integers; trainable; its state."""

import copy

import pytest
import torch
from pairwise import pairwise
from torch import nn
from torch.nn import functional as F

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.scalar import weights
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.tokens import quantize_tokens

GRIDS = [("tensor", None), ("channel", None), ("channel", 32), ("histogram", None), ("histogram", 40)]
OUT, IN = 21, 75
RANGE = (-1.7, 3.2)
INPUTS = [("dynamic", 8), ("dynamic", 4), ("static", 8), ("static", 5), (None, 8)]


def float_linear(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT, dtype=dtype).eval()


def make(bits=4, method="channel", group_size=None, symmetric=False, activations="dynamic", seed=0, **more):
    if activations == "static":
        more = {"input_range": RANGE, **more}
    return EmulatedLinear.from_linear(
        float_linear(seed), bits, method, group_size, symmetric, activations, "encoder.query", **more
    )


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def agrees_with_product(got, a, b):
    """Whether ``got`` is a @ b, summed in any order: K products and K sums, each rounded, and the result once more."""
    bound = (2 * a.shape[-1] + 2) * torch.finfo(got.dtype).eps * (a.double().abs() @ b.double().abs())
    return bool(((got.double() - a.double() @ b.double()).abs() <= bound).all())


@pairwise(
    bits=[2, 3, 4, 5, 8],
    grid=GRIDS,
    symmetric=[False, True],
    dtype=[torch.float32, torch.float16, torch.float64],
)
def test_integers_are_those_of_the_packed_layer(bits, grid, symmetric, dtype):
    method, group_size = grid
    linear = float_linear(dtype=dtype)
    emulated = EmulatedLinear.from_linear(linear, bits, method, group_size, symmetric)
    packed = PackedLinear.from_float(linear, LinearConfig(bits, method, None, group_size, symmetric))
    assert torch.equal(emulated.integers(), packed.integers())
    assert torch.equal(emulated.scale, packed.scale)
    assert torch.equal(emulated.zero_point, packed.zero_point.int())
    assert torch.equal(emulated.quantized_weight(), packed.dequantize().to(dtype))


@pairwise(bits=[2, 4, 8], grid=GRIDS, symmetric=[False, True], inputs=INPUTS)
def test_output_is_that_of_the_packed_layer_up_to_rounding(bits, grid, symmetric, inputs):
    (method, group_size), (activations, activation_bits) = grid, inputs
    emulated = make(bits, method, group_size, symmetric, activations, activation_bits=activation_bits)
    config = LinearConfig(bits, method, activations, group_size, symmetric, activation_bits=activation_bits)
    packed = PackedLinear.from_float(float_linear(), config, input_range=RANGE if activations == "static" else None)
    x = tokens(2, 5, IN)
    # K float32 products and sums instead of integer ones: K + 12 eps of the sum of absolute terms
    q, scale = packed.input_grid.quantize(x) if activations else (x, 1)
    terms = (q * scale).abs() @ packed.dequantize().abs().T + packed.bias.abs()
    if activations == "static":
        terms = terms + packed.input_correction.abs()
    assert bool(((emulated(x) - packed(x)).abs() <= (IN + 12) * torch.finfo(torch.float32).eps * terms).all())


@pytest.mark.parametrize("activations", ["dynamic", None])
def test_activations_are_rounded_only_if_asked(activations):
    layer, x = make(activations=activations), tokens(3, IN)
    q, scale = quantize_tokens(x)
    seen = q * scale if activations else x
    assert torch.equal(layer(x), F.linear(seen, layer.quantized_weight(), layer.bias))


@pairwise(grid=GRIDS, activations=["dynamic", None], training=[True, False])
def test_gradients_flow_to_weight_bias_and_input(grid, activations, training):
    method, group_size = grid
    layer, x = make(8, method, group_size, activations=activations).train(training), tokens(3, IN).requires_grad_()
    upstream = tokens(3, OUT)
    layer(x).backward(upstream)
    assert agrees_with_product(x.grad, upstream, layer.quantized_weight().detach())
    assert torch.equal(layer.bias.grad, upstream.sum(0))
    seen = x.detach()
    if activations:
        q, scale = quantize_tokens(seen)
        seen = q * scale
    passed = layer.weight.grad != 0
    # straight through, but for weights past the ends of the grid (clipped, or within half a step of an end)
    assert agrees_with_product(torch.where(passed, layer.weight.grad, upstream.T @ seen), upstream.T, seen)
    assert float(passed.float().mean()) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_fixed_range_cuts_the_gradient_outside(dtype):
    layer, x = make(8, activations="static").to(dtype), 2 * tokens(40, IN)
    x = x.to(dtype).requires_grad_()
    assert torch.equal(layer.input_scale, make(8, activations="static").input_scale)  # not rounded
    upstream = tokens(40, OUT).to(dtype)
    y = layer(x)
    half = 128
    q = (x.detach().float() / layer.input_scale).round() + layer.input_zero_point
    seen = ((q.clamp(-half, half - 1) - layer.input_zero_point) * layer.input_scale).to(dtype)
    assert torch.equal(y, F.linear(seen, layer.quantized_weight(), layer.bias))
    y.backward(upstream)
    low, high = ((end - layer.input_zero_point) * layer.input_scale for end in (-half, half - 1))
    inside = (x.detach() >= low) & (x.detach() <= high)
    assert 0.6 < float(inside.float().mean()) < 0.9
    weight = layer.quantized_weight().detach()
    assert agrees_with_product(torch.where(inside, x.grad, upstream @ weight), upstream, weight)
    assert bool((x.grad[~inside] == 0).all())


def test_every_weight_is_quantized_in_training_too():
    layer, x = make().train(), tokens(3, IN)
    assert torch.equal(layer.noisy_weight(), layer.quantized_weight())
    assert torch.equal(layer(x), layer.eval()(x))


def test_training_moves_the_integers():
    layer, x, target = make(bits=4).train(), tokens(40, IN), tokens(40, OUT) * 0.1
    layer.update_step = 1
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    before, losses = layer.integers(), []
    for _ in range(15):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(layer.integers(), before)


def test_parameters_are_those_of_the_float_layer():
    linear = float_linear()
    layer = EmulatedLinear.from_linear(linear, 4, "channel", 32)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.training is linear.training
    assert (layer.p, layer.bits, layer.group_size, layer.name) == (1, 4, 32, "linear")


def test_the_range_is_observed_at_once_and_follows_training():
    layer = make(4, "channel", 32)
    assert layer.scale.shape == (OUT, 3)
    layer.train()(tokens(1, IN))
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.eval()
    expected = weights.observe_weight(layer.weight, 4, "channel", 32)
    assert torch.equal(layer.scale, expected[0])


@pairwise(grid=GRIDS, symmetric=[False, True])
def test_state_dict_round_trip(grid, symmetric):
    method, group_size = grid
    saved, fresh = (make(4, method, group_size, symmetric, seed=seed) for seed in (0, 5))
    x = tokens(3, IN)
    assert not torch.equal(fresh(x), saved(x))
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(x), saved(x))
    assert torch.equal(fresh.integers(), saved.integers())
    assert torch.equal(copy.deepcopy(saved)(x), saved(x))


def test_a_fixed_range_is_in_the_state_dict():
    saved, fresh = make(activations="static"), make(activations="static", seed=5, input_range=(-9, 1))
    x = tokens(3, IN)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(x), saved(x))
    assert torch.equal(fresh.input_scale, saved.input_scale)
    fresh.load_state_dict(float_linear().state_dict())  # a float model's has no range, so the layer keeps its own
    assert torch.equal(fresh(x), saved(x))


def test_state_of_a_fixed_range_goes_into_no_other_layer_and_the_reverse():
    static, dynamic = make(activations="static"), make()
    with pytest.raises(ValueError, match=r"^encoder\.query was saved with a fixed input range, .* has none"):
        dynamic.load_state_dict(static.state_dict())
    with pytest.raises(ValueError, match=r"^encoder\.query was saved without a fixed input range, .* has one"):
        static.load_state_dict(dynamic.state_dict())


def test_a_float_state_dict_is_observed_anew():
    layer, source = make(4, "channel", 32), float_linear(seed=7)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer.integers(), EmulatedLinear.from_linear(source, 4, "channel", 32).integers())


def test_a_packed_state_dict_is_refused():
    packed = nn.ModuleDict({"query": PackedLinear.from_float(float_linear(), LinearConfig(4, "channel"))})
    model = nn.ModuleDict({"query": make()})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^query\.weight_codes: .*execution='packed'"):
        model.load_state_dict(packed.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", [{"group_size": 64}, {"symmetric": True}], ids=str)
def test_state_of_another_grid_is_refused(settings):
    """Groups of 40 and of 64 are two each: the scales fit, and mean something else."""
    saved = make(4, "channel", group_size=40)
    with pytest.raises(
        ValueError, match=r"^encoder\.query was saved with 4 bits, 75 inputs, groups of 40, affine, but this layer has"
    ):
        make(4, "channel", **{"group_size": 40, **settings}).load_state_dict(saved.state_dict())


SETTINGS = [
    {},
    {"bits": 3, "method": "channel", "group_size": 32, "symmetric": True, "activations": "dynamic"},
    {"bits": 4, "method": "tensor", "activations": "static", "input_range": RANGE, "activation_bits": 5},
    {"input_factor": torch.linspace(0.5, 2, IN), "activations": "dynamic"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "defaults")
def test_the_plain_constructor_makes_what_from_linear_makes(settings):
    layer, x = EmulatedLinear(IN, OUT, **settings), tokens(3, IN)
    twin = nn.Linear(IN, OUT)
    twin.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    made = EmulatedLinear.from_linear(twin, **{"bits": 8, "method": "histogram", **settings})
    assert torch.equal(layer(x), made(x))  # in training
    assert torch.equal(layer.eval()(x), made.eval()(x))
    assert torch.equal(layer.integers(), made.integers())
    assert (layer.p, layer.update_step) == (made.p, made.update_step) == (1, 100)
    fresh = EmulatedLinear(IN, OUT, **settings).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert fresh.state_dict().keys() == made.state_dict().keys()


def test_it_can_be_built_on_the_meta_device():
    saved, x = EmulatedLinear(IN, OUT, bits=4, activations="static", input_range=RANGE).eval(), tokens(3, IN)
    saved(x)
    for where in ("meta", "cpu"):
        with torch.device(where):
            layer = EmulatedLinear(IN, OUT, bits=4, activations="static", input_range=RANGE)
        assert layer.weight.is_meta == (where == "meta")
        layer.to_empty(device="cpu").load_state_dict(saved.state_dict())
        assert torch.equal(layer.eval()(x), saved(x))


def test_bad_settings():
    with pytest.raises(ValueError, match="activations of fc1 must be 'dynamic', 'static' or None, got 'int8'"):
        EmulatedLinear(4, 4, activations="int8", name="fc1")
    with pytest.raises(ValueError, match="fc1 has activations='static' and needs an input_range"):
        EmulatedLinear(4, 4, activations="static", name="fc1")
    with pytest.raises(ValueError, match="takes no group_size"):
        make(4, "tensor", 32)
    with pytest.raises(ValueError, match="in steps of 8, got 33"):
        make(4, "channel", 33)
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 9"):
        make(activation_bits=9)
    with pytest.raises(ValueError, match=r"^encoder\.query has activations='static' and needs an input_range"):
        make(activations="static", input_range=None)
    with pytest.raises(ValueError, match=r"^encoder\.query takes an input_range only with activations='static'"):
        make(input_range=RANGE)
    with pytest.raises(TypeError, match="got Conv1d"):
        EmulatedLinear.from_linear(nn.Conv1d(1, 1, 1), 4, "channel")
    broken = nn.Linear(4, 4)
    nn.init.constant_(broken.weight, float("inf"))
    with pytest.raises(ValueError, match=r"head\.weight has 16 NaN or Inf"):
        EmulatedLinear.from_linear(broken, 4, "channel", name="head")


def test_repr_says_what_it_is():
    assert "activations=dynamic, group_size=32, symmetric" in repr(make(4, "channel", 32, True))
    assert "activations=static, activation_bits=4" in repr(make(activations="static", activation_bits=4))
