"""The same scales, zero points and integers, whatever the caller has set."""

import pytest
import torch
from ambient import AMBIENT
from torch import nn

from fairseq.modules.quantization.scalar import ops, weights
from fairseq.modules.quantization.scalar.modules import (
    ActivationQuantizer,
    EmulatedLinear,
    IntConv2d,
    IntEmbedding,
    IntLinear,
)
from fairseq.modules.quantization.scalar.modules.straight_through import quant_noise
from fairseq.modules.quantization.scalar.tokens import (
    fake_quantize_tokens,
    quantize_static,
    quantize_tokens,
    static_qparams,
)

METHODS = [("tensor", None, False), ("channel", 0, False), ("channel", 0, True), ("histogram", None, False),
           ("histogram", 0, True)]  # fmt: skip
GRIDS = [("tensor", None, False), ("channel", 32, True), ("histogram", None, False), ("histogram", 40, True)]


def tensor(*shape, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    values.view(-1)[3] = 9  # so that a search clips
    return values.to(dtype)


def observed(w):
    for bits in (3, 8):  # the two error functions of the search
        for method, axis, symmetric in METHODS:
            yield from ops.observe(w, bits, method, axis, symmetric=symmetric)
        for size in (1, 1e-9, 1e9):
            yield from ops.histogram_range(w * size, bits, 0)
        yield from ops.emulate_int(w, bits, "histogram")


def weight(w):
    for method, group_size, symmetric in GRIDS:
        scale, zero_point = weights.observe_weight(w, 4, method, group_size, symmetric)
        q = weights.weight_to_int(w, scale, zero_point, 4, group_size)
        yield from (scale, zero_point, q, weights.weight_to_real(q, scale, zero_point, group_size))
    yield weights.settings_tensor(4, 40, 32, False)


def tokens(x):
    for bits in (4, 8):
        yield from quantize_tokens(x, bits)
        yield fake_quantize_tokens(x, bits)
        grid = static_qparams("static", (-1.3, 2.7), bits, "query")
        yield from (*grid, *quantize_static(x, *grid, bits))


def noise(x):
    torch.manual_seed(3)
    yield quant_noise(x, torch.zeros_like(x), 0.5)


STEPS = {"observe": observed, "weight": weight, "tokens": tokens, "noise": noise}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", AMBIENT)
def test_a_step_is_the_same_in_every_ambient_state(state, step, dtype):
    w = tensor(6, 75, dtype=dtype)
    expected = list(STEPS[step](w))
    with AMBIENT[state]():
        got = list(STEPS[step](w))
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def layers():
    yield IntLinear(75, 6, bits=4), tensor(3, 75)
    yield IntConv2d(3, 6, 5, bits=4, method="channel"), tensor(2, 3, 8, 8)
    yield IntEmbedding(9, 75, bits=3, method="tensor"), torch.tensor([[1, 0], [8, 1]])
    yield EmulatedLinear(75, 6, bits=4, group_size=32, activations="dynamic"), tensor(3, 75)
    yield EmulatedLinear(75, 6, bits=4, method="tensor", activations="static", input_range=(-1, 2)), tensor(3, 75)


@pytest.mark.parametrize("state", AMBIENT)
def test_layers_see_their_weight_the_same_and_can_be_trained_afterwards(state):
    torch.manual_seed(0)
    for layer, x in layers():
        expected = layer.eval().quantized_weight().detach()
        scale, zero_point = layer.scale, layer.zero_point
        layer.scale = layer.zero_point = None
        with AMBIENT[state]():
            layer(x)
            assert torch.equal(layer.quantized_weight(), expected)
        assert torch.equal(layer.scale, scale)
        assert torch.equal(layer.zero_point, zero_point)
        layer.scale.copy_(scale)  # as an average does, which an inference tensor would refuse
        layer.train()(x).sum().backward()


@pytest.mark.parametrize("state", AMBIENT)
def test_a_linear_is_replaced_the_same(state):
    linear = nn.Linear(75, 6)
    settings = {"group_size": 32, "activations": "static", "input_range": (-1, 2)}
    expected = EmulatedLinear.from_linear(linear, 4, "channel", **settings)
    with AMBIENT[state]():
        got = EmulatedLinear.from_linear(linear, 4, "channel", **settings)
    for name, value in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name
    got.load_state_dict(expected.state_dict())


@pytest.mark.parametrize("state", AMBIENT)
def test_an_output_is_observed_the_same_and_can_be_observed_again(state):
    x, scales = tensor(30, 5), []
    for context in (AMBIENT["no_grad"], AMBIENT[state]):
        module = nn.Identity().eval()
        ActivationQuantizer(module, bits=4)
        with context():
            module(x)
        scales += [module.activation_scale, module.activation_zero_point]
        module.activation_scale.copy_(module.activation_scale.clone())
    assert torch.equal(scales[0], scales[2])
    assert torch.equal(scales[1], scales[3])
