"""The tensors of a packed layer: their size, what a state dict holds and loads, copies, and other dtypes."""

import copy
import io
import pickle

import pytest
import torch
from bounds import agrees, bound, eps, exact, is_within, terms
from packed_layers import IN, OUT, float_linear, make, tokens
from pairwise import pairwise
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import library, native
from fairseq.modules.quantization.packed.linear import use_native
from fairseq.modules.quantization.packed.packing import packed_length
from fairseq.modules.quantization.scalar.modules import EmulatedLinear

STORAGE = ["packed", "unpacked"]

# Memory.


@pairwise(
    activations=["dynamic", "static"],
    weight_storage=STORAGE,
    grid=[("tensor", None, 1), ("channel", None, OUT), ("channel", 32, 3 * OUT)],
    width=[(2, 19), (3, 19 + 10), (4, 38), (8, 75)],
)
def test_memory_is_that_of_the_integers(width, grid, weight_storage, activations):
    (bits, row), (method, group_size, scales) = width, grid
    layer = make(bits, method, activations, group_size, weight_storage=weight_storage)
    row = row if weight_storage == "packed" else IN
    assert list(layer.parameters()) == []
    sizes = {name: buffer.nbytes for name, buffer in layer.named_buffers()}
    static = {"input_scale": 4, "input_zero_point": 4, "input_correction": 4 * OUT} if activations == "static" else {}
    assert sizes == {
        "weight_codes": OUT * row, "scale": 4 * scales, "zero_point": scales, "settings": 16, "bias": 4 * OUT, **static
    }  # fmt: skip
    held = {name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    assert held == set()  # nothing beside the buffers
    assert sum(b.untyped_storage().nbytes() for b in layer.buffers()) == sum(sizes.values())


def test_the_float_layer_is_neither_changed_nor_shared():
    linear = float_linear()
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    layer = PackedLinear.from_float(linear, LinearConfig(4))
    x = tokens(3, IN)
    expected = layer(x)
    assert all(torch.equal(value, before[name]) for name, value in linear.state_dict().items())
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_taken_over_and_changes_nothing(training):
    layer = PackedLinear.from_float(float_linear().train(training), LinearConfig())
    assert layer.training is training
    x = tokens(3, IN)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_repr_says_what_it_is():
    shown = repr(make(4, group_size=32, symmetric=True))
    for part in ("in_features=75, out_features=21, bias=True", "bits=4", "group_size=32", "symmetric"):
        assert part in shown
    assert "backend" not in shown
    assert "activation_bits" not in shown
    assert "activations=static, activation_bits=6" in repr(make(4, activations="static", activation_bits=6))
    assert "backend=reference" in repr(make(4, backend="reference"))


# State.


@pairwise(bits=range(2, 9), group_size=[None, 32], weight_storage=STORAGE, other=STORAGE)
def test_state_dict_round_trip(bits, group_size, weight_storage, other):
    saved = make(bits, group_size=group_size, weight_storage=weight_storage)
    fresh = make(bits, group_size=group_size, weight_storage=other, seed=5)
    x = tokens(4, IN)
    assert not torch.equal(fresh(x), saved(x))
    state = saved.state_dict()
    assert list(state) == ["weight_codes", "scale", "zero_point", "settings", "bias"]
    assert state["weight_codes"].dtype == torch.uint8
    assert state["weight_codes"].shape == (
        OUT,
        packed_length(IN, bits),
    )  # whatever the weight_storage
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), saved(x))
    assert torch.equal(fresh.integers(), saved.integers())
    assert [b.dtype for b in fresh.buffers()] == [b.dtype for b in make(bits, weight_storage=other).buffers()]


@pairwise(activations=["dynamic", "static"], weight_storage=STORAGE, bits=[3, 8])
def test_state_that_is_assigned(bits, weight_storage, activations):
    saved, x = make(bits, activations=activations), tokens(4, IN)
    fresh = make(bits, activations=activations, weight_storage=weight_storage, seed=5)
    fresh.load_state_dict(saved.state_dict(), assign=True)
    assert torch.equal(fresh(x), saved(x))


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [3, 8])
def test_state_dict_round_trip_of_a_fixed_range(bits, group_size):
    saved = make(bits, activations="static", group_size=group_size)
    fresh = make(bits, activations="static", group_size=group_size, seed=5, input_range=(-9, 1))
    state = saved.state_dict()
    assert list(state) == ["weight_codes", "scale", "zero_point", "settings", "bias", "input_scale", "input_zero_point"]
    assert [(state[key].dtype, state[key].shape) for key in ("input_scale", "input_zero_point")] == [
        (torch.float32, (1,)), (torch.int32, (1,))
    ]  # fmt: skip
    x = tokens(4, IN)
    assert not torch.equal(fresh(x), saved(x))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), saved(x))


@pytest.mark.parametrize("activations", ["dynamic", None])
def test_state_of_a_fixed_range_goes_into_no_other_layer_and_the_reverse(activations):
    static, other = (nn.ModuleDict({"query": make(activations=kind)}) for kind in ("static", activations))
    with pytest.raises(
        ValueError,
        match=r"^query was saved with a fixed input range, but this layer has none; .* activations='static'$",
    ):
        other.load_state_dict(static.state_dict())
    with pytest.raises(
        ValueError,
        match=r"^query was saved without a fixed input range, but this layer has one; .* other than 'static'$",
    ):
        static.load_state_dict(other.state_dict())


OTHERS = [
    ({"bits": 4}, "8 bits, 75 inputs, no groups, affine", "4 bits, 75 inputs, no groups, affine"),
    ({"bits": 5}, "8 bits, 75 inputs, no groups, affine", "5 bits, 75 inputs, no groups, affine"),
    ({"group_size": 32}, "8 bits, 75 inputs, no groups, affine", "8 bits, 75 inputs, groups of 32, affine"),
    ({"symmetric": True}, "8 bits, 75 inputs, no groups, affine", "8 bits, 75 inputs, no groups, symmetric"),
    ({"inputs": 74}, "8 bits, 75 inputs, no groups, affine", "8 bits, 74 inputs, no groups, affine"),
]


@pytest.mark.parametrize("weight_storage", ["packed", "unpacked"])
@pytest.mark.parametrize(("settings", "was", "this"), OTHERS, ids=lambda v: str(v)[:20])
def test_state_of_other_settings_is_refused(settings, was, this, weight_storage):
    saved = nn.ModuleDict({"encoder": nn.ModuleDict({"query": make()})})
    layer = make(**settings, weight_storage=weight_storage, seed=5)
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"query": layer})})
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=f"^encoder.query was saved with {was}, but this layer has {this}$"):
        model.load_state_dict(saved.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_groups_of_another_size_are_refused_where_their_number_is_the_same():
    saved, layer = make(group_size=40), make(group_size=64)
    assert saved.scale.shape == layer.scale.shape
    with pytest.raises(ValueError, match="saved with 8 bits, 75 inputs, groups of 40, affine"):
        layer.load_state_dict(saved.state_dict())


def test_a_refused_state_names_a_layer_that_is_loaded_by_itself():
    for state in (make(8).state_dict(), float_linear().state_dict()):
        with pytest.raises(ValueError, match=r"encoder\.query"):
            make(4).load_state_dict(state)


def test_a_float_state_dict_is_refused():
    for source in (float_linear(), EmulatedLinear.from_linear(float_linear(), 8, "channel")):
        model = nn.ModuleDict({"query": make()})
        with pytest.raises(
            ValueError, match=r"^query\.weight: .* float model.*execution='emulated'.*encoder\.query is"
        ):
            model.load_state_dict(nn.ModuleDict({"query": source}).state_dict())


@pytest.mark.parametrize(
    "missing", ["weight_codes", "scale", "zero_point", "settings", "bias", "input_scale", "input_zero_point"]
)
@pytest.mark.parametrize("weight_storage", ["packed", "unpacked"])
def test_an_incomplete_state_dict_is_refused(missing, weight_storage):
    activations = "static" if missing.startswith("input") else "dynamic"
    state = make(4, activations=activations).state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        make(4, activations=activations, weight_storage=weight_storage).load_state_dict(state)


@pytest.mark.parametrize("weight_storage", ["packed", "unpacked"])
def test_state_of_another_number_of_outputs_is_refused(weight_storage):
    with pytest.raises(RuntimeError, match="size mismatch for weight_codes"):
        make(4, weight_storage=weight_storage).load_state_dict(make(4, outputs=20).state_dict())


def by_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_file(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(
        layer.config.bits, activations=layer.config.activations, weight_storage=layer.config.weight_storage, seed=9
    )
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": by_torch_save,
    "state file": by_state_file,
}


@pairwise(duplicate=list(COPIES), weight_storage=STORAGE, bits=[3, 8], activations=["dynamic", "static"])
def test_copies_give_the_same_and_share_nothing(duplicate, activations, bits, weight_storage):
    layer, x = make(bits, activations=activations, weight_storage=weight_storage), tokens(4, IN)
    expected = layer(x)
    other = COPIES[duplicate](layer)
    assert torch.equal(other(x), expected)
    assert other.config == layer.config
    for buffer in other.buffers():
        buffer.zero_()
    assert torch.equal(layer(x), expected)


# Dtypes.


@pairwise(
    dtype=[torch.float16, torch.bfloat16, torch.float64, torch.float32],
    layer_dtype=[torch.float16, torch.bfloat16, torch.float64, torch.float32],
    activations=["dynamic", "static", None],
)
def test_output_has_the_dtype_of_the_input_and_the_scale_keeps_its_own(layer_dtype, dtype, activations):
    layer = make(8, activations=activations)
    kept = {name: buffer.clone() for name, buffer in layer.named_buffers() if name != "bias"}
    scale, bias = layer.scale.clone(), layer.bias.clone()
    layer = {torch.float16: layer.half, torch.bfloat16: layer.bfloat16, torch.float64: layer.double}.get(
        layer_dtype, layer.float
    )()
    assert torch.equal(layer.scale, scale)
    assert layer.scale.dtype == torch.float32
    assert (layer.zero_point.dtype, layer.weight_codes.dtype) == (torch.uint8, torch.int8)
    for name, buffer in kept.items():
        assert torch.equal(getattr(layer, name), buffer)
        assert getattr(layer, name).dtype == buffer.dtype
    assert torch.equal(layer.bias, bias.to(layer_dtype))
    x = tokens(5, IN, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert agrees(y, layer, x)


def test_to_a_dtype_keeps_the_scale():
    layer = make()
    before = layer.scale.clone()
    assert torch.equal(layer.to(torch.float16).scale, before)
    assert layer.scale.dtype == torch.float32


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_a_float64_layer_computes_in_float64(activations):
    layer, x = make(8, activations=activations, dtype=torch.float64), tokens(5, IN).double()
    assert layer.scale.dtype == torch.float64
    longer = IN * eps(torch.float64) * terms(layer, x)  # float64 itself is no better for the sums that it makes
    y = exact(layer, x)
    assert is_within(layer(x), y, bound(layer, x, y) + longer)


@pytest.mark.parametrize("group_size", [None, 32])
def test_autocast_gives_every_layer_one_dtype(group_size):
    """Whatever autocast does to the output of a weight-only layer, groups are no reason for another dtype."""
    x = tokens(3, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(8, activations=None, group_size=group_size)(x).dtype == make(8)(x).dtype


@pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
def test_native_layers_lie_one_behind_the_other_and_each_can_be_taken_away():
    large = nn.Linear(1024, 1100)
    layers = [PackedLinear.from_float(large, LinearConfig(8)) for _ in range(4)]
    layers[3].layout = layers[2].layout  # tied
    x = tokens(3, 1024)
    expected = [layer(x) for layer in layers]
    use_native(layers)
    assert layers[0].weight_codes.untyped_storage().data_ptr() == layers[1].weight_codes.untyped_storage().data_ptr()
    assert layers[3].weight_codes is layers[2].weight_codes
    places = [layer.weight_codes.data_ptr() for layer in layers]
    use_native(layers)
    assert [layer.weight_codes.data_ptr() for layer in layers] == places  # which they do already
    for layer, y in zip(layers, expected, strict=True):
        assert torch.equal(layer(x), y)
    for duplicate in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        single = duplicate(layers[1])
        assert single.weight_codes.untyped_storage().nbytes() == single.weight_codes.nbytes
        assert torch.equal(single(x), expected[1])
        one, other = duplicate(nn.ModuleList(layers[2:]))
        assert one.weight_codes is other.weight_codes
    use_native(layers, use=False)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
