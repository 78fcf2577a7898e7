"""What integer arithmetic does not take, each with one sentence."""

import families
import pytest
import torch

from fairseq.models.vit_quantization import ViTQuantizer

PICTURES = families.pictures(4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit-bare", "its pooler_output is not tokens or their mean"),
        ("vit-mae-encoder", "its embedding does more"),
        ("swin", "attention is of windows"),
        ("swinv2", "its norms are post1, post2"),
        ("dinov2-giant", "its MLP is gated"),
        ("dinov3", "rotary positions"),
        ("clip", "it has a text tower"),
        ("siglip2-vision", "one Conv2d is expected"),
    ],
)
def test_models(name, reason):
    with pytest.raises(ValueError, match=reason):
        ViTQuantizer(arithmetic="integer").quantize_model(families.build(name), calibration=PICTURES)


@pytest.mark.parametrize(
    "settings",
    [
        {"activations": None},
        {"activation_bits": 7},
        {"method": "channel", "group_size": 32},
        {"execution": "emulated"},
        {"p": 0.5},
        {"quantize_mlp": False},
        {"exclude": ["*classifier"]},
        {"weight_storage": "unpacked"},
        {"backend": "reference"},
        {"quantize_embeddings": True},
        {"overrides": {"*classifier": {"skip": True}}},
        {"overrides": {"*classifier": {"activations": None}}},
    ],
    ids=str,
)
def test_settings(settings):
    with pytest.raises(ValueError, match="arithmetic='integer'"):
        ViTQuantizer(arithmetic="integer", **settings)


def test_names():
    with pytest.raises(ValueError, match="arithmetic must be one of 'float', 'integer'; got 'int'"):
        ViTQuantizer(arithmetic="int")
    quantizer = ViTQuantizer(arithmetic="integer")
    with pytest.raises(ValueError, match="no fused engine"):
        quantizer.quantize_model(families.build("vit"), calibration=PICTURES, engine="fused")
    with pytest.raises(ValueError, match="assign_bits measures arithmetic='float'"):
        quantizer.assign_bits(families.build("vit"), PICTURES, average_bits=6)


def test_a_block_whose_sums_could_overflow():
    model = families.build("vit")
    wide = 2**13 + 8
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.out_features == 40:
            module.weight = torch.nn.Parameter(torch.randn(wide, module.in_features) / 9)
            module.bias, module.out_features = torch.nn.Parameter(torch.zeros(wide)), wide
        elif isinstance(module, torch.nn.Linear) and module.in_features == 40:
            module.weight = torch.nn.Parameter(torch.randn(module.out_features, wide) / 99)
            module.in_features = wide
    with pytest.raises(ValueError, match="fc2 has 8200 inputs, more than 8192"):
        ViTQuantizer(8, "channel", arithmetic="integer", rounding="nearest", equalize=False).quantize_model(
            model, calibration=PICTURES
        )


def test_what_has_integers_alone_is_told_so():
    quantizer = ViTQuantizer(method="channel", arithmetic="integer", rounding="nearest")
    integers = quantizer.quantize_model(families.build("vit"), calibration=PICTURES)
    for call in (ViTQuantizer().quantize_model, ViTQuantizer.optimize, ViTQuantizer.dequantize_model):
        with pytest.raises(ValueError, match="an integer-only one already"):
            call(integers)
