"""A model that runs layer by layer has the same bits traced, exported, and read back from a file of PyTorch's."""

import copy

import pytest
import torch
from families import build, pictures, shortened
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.engine.fuse import optimize

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    pytest.param("vit", {"bits": 8}, marks=pytest.mark.matrix),
    ("vit", {"bits": 4, "method": "tensor", "activations": "static"}),
    ("swin", {"bits": 8}),
    ("dinov2", {"bits": 4, "group_size": 32}),
]


def quantized(name, settings):
    quantizer = ViTQuantizer(**{"method": "channel", **settings})
    model = build(name) if name == "swin" else shortened(build(name))  # Swin's second block shifts its windows
    return quantizer.quantize_model(model, calibration=pictures(8) if "activations" in settings else None)


def logits(output):
    output = output if isinstance(output, (tuple, torch.Tensor)) else output.logits
    return output[0] if isinstance(output, tuple) else output


class Logits(nn.Module):
    """A model by position, and of its output only the logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return logits(self.model(pixel_values))


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_traced_exported_and_read_back(name, settings, tmp_path):
    layers = Logits(optimize(quantized(name, settings), "layers")).eval()
    x, batch = pictures(5), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        traced = torch.jit.trace(copy.deepcopy(layers), x, check_trace=False)  # Swin keeps a number of the trace
        traced.save(str(tmp_path / "traced.pt"))
        exported = torch.export.export(layers, (x,), dynamic_shapes=({0: batch},)).module()
        runs = traced, torch.jit.load(str(tmp_path / "traced.pt")), exported
        for pixels in (x, pictures(3, seed=4)):
            expected = layers(pixels)
            for run in runs:
                for _ in range(3):  # TorchScript looks at the first runs and optimizes the later ones
                    assert torch.equal(run(pixels), expected)


@pytest.mark.parametrize(
    ("name", "settings", "form", "suffix"),
    [
        pytest.param("vit", {"bits": 8}, "torchscript", ".pt", marks=pytest.mark.matrix),
        pytest.param("vit", {"bits": 4}, "torch_export", ".pt2", marks=pytest.mark.matrix),  # as in test_export.py
        ("swin", {"bits": 4}, "torchscript", ".pt"),
    ],
    ids=str,
)
def test_files(name, settings, form, suffix, tmp_path, verified_here):
    model, path = quantized(name, settings), tmp_path / f"model{suffix}"
    report = ViTQuantizer.export(model, path, form, pictures(5))
    assert report.max_difference == 0  # on two batch sizes
    loaded = torch.jit.load(str(path)) if form == "torchscript" else torch.export.load(str(path)).module()
    x = pictures(3, seed=4)
    with torch.no_grad():
        assert torch.equal(logits(loaded(x)), logits(optimize(model, "layers")(x)))
