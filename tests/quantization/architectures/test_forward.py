"""How models are called that are not HuggingFace's, and which output stands for all, whatever a model returns."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput, DepthEstimatorOutput

from fairseq.quantization.architectures.forward import call, class_dimension, output_of, picture_inputs

PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MAP, DEEP = torch.randn(2, 4, 6, 5), torch.randn(2, 9, 3, 3)


class Returns(nn.Module):
    """Takes pictures by position and returns what it was made with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        assert images.shape == PICTURES.shape
        return self.output


class Named(NamedTuple):
    indices: Tensor
    boxes: Tensor


@dataclass
class Fields:
    loss: Tensor
    depth: Tensor


@pytest.mark.parametrize(
    ("output", "name", "value"),
    [
        (MAP, "output", MAP),
        ((MAP, DEEP), "output_0", MAP),
        (((MAP, DEEP), MAP), "output_0[1]", DEEP),
        ([MAP, DEEP], "output[1]", DEEP),  # feature maps, from shallow to deep
        ([{"boxes": MAP}, {"labels": torch.ones(2, dtype=torch.long), "boxes": DEEP}], "output[1].boxes", DEEP),
        (OrderedDict(out=MAP, aux=DEEP), "out", MAP),
        ({"loss": torch.zeros(()), "depth": MAP}, "depth", MAP),  # a number says nothing of a picture
        ({"aux": DEEP, "last_hidden_state": MAP}, "last_hidden_state", MAP),
        ({"last_hidden_state": DEEP, "logits": MAP}, "logits", MAP),
        ({"logits": None, "masks": MAP}, "masks", MAP),
        ({"logits": (DEEP, MAP)}, "logits[1]", MAP),
        (Named(torch.ones(2, dtype=torch.long), MAP), "boxes", MAP),
        (Fields(torch.zeros(()), MAP), "depth", MAP),
        (DepthEstimatorOutput(predicted_depth=MAP, hidden_states=(DEEP, DEEP)), "predicted_depth", MAP),
        (BackboneOutput(feature_maps=(MAP, DEEP)), "feature_maps[1]", DEEP),
    ],
)
def test_any_floating_output_stands_for_all(output, name, value):
    got = output_of(Returns(output), PICTURES)
    assert got[0] == name
    assert got[1] is value


@pytest.mark.parametrize(
    ("output", "kinds"),
    [
        (None, "output: NoneType"),
        ((), "nothing"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool), "loss": torch.ones(())}, "mask: Tensor, loss: Tensor"),
        ([torch.ones(2).long()], "output: list"),
    ],
)
def test_a_model_without_a_floating_output_is_refused(output, kinds):
    with pytest.raises(ValueError, match=f"Returns returned no floating tensor.*; it returned {kinds}$"):
        output_of(Returns(output), PICTURES)


def test_one_tensor_is_logits_only_if_its_width_is_the_number_of_classes():
    model = Returns(torch.randn(2, 7))
    assert output_of(model, PICTURES)[0] == "output"
    model.num_classes = 6
    assert output_of(model, PICTURES)[0] == "output"
    model.num_classes = 7
    assert output_of(model, PICTURES)[0] == "logits"


class Keywords(nn.Module):
    def forward(self, **inputs):
        return inputs["pixel_values"]


class Draws(nn.Module):
    """Has an argument that is called like ViT-MAE's, and no patches to draw it for."""

    def forward(self, x, noise=None):
        assert noise is None
        return x


MODELS = [nn.Sequential(nn.Identity()), Keywords(), Draws(), torch.compile(Draws(), backend="eager")]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_pictures_reach_a_model_by_position_or_by_name(model):
    torch.testing.assert_close(call(model, picture_inputs(model, PICTURES))["output"], PICTURES, rtol=0, atol=0)
    of_a_processor = {"pixel_values": PICTURES, "pixel_mask": torch.ones(2, 8, 8)}
    torch.testing.assert_close(output_of(model, of_a_processor)[1], PICTURES, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "dimension"),
    [
        ("logits", (2, 7), -1),
        ("logits_per_image", (2, 7), -1),
        ("logits", (2, 100, 7), -1),  # queries of a detector, words of a decoder
        ("logits", (2, 7, 8, 8), 1),  # a class for each pixel
        ("logits", (2, 1), None),  # a regression
        ("logits", (2, 1, 8, 8), None),  # one map, of foreground
        ("logits", (2, 8, 8), None),  # likewise: as large as the pictures
        ("logits", (2,), None),
        ("logits[1]", (2, 7), None),
        ("predicted_depth", (2, 7), None),
    ],
)
def test_which_dimension_is_of_classes(name, shape, dimension):
    assert class_dimension(name, torch.zeros(shape), PICTURES) == dimension
