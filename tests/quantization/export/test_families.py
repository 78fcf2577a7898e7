"""Every family in every export format; a few of them each time, all with ``pytest -m matrix``."""

import pytest
import torch
from families import BUILDERS, build, pictures

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.architectures.forward import picture_inputs
from fairseq.quantization.export import export as exporting
from fairseq.quantization.export import verify

QUICK = {("swin", "onnx"), ("swin", "torchscript"), ("siglip-vision", "torchscript")}
FORMATS = [form for form in exporting.FORMATS if form != "c"]  # that is for integer-only models
SIGLIP2 = ("siglip2", "siglip2-vision")
REFUSED = {(name, form): "to each picture's shape" for name in SIGLIP2 for form in FORMATS}
"""(family, format) -> what the error says."""
REFUSED_BY_TORCH_2_9 = {
    ("vit-mae", "onnx"), ("vit-mae", "torch_export"), ("vit-mae-encoder", "onnx"), ("vit-mae-encoder", "torch_export"),
    ("vit-masked", "onnx"), ("swinv2", "onnx"), ("siglip-vision", "onnx"),
    ("siglip", "onnx"), ("siglip-classifier", "onnx"), ("swin", "onnx"),
}  # fmt: skip
REFUSED_BY_TORCH_2_9 |= {(name, "openvino") for name, form in REFUSED_BY_TORCH_2_9 if form == "onnx"}
"""Its exporter wants another range of batch sizes, or loses a guard."""


def run_here(form, path, batches):
    """The outputs of an exported file, in this process: test_export.py has the fresh ones."""
    if form == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        runs = (session.run(None, {name: tensor.numpy() for name, tensor in batch.items()}) for batch in batches)
        return [[torch.from_numpy(output) for output in outputs] for outputs in runs]
    if form == "openvino":
        openvino = pytest.importorskip("openvino")
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        runs = (compiled({name: tensor.numpy() for name, tensor in batch.items()}) for batch in batches)
        return [[torch.from_numpy(output) for output in outputs.values()] for outputs in runs]
    model = torch.jit.load(str(path)) if form == "torchscript" else torch.export.load(str(path)).module()
    with torch.no_grad():
        return [list(model(*batch.values())) for batch in batches]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (name, form) in QUICK else pytest.mark.matrix, id=f"{name}-{form}")
        for name in BUILDERS
        for form in FORMATS
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_export(name, form, tmp_path, monkeypatch):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    monkeypatch.setattr(verify, "run_elsewhere", run_here)
    model = build(name)
    bits = 7 if form == "openvino" else 8  # its products of 8 bits saturate on x86 without VNNI
    quantized = ViTQuantizer(bits=bits, method="channel").quantize_model(model)
    path = tmp_path / f"model{exporting.FORMATS[form]}"
    sample = picture_inputs(model, pictures(2))
    refused = REFUSED.get((name, form))
    if (name, form) in REFUSED_BY_TORCH_2_9 and torch.__version__ < "2.10":
        refused = "cannot write|name 'L'"  # written, and then it does not run
    if form == "openvino":
        pytest.importorskip("openvino")
    if refused:
        with pytest.raises((NameError, RuntimeError, ValueError), match=refused):
            ViTQuantizer.export(quantized, path, form, sample)
        assert not list(tmp_path.iterdir())
        return
    report = ViTQuantizer.export(quantized, path, form, sample)
    assert report.integer_weights >= 8
    assert report.mean_difference < 1e-2 < report.tolerance  # of roundings, one or two may go another way
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
