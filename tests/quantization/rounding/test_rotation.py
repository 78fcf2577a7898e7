"""rotated: the logits stay, hidden states turn, and outliers of a channel spread; what it is not for is refused."""

import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.rounding.rotation import rotated, rotation_of

SIZES = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "num_labels": 7,
}  # fmt: skip


def model_of(kind, config):
    torch.manual_seed(0)
    model = kind(config(**SIZES)).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():  # norms with gains and biases, tokens that are not zero
            parameter.add_(0.3 * torch.randn_like(parameter) if parameter.ndim != 2 else 0)
    return model


@pytest.mark.parametrize(
    ("kind", "config"),
    [(ViTForImageClassification, ViTConfig), (DeiTForImageClassificationWithTeacher, DeiTConfig)],
)
def test_the_logits_stay_and_the_hidden_states_turn(kind, config):
    model = model_of(kind, config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    turned = rotated(model, seed=1)
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, got = (m(pixels, output_hidden_states=True) for m in (model, turned))
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-10)
    rotation = rotation_of(48, 1)
    for seen, plain in zip(got.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
        torch.testing.assert_close(seen, plain @ rotation.T, rtol=0, atol=1e-10)
        assert (seen - plain).abs().max() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_orthogonal_and_leaves_ones_alone_and_spreads_a_channel():
    rotation = rotation_of(192)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(192).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation.sum(1), torch.ones(192).double(), rtol=0, atol=1e-12)
    assert rotation.abs().max() < 0.4
    assert not torch.equal(rotation, rotation_of(192, 1))


def test_what_it_is_not_for_is_refused():
    class Own(ViTForImageClassification):
        pass

    with pytest.raises(ValueError, match=r"rotate=True is for ViTForImageClassification, .*Own"):
        rotated(Own(ViTConfig(**SIZES)))
    model = ViTForImageClassification(ViTConfig(**SIZES, qkv_bias=False))
    with pytest.raises(ValueError, match=r"layernorm_before is read by Linear.*bias=False"):
        rotated(model)


def test_a_hook_that_reads_hidden_states_is_noticed():
    model = model_of(ViTForImageClassification, ViTConfig)
    model.vit.layernorm.register_forward_hook(lambda module, args, output: output * torch.arange(48).double())
    with pytest.raises(ValueError, match=r"the logits of .* change by"):
        rotated(model)


def test_a_rotated_model_is_quantized_saved_and_loaded(tmp_path):
    """A channel with outliers makes one scale for a layer coarse; after a rotation all channels share them."""
    model = model_of(ViTForImageClassification, ViTConfig).float()
    with torch.no_grad():
        for layer in (layer for name, layer in model.named_modules() if name.endswith((".o_proj", ".output.dense"))):
            layer.weight[5] *= 30
    results, ratios = [], []
    for rotate in (True, False):
        quantizer = ViTQuantizer(bits=4, method="tensor", equalize=False, rotate=rotate)
        results.append(quantizer.quantize_model(model))
        layers = [layer for layer in quantizer.report.layers if layer.name.endswith((".o_proj", ".output.dense"))]
        ratios.append([layer.outlier_ratio for layer in layers])
    assert all(turned < 0.8 * plain for turned, plain in zip(*ratios, strict=True))
    pixels = torch.randn(4, 3, 32, 32)
    results[0].save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, results[0](pixels).logits)
