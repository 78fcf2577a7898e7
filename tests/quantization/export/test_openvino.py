"""OpenVINO: layers of every kind in one file: their outputs, their integers, and what a CPU multiplies."""

import numpy as np
import pytest
import torch
from quantization.export.test_onnx_graph import EPS, IN, INPUTS, LAYERS, OUT, SideBySide, make

from fairseq.quantization.export.onnx_graph import onnx_model
from fairseq.quantization.export.openvino_ir import IN_FLOAT32, multiplies_exactly, openvino_tensors, write_openvino

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore")


def exact_everywhere(settings):
    """Without ties, and without sums past 16 bits where they saturate.

    Half of a step, which factors would make, goes to the nearest even integer here before a zero point is added.
    """
    factor = settings.get("factor", False) and settings.get("activations") != "static"
    return {**settings, "factor": factor, "room": 2 if settings["bits"] == 8 and not multiplies_exactly() else 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the layers, the file)."""
    layers = [make(number, **exact_everywhere(settings)) for number, (settings, *_) in enumerate(LAYERS)]
    batch = torch.export.Dim("batch", min=1, max=64)
    names = [f"layer{number}" for number in range(len(layers))]
    path = tmp_path_factory.mktemp("openvino") / "layers.xml"
    with torch.no_grad():
        proto = onnx_model(SideBySide(layers).eval(), INPUTS, names, tuple({0: batch} for _ in INPUTS), "openvino")
        write_openvino(proto, path)
    return layers, path


def test_each_layer_gives_its_outputs(written):
    """By itself with no setting but the precision: nothing rounds the inputs of weight-only layers."""
    layers, path = written
    compiled = openvino.Core().compile_model(path, "CPU", IN_FLOAT32)
    got = compiled({name: x[:1].repeat(3, 1, 1).numpy() for name, x in INPUTS.items()})
    for i, (layer, (settings, *_)) in enumerate(zip(layers, LAYERS, strict=True)):
        x = INPUTS["sixes" if layer.config.activation_bits == 6 else "eights"][:1]
        with torch.no_grad():
            expected = layer(x)
        if layer.input_factor is not None:
            x = x * layer.input_factor
        magnitude = x.abs() @ layer.dequantize().abs().T + (0 if layer.bias is None else layer.bias.abs())
        # The zero point is subtracted after the sum.
        shift = layer.weight_matrix.code_zero_point().abs().max() * layer.scale.max() * x.abs().sum(-1, keepdim=True)
        bound = 2 * (IN + 8) * EPS * (magnitude + shift)
        assert ((torch.from_numpy(got[i]) - expected).abs() <= bound).all(), settings


def test_weights_are_integers_of_their_width(written):
    layers, path = written
    integers, floats, _ = openvino_tensors(path)
    for number, layer in enumerate(layers):
        kind, shape, size = integers[f"layers.{number}.weight_codes"]
        group = layer.config.group_size
        padded = IN if group is None else -(-IN // group) * group
        assert (kind, np.prod(shape)) == ("u4" if layer.config.bits <= 4 else "i8", OUT * padded)
        assert size == OUT * padded // (2 if kind == "u4" else 1)
    assert not [name for name, tensor in floats.items() if tensor.numel() >= OUT * IN]
    held = sum(size for *_, size in integers.values()) + sum(tensor.nbytes for tensor in floats.values())
    assert path.with_suffix(".bin").stat().st_size < 1.2 * held  # aligned, and some shapes


def test_rounded_inputs_are_multiplied_as_bytes(written):
    layers, path = written
    rounded = [x for x in layers if x.config.activations is not None and x.config.group_size is None]
    extra = sum(layer.config.bits > 6 for layer in rounded)  # of the sums of tokens, for zero points of 7 and 8 bits
    model = openvino.Core().compile_model(path, "CPU", IN_FLOAT32).get_runtime_model()
    products = [node.get_rt_info() for node in model.get_ordered_ops()]
    products = [info for info in products if info["layerType"].astype(str) == "FullyConnected"]
    assert len(products) == len(layers) + extra
    assert sum(info["runtimePrecision"].astype(str) == "u8" for info in products) == len(rounded) + extra
