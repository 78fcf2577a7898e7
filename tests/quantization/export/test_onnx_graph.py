"""onnx_graph: layers of every kind side by side in one graph: their outputs, their operators, their integers."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int
from fairseq.quantization.export.onnx_graph import onnx_model
from fairseq.quantization.export.verify import nodes_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")

IN, OUT, TOKENS = 44, 12, 6  # 44: the last group of 32 is short, and a row of 4-bit integers is not of whole blocks
EPS = 2.0**-24  # half a unit in the last place of 1

# Settings, bias and input factor, and the product for each set of operators. Together they have every pair of values.
LAYERS = [
    ({"bits": 8, "method": "channel"}, "MatMulInteger", "MatMulIntegerToFloat"),
    ({"bits": 4, "method": "tensor", "bias": False}, "MatMulInteger", "MatMulIntegerToFloat"),
    ({"bits": 3, "method": "channel", "symmetric": True, "factor": True}, "MatMulInteger", "MatMulIntegerToFloat"),
    ({"bits": 5, "method": "histogram", "activations": "static"}, "MatMulInteger", "MatMulIntegerToFloat"),
    ({"bits": 7, "method": "channel", "activations": "static", "bias": False}, "MatMulInteger", "MatMulIntegerToFloat"),
    ({"bits": 2, "method": "tensor", "activations": "static", "factor": True}, "MatMulInteger", "MatMulIntegerToFloat"),
    ({"bits": 6, "method": "channel", "activation_bits": 6}, "MatMulInteger", "MatMulIntegerToFloat"),
    (
        {"bits": 4, "method": "channel", "activations": "static", "activation_bits": 6, "bias": False},
        "MatMulInteger",
        "MatMulIntegerToFloat",
    ),
    ({"bits": 2, "method": "channel", "activations": None, "bias": False}, "MatMul", "MatMulNBits"),
    ({"bits": 7, "method": "tensor", "activations": None, "factor": True}, "MatMul", "MatMulNBits"),
    ({"bits": 4, "method": "channel", "activations": None, "group_size": 40}, "MatMul", "MatMul"),
    ({"bits": 8, "method": "histogram", "activations": None, "group_size": 32}, "MatMul", "MatMulNBits"),
    ({"bits": 4, "method": "channel", "group_size": 32}, "MatMul", "MatMulNBits"),
    ({"bits": 6, "method": "channel", "group_size": 40, "activations": "static"}, "MatMul", "MatMul"),
    (
        {
            "bits": 3,
            "method": "channel",
            "group_size": 32,
            "activations": "static",
            "activation_bits": 6,
            "symmetric": True,
        },
        "MatMul",
        "MatMulNBits",
    ),
]


class SideBySide(nn.Module):
    """Each layer on the tokens of its width."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.narrow = [layer.config.activation_bits == 6 for layer in layers]

    def forward(self, eights, sixes):
        return tuple(layer(sixes if narrow else eights) for layer, narrow in zip(self.layers, self.narrow, strict=True))


def make(number, bias=True, factor=False, room=1, **settings):
    """The layer with that number; a grid with ``room`` for a multiple of its weight has integers in its middle."""
    config = LinearConfig(**settings)
    draw = torch.Generator().manual_seed(number)
    weight = torch.randn(OUT, IN, generator=draw)
    grid = observe_weight(room * weight, config.bits, config.method, config.group_size, config.symmetric)
    span = None
    if config.activations == "static":
        span = (-4.0, 3.875) if config.activation_bits == 6 else (-127 / 16, 8.0)
    return PackedLinear.from_integers(
        weight_to_int(weight, *grid, config.bits, config.group_size),
        *grid,
        torch.randn(OUT, generator=draw) if bias else None,
        config,
        f"layer{number}",
        span,
        2.0 ** torch.randint(-1, 2, (IN,), generator=draw) if factor else None,
    )


def tokens(low, high, step, seed):
    """Numbers on a grid that every token's extremes make its own: no rounding is near an edge, so none goes astray."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(low, high + 1, (2, TOKENS // 2, IN), generator=draw)
    x[..., 0], x[..., 1] = low, high
    return x * step


INPUTS = {"eights": tokens(-127, 127, 1 / 16, 0), "sixes": tokens(-32, 31, 1 / 8, 1)}


@pytest.fixture(scope="module", params=["standard", "onnxruntime"])
def exported(request):
    layers = [make(number, **settings) for number, (settings, *_) in enumerate(LAYERS)]
    wrapper = SideBySide(layers).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    names = [f"layer{number}" for number in range(len(layers))]
    shapes = tuple({0: batch} for _ in INPUTS)
    with torch.no_grad():
        proto = onnx_model(wrapper, INPUTS, names, shapes, request.param)
    return layers, proto, 1 if request.param == "standard" else 2


def test_each_layer_gives_its_outputs(exported):
    layers, proto, _ = exported
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: x[:1].repeat(3, 1, 1).numpy() for name, x in INPUTS.items()})
    for layer, y, (settings, *_) in zip(layers, got, LAYERS, strict=True):
        x = INPUTS["sixes" if layer.config.activation_bits == 6 else "eights"][:1]
        with torch.no_grad():
            expected = layer(x)
        if layer.input_factor is not None:
            x = x * layer.input_factor
        magnitude = x.abs() @ layer.dequantize().abs().T + (0 if layer.bias is None else layer.bias.abs())
        # Both sum IN products in float32, in any order, each with five factors that are rounded themselves.
        bound = 2 * (IN + 8) * EPS * magnitude
        assert ((torch.from_numpy(y) - expected).abs() <= bound).all(), settings


def test_each_layer_has_its_operator(exported):
    _, proto, column = exported
    kinds = Counter(node.op_type for node in nodes_of(proto.graph))
    products = Counter(expected[column] for expected in LAYERS)
    assert {kind: kinds[kind] for kind in products} == products
    assert {node.domain for node in proto.graph.node} <= ({""} if column == 1 else {"", "com.microsoft"})


def test_layers_that_read_one_tensor_share_its_rounding(exported):
    """8 bits per token: once for the plain layers, groups included, and once for each that has a factor."""
    layers, proto, _ = exported
    dynamic = [x for x in layers if x.config.activations == "dynamic" and x.config.activation_bits == 8]
    static = [x for x in layers if x.config.activations == "static" and x.config.activation_bits == 8]
    assert len(dynamic) > 3
    different = 1 + sum(layer.input_factor is not None for layer in dynamic)
    rounded = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == different + len(static)


def test_weights_are_integers_of_their_width(exported):
    layers, proto, column = exported
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    kinds = onnx.TensorProto
    for number, (layer, expected) in enumerate(zip(layers, LAYERS, strict=True)):
        tensor = tensors[f"layers.{number}.weight_codes"]
        if expected[column] == "MatMulNBits":
            assert tensor.data_type == kinds.UINT8
            block, width = layer.config.group_size or 32, 8 if layer.config.bits > 4 else 4
            assert list(tensor.dims) == [OUT, -(-IN // block), block * width // 8]
        else:
            assert tensor.data_type in ((kinds.UINT4,) if layer.config.bits <= 4 else (kinds.INT8, kinds.UINT8))
            assert sorted(tensor.dims) == [OUT, IN]
        floats = [t for t in proto.graph.initializer if t.data_type == kinds.FLOAT and np.prod(t.dims) == OUT * IN]
        assert not floats


@pytest.mark.parametrize(("ops", "elsewhere"), [("standard", False), ("onnxruntime", False), ("onnxruntime", True)])
def test_the_largest_products_of_bytes_are_exact_on_every_processor(ops, elsewhere, tmp_path):
    """Also where onnxruntime adds two of them in 16 bits, and in the branch for such processors, wherever this runs."""
    codes = torch.tensor([[255, 255, 0, 255], [0, 0, 255, 0], [255] * 4, [128, 127, 129, 128]], dtype=torch.uint8)
    config = LinearConfig(bits=8, method="channel")
    zero_point = torch.full((12,), 128, dtype=torch.uint8)
    layer = PackedLinear.from_integers(codes.repeat(3, 8), torch.ones(12), zero_point, None, config)
    x = torch.cat([torch.full((1, 2, 32), 127.0), torch.full((1, 2, 32), -127.0)])
    with torch.no_grad():
        proto = onnx_model(SideBySide([layer]), {"eights": x, "sixes": x}, ["y"], None, ops)
        expected = layer(x)
    if elsewhere:
        (probe,) = (tensor for tensor in proto.graph.initializer if tensor.name == "fairseq.probe_sum")
        probe.raw_data = np.int32(0).tobytes()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (got,) = session.run(["y"], {"eights": x.numpy(), "sixes": x.numpy()})
    assert torch.equal(torch.from_numpy(got), expected)
    kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert kinds["If"] == 0  # the processor is asked once, when the file is loaded
    assert kinds["MatMulIntegerToFloat"] + kinds["MatMulInteger"] == 1
    assert kinds["BitwiseXor"] == 0  # as are the weights
