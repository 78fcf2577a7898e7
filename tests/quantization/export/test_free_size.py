"""free_size: files that take pictures of any size, as the model does, and models that cannot have such files."""

import numpy as np
import pytest
import torch
from families import build, pictures, shortened

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.export.export import FORMATS
from fairseq.quantization.export.free_size import always_resized

pytestmark = pytest.mark.filterwarnings("ignore")
OLD = torch.__version__ < "2.10"
SIZES = [(16, 16), (12, 28), (40, 8)]
"""That of the configuration, and two on which no file is verified."""


def run(form, path, pixels):
    if form == "torch_export":
        with torch.no_grad():
            return torch.export.load(path).module()(pixels)[0]
    if form == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        return torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(np.array(compiled({"pixel_values": pixels.numpy()})["logits"]))


@pytest.mark.parametrize(
    ("name", "form", "settings"),
    [
        ("vit", "onnx", {"interpolate_pos_encoding": True}),
        ("dinov2-registers", "torch_export", {}),
        ("deit", "openvino", {"interpolate_pos_encoding": True}),
    ],
)
def test_a_file_takes_any_size(tmp_path, verified_here, name, form, settings):
    if form == "openvino":
        pytest.importorskip("openvino")
    if OLD:
        pytest.skip("torch 2.9 cannot; test_what_has_one_size_is_refused")
    quantizer = ViTQuantizer(bits=4, method="channel", activations=None, quantize_attention=False)
    model = quantizer.quantize_model(shortened(build(name)))
    path = tmp_path / f"free{FORMATS[form]}"
    report = ViTQuantizer.export(model, path, form, pictures(2), free_size=True)
    layers = ViTQuantizer.optimize(model, engine="layers")
    for i, size in enumerate(SIZES):
        pixels = torch.randn(i + 1, 3, *size, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            expected = layers(pixels, **settings).logits
        assert float((run(form, path, pixels) - expected).abs().max()) <= report.tolerance < 0.01


def test_resizing_to_the_same_size_changes_nothing():
    """The model is itself again afterwards."""
    model = build("dinov2-registers").eval()
    kinds = [type(part) for part in model.modules()]
    with torch.no_grad():
        expected = model(pictures(2)).logits
        with always_resized(model):
            assert [type(part) for part in model.modules()] != kinds
            np.testing.assert_allclose(model(pictures(2)).logits, expected, rtol=0, atol=1e-6)
    assert [type(part) for part in model.modules()] == kinds


@pytest.mark.parametrize(
    ("name", "form", "size", "message"),
    [
        (
            "vit",
            "torchscript",
            16,
            "free_size is for the formats 'onnx', .*, got 'torchscript'",
        ),
        ("vit", "torch_export", 18, "whole patches, two or more: its height is 18, a patch is 4"),
        ("swin", "onnx", 16, "SwinForImageClassification chooses its windows by the size"),
        ("vit", "torch_export", 4, "two or more: its height is 4"),
        ("timm-vit", "torch_export", 16, "VisionTransformer does not take pictures of 20 x 24: Input height"),
    ],
)
def test_what_has_one_size_is_refused(tmp_path, name, form, size, message):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = ViTQuantizer(bits=8, method="channel").quantize_model(build(name))
    sample = torch.randn(2, 3, size, size)
    if OLD and form != "torchscript":
        message = "free_size needs torch 2.10 or later"
    with pytest.raises(ValueError, match=message):
        ViTQuantizer.export(model, tmp_path / f"free{FORMATS[form]}", form, sample, free_size=True)
    assert not list(tmp_path.iterdir())
