"""Small integer-only models, of each kind of arithmetic that a file or a runtime has to know."""

import functools
import zipfile
from pathlib import Path

import families
import pytest
import torch
from conftest import vit_config
from PIL import Image
from transformers import AutoImageProcessor, ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer

PICTURES = families.pictures(12)


def spread():
    """A float model one of whose columns reaches so far that static activations make several bytes of it."""
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(intermediate_size=128)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape == (128,):  # of fc1
                parameter[3] += 1
    return model


KINDS = {
    "dynamic": ("vit", {}),
    "static": ("vit", {"activations": "static"}),
    "spread": (spread, {"activations": "static", "equalize": False}),
    "4 bits": ("deit", {"bits": 4}),
    "timm, 3 bits": ("timm-vit", {"activations": "static", "bits": 3, "method": "channel"}),
    "two heads": ("deit-teacher", {}),
    "class token and mean": ("dinov2", {"activations": "static"}),
    "norm before": ("clip-vision-projection", {"activations": "static"}),
    "attention pooling": ("siglip-vision", {}),
}
QUICK = ("spread", "4 bits", "two heads", "class token and mean", "attention pooling")
EACH = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.matrix) for kind in KINDS]
"""Five of them each time, all with ``pytest -m matrix``."""


def quantize(kind):
    """A new model of that kind."""
    build, settings = KINDS[kind]
    quantizer = ViTQuantizer(**{"bits": 8, "rounding": "nearest", "arithmetic": "integer", **settings})
    model = build() if callable(build) else families.build(build)
    made = quantizer.quantize_model(model, calibration=PICTURES)
    assert any(name.endswith("columns") for name in made.state_dict()) == (kind == "spread")
    return made


made = functools.cache(quantize)
"""Models that are not to be changed."""

EXAMPLES = Path(__file__).parent.parent / "examples" / "vision_transformer"


@functools.cache
def embedded_pictures(count=40):
    """Pixel values of every twelfth picture that ships with the embedded model, (count, 3, 32, 32)."""
    processor = AutoImageProcessor.from_pretrained(EXAMPLES / "cifar10-vit")
    with zipfile.ZipFile(EXAMPLES / "assets" / "cifar10_test_500.zip") as archive:
        pictures = [Image.open(archive.open(name)).convert("RGB") for name in archive.namelist()[::12][:count]]
    return processor(images=pictures, return_tensors="pt")["pixel_values"]


@functools.cache
def embedded(activations):
    """The embedded model; it is not to be changed."""
    model = ViTForImageClassification.from_pretrained(EXAMPLES / "cifar10-vit", dtype=torch.float32).eval()
    quantizer = ViTQuantizer(
        method="channel", rounding="nearest", equalize=False, arithmetic="integer", activations=activations
    )
    return quantizer.quantize_model(model, calibration=embedded_pictures()[:8])
