"""Integer-only models in files for other runtimes: every integer the same, and no float on the way to it."""

import copy
import functools
import json

import families
import pytest
import timm
import torch
from families import build, shortened
from integer_models import EACH, PICTURES, embedded, embedded_pictures, made

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.export import integer, integer_nodes
from fairseq.quantization.export.integer_check import not_integers
from fairseq.quantization.export.integer_graph import integer_model
from fairseq.quantization.export.integer_nodes import IntegerNodes
from fairseq.quantization.integer_only import layers

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def dynamic_file():
    """The file of such a model; it is to be copied before it is changed."""
    return integer_model(made("dynamic"))


def run_here(form, path, batches):
    """The outputs of an exported file in this process; some of the tests below start a new one."""
    return [run_all(path, "pixels", batch["pixels"]) for batch in batches]


@pytest.fixture(scope="module", params=EACH)
def exported(request, tmp_path_factory):
    """(the model, the file, the report)"""
    model, path = made(request.param), tmp_path_factory.mktemp("integers") / "vit.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer, "run_elsewhere", run_here)
        return model, path, ViTQuantizer.export(model, path, sample=PICTURES[:3])


def run(path, name, x):
    return run_all(path, name, x)[0]


def run_all(path, name, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return [torch.from_numpy(y) for y in onnxruntime.InferenceSession(str(path), options).run(None, {name: x.numpy()})]


def test_onnx_gives_every_integer_of_the_model(exported):
    model, path, report = exported
    pixels = model.round_pixels(PICTURES)
    for count in (1, 3, 8):
        expected = model.integer_outputs(pixels[:count])
        assert all(map(torch.equal, run_all(path, "pixels", pixels[:count]), expected.values()))
    assert report.outputs == tuple(f"integer_{name}" for name in expected)
    assert report.max_difference == report.tolerance == report.float_weight_bytes == 0
    assert report.integer_weights == sum(isinstance(m, layers.IntegerLinear) for m in model.modules())
    attentions = sum(isinstance(m, layers.IntegerAttention) for m in model.modules())
    assert report.integer_nodes == {"MatMulInteger": report.integer_weights + 2 * attentions}


def test_onnx_is_of_integers_and_of_standard_operators(exported):
    model, path, _ = exported
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert not_integers(proto) == []
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 21)]
    names = {name: "logit" if name == "logits" else name for name in model.head.outputs}
    exponents = {f"{names[name]}_exponent": e.item() for name, e in model.head.exponents().items()}
    assert {entry.key: json.loads(entry.value) for entry in proto.metadata_props} == {
        **exponents,
        "pixel_start": model.pixel_start.tolist(),
        "pixel_step": model.pixel_step.tolist(),
    }
    weights = model.blocks[0].fc1.weight
    stored = next(t for t in proto.graph.initializer if t.name == "blocks.0.fc1.weight_codes")
    narrow = int((weights.amax(-1).long() - weights.amin(-1)).max()) < 16
    assert stored.data_type == (onnx.TensorProto.UINT4 if narrow else onnx.TensorProto.UINT8)
    assert len(stored.raw_data) == weights.numel() // (2 if narrow else 1)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_onnx_of_the_embedded_model(activations):
    model = embedded(activations)
    session = onnxruntime.InferenceSession(integer_model(model).SerializeToString())
    pixels = model.round_pixels(embedded_pictures())
    expected = model.integer_logits(pixels)
    for count in (1, 3, 8, 40):
        (got,) = session.run(None, {"pixels": pixels[:count].numpy()})
        assert torch.equal(torch.from_numpy(got), expected[:count])


def test_onnx_of_a_layer_on_every_token(tmp_path):
    torch.manual_seed(0)
    original = timm.create_model("vit_tiny_patch16_224", **families.TIMM, global_pool="").eval()
    quantizer = ViTQuantizer(method="channel", arithmetic="integer", rounding="nearest")
    model = quantizer.quantize_model(original, calibration=PICTURES)
    name = model.main
    pixels = model.round_pixels(PICTURES[:3])
    expected = model.integer_outputs(pixels)[name]
    assert expected.shape == (3, 17, 7)
    session = onnxruntime.InferenceSession(integer_model(model).SerializeToString())
    (got,) = session.run([f"integer_{name}"], {"pixels": pixels.numpy()})
    assert torch.equal(torch.from_numpy(got), expected)


def test_rounding_in_front_is_the_only_part_with_floats(tmp_path):
    model = made("dynamic")
    path = tmp_path / "vit.onnx"
    ViTQuantizer.export(model, path, sample={"pixel_values": PICTURES[:1]}, pixels="float32")
    edges = model.pixel_start[:, None, None] + model.pixel_step[:, None, None] * (torch.arange(16) + 0.5)
    for x in (PICTURES[:5], 3 * PICTURES[:1], edges.expand(1, 3, 16, 16).float()):
        assert torch.equal(run(path, "pixel_values", x), model(x).integer_logits)
    proto = onnx.load(path)
    assert not_integers(proto, after="pixels") == []
    assert {line.split(" is of type ")[1] for line in not_integers(proto)} == {"FLOAT", "DOUBLE"}
    with pytest.raises(ValueError, match="no value 'pictures'"):
        not_integers(proto, after="pictures")


def plant_cast(graph, helper):
    """h -> float -> h, which changes nothing."""
    node = next(node for node in graph.node if node.op_type == "Abs")
    there = helper.make_node("Cast", [node.input[0]], ["float"], name="there", to=onnx.TensorProto.FLOAT)
    back = helper.make_node("Cast", ["float"], ["back"], name="back", to=onnx.TensorProto.INT64)
    node.input[0] = "back"
    place = list(graph.node).index(node)
    graph.node.insert(place, back)
    graph.node.insert(place, there)


def plant_constant(graph, helper):
    graph.initializer.append(helper.make_tensor("unused", onnx.TensorProto.FLOAT16, [1], [0.5]))


def plant_node(graph, helper):
    graph.node.append(helper.make_node("Constant", [], ["unused"], name="planted", value_float=0.5))


def plant_unknown(graph, helper):
    graph.node.append(helper.make_node("Other", [graph.input[0].name], ["unused"], name="planted", domain="other"))


def plant_branch(graph, helper):
    graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.BOOL, [], [True]))
    inside = [helper.make_node("Identity", ["one"], ["inside"])]
    branch = helper.make_graph(inside, "b", [], [helper.make_tensor_value_info("inside", onnx.TensorProto.BOOL, [])])
    branches = {"then_branch": branch, "else_branch": branch}
    graph.node.append(helper.make_node("If", ["one"], ["unused"], name="planted", **branches))


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (plant_cast, "float is of type FLOAT"),
        (plant_constant, "unused is of type FLOAT16"),
        (plant_node, "Constant planted: value_float is a floating number"),
        (plant_unknown, "unused is of type UNDEFINED"),
        (plant_branch, "If planted: then_branch is a subgraph or a sparse constant, which is not looked into"),
    ],
)
def test_a_planted_float_is_seen(plant, said):
    proto = copy.deepcopy(dynamic_file())
    assert not_integers(proto) == []
    plant(proto.graph, onnx.helper)
    proto.opset_import.append(onnx.helper.make_opsetid("other", 1))
    assert said in not_integers(proto)


def test_a_file_with_a_float_or_another_integer_is_not_kept(tmp_path, monkeypatch, verified_here):
    model, add = made("dynamic"), IntegerNodes.add

    def through_float(self, x, value):
        return self.cast(self.cast(add(self, x, value), "DOUBLE"), "INT64")

    with monkeypatch.context() as patch:
        patch.setattr(IntegerNodes, "add", through_float)
        with pytest.raises(RuntimeError, match=r"not of integers alone: .* is of type DOUBLE"):
            ViTQuantizer.export(model, tmp_path / "vit.onnx")
    with monkeypatch.context() as patch:
        exact = integer_nodes.half
        patch.setattr(integer_nodes, "half", lambda n: 0 * exact(n))
        with pytest.raises(RuntimeError, match=r"integer_logits of the exported file, torch.int32 .* are not those"):
            ViTQuantizer.export(model, tmp_path / "vit.onnx")
    with monkeypatch.context() as patch:
        exact = layers.normalize
        patch.setattr(layers, "normalize", lambda h, eps: exact(h, eps).double().long())
        with pytest.raises(RuntimeError, match=r"not of integers alone: aten\._to_copy"):
            ViTQuantizer.export(model, tmp_path / "vit.pt", "torchscript")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "suffix", "pixels"),
    [
        ("torchscript", ".pt", "float32"),
        pytest.param("torch_export", ".pt2", "uint8", marks=pytest.mark.slow),  # each time: the graph in test_model.py
    ],
)
def test_files_of_torch(tmp_path, verified_here, format, suffix, pixels):
    quantizer = ViTQuantizer(method="channel", arithmetic="integer", rounding="nearest")
    model = quantizer.quantize_model(shortened(build("vit")), calibration=PICTURES)
    path = tmp_path / f"vit{suffix}"
    report = ViTQuantizer.export(model, path, format, PICTURES[:8], pixels=pixels)
    assert report.integer_weights == 8
    assert report.max_difference == report.tolerance == 0
    if format == "torchscript":
        x = PICTURES if pixels == "float32" else model.round_pixels(PICTURES)
        assert torch.equal(torch.jit.load(str(path))(x)[0], model(PICTURES).integer_logits)


def test_external_data_lies_beside(tmp_path):
    model = made("4 bits")
    report = ViTQuantizer.export(model, tmp_path / "vit.onnx", external_data=True)
    assert {path.name for path in tmp_path.iterdir()} == {"vit.onnx", "vit.onnx.data"}
    assert len(report.paths) == 2


def test_what_cannot_be_is_refused(tmp_path):
    model = made("dynamic")
    cases = [
        (model, {"pixels": "float16"}, ValueError, "pixels must be one of 'uint8', 'float32'"),
        (model, {"sample": torch.zeros(1, 3, 8, 8)}, ValueError, r"shape \(batch, 3, 16, 16\), got \(1, 3, 8, 8\)"),
        (model, {"sample": [1]}, TypeError, "must be a tensor, got list"),
        (model, {"format": "tflite"}, ValueError, "format must be one of"),
        (
            ViTQuantizer(method="channel").quantize_model(build("vit")),
            {"pixels": "uint8"},
            ValueError,
            "is for integer-only models",
        ),
    ]
    for subject, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            ViTQuantizer.export(subject, tmp_path / "vit.onnx", **settings)
    assert not list(tmp_path.iterdir())
