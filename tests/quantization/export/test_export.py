"""export: files that run by themselves, hold integers and give the model's outputs; what is refused."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.export import export as module
from fairseq.quantization.export import onnx_graph
from fairseq.quantization.export import verify as export_check

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")


def quantized(model, pixels=None, **settings):
    settings = {"bits": 8, "method": "channel", **settings}
    calibration = pixels if settings.get("activations") == "static" else None
    return ViTQuantizer(**settings).quantize_model(model, calibration=calibration)


def logits_of(path, pixels):
    return onnxruntime.InferenceSession(str(path)).run(None, {"pixel_values": pixels.numpy()})[0]


@pytest.mark.parametrize(
    ("settings", "ops", "nodes"),
    [
        ({"bits": 8}, "onnxruntime", {"MatMulIntegerToFloat": 13, "QuantizeLinear": 9}),
        ({"bits": 4}, "standard", {"MatMulInteger": 13, "QuantizeLinear": 9}),
        ({"bits": 3, "symmetric": True}, "onnxruntime", {"MatMulIntegerToFloat": 13, "QuantizeLinear": 9}),
        ({"bits": 2, "activations": None}, "standard", {"DequantizeLinear": 13}),
        ({"bits": 4, "method": "tensor", "activations": None}, "onnxruntime", {"MatMulNBits": 13}),
        ({"bits": 8, "activations": "static"}, "onnxruntime", {"MatMulIntegerToFloat": 13, "QuantizeLinear": 13}),
        ({"bits": 8, "method": "tensor", "activations": "static"}, "standard", {"MatMulInteger": 13}),
        ({"bits": 4, "group_size": 32}, "onnxruntime", {"MatMulNBits": 13}),
        ({"bits": 6, "activation_bits": 6}, "onnxruntime", {"MatMulIntegerToFloat": 13}),
    ],
    ids=str,
)
def test_onnx_gives_the_outputs_of_the_model_from_integers(tiny_vit, pixels, tmp_path, settings, ops, nodes):
    import onnx

    model, path = quantized(tiny_vit, pixels, **settings), tmp_path / "vit.onnx"
    report = ViTQuantizer.export(model, path, sample={"pixel_values": pixels}, onnx_ops=ops)
    assert {name: report.integer_nodes[name] for name in nodes} == nodes
    assert report.max_difference <= report.tolerance
    assert (report.integer_weights, report.outputs) == (13, ("logits",))
    proto = onnx.load(path)
    assert {"": 21}.items() <= {entry.domain: entry.version for entry in proto.opset_import}.items()
    assert ops == "onnxruntime" or {node.domain for node in proto.graph.node} <= {""}
    integers = sum(layer.integers().numel() for layer in model.modules() if hasattr(layer, "weight_codes"))
    assert report.integer_weight_bytes <= integers * (1 if settings["bits"] > 4 else 1.4)  # blocks are filled up
    got = logits_of(path, pixels)
    for i in range(len(pixels)):  # an image does not see its neighbours
        np.testing.assert_allclose(logits_of(path, pixels[i : i + 1])[0], got[i], rtol=0, atol=2e-5)


def test_torch_files_give_the_outputs_of_the_model_from_integers(tiny_vit, pixels, tmp_path):
    model = quantized(tiny_vit, bits=4)
    for form, suffix in (("torchscript", ".pt"), ("torch_export", ".pt2")):
        report = ViTQuantizer.export(model, tmp_path / f"vit{suffix}", form, pixels)
        assert report.integer_weights == 13
        assert report.max_difference <= report.tolerance
        assert json.loads(json.dumps(report.to_dict()))["format"] == form
    with torch.no_grad():
        expected = ViTQuantizer.optimize(model, engine="layers")(pixels).logits
        (got,) = torch.jit.load(str(tmp_path / "vit.pt"))(pixels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_external_data_lies_beside(tiny_vit, tmp_path):
    report = ViTQuantizer.export(quantized(tiny_vit), tmp_path / "vit.onnx", external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["vit.onnx", "vit.onnx.data"]
    assert report.paths == (str(tmp_path / "vit.onnx"), str(tmp_path / "vit.onnx.data"))
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert logits_of(tmp_path / "vit.onnx", torch.zeros(3, 3, 16, 16)).shape == (3, 7)


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_float_file_is_refused(tiny_vit, pixels, tmp_path, monkeypatch, format):
    plain = module._write

    def write_float(wrapper, inputs, file, *settings):
        wrapper = copy.deepcopy(wrapper)
        wrapper.model = ViTQuantizer.dequantize_model(wrapper.model)
        if format == "torchscript":
            plain(wrapper, inputs, file, *settings)
        else:
            torch.onnx.export(wrapper, tuple(inputs.values()), str(file), external_data=False, verbose=False)

    monkeypatch.setattr(module, "_write", write_float)
    with pytest.raises(RuntimeError, match=r"13 layers in float: vit\."):
        ViTQuantizer.export(quantized(tiny_vit), tmp_path / f"vit{module.FORMATS[format]}", format, pixels)
    assert not list(tmp_path.iterdir())


def test_other_numbers_are_refused(tiny_vit, pixels, tmp_path, monkeypatch):
    finish = onnx_graph.GraphBuilder.finish

    def without_bias(self, layer, *settings):
        layer = copy.copy(layer)
        layer._buffers = {**layer._buffers, "bias": None}
        finish(self, layer, *settings)

    monkeypatch.setattr(onnx_graph.GraphBuilder, "finish", without_bias)
    with pytest.raises(RuntimeError, match="logits of the exported file differs by"):
        ViTQuantizer.export(quantized(tiny_vit), tmp_path / "vit.onnx", sample=pixels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_nothing_is_left_and_what_was_there_stays_when_it_stops(tiny_vit, tmp_path, monkeypatch, stop):
    (tmp_path / "vit.onnx").write_bytes(b"before")

    def stopped(*_):
        raise stop

    monkeypatch.setattr(module, "_verify", stopped)
    with pytest.raises(stop):
        ViTQuantizer.export(quantized(tiny_vit), tmp_path / "vit.onnx")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("vit.onnx", b"before")]


def test_the_other_process_cannot_import_this_library():
    start = export_check.CHILD.split("import numpy", 1)[0]
    done = subprocess.run([sys.executable, "-I", "-c", f"{start}\nimport fairseq"], capture_output=True, text=True)
    assert done.returncode
    assert "ModuleNotFoundError: import of fairseq halted" in done.stderr


def test_openvino_reads_the_standard_file(tiny_vit, pixels, tmp_path):
    openvino = pytest.importorskip("openvino")
    for bits in (8, 4):
        model, path = quantized(tiny_vit, bits=bits), tmp_path / f"{bits}.onnx"
        report = ViTQuantizer.export(model, path, sample=pixels, onnx_ops="standard")
        compiled = openvino.Core().compile_model(str(path), "CPU")
        got = compiled({"pixel_values": pixels.numpy()})[0]
        assert float(np.abs(got - logits_of(path, pixels)).max()) <= 2 * report.tolerance


def test_what_cannot_be_exported_is_refused_with_what_to_do(tiny_vit, tmp_path):
    model = quantized(tiny_vit)
    cases = [
        (tiny_vit, "vit.onnx", {}, ValueError, "nothing in the model is packed; pass what"),
        (quantized(tiny_vit, execution="emulated"), "vit.onnx", {}, ValueError, "execution='packed'"),
        (model, "vit.onnx", {"format": "tflite"}, ValueError, "format must be one of 'onnx', .* got 'tflite'"),
        (model, "vit.pt", {}, ValueError, r"format 'onnx' ends in \.onnx, got 'vit.pt'"),
        (model, "no/vit.onnx", {}, FileNotFoundError, "create it first"),
        (model, "vit.onnx", {"onnx_ops": "fast"}, ValueError, "onnx_ops must be one of"),
        (model, "vit.pt", {"format": "torchscript", "external_data": True}, ValueError, "format 'onnx' only"),
        (model, "vit.onnx", {"sample": [1]}, TypeError, "sample must be .* got list"),
        (copy.deepcopy(model).to("meta"), "vit.onnx", {}, ValueError, "the model is on meta .* export a copy"),
        ("vit", "vit.onnx", {}, TypeError, "must be a torch.nn.Module, got str"),
    ]
    for subject, name, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            ViTQuantizer.export(subject, tmp_path / name, **settings)
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'needs onnxscript: pip install "fairseq\[onnx\]"'):
        ViTQuantizer.export(quantized(tiny_vit), tmp_path / "vit.onnx")
