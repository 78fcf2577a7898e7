"""What a model computes is read right where some numbers reach far beyond the others, and where pictures say little."""

import copy
from dataclasses import dataclass

import families
import pytest
import torch
from transformers import Dinov2Backbone, Dinov2Config
from transformers.utils import ModelOutput

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.integer_only.convert import telling_pictures
from fairseq.quantization.integer_only.head_spec import distance
from fairseq.quantization.integer_only.reading import read_model

PICTURES = families.pictures(8)


def convert(model, pictures=PICTURES, **settings):
    quantizer = ViTQuantizer(method="channel", arithmetic="integer", rounding="nearest", **settings)
    return quantizer.quantize_model(model, calibration=pictures)


def beit(bias, reach):
    """A small LayerScale, relative positions of ``bias``, and a channel of the class token that reaches so far."""
    model = families.build("beit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_(std=bias) if bias else parameter.zero_()
            elif "lambda_" in name:
                parameter.fill_(0.1)
        model.beit.embeddings.cls_token[..., 5] += reach
    return model


@pytest.mark.parametrize("reach", [0, 30, 300])
def test_a_far_channel_hides_no_relative_positions(reach):
    with pytest.raises(ValueError, match="attention is of windows, or has relative"):
        convert(beit(1.0, reach))
    convert(beit(0.0, reach))


@pytest.mark.parametrize("reach", [0, 30, 300])
def test_a_far_channel_hides_no_token_of_a_mean(reach):
    model = beit(0.0, 0)
    with torch.no_grad():
        model.beit.embeddings.patch_embeddings.projection.bias[5] += reach
        model.beit.embeddings.cls_token[..., 5] += reach
        parts = read_model(model, PICTURES[:2])
    assert parts.head.readouts["logits"].tokens == ((1, 1 + len(parts.constants) - 1),)


def test_distances():
    a = torch.randn(5, 3)
    assert distance(a, a) == 0
    far = a * torch.tensor([1.0, 1000.0, 1.0])
    assert distance(far + torch.tensor([0.1, 0.0, 0.0]), far) > 1e-3
    assert distance(far, far[:4]) == distance(far, far * float("nan")) == float("inf")


def test_what_pictures_do_not_show_noise_does():
    model = families.build("vit")
    embeddings = model.vit.embeddings.patch_embeddings
    embeddings.register_forward_hook(lambda module, args, output: torch.nn.functional.gelu(output))
    black = PICTURES.clone()
    black[:3] = 0
    with pytest.raises(ValueError, match="its embedding does more"):
        convert(model, black)
    chosen = telling_pictures(black)
    assert chosen.shape == (4, *PICTURES.shape[1:])
    assert chosen[:2].flatten(1).var(1).min() > 0
    assert chosen.min() >= black.min()
    assert chosen.max() <= black.max()


@dataclass
class Other(ModelOutput):
    logits: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda output: (output.logits, output.logits * 2), "it returns a tuple, and a tensor or an output class"),
        (lambda output: {"logits": output.logits}, "it returns a dict, and a tensor or an output class"),
        (lambda output: Other(logits=output.logits), "it returns a Other, and a tensor or an output class"),
        (lambda output: type(output)(logits=output.logits, hidden_states=(output.logits,)), "hidden_states, a tuple"),
        (lambda output: type(output)(logits=output.logits.long()), "logits, a tensor of torch.int64"),
    ],
)
def test_what_could_not_be_returned_in_the_same_way_is_refused(returned, reason):
    model = families.build("vit")
    model.register_forward_hook(lambda module, args, output: returned(output))
    with pytest.raises(ValueError, match=reason):
        convert(model)


def test_feature_maps_are_refused():
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4, mlp_ratio=2
    )
    with pytest.raises(ValueError, match="feature_maps, a tuple, and floating tensors alone"):
        convert(Dinov2Backbone(config).eval())


def test_patches_divide_the_pictures():
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=17, patch_size=4, mlp_ratio=2
    )
    model = families.transformers.Dinov2ForImageClassification(config).eval()
    with pytest.raises(ValueError, match="its patches of 4 x 4 do not divide pictures of 17 x 17"):
        convert(model, torch.randn(4, 3, 17, 17))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision_are_converted_from_a_copy(dtype):
    half = families.build("vit").to(dtype)
    integers, expected = convert(half), convert(copy.deepcopy(half).float())
    assert next(half.parameters()).dtype == dtype
    pixels = expected.round_pixels(PICTURES)
    assert torch.equal(integers.integer_logits(pixels), expected.integer_logits(pixels))
