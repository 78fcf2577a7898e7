"""What a block is missing is found for the layer that ends it, where there is one, and made up for by that layer."""

import families
import pytest
import torch
from families import build

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.tokens import fake_quantize_tokens
from fairseq.quantization.architectures.layers import block_of, linear_layers
from fairseq.quantization.config import LayerConfig, QuantizationConfig
from fairseq.quantization.conversion.convert import convert
from fairseq.quantization.conversion.quantize_layer import quantize_layer
from fairseq.quantization.rounding.round_weight import round_weight
from fairseq.quantization.rounding.statistics import Statistics

PLACE = "fairseq.quantization.conversion.quantize_layer.round_weight"
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def run(model, images, *names):
    """What modules of a model read and give: (tokens, features), float64."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, y, name=name: seen.update({name: (args[0], y[0] if isinstance(y, tuple) else y)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(pixel_values=images)
    for hook in hooks:
        hook.remove()
    return [tuple(x.flatten(0, -2).double() for x in seen[name]) for name in names]


def recorded(monkeypatch, model, config, images):
    """The statistics of each layer, and the quantized model."""
    found = {}

    def recording(weight, statistics, config, rounding, name):
        found[name.removesuffix(".weight")] = statistics
        return round_weight(weight, statistics, config, rounding, name)

    monkeypatch.setattr(PLACE, recording)
    return found, convert(model, config, images, engine="layers")[0]


@pytest.mark.parametrize(("activation_bits", "share"), [(None, 1.0), (3, 1.0), (None, 0.5)])
def test_missing_is_what_the_float_block_gives_more(tiny_vit, monkeypatch, activation_bits, share):
    """Also where a hook of the user halves what the layer gives."""
    monkeypatch.setattr("fairseq.quantization.calibration.token_weights.UNIFORM_SHARE", 1.0)
    settings = {"activations": None} if activation_bits is None else {"activation_bits": activation_bits}
    config = QuantizationConfig(bits=2, method="channel", equalize=False, bias_correction=True, **settings)
    last = [name for name in linear_layers(tiny_vit) if ".1." in name][-1]
    if share != 1:
        tiny_vit.get_submodule(last).register_forward_hook(lambda m, args, y: share * y)
    found, result = recorded(monkeypatch, tiny_vit, config, IMAGES)
    assert [name for name, statistics in found.items() if statistics.missing is not None][-1] == last
    assert sum(statistics.missing is not None for statistics in found.values()) == 2  # one for each block
    block, layer = block_of(last), tiny_vit.get_submodule(last)
    ((_, wanted),) = run(tiny_vit, IMAGES, block)
    (read, given), (_, whole) = run(result, IMAGES, last, block)
    x = read if activation_bits is None else fake_quantize_tokens(read.float(), activation_bits).double()
    missing = wanted - (whole - given + share * (x @ layer.weight.double().T + layer.bias.double()))
    expected = missing.T @ x / len(x)
    torch.testing.assert_close(found[last].missing.double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close(found[last].missing_mean.double(), missing.mean(0), rtol=0, atol=1e-5)


def test_the_layer_makes_up_for_half_of_it_where_nothing_was_tried_out():
    """With so many tokens that damping takes nothing, and 8 bits, so that rounding hardly does."""
    generator = torch.Generator().manual_seed(0)
    x, weight, other = (torch.randn(*shape, generator=generator) for shape in ((4000, 8), (6, 8), (6, 8)))
    moment, missing = x.T @ x / len(x), other @ x.T @ x / len(x)
    statistics = Statistics(moment, x.mean(0), samples=1e6, missing=missing)
    config = LinearConfig(bits=8, method="channel")
    integers, scale, zero_point = round_weight(weight, statistics, config, "coordinate")
    real = scale[:, None] * (integers - zero_point[:, None].float())
    assert ((real - weight - 0.5 * other).abs() <= 2 * scale[:, None]).all()


def test_bias_correction_takes_what_the_block_is_missing_on_average():
    """The mean of what the block gives is then the float one's."""
    generator = torch.Generator().manual_seed(0)
    x, weight, missing = (torch.randn(*shape, generator=generator) for shape in ((500, 32), (6, 32), (6, 32)))
    lost = torch.arange(6.0)
    statistics = Statistics(x.T @ x / len(x), x.mean(0), samples=500.0, missing=missing, missing_mean=lost)
    bias = torch.ones(6)
    layer = quantize_layer(weight, bias, statistics, LayerConfig(bits=3, method="channel", bias_correction=True))
    torch.testing.assert_close(layer.bias, bias + lost + (weight - layer.real) @ x.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "ends"), [("vit", True), ("deit", True), ("beit", False), ("swinv2", False)])
def test_it_is_seen_by_running_which_layer_ends_a_block(name, ends, monkeypatch):
    """LayerScale or a norm behind the last layer is not what it gives."""
    model = build(name).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lambda" in key:  # LayerScale
                parameter.uniform_(0.3, 0.6)
    found, _ = recorded(monkeypatch, model, QuantizationConfig(bits=3, method="channel"), families.pictures(4))
    assert any(statistics.missing is not None for statistics in found.values()) == ends
