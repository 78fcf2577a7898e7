"""errors_alone: each part by itself, against the model put together by hand; what moves within a block is no error."""

import copy

import families
import other_heads
import pytest
import torch

from fairseq.models.vit_quantization import ViTQuantizer, compare_outputs
from fairseq.quantization.evaluation.alone import errors_alone, parts


def mixed(original, quantized, name):
    result = copy.deepcopy(original)
    owner, _, last = name.rpartition(".")
    setattr(result.get_submodule(owner), last, copy.deepcopy(quantized.get_submodule(name)))
    return result


@pytest.mark.parametrize("name", ["vit", "swin", "timm-vit"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_it_is_the_error_with_that_part_alone(name, batch_size):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    original, pixels = families.build(name), families.pictures(5)
    before = copy.deepcopy(original.state_dict())
    quantized = ViTQuantizer(bits=3, method="channel").quantize_model(original)
    found = errors_alone(original, quantized, pixels, batch_size)
    assert list(found) == parts(quantized)
    for part, error in found.items():
        (row,) = compare_outputs(original, mixed(original, quantized, part), pixels, batch_size)
        assert error == pytest.approx(row.relative_error, rel=1e-5)
        assert error > 0
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_a_part_at_more_bits_changes_less():
    original, pixels = families.build("vit"), families.pictures(4)
    first, second = parts(ViTQuantizer(bits=8, method="channel").quantize_model(original))[:2]
    quantizer = ViTQuantizer(bits=8, method="channel", overrides={f"{first}.*": {"bits": 2}})
    found = errors_alone(original, quantizer.quantize_model(original), pixels)
    assert found[first] > 20 * found[second]


def test_what_equalization_moves_within_a_block_is_no_error():
    original = families.build("vit")
    with torch.no_grad():  # channels of very different ranges, which equalization evens out
        for key, module in original.named_modules():
            if key.endswith("layernorm_before"):
                module.weight.mul_(torch.logspace(-1.5, 1.5, len(module.weight)))
    settings = {"bits": 8, "method": "tensor", "activations": None}
    equalized, plain = (
        ViTQuantizer(**settings, equalize=equalize).quantize_model(original) for equalize in (True, False)
    )
    name = parts(equalized)[0]
    norm = f"{name}.layernorm_before.weight"
    assert not torch.allclose(equalized.get_parameter(norm), original.get_parameter(norm))
    errors = [errors_alone(original, each, families.pictures(4))[name] for each in (equalized, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_of_attention_made_of_layers():
    original, pixels = other_heads.build("torchvision-vit"), other_heads.pictures("torchvision-vit")
    quantized = ViTQuantizer(bits=4, method="channel").quantize_model(original)
    found = errors_alone(original, quantized, pixels)
    assert list(found) == ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "heads.head"]
    assert all(0 < error < 1 for error in found.values())
