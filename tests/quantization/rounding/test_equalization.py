"""Equalization: exact before rounding, and a smaller error after it."""

import copy

import pytest
import torch
from bounds import EXACT, rounding_noise
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer, compare_models
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int, weight_to_real
from fairseq.quantization.architectures.blocks import SPLIT, block_plan, class_of
from fairseq.quantization.architectures.layers import block_of, linear_layers
from fairseq.quantization.config import LayerConfig
from fairseq.quantization.rounding.equalization import LARGEST, ROWS, Consumer, channel_factor, equalize, input_factor
from fairseq.quantization.rounding.statistics import Sample

TENSOR, CHANNEL = LayerConfig(bits=4, method="tensor"), LayerConfig(bits=4, method="channel")
ROUNDINGS = 2 * 13  # the weight and the input of each layer
STATIC = LayerConfig(bits=8, method="channel", activations="static")


def blocks(model):
    return [model.get_submodule(b) for b in dict.fromkeys(block_of(name) for name in linear_layers(model)) if b]


def plan_of(block):
    return block_plan(block, class_of(type(block)))


def layer(block, role):
    return block.get_submodule(plan_of(block).layers[role])


def uneven(model):
    """The model with input channels of very unequal range, which its LayerNorms make up for: the same function."""
    torch.manual_seed(3)
    with torch.no_grad():
        for block in blocks(model):
            for path, roles in plan_of(block).norms.items():
                norm = block.get_submodule(path)
                norm.weight.normal_(1, 0.2)
                norm.bias.normal_(0, 0.1)
                spread = torch.exp(torch.randn(len(norm.weight)))
                norm.weight.div_(spread)
                norm.bias.div_(spread)
                for role in roles:
                    layer(block, role).weight.mul_(spread)
            for role in ("fc2", "output"):
                layer(block, role).weight.mul_(torch.exp(torch.randn(layer(block, role).in_features)))
    return model


@pytest.fixture(params=["vit", "deit"])
def model(request, tiny_vit):
    if request.param == "vit":
        return uneven(tiny_vit)
    config = DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=4
    )
    return uneven(DeiTForImageClassification(config).eval())


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def test_the_outputs_stay_and_the_weights_do_not(model, pixels):
    model = model.double()
    equalized = copy.deepcopy(model)
    for block in blocks(equalized):
        assert set(plan_of(block).layers) == set(SPLIT)
        equalize(block, plan_of(block), dict.fromkeys(SPLIT, TENSOR))
    with torch.no_grad():
        torch.testing.assert_close(equalized(pixels.double()).logits, model(pixels.double()).logits, **EXACT)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, equalized.get_parameter(n))]
    assert sum("layernorm" in name for name in changed) == 8
    for block, before in zip(blocks(equalized), blocks(model), strict=True):
        for role in ("query", "fc1"):
            spread = [w.weight.abs().amax(0).log().std() for w in (layer(b, role) for b in (block, before))]
            assert spread[0] < spread[1]


def test_rounding_errs_less_after_it(model, pixels):
    errors = {}
    for equalized in (False, True):
        quantizer = ViTQuantizer(bits=4, method="tensor", equalize=equalized, activations=None)
        errors[equalized] = compare_models(model, quantizer.quantize_model(model), pixels).mse_loss
    assert errors[True] < 0.75 * errors[False]


def test_layers_without_a_norm_multiply_their_input(tiny_vit):
    quantized = ViTQuantizer(bits=4, method="tensor").quantize_model(uneven(tiny_vit))
    factors = [
        name for name, m in quantized.named_modules() if isinstance(m, PackedLinear) and m.input_factor is not None
    ]
    assert len(factors) == 3  # fc2 of each of two blocks, and the classifier
    assert "classifier" in factors


@pytest.mark.parametrize(
    ("model", "dtype", "method"),
    [
        ("vit", torch.float16, "tensor"),
        ("deit", torch.bfloat16, "channel"),
        ("vit", torch.float64, "channel"),
        pytest.param("vit", torch.float16, "channel", marks=pytest.mark.matrix),
        pytest.param("deit", torch.bfloat16, "tensor", marks=pytest.mark.matrix),
        pytest.param("vit", torch.float64, "tensor", marks=pytest.mark.matrix),
    ],
    indirect=["model"],
    ids=str,
)
def test_other_precisions(model, images, dtype, method):
    """In half precision, factors that are powers of two change no bit of the float model's output."""
    model = model.to(dtype)
    equalized = copy.deepcopy(model)
    for block in blocks(equalized):
        equalize(block, plan_of(block), dict.fromkeys(SPLIT, TENSOR))
    assert any(not torch.equal(p, equalized.get_parameter(n)) for n, p in model.named_parameters())
    with torch.no_grad():
        got, expected = (m(images.to(dtype)).logits for m in (equalized, model))
    torch.testing.assert_close(got, expected, **(EXACT if dtype is torch.float64 else {"atol": 0, "rtol": 0}))
    quantized = ViTQuantizer(bits=8, method=method, activations="static").quantize_model(model, images)
    error = compare_models(model, quantized, images.to(dtype)).mse_loss
    noise = rounding_noise(13) + 13 * 10**-2.8  # weights; and inputs, which below 28 dB would stay dynamic
    assert error < noise * expected.double().square().mean()


@pytest.mark.parametrize(("method", "expected"), [("tensor", True), ("channel", False), ("histogram", False)])
def test_it_is_for_one_scale_per_layer(tiny_vit, method, expected):
    quantized = ViTQuantizer(bits=4, method=method).quantize_model(tiny_vit)
    assert any(m.input_factor is not None for m in quantized.modules() if isinstance(m, PackedLinear)) == expected


@pytest.mark.parametrize(
    ("model", "activations"),
    [
        ("vit", {"activations": "static"}),
        ("deit", {"activations": "static", "activation_bits": 6}),
        ("vit", {"activation_bits": 4}),
    ],
    indirect=["model"],
    ids=str,
)
def test_inputs_that_share_a_scale_are_rounded_better(model, images, monkeypatch, activations):
    monkeypatch.setattr("fairseq.quantization.conversion.quantize_layer.MIN_STATIC_SQNR", -100.0)
    errors = {}
    for equalized in (False, True):
        quantizer = ViTQuantizer(bits=8, method="channel", equalize=equalized, **activations)
        errors[equalized] = compare_models(model, quantizer.quantize_model(model, images), images).mse_loss
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("model", ["vit"], indirect=True)  # DeiT's random weights are too small to notice
def test_a_layer_left_in_float_is_rescaled_with_its_norm(model):
    """What shares a LayerNorm with quantized layers has to follow, whether it is quantized or not."""
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    for settings in ({"quantize_mlp": False}, {"overrides": {"*attention*k*": {"skip": True}}}):
        quantized = ViTQuantizer(bits=8, method="tensor", activations=None, **settings).quantize_model(model)
        with torch.no_grad():
            energy = model(images).logits.square().mean()
        assert compare_models(model, quantized, images).mse_loss < rounding_noise(ROUNDINGS) * energy


def test_the_factor_of_an_input_evens_out_its_channels():
    torch.manual_seed(0)
    spread = torch.exp(2 * torch.randn(40))
    w, tokens = torch.randn(30, 40) / spread, torch.randn(200, 40) * spread
    sample = Sample(tokens, torch.ones(200))
    assert input_factor(w, CHANNEL, sample) is None  # 8 bits per token are fine enough
    factor = input_factor(w, STATIC, sample)
    left = [(tokens * r).abs().amax(0).log().std() for r in (factor, torch.ones(40))]
    assert left[0] < 0.5 * left[1]
    assert input_factor(w, STATIC) is None  # and without a sample nothing is known


def test_rare_large_numbers_do_not_hide_how_channels_differ():
    """The largest magnitudes of all channels are alike here, of tokens that any factor rounds exactly."""
    torch.manual_seed(0)
    spread = torch.exp(0.7 * torch.randn(40))
    w, tokens = torch.randn(30, 40) / spread, torch.randn(4000, 40) * spread
    tokens[:40] = tokens.abs().max() * torch.eye(40)
    factor = input_factor(w, LayerConfig(bits=4, method="channel", activation_bits=4), Sample(tokens, torch.ones(4000)))
    left = [(tokens[40:] * r).square().mean(0).log().std() for r in (factor, torch.ones(40))]
    assert left[0] < 0.7 * left[1]


def test_tokens_count_as_much_as_they_weigh():
    """Two kinds of tokens, uneven in opposite channels: the factor is that of those which count."""
    torch.manual_seed(0)
    spread = torch.exp(torch.randn(40))
    w, first, second = torch.randn(30, 40), torch.randn(200, 40) * spread, torch.randn(200, 40) / spread
    settings, tokens = LayerConfig(bits=8, method="channel", activation_bits=4), torch.cat([first, second])
    for share in (1e-3, 1 - 1e-3):
        weights = torch.tensor([share, 1 - share]).repeat_interleave(200)
        factor = input_factor(w, settings, Sample(tokens, weights)).log()
        with_first = torch.corrcoef(torch.stack([factor, -spread.log()]))[0, 1]
        assert with_first > 0.9 if share > 0.5 else with_first < -0.9


def test_even_channels_are_left_alone():
    torch.manual_seed(0)
    signs = torch.randn(40, 30).sign()
    assert input_factor(signs, TENSOR) is None
    assert input_factor(signs, STATIC, Sample(torch.randn(64, 30).sign(), torch.ones(64))) is None


def test_large_layers_are_judged_by_some_of_their_rows():
    torch.manual_seed(0)
    w = torch.randn(4 * ROWS, 20) * torch.exp(torch.randn(20))
    ratio = input_factor(w, TENSOR).log() / input_factor(w[:ROWS], TENSOR).log()
    assert float((ratio - 1).abs().median()) < 0.3


def test_the_factor_is_the_best_power_of_the_ranges():
    torch.manual_seed(0)
    w = torch.randn(30, 20).double() * torch.exp(torch.randn(20))
    factor = input_factor(w, TENSOR)

    def error(r):
        scale, zero_point = observe_weight(w / r, 4, "tensor")
        return (weight_to_real(weight_to_int(w / r, scale, zero_point, 4), scale, zero_point) * r - w).square().sum()

    assert error(factor) < error(torch.ones(20, dtype=torch.float64))
    ranges = w.abs().amax(0)
    ratio = factor.log() / (ranges / ranges.log().mean().exp()).log()
    torch.testing.assert_close(ratio, ratio[:1].expand(20), **EXACT)


def test_zero_channels_and_zero_weights_stay_finite():
    torch.manual_seed(0)
    w = torch.randn(6, 8) * torch.exp(torch.randn(8))
    w[:, 2] = 0
    assert channel_factor([Consumer(torch.zeros(6, 8), TENSOR)]) is None
    factor = channel_factor([Consumer(w, TENSOR)])
    assert ((factor >= 1 / LARGEST) & (factor <= LARGEST)).all()  # and finite


def test_unknown_blocks_are_left_alone():
    assert class_of(nn.Sequential) is None
