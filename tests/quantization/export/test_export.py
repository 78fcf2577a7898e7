"""export: files that run by themselves, hold integers and give the model's outputs; what is refused."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import vit_config
from families import build, pictures, shortened
from torch import nn
from transformers import ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.export import export as module
from fairseq.quantization.export import onnx_nodes, openvino_nodes, verify
from fairseq.quantization.export.openvino_ir import multiplies_exactly

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")

PICTURES = pictures(5)


def quantized(model, **settings):
    return ViTQuantizer(**{"bits": 8, "method": "channel", **settings}).quantize_model(model)


def logits_of(path, pixels):
    return onnxruntime.InferenceSession(str(path)).run(None, {"pixel_values": pixels.numpy()})[0]


@pytest.fixture
def toy():
    """One packed layer behind the pixels: all that a file of the wrong kind needs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), PackedLinear.from_float(nn.Linear(48, 7), LinearConfig(method="channel")))


TOY_PICTURES = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def plain():
    """8 bits, for onnxruntime; query, key and value share the rounding of their input."""
    return quantized(shortened(build("vit"))), {}, {"MatMulIntegerToFloat": 7, "QuantizeLinear": 5}


def mixed():
    """4 bits with other settings here and there, for any runtime, the weights in a file of their own."""
    model = shortened(build("vit"))
    names = list(linear_layers(model))
    overrides = {names[4]: {"activations": "static"}, names[5]: {"activations": None}, names[6]: {"group_size": 32}}
    quantizer = ViTQuantizer(bits=4, method="channel", overrides=overrides)
    result = quantizer.quantize_model(model, calibration=PICTURES)
    nodes = {"MatMulInteger": 5, "QuantizeLinear": 4, "DequantizeLinear": 3}  # groups: rounded, and read as floats
    return result, {"onnx_ops": "standard", "external_data": True}, nodes


@pytest.fixture(scope="module", params=[plain, mixed], ids=lambda make: make.__name__)
def exported(request, tmp_path_factory):
    """(the model, the file, the report, the nodes that it must have)."""
    model, settings, nodes = request.param()
    path = tmp_path_factory.mktemp("exported") / "vit.onnx"
    return model, path, ViTQuantizer.export(model, path, sample={"pixel_values": PICTURES}, **settings), nodes


def test_onnx_gives_the_outputs_of_the_model(exported):
    _, path, report, _ = exported
    assert report.max_difference <= report.tolerance
    assert report.outputs == ("logits",)
    got = logits_of(path, PICTURES)
    for i in range(len(PICTURES)):  # an image does not see its neighbours
        np.testing.assert_allclose(logits_of(path, PICTURES[i : i + 1])[0], got[i], rtol=0, atol=2e-5)


def test_onnx_runs_on_integers(exported):
    model, path, report, nodes = exported
    assert {name: report.integer_nodes[name] for name in nodes} == nodes
    assert report.integer_weights == 7
    proto = onnx.load(path)
    assert {"": 21}.items() <= {entry.domain: entry.version for entry in proto.opset_import}.items()
    assert "MatMulInteger" not in nodes or {node.domain for node in proto.graph.node} <= {""}
    layers = [layer for layer in model.modules() if hasattr(layer, "weight_codes")]
    half = [
        -(-layer.integers().numel() // 2) if layer.config.bits <= 4 else layer.integers().numel() for layer in layers
    ]
    assert report.integer_weight_bytes == sum(half)


def test_external_data_lies_beside(exported):
    _, path, report, nodes = exported
    files = ["vit.onnx", "vit.onnx.data"] if "MatMulInteger" in nodes else ["vit.onnx"]
    assert sorted(p.name for p in path.parent.iterdir()) == files
    assert report.paths == tuple(str(path.parent / name) for name in files)
    assert report.bytes == sum(p.stat().st_size for p in path.parent.iterdir())


def test_torch_files_give_the_outputs_of_the_model_from_integers(tmp_path):
    torch.manual_seed(0)
    model = quantized(ViTForImageClassification(vit_config(num_hidden_layers=1)).eval(), bits=4)
    for form, suffix in (("torchscript", ".pt"), ("torch_export", ".pt2")):
        report = ViTQuantizer.export(model, tmp_path / f"vit{suffix}", form, PICTURES)
        assert report.integer_weights == 7
        assert report.max_difference == 0
        assert json.loads(json.dumps(report.to_dict()))["format"] == form
    with torch.no_grad():
        expected = ViTQuantizer.optimize(model, engine="layers")(PICTURES).logits
        (got,) = torch.jit.load(str(tmp_path / "vit.pt"))(PICTURES)
        again = [torch.export.load(tmp_path / "vit.pt2").module()(x)[0] for x in (PICTURES, PICTURES[:3])]
    assert torch.equal(got, expected)
    assert torch.equal(again[0], expected)
    assert torch.equal(again[1], expected[:3])


@pytest.mark.parametrize("bits", [8, pytest.param(7, marks=pytest.mark.slow), 4])
def test_openvino_files_give_the_outputs_of_the_model_from_integers(tmp_path, bits, request):
    """That of 4 bits in a process of its own."""
    openvino = pytest.importorskip("openvino")
    if bits != 4:
        request.getfixturevalue("verified_here")
    model = quantized(shortened(build("vit")), bits=bits)
    if bits == 8 and not multiplies_exactly():
        with pytest.raises(
            RuntimeError, match=r"saturate on this processor \(classifier, .*\.0\..*, .*\), .*; take at most 7"
        ):
            ViTQuantizer.export(model, tmp_path / "vit.xml", "openvino", PICTURES)
        assert not list(tmp_path.iterdir())
        return
    report = ViTQuantizer.export(model, tmp_path / "vit.xml", "openvino", PICTURES)
    assert report.paths == (str(tmp_path / "vit.xml"), str(tmp_path / "vit.bin"))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "vit.bin", tmp_path / "vit.xml"]
    assert report.integer_weights == 7
    assert report.max_difference <= report.tolerance
    weights = sum(layer.integers().numel() for layer in model.modules() if hasattr(layer, "weight_codes"))
    width = 4 if bits == 4 else 8
    assert report.integer_weight_bytes == weights * width // 8
    assert (tmp_path / "vit.bin").stat().st_size < weights * width // 8 + 1.2 * report.float_weight_bytes
    compiled = openvino.Core().compile_model(tmp_path / "vit.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    together = compiled({"pixel_values": PICTURES.numpy()})["logits"]
    alone = compiled({"pixel_values": PICTURES[3:4].numpy()})["logits"]
    np.testing.assert_allclose(alone[0], together[3], rtol=0, atol=2e-5)


def test_openvino_constants_of_four_bytes_are_refused(toy, tmp_path, monkeypatch):
    pytest.importorskip("openvino")

    def wide(self, layer, name, codes):
        return self.constant(f"{name}.weight_codes", codes.astype(np.int32))

    monkeypatch.setattr(openvino_nodes.OpenVINOBuilder, "weight_codes", wide)
    with pytest.raises(RuntimeError, match="holds 0 integer weights; the model runs 1 layers"):
        ViTQuantizer.export(toy, tmp_path / "toy.xml", "openvino", TOY_PICTURES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "table_bits"), [("vit.onnx", 8), ("vit.onnx", 6), ("vit.pt", 8), ("vit.pt2", 6)])
def test_embeddings_are_exported_from_integers(tiny_vit, tmp_path, name, table_bits, verified_here):
    settings = {"bits": 6, "method": "channel", "quantize_attention": False, "quantize_mlp": False}
    overrides = {"*position_embeddings": {"bits": table_bits}}
    quantizer = ViTQuantizer(**settings, quantize_embeddings=True, overrides=overrides)
    formats = {".onnx": "onnx", ".pt": "torchscript", ".pt2": "torch_export"}
    path = tmp_path / name
    report = ViTQuantizer.export(quantizer.quantize_model(shortened(tiny_vit)), path, format=formats[path.suffix])
    assert report.max_difference <= report.tolerance
    assert report.integer_weights >= 2  # the classifier's, and the patches


@pytest.mark.parametrize("format", ["onnx", "torchscript"])
def test_a_float_file_is_refused(toy, tmp_path, monkeypatch, format):
    plain = module._write

    def write_float(wrapper, inputs, file, *settings):
        wrapper = copy.deepcopy(wrapper)
        wrapper.model = ViTQuantizer.dequantize_model(wrapper.model)
        if format == "torchscript":
            plain(wrapper, inputs, file, *settings)
        else:
            torch.onnx.export(wrapper, tuple(inputs.values()), str(file), external_data=False, verbose=False)

    monkeypatch.setattr(module, "_write", write_float)
    with pytest.raises(RuntimeError, match=r"1 layers in float: 1$"):
        ViTQuantizer.export(toy, tmp_path / f"toy{module.FORMATS[format]}", format, TOY_PICTURES)
    assert not list(tmp_path.iterdir())


def test_other_numbers_are_refused(toy, tmp_path, monkeypatch, verified_here):
    finish = onnx_nodes.GraphBuilder.finish

    def without_bias(self, layer, *settings):
        layer = copy.copy(layer)
        layer._buffers = {**layer._buffers, "bias": None}
        finish(self, layer, *settings)

    monkeypatch.setattr(onnx_nodes.GraphBuilder, "finish", without_bias)
    with pytest.raises(RuntimeError, match="output of the exported file differs by"):
        ViTQuantizer.export(toy, tmp_path / "toy.onnx", sample=TOY_PICTURES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_nothing_is_left_and_what_was_there_stays_when_it_stops(toy, tmp_path, monkeypatch, stop):
    (tmp_path / "toy.pt").write_bytes(b"before")

    def stopped(wrapper, inputs, file, form, others):
        assert file.stat().st_size > 6  # it was written
        raise stop

    monkeypatch.setattr(module, "verify", stopped)
    with pytest.raises(stop):
        ViTQuantizer.export(toy, tmp_path / "toy.pt", "torchscript", TOY_PICTURES)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("toy.pt", b"before")]


def test_the_other_process_cannot_import_this_library():
    start = verify.CHILD.split("import numpy", 1)[0]
    done = subprocess.run([sys.executable, "-I", "-c", f"{start}\nimport fairseq"], capture_output=True, text=True)
    assert done.returncode
    assert "ModuleNotFoundError: import of fairseq halted" in done.stderr


def test_openvino_reads_the_standard_file(tmp_path, verified_here):
    openvino = pytest.importorskip("openvino")
    for bits in (8, 4):
        model, path = quantized(shortened(build("vit")), bits=bits), tmp_path / f"{bits}.onnx"
        report = ViTQuantizer.export(model, path, sample=PICTURES, onnx_ops="standard")
        compiled = openvino.Core().compile_model(str(path), "CPU")
        got = compiled({"pixel_values": PICTURES.numpy()})[0]
        assert float(np.abs(got - logits_of(path, PICTURES)).max()) <= 2 * report.tolerance


def test_what_cannot_be_exported_is_refused_with_what_to_do(tiny_vit, tmp_path):
    model = quantized(tiny_vit)
    cases = [
        (tiny_vit, "vit.onnx", {}, ValueError, "nothing in the model is packed; pass what"),
        (quantized(tiny_vit, execution="emulated"), "vit.onnx", {}, ValueError, "execution='packed'"),
        (model, "vit.onnx", {"format": "tflite"}, ValueError, "format must be one of 'onnx', .* got 'tflite'"),
        (model, "vit.pt", {}, ValueError, r"format 'onnx' ends in \.onnx, got 'vit.pt'"),
        (model, "vit.bin", {"format": "openvino"}, ValueError, r"format 'openvino' ends in \.xml, got 'vit.bin'"),
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


@pytest.mark.parametrize(
    ("package", "name", "format", "message"),
    [
        ("onnxscript", "vit.onnx", "onnx", r'to ONNX needs onnxscript: pip install -e "\.\[onnx\]"'),
        ("openvino", "vit.xml", "openvino", r'to OpenVINO needs openvino: pip install -e "\.\[openvino\]"'),
    ],
)
def test_a_missing_extra_is_named(tiny_vit, tmp_path, monkeypatch, package, name, format, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        ViTQuantizer.export(quantized(tiny_vit), tmp_path / name, format)
