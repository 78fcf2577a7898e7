"""PackedLinear: its numbers against a plain formula, what it refuses, threads, and graphs that are made of it."""

import concurrent.futures
import itertools

import pytest
import torch
from bounds import bound, eps, half_steps, is_within, scaled, terms
from packed_layers import GRIDS, IN, INPUTS, OUT, RANGE, float_linear, make, tokens
from pairwise import all_pairs, pairwise
from torch import nn
from torch.nn.utils import prune

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.state import MAX_IN_FEATURES
from fairseq.modules.quantization.scalar import weights
from fairseq.modules.quantization.scalar.tokens import quantize_tokens

pytestmark = pytest.mark.usefixtures("exact_int_mm")
EPS = eps(torch.float32)


def formula(layer, x):
    """The output in float64, of integers that are exact and a weight that is as it is."""
    x, bias = scaled(layer, x).to(layer.scale.dtype), 0 if layer.bias is None else layer.bias.double()
    scale, zero_point, bits = 1, 0, layer.config.activation_bits
    if layer.config.activations == "dynamic" and bits == 8:
        scale = x.abs().amax(-1, keepdim=True) * (1 / 127)
        x, scale = (x / scale).round(), scale.double()
    elif layer.config.activations == "dynamic":
        x, scale = quantize_tokens(x, bits)  # test_tokens.py has its definition
        scale = scale.double()
    elif layer.config.activations == "static":
        zero_point = layer.input_zero_point
        x = ((x / layer.input_scale).round() + zero_point).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        scale = layer.input_scale.double()
    return ((x.double() - zero_point) * scale) @ layer.weight_matrix.dequantize().double().T + bias


def is_close(got, layer, x, more=0.0):
    """Within the bound that follows from the arithmetic, and ``more`` of the sum of the magnitudes of the terms."""
    y = formula(layer, x)
    rows = x.reshape(-1, x.shape[-1])  # (..., in) -> (M, in)
    allowed = bound(layer, rows, y.reshape(len(rows), layer.out_features)) + more * terms(layer, rows)
    return is_within(got, y, allowed.view_as(y))


# Numbers.


@pairwise(
    bits=range(2, 9),
    grid=GRIDS,
    inputs=INPUTS,
    symmetric=[False, True],
    weight_storage=["packed", "unpacked"],
    backend=["auto", "reference"],
    bias=[True, False],
    factor=[None, tokens(IN).abs() + 0.5],
)
def test_output_and_integers_are_those_of_the_formula(
    bits, grid, inputs, symmetric, weight_storage, backend, bias, factor, device
):
    (method, group_size), (activations, activation_bits) = grid, inputs
    layer = make(
        bits, method, activations, group_size, symmetric, weight_storage=weight_storage, backend=backend, bias=bias,
        activation_bits=activation_bits, input_factor=factor,
    ).to(device)  # fmt: skip
    w = float_linear(bias=bias).weight.detach()
    scale, zero_point = weights.observe_weight(w, bits, method, group_size, symmetric)
    integers = weights.weight_to_int(w, scale, zero_point, bits, group_size)
    assert torch.equal(layer.integers().cpu(), integers)
    real = weights.weight_to_real(integers, scale, zero_point, group_size)
    assert torch.equal(layer.dequantize().cpu(), real if factor is None else real * factor)
    x = tokens(9, IN).to(device)
    assert is_close(layer(x), layer, x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_output_is_that_of_the_float_layer_up_to_half_a_step_of_each_number(bits, activations):
    linear, x = float_linear(), tokens(200, IN)
    span = (float(x.min()), float(x.max())) if activations == "static" else None
    layer = make(bits, activations=activations, input_range=span)
    assert is_within(layer(x), linear(x), half_steps(layer, x))


@pairwise(
    sizes=[(1, 1), (3, 5), (7, 33), (13, 1), (1, 9), (129, 2)], bits=[2, 3, 4, 8], bias=[True, False], inputs=INPUTS
)
def test_odd_widths(sizes, bits, bias, inputs):
    (width, outputs), (activations, activation_bits) = sizes, inputs
    layer = make(
        bits, activations=activations, activation_bits=activation_bits, inputs=width, outputs=outputs, bias=bias
    )
    x = tokens(5, width)
    assert is_close(layer(x), layer, x)
    assert (layer.in_features, layer.out_features) == (width, outputs)


@pytest.mark.parametrize("shape", [(IN,), (1, IN), (0, IN), (2, 0, IN), (4, IN), (2, 3, IN), (2, 3, 4, IN)], ids=str)
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_input_of_any_dimensions(shape, activations):
    layer, x = make(4, activations=activations), tokens(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    rows = x.reshape(-1, IN)
    assert is_close(y.reshape(-1, OUT), layer, rows)
    if activations:  # integer sums do not depend on the shape
        assert torch.equal(y.reshape(-1, OUT), layer(rows))


@pytest.mark.parametrize(
    "view",
    [lambda: tokens(IN, 6).T, lambda: tokens(6, 2 * IN)[:, ::2], lambda: tokens(1, IN).expand(6, IN),
     lambda: tokens(3, IN, 2).transpose(1, 2), lambda: tokens(12, IN)[::2]],
    ids=["transposed", "columns", "expanded", "three", "rows"],
)  # fmt: skip
@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_input_that_is_not_contiguous(view, activations):
    layer, x = make(4, activations=activations), view()
    before = x.clone()
    y = layer(x)
    assert torch.equal(x, before)
    assert is_close(y, layer, x)
    if activations:
        assert torch.equal(y, layer(x.contiguous()))


@pairwise(
    value=[float("nan"), float("inf"), -float("inf")], dtype=[torch.float32, torch.bfloat16], group_size=[None, 32]
)
def test_one_nan_or_inf_spoils_its_token_and_no_other(value, dtype, group_size):
    layer, x = make(8, group_size=group_size), tokens(6, IN, dtype=dtype)
    clean = layer(x)
    x[2, 5] = value
    y = layer(x)
    assert not bool(torch.isfinite(y[2]).any())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], clean[others])


@pairwise(dtype=[torch.float32, torch.bfloat16], group_size=[None, 32], backend=["cpu", "reference"])
def test_a_fixed_range_saturates_and_a_nan_spoils_its_token_and_no_other(backend, group_size, dtype):
    layer, x = make(8, activations="static", group_size=group_size, backend=backend), tokens(6, IN, dtype=dtype)
    x[:, :2] = torch.tensor(RANGE).to(dtype) * 2
    clean = layer(x)
    beyond = x.clone()
    beyond[:, 0], beyond[:, 1] = -float("inf"), 1e30
    assert torch.equal(layer(beyond), clean)
    x[2, 5] = float("nan")
    y = layer(x)
    assert bool(y[2].isnan().all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], clean[others])


@pairwise(symmetric=[False, True], grid=GRIDS, activation_bits=[4, 8])
def test_a_fixed_range_is_the_float_computation_on_the_fake_quantized_input(activation_bits, grid, symmetric):
    method, group_size = grid
    layer = make(8, method, "static", group_size, symmetric, activation_bits=activation_bits)
    x = tokens(50, IN)
    half = 2 ** (activation_bits - 1)
    seen = torch.fake_quantize_per_tensor_affine(
        x, float(layer.input_scale), int(layer.input_zero_point), -half, half - 1
    )
    expected = nn.functional.linear(seen.double(), layer.dequantize().double(), layer.bias.double())
    allowed = bound(layer, x, expected) + EPS * terms(layer, x)  # fake quantization rounds, too
    assert is_within(layer(x), expected, allowed)


@pytest.mark.parametrize(("method", "group_size"), GRIDS)
@pytest.mark.parametrize("activations", ["dynamic", None])
def test_a_token_of_zeros_gives_exactly_the_bias(method, group_size, activations):
    layer, x = make(4, method, activations, group_size), tokens(3, IN)
    x[1] = 0
    assert torch.equal(layer(x)[1], layer.bias)
    without = make(4, method, activations, group_size, bias=False)
    assert bool((without(x)[1] == 0).all())


@pytest.mark.parametrize(("grid", "size"), [*((grid, 1e30) for grid in GRIDS), (GRIDS[0], 1e-30), (GRIDS[2], 1e-30)])
def test_huge_and_tiny_tokens_are_as_exact_as_others(grid, size):
    method, group_size = grid
    layer, x = make(8, method, group_size=group_size, bias=False), tokens(5, IN)
    x[1] *= size
    assert is_close(layer(x), layer, x)
    assert float(layer(x)[1].abs().max()) > 0.1 * size


@pytest.mark.parametrize(("method", "group_size"), GRIDS)
def test_a_token_near_the_largest_float_stays_finite(method, group_size):
    layer, x = make(8, method, group_size=group_size), torch.full((1, IN), 1e36)
    assert bool(torch.isfinite(float_linear()(x)).all())
    assert bool(torch.isfinite(layer(x)).all())
    assert is_close(layer(x), layer, x)


@pairwise(bits=[3, 8], group_size=[None, 32], dtype=[torch.float32, torch.float16], activations=["dynamic", "static"])
def test_a_token_does_not_depend_on_its_neighbours(activations, bits, group_size, dtype):
    layer, x = make(bits, activations=activations, group_size=group_size), tokens(40, IN)
    x[1::2] *= 1e4
    x = x.to(dtype)
    together = layer(x)
    for row in (0, 1, 38):
        assert torch.equal(layer(x[row]), together[row])
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


# Arguments.


@pytest.mark.parametrize("x", [torch.zeros(2, IN + 1), torch.zeros(IN, 2), torch.zeros(()), torch.zeros(0)], ids=str)
def test_another_width_is_refused(x):
    with pytest.raises(
        ValueError, match=rf"encoder.query takes .* \(\.\.\., {IN}\), got torch.float32 of shape"
    ) as error:
        make()(x)
    assert str(error.value).endswith(f"of shape {tuple(x.shape)}")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_another_kind_of_number_is_refused(dtype):
    with pytest.raises(ValueError, match=f"encoder.query takes a floating tensor .*, got {dtype}"):
        make()(torch.zeros(2, IN).to(dtype))


def test_what_cannot_be_packed_is_refused():
    config = LinearConfig()
    with pytest.raises(TypeError, match=r"head must be an nn\.Linear, got Conv2d"):
        PackedLinear.from_float(nn.Conv2d(1, 1, 1), config, "head")
    with pytest.raises(ValueError, match="head cannot be packed: its weight is computed"):
        PackedLinear.from_float(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), config, "head")
    with pytest.raises(ValueError, match=r"head\.weight is on the meta device"):
        PackedLinear.from_float(nn.Linear(4, 4, device="meta"), config, "head")
    with pytest.raises(ValueError, match=r"head\.weight is empty: shape \(3, 0\)"):
        PackedLinear.from_float(nn.Linear(0, 3), config, "head")
    broken = nn.Linear(4, 4)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match=r"head\.weight has 16 NaN or Inf"):
        PackedLinear.from_float(broken, config, "head")
    with pytest.raises(ValueError, match=f"head has {MAX_IN_FEATURES} inputs; integer sums are exact below"):
        PackedLinear.from_float(nn.Linear(MAX_IN_FEATURES, 1), config, "head")


def test_integers_make_the_layer_of_their_weight():
    for bits, (method, group_size), weight_storage in all_pairs(
        bits=(3, 6, 8), grid=GRIDS[:3], weight_storage=("packed", "unpacked")
    ):
        layer = make(bits, method, "static", group_size, weight_storage=weight_storage)
        q, scale, zero_point, bias = (t.clone() for t in (layer.integers(), layer.scale, layer.zero_point, layer.bias))
        again = PackedLinear.from_integers(q, scale, zero_point, bias, layer.config, "key", RANGE)
        x = tokens(4, IN)
        expected = layer(x)
        assert torch.equal(again(x), expected)
        for given in (q, scale, zero_point, bias):
            given.zero_()
        assert torch.equal(again(x), expected)  # nothing is shared


def test_integers_that_do_not_fit_are_refused():
    config = LinearConfig(4, "channel")
    q, scale, zero_point = torch.ones(3, 40, dtype=torch.uint8), torch.ones(3), torch.ones(3, dtype=torch.int32)
    wrong = [
        (TypeError, "integers of key must be uint8, got torch.int8", {"q": q.to(torch.int8)}),
        (TypeError, "scale of float32 or float64 .*got torch.float16", {"scale": scale.half()}),
        (TypeError, "zero point of integers, got torch.float32 and torch.float32", {"zero_point": scale}),
        (ValueError, r"integers of key must have the shape \(out, in\), not empty; got \(3, 0\)", {"q": q[:, :0]}),
        (ValueError, r"integers of key must have the shape \(out, in\), not empty; got \(40,\)", {"q": q[0]}),
        (ValueError, r"shape \(3,\) for method 'channel' and group_size None, got \(1,\)", {"scale": scale[:1]}),
        (ValueError, r"group_size None, got \(3,\) and \(3, 1\)", {"zero_point": zero_point[:, None]}),
        (ValueError, r"shape \(3, 2\) .* group_size 32", {"config": LinearConfig(4, "channel", group_size=32)}),
        (ValueError, r"shape \(1,\) for method 'tensor'", {"config": LinearConfig(4)}),
        (ValueError, "scale of key must be positive and finite", {"scale": scale * 0}),
        (ValueError, "scale of key must be positive and finite", {"scale": scale / 0}),
        (ValueError, "from 0 to 15; in key they reach 16", {"q": q * 16}),
        (ValueError, "in key they reach 1, and -1 to -1", {"zero_point": -zero_point}),
        (ValueError, "key is symmetric, .* must be 8", {"config": LinearConfig(4, "channel", symmetric=True)}),
        (ValueError, r"bias of key must have the shape \(3,\), got \(4,\)", {"bias": torch.zeros(4)}),
        (ValueError, "key takes an input_range only with", {"input_range": RANGE}),
        (ValueError, "key has activations='static' and needs", {"config": LinearConfig(4, "channel", "static")}),
    ]
    right = {"q": q, "scale": scale, "zero_point": zero_point, "bias": None, "config": config, "name": "key"}
    assert torch.equal(PackedLinear.from_integers(**right).integers(), q)
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            PackedLinear.from_integers(**{**right, **change})


def test_a_range_that_is_missing_not_used_or_none_is_refused():
    with pytest.raises(ValueError, match=r"^encoder\.query has activations='static' and needs an input_range"):
        make(activations="static", input_range=None)
    with pytest.raises(ValueError, match=r"^encoder\.query takes an input_range only with activations='static'"):
        make(input_range=RANGE)
    with pytest.raises(ValueError, match=r"^the input_range of encoder\.query must be .* got \(1, -1\)"):
        make(activations="static", input_range=(1, -1))


def test_the_widest_layer_has_exact_sums():
    """The largest sums of products, 65535 * 127 * 255 and for a fixed range 65535 * 128 * 255, just fit int32."""
    width = MAX_IN_FEATURES - 1
    linear = nn.Linear(width, 2, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1)
        linear.weight[1] = -1
    for backend, activations in itertools.product(("cpu", "reference"), ("dynamic", "static")):
        config = LinearConfig(8, "channel", activations, backend=backend)
        layer = PackedLinear.from_float(linear, config, input_range=(-1, 0) if activations == "static" else None)
        x = -torch.ones(2, width)  # -128 if static
        assert is_close(layer(x), layer, x)
        assert torch.equal(layer.integers(), torch.tensor([[255], [0]], dtype=torch.uint8).expand(2, width))


# Gradients.


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_an_input_that_requires_grad_gives_the_same_output(activations):
    layer, x = make(4, activations=activations), tokens(3, IN)
    expected = layer(x)
    y = layer(x.clone().requires_grad_())
    assert torch.equal(y, expected)
    assert y.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(mode):
    layer, x = make(4), tokens(3, IN).requires_grad_()
    with mode():
        assert not layer(x).requires_grad
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("activations", ["dynamic", None])
def test_modes_may_alternate(activations):
    """Scratch memory that is made in inference mode is written to in others, and the other way round."""
    layer, results = make(4, activations=activations), []
    for size in (2, 5, 9):
        x = tokens(size, IN)
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                results.append(torch.equal(layer(x), layer(x.clone())))
    assert all(results)


# Threads.


def in_threads(work, items):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, items))


@pytest.mark.parametrize(("bits", "activations"), [(4, "dynamic"), (8, "static"), (4, None)])
def test_eight_threads_at_once_get_what_one_gets(bits, activations):
    layer = make(bits, activations=activations)
    inputs = [tokens(1 + 7 * (n % 9), IN, seed=n) for n in range(120)]
    assert all(is_same(got, layer, x) for got, x in zip(in_threads(layer, inputs), inputs, strict=True))


@pytest.mark.parametrize("one_tensor", [True, False])
def test_eight_threads_at_once_with_a_shared_input(one_tensor):
    layers = [make(4, seed=seed) for seed in range(3)]
    inputs = [tokens(20, IN, seed=0 if one_tensor else n) for n in range(40)]
    if one_tensor:
        inputs = inputs[:1] * 40  # the very same one, read by every thread
    expected = [[layer(x) for layer in layers] for x in inputs]
    got = in_threads(lambda x: [layer(x) for layer in layers], inputs)
    assert all(torch.equal(a, b) for pair in zip(got, expected, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(
    ("mode", "activations"), [(torch.inference_mode, "dynamic"), (torch.no_grad, "dynamic"), (torch.no_grad, "static")]
)
def test_a_tensor_that_is_edited_between_two_layers_is_rounded_anew(activations, mode):
    """Through ``.data``, and in inference mode, nothing counts the edits."""
    query, key = (make(4, activations=activations, backend="cpu", seed=seed) for seed in (0, 1))
    x = tokens(5, IN)
    expected = key(x.flip(0) * -3)
    with mode():
        x = x.clone()
        query(x)
        x.data.copy_(x.flip(0) * -3)
        assert torch.equal(key(x), expected)


# Tracing, compiling, exporting: the same bits of integer products; equal up to the roundings that is_close allows of
# products of floats, and of ONNX.


def is_same(got, layer, x):
    """What a recorded layer must give for x, and one in another thread, whose memory may be aligned otherwise."""
    return is_close(got, layer, x) if layer.config.activations is None else torch.equal(got, layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@pairwise(inputs=INPUTS, weight=[(3, None), (4, 32), (8, None)])
def test_trace_gives_the_same_for_other_batch_sizes(weight, inputs):
    (bits, group_size), (activations, activation_bits) = weight, inputs
    layer = make(bits, "channel", activations, group_size, activation_bits=activation_bits).eval()
    traced = torch.jit.trace(layer, tokens(2, 5, IN))
    for x in (tokens(2, 5, IN), tokens(7, 5, IN, seed=4), tokens(1, 1, IN, seed=5)):
        assert traced(x).shape == layer(x).shape
        assert is_same(traced(x), layer, x)


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize(
    ("bits", "group_size", "activations"),
    [(3, None, "dynamic"), (4, 32, "dynamic"), (8, None, None), (8, None, "static"), (4, 32, "static")],
)
def test_compiled_without_a_break_gives_the_same(bits, group_size, activations):
    layer, x = make(bits, "channel", activations, group_size).eval(), tokens(4, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert is_same(compiled(x), layer, x)
    assert is_same(compiled(x), layer, x)  # with grad enabled, as scripts often leave it
    assert is_same(compiled(x.clone().requires_grad_()).detach(), layer, x)


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.parametrize(
    ("bits", "group_size", "activations"),
    [(3, None, "dynamic"), (4, 32, "dynamic"), (8, None, None), (8, None, "static"), (4, 32, "static")],
)
def test_compiled_without_a_break_it_has_its_gradient(bits, group_size, activations):
    layer, x = make(bits, "channel", activations, group_size).eval(), 3 * tokens(4, IN)
    compiled, gradients = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for call in (layer, compiled):
        given = x.clone().requires_grad_()
        call(2 * given).cos().sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)
    assert bool((gradients[0] != 0).any())
    assert bool((gradients[0] == 0).any()) == (activations == "static")  # where it saturates


@pytest.mark.usefixtures("clean_compiler")
def test_compiled_takes_other_batch_sizes():
    layer = make(4).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (4, 7, 1, 30):
        x = tokens(rows, IN, seed=rows)
        assert is_same(compiled(x), layer, x)


@pytest.mark.parametrize(
    ("bits", "group_size", "activations"),
    [(3, None, "dynamic"), (4, 32, "dynamic"), (8, None, None), (8, None, "static"), (4, 32, "static")],
)
def test_exported_with_a_dynamic_batch_gives_the_same(bits, group_size, activations):
    layer = make(bits, "channel", activations, group_size).eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(layer, (tokens(4, 5, IN),), dynamic_shapes={"input": {0: batch}}).module()
    for rows in (4, 9, 33):
        x = tokens(rows, 5, IN, seed=rows)
        assert is_same(exported(x), layer, x)


ONNX = [
    (GRIDS[0], INPUTS[0]), (GRIDS[1], INPUTS[1]), (GRIDS[1], INPUTS[2]), (GRIDS[0], INPUTS[3]), (GRIDS[1], INPUTS[4]),
    (GRIDS[2], INPUTS[0]), (GRIDS[2], INPUTS[3]), (GRIDS[2], INPUTS[4]),
]  # fmt: skip


class Together(nn.Module):
    """Layers beside one another, in one graph: to export one takes a second, and to export eight little more."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_onnx_gives_the_same(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    layers = [
        make(4, method, activations, group_size, activation_bits=activation_bits).eval()
        for (method, group_size), (activations, activation_bits) in ONNX
    ]
    rows, path = torch.export.Dim("rows", min=1, max=512), str(tmp_path / "layers.onnx")
    torch.onnx.export(
        Together(layers), (tokens(6, IN),), path, input_names=["x"], dynamic_shapes={"x": {0: rows}}, verbose=False
    )
    operators = [node.op_type for node in onnx.load(path).graph.node]
    integer = [layer.config.activations is not None and layer.config.group_size is None for layer in layers]
    assert operators.count("MatMulInteger") == sum(integer) == 4
    session = onnxruntime.InferenceSession(path)
    for rows in (6, 1, 17):
        x = tokens(rows, IN, seed=rows)
        for layer, y in zip(layers, session.run(None, {"x": x.numpy()}), strict=True):
            more = (IN + 1) * EPS if layer.config.group_size else 0  # a float product
            assert is_close(torch.from_numpy(y), layer, x, more=more)
