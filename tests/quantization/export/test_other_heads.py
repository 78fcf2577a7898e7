"""Models with other heads as files: one each time, all with ``pytest -m matrix``; not language models."""

import other_heads
import pytest
import torch
from quantization.export.test_families import run_here

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.export import export as exporting
from fairseq.quantization.export import verify

FORMS = ("onnx", "openvino", "torch_export", "torchscript")
NAMES = [name for name in other_heads.NAMES if name not in other_heads.SPEAKING and name != "owl-vit"]
QUICK = {("yolos", "torchscript")}
REFUSED = {
    ("sam", "onnx"): "cannot write SamModel",
    ("rt-detr", "onnx"): "Got invalid dimensions for input: pixel_values",
    ("rt-detr", "openvino"): r"model input \(shape=\[2,3,64,64\]\) and the tensor .* are incompatible",
    ("rt-detr", "torch_export"): "cannot write RTDetrForObjectDetection",
}
"""(architecture, format) -> what the error says."""
REFUSED_BY_TORCH_2_9 = {
    (name, "onnx")
    for name in (
        "dpt", "depth-anything", "segformer", "beit-segmentation", "mask2former", "backbone-dinov2", "torchvision-swin",
    )
}  # fmt: skip
REFUSED_BY_TORCH_2_9 |= {(name, "openvino") for name in ("sam", *(name for name, _ in REFUSED_BY_TORCH_2_9))}
"""Its exporter wants another range of batch sizes."""


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(name, form, marks=[] if (name, form) in QUICK else pytest.mark.matrix, id=f"{name}-{form}")
        for name in NAMES
        for form in FORMS
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_export(name, form, tmp_path, monkeypatch):
    for package in {"mask2former": ["scipy"], "open-clip": ["open_clip"]}.get(name, []):
        pytest.importorskip(package)
    if form == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr(verify, "run_elsewhere", run_here)
    bits = 7 if form == "openvino" else 8  # its products of 8 bits saturate on x86 without VNNI
    quantized = ViTQuantizer(bits=bits, method="channel").quantize_model(other_heads.build(name))
    path = tmp_path / f"model{exporting.FORMATS[form]}"
    refused = REFUSED.get((name, form))
    if (name, form) in REFUSED_BY_TORCH_2_9 and torch.__version__ < "2.10":
        refused = "cannot write"
    if refused:
        with pytest.raises(Exception, match=refused):  # onnxruntime has errors of its own
            ViTQuantizer.export(quantized, path, form, other_heads.pictures(name, 2))
        assert not list(tmp_path.iterdir())
        return
    report = ViTQuantizer.export(quantized, path, form, other_heads.pictures(name, 2))
    assert report.integer_weights >= 6
    assert report.mean_difference < 1e-2  # of roundings, one or two may go another way
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
