"""A packed layer on the Triton kernels: the bits of the reference, alone and compiled."""

import pytest
import torch
from pairwise import pairwise
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import reference

pytest.importorskip("triton")

from fairseq.modules.quantization.packed.kernels.triton import linear, operators
from fairseq.modules.quantization.packed.kernels.triton.tiles import tile_for

pytestmark = pytest.mark.usefixtures("exact_int_mm")


def make(device, bits=8, activations="dynamic", bias=True, **settings):
    torch.manual_seed(0)
    config = LinearConfig(bits, **{"method": "channel", **settings}, activations=activations)
    layer = PackedLinear.from_float(
        nn.Linear(75, 21, bias=bias), config, input_range=(-1.5, 3.0) if activations == "static" else None
    )
    return layer.to(device)


@pairwise(
    bits=[2, 3, 4, 5, 8], method=["tensor", "channel"], activations=["dynamic", "static"], symmetric=[False, True],
    bias=[False, True], dtype=[torch.float32, torch.float16],
)  # fmt: skip
def test_a_layer_has_the_bits_of_the_reference(device, dtype, bits, bias, activations, method, symmetric):
    same_bits(make(device, bits, activations, bias, method=method, symmetric=symmetric), dtype)


@pytest.mark.parametrize("settings", [{"group_size": 32}, {"activation_bits": 4}], ids=str)
def test_what_the_epilogue_cannot_do_is_done_around_the_product(settings, device):
    same_bits(make(device, 4, **settings), torch.float32)


def same_bits(layer, dtype):
    x = torch.randn(5, 75, generator=torch.Generator().manual_seed(1)).to(layer.scale.device, dtype)
    arguments = x, layer.weight_matrix, layer.bias, layer.input_grid
    assert torch.equal(linear.integer(*arguments), reference.integer(*arguments))


def test_rows_may_be_of_any_strides(device):
    layer, x = make(device), torch.randn(75, 5, device=device).T
    arguments = layer.weight_matrix, layer.bias, layer.input_grid
    assert torch.equal(linear.integer(x, *arguments), reference.integer(x.contiguous(), *arguments))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_operators_are_what_a_compiler_needs(activations, device):
    layer = make(device, 4, activations)
    x = torch.randn(5, 75, device=device)
    grid, weight = layer.input_grid, layer.weight_matrix
    given = x, grid.scale, grid.zero_point
    torch.library.opcheck(operators.triton_quantize, given, test_utils=("test_schema", "test_faketensor"))
    rows = operators.triton_quantize(*given)
    parts = weight.codes, weight.scale, weight.zero_point, 4, False, layer.bias, grid.correction, torch.float16
    torch.library.opcheck(operators.triton_product, (*rows, *parts), test_utils=("test_schema", "test_faketensor"))


def test_a_compiled_layer_is_recorded_as_two_operators(device):
    layer, recorded = make(device), []

    def backend(graph, example):
        recorded.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def run(x):
        return linear.integer(x, layer.weight_matrix, layer.bias, layer.input_grid)

    x = torch.randn(5, 75, device=device)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, backend=backend, fullgraph=True)(x), run(x))
    names = [str(target) for target in recorded]
    assert sum("triton_quantize" in name for name in names) == sum("triton_product" in name for name in names) == 1


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_device_has_tiles(capability):
    sizes = [(rows, columns) for rows in (1, 1576, 12608) for columns in (768, 3072)]
    tiles = [tile_for(capability, *size) for size in sizes]
    assert tiles[0].columns < tiles[1].columns  # more of them, for all processors
    assert tiles[1].rows * tiles[1].columns < tiles[3].rows * tiles[3].columns < tiles[5].rows * tiles[5].columns
    assert all(tile.descriptors == (capability >= 90) for tile in tiles)  # before, no engine reads them
