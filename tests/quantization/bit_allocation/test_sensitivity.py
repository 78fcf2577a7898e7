"""sensitivity: what is measured is what rounding one layer does; the assignment is the optimum; files survive."""

import copy
import itertools
import json
import math
from fnmatch import fnmatchcase

import pytest
import torch
from conftest import vit_config
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import ViTModel

from fairseq.modules.quantization.scalar.ops import emulate_int
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.bit_allocation import sensitivity
from fairseq.quantization.bit_allocation.sensitivity import BitAssignment, assign_bits, measure
from fairseq.quantization.config import QuantizationConfig

CHANNEL = QuantizationConfig(method="channel")


def directly(model, pixels, name, bits):
    """The KL divergence with one layer of a copy rounded per channel."""
    other = copy.deepcopy(model)
    layer = other.get_submodule(name)
    layer.weight.data = emulate_int(layer.weight.data, bits, "channel")[0]
    with torch.no_grad():
        p, q = (m(pixels).logits.double().softmax(-1) for m in (model, other))
    return (p * (p.log() - q.log())).sum(-1).mean().item()


def test_measured_widths_are_those_of_a_model_with_one_rounded_layer(tiny_vit, pixels):
    errors = measure(tiny_vit, pixels, CHANNEL, choices=(3, 6), batch_size=2)
    assert list(errors) == list(linear_layers(tiny_vit))
    for name, layer in errors.items():
        for bits, error in layer.items():
            assert error == pytest.approx(directly(tiny_vit, pixels, name, bits), rel=1e-3, abs=1e-9), (name, bits)


def test_derived_widths_are_near_the_measured_ones(tiny_vit, pixels):
    errors = measure(tiny_vit, pixels, CHANNEL)
    off = []
    for name, layer in errors.items():
        assert list(layer) == [2, 3, 4, 5, 6, 8]
        for bits in (3, 6):
            assert layer[bits] == pytest.approx(directly(tiny_vit, pixels, name, bits), rel=1e-3)
        off += [abs(math.log(layer[bits] / directly(tiny_vit, pixels, name, bits))) for bits in (4, 5, 8)]
    assert sorted(off)[len(off) // 2] < math.log(1.6)
    assert sorted(off)[9 * len(off) // 10] < math.log(4)


def test_every_width_is_run_where_two_disagree(tiny_vit, pixels, monkeypatch):
    monkeypatch.setattr(sensitivity, "SAME_CURVATURE", 1.0)
    errors = measure(tiny_vit, pixels, CHANNEL, choices=(2, 4, 5, 8))
    for name in list(errors)[::5]:
        for bits, error in errors[name].items():
            assert error == pytest.approx(directly(tiny_vit, pixels, name, bits), rel=1e-3, abs=1e-9)


def test_blocks_before_the_layer_do_not_run_again(tiny_vit, pixels, monkeypatch):
    runs = []
    layer_class = type(tiny_vit.get_submodule(sensitivity.block_of(next(iter(linear_layers(tiny_vit))))))
    forward = layer_class.forward

    def counted(self, *args, **keywords):
        runs.append(self)
        return forward(self, *args, **keywords)

    monkeypatch.setattr(layer_class, "forward", counted)
    measure(tiny_vit, pixels, CHANNEL, choices=(4, 8))
    # float: 2 blocks, then 1 to check the second's start, 0 the head's; 6 layers by 2 widths from either block
    assert len(runs) == 2 + 1 + 6 * 2 * 2 + 6 * 2


def test_a_model_whose_blocks_read_more_than_the_one_before_is_run_as_a_whole(tiny_vit, pixels):
    blocks = [m for name, m in tiny_vit.named_modules() if sensitivity.block_of(f"{name}.x") == name]
    assert len(blocks) == 2
    first = []
    blocks[0].register_forward_hook(lambda m, args, y: first.append(args[0]))
    tiny_vit.classifier.register_forward_pre_hook(lambda m, args: (args[0] + first.pop()[:, 0],))
    errors = measure(tiny_vit, pixels[:3], CHANNEL, choices=(3,))
    for name in list(errors)[::4]:
        assert errors[name][3] == pytest.approx(directly(tiny_vit, pixels[:3], name, 3), rel=1e-3)


def test_a_bare_model_is_measured_by_its_last_hidden_state(pixels):
    torch.manual_seed(0)
    model = ViTModel(vit_config(), add_pooling_layer=False)
    name = list(linear_layers(model))[-1]
    error = measure(model, pixels, CHANNEL, choices=(4,))[name][4]
    model.eval()
    other = copy.deepcopy(model)
    layer = other.get_submodule(name)
    layer.weight.data = emulate_int(layer.weight.data, 4, "channel")[0]
    with torch.no_grad():
        y, z = (m(pixels).last_hidden_state.double() for m in (model, other))
    assert error == pytest.approx(((y - z).square().sum() / y.square().sum()).item(), rel=1e-3)


@pytest.mark.parametrize("interrupt", [None, KeyboardInterrupt, RuntimeError])
def test_the_model_stays_as_it_was(tiny_vit, pixels, monkeypatch, interrupt):
    tiny_vit.train()
    tiny_vit.classifier.eval()
    state = {name: t.clone() for name, t in tiny_vit.state_dict().items()}
    modules = {name: (m, m.training, dict(vars(m))) for name, m in tiny_vit.named_modules()}
    if interrupt:
        calls = itertools.count()

        def broken(*args):
            if next(calls) == 7:
                raise interrupt
            return 1.0

        monkeypatch.setattr(sensitivity, "_output_error", broken)
        with pytest.raises(interrupt):
            measure(tiny_vit, pixels, CHANNEL)
    else:
        measure(tiny_vit, pixels, CHANNEL, choices=(4,))
    assert all(torch.equal(t, state[name]) for name, t in tiny_vit.state_dict().items())
    assert {name: (m, m.training, dict(vars(m))) for name, m in tiny_vit.named_modules()} == modules
    assert all(p.requires_grad and p.grad is None for p in tiny_vit.parameters())


def test_settings_of_each_layer_are_followed(tiny_vit, pixels):
    names = list(linear_layers(tiny_vit))
    config = QuantizationConfig(overrides={"classifier": {"skip": True}, names[0]: {"method": "channel"}})
    errors = measure(tiny_vit, pixels, config, choices=(3,))
    assert list(errors) == names[:-1]
    assert errors[names[0]][3] == pytest.approx(directly(tiny_vit, pixels, names[0], 3), rel=1e-3)
    assert errors[names[1]][3] != pytest.approx(directly(tiny_vit, pixels, names[1], 3), rel=1e-3)


def test_an_exact_rounding_has_no_error(tiny_vit, pixels):
    tiny_vit.classifier.weight.data.zero_()
    assert set(measure(tiny_vit, pixels, CHANNEL)["classifier"].values()) == {0.0}


def test_runs_where_the_model_is(tiny_vit, pixels, device):
    errors = measure(tiny_vit, pixels, CHANNEL, choices=(4,))
    there = measure(tiny_vit.to(device), pixels, CHANNEL, choices=(4,))
    for name in errors:
        assert there[name][4] == pytest.approx(errors[name][4], rel=0.05, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"pixel_values": torch.zeros(3, 16, 16)}, ValueError, r"pixel_values must be \(N, channels, height, width\)"),
        ({"pixel_values": torch.full((1, 3, 16, 16), math.nan)}, ValueError, "pixel_values"),
        ({"pixel_values": [1.0]}, TypeError, "pixel_values"),
        ({"choices": ()}, ValueError, "at least one bit width"),
        ({"choices": (4, 9)}, ValueError, "9"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int"),
        ({"model": nn.Linear(3, 3)}, ValueError, "found no attention"),
    ],
)
def test_measure_refuses(tiny_vit, pixels, changes, error, match):
    arguments = {"model": tiny_vit, "pixel_values": pixels, "config": CHANNEL, **changes}
    with pytest.raises(error, match=match):
        measure(**arguments)


# --- assign_bits


@st.composite
def problems(draw):
    names = [f"layer.{i}" for i in range(draw(st.integers(1, 4)))]
    widths = draw(st.lists(st.sampled_from((2, 3, 4, 5, 6, 8)), min_size=1, max_size=4, unique=True))
    error = st.sampled_from((0.0, 1e-6, 0.25, 0.5, 1.0)) | st.floats(0, 10)
    errors = {name: {bits: draw(error) for bits in widths} for name in names}
    return errors, {name: draw(st.integers(1, 9)) * draw(st.sampled_from((1, 7, 1000))) for name in names}


def every_assignment(errors, sizes):
    """(summed error, size) of each; a width counts as no worse than a narrower one."""
    for bits in itertools.product(*(layer for layer in errors.values())):
        chosen = list(zip(errors, bits))
        yield (
            sum(min(e for b, e in errors[n].items() if b <= bits) for n, bits in chosen),
            sum(bits * sizes[n] for n, bits in chosen),
        )


@given(problems(), st.floats(0, 1))
def test_the_assignment_for_a_size_is_the_best(problem, share):
    errors, sizes = problem
    total = sum(sizes.values())
    low, high = (f(size for _, size in every_assignment(errors, sizes)) / total for f in (min, max))
    average = min(high, low + share * (high - low))
    got = assign_bits(errors, sizes, average_bits=average)
    fits = [(error, size) for error, size in every_assignment(errors, sizes) if size <= average * total + 1e-6]
    error = min(error for error, _ in fits)
    assert got.average_bits <= average + 1e-9
    assert got.predicted_error == pytest.approx(error, abs=1e-8)
    assert got.average_bits * total <= max(s for e, s in fits if e <= error + 1e-8) + 1e-6


@given(problems(), st.floats(0, 1))
def test_the_assignment_for_an_error_is_the_smallest(problem, share):
    errors, sizes = problem
    low, high = (f(error for error, _ in every_assignment(errors, sizes)) for f in (min, max))
    limit = low + share * (high - low)
    got = assign_bits(errors, sizes, max_error=limit)
    smallest = min(size for error, size in every_assignment(errors, sizes) if error <= limit * (1 + 1e-9))
    assert got.predicted_error <= limit * (1 + 1e-8)
    assert got.average_bits * sum(sizes.values()) == pytest.approx(smallest)


@pytest.mark.parametrize("step", [1, 36864])
def test_more_bits_never_predict_a_larger_error(step):
    """With sizes of no common divisor too, where the table is coarser than the sizes."""
    draw = torch.Generator().manual_seed(0)
    sizes = {f"layer.{i}": step * int(torch.randint(1, 900_000 // step, (), generator=draw)) for i in range(40)}
    errors = {name: {b: torch.rand((), generator=draw).item() * 4.0**-b for b in (2, 3, 4, 6, 8)} for name in sizes}
    averages = [2, 2.01, 2.5, 3, 3.7, 4, 5, 6.3, 7.9, 8]
    assigned = [assign_bits(errors, sizes, average_bits=average) for average in averages]
    for average, got in zip(averages, assigned):
        assert got.average_bits <= average + 1e-9
    assert all(a.predicted_error >= b.predicted_error for a, b in itertools.pairwise(assigned))
    assert assigned[4].average_bits > 3.68
    limited = assign_bits(errors, sizes, max_error=assigned[4].predicted_error)
    assert limited.average_bits <= assigned[4].average_bits + 1e-9


def test_equal_errors_take_fewer_bits():
    errors = {"a": {2: 1.0, 4: 0.5, 8: 0.5}, "b": {2: 0.1, 4: 0.3, 8: 0.1}}
    assert assign_bits(errors, {"a": 10, "b": 10}, average_bits=8).bits == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    ("limits", "error", "match"),
    [
        ({}, ValueError, "exactly one of average_bits and max_error"),
        ({"average_bits": 4, "max_error": 1.0}, ValueError, "exactly one"),
        ({"average_bits": 1.5}, ValueError, "average_bits must be from 2 to 8, what the choices allow; got 1.5"),
        ({"average_bits": 8.1}, ValueError, "from 2 to 8"),
        ({"average_bits": "4"}, TypeError, "average_bits must be a number"),
        ({"average_bits": math.nan}, ValueError, "average_bits must be finite"),
        ({"max_error": -1.0}, ValueError, "max_error must be finite and not negative"),
        ({"max_error": 0.01}, ValueError, r"max_error=0.01 cannot be kept: .* summed error of 0.5"),
        ({"average_bits": 4, "sizes": {"a": 4}}, ValueError, r"same layers.*\['b'\]"),
        ({"average_bits": 4, "sizes": {"a": 4, "b": 0}}, ValueError, "b: the number of weights"),
        ({"average_bits": 4, "errors": {"a": {}, "b": {4: 1.0}}}, ValueError, "a: errors must be finite"),
        ({"average_bits": 4, "errors": {"a": {4: math.nan}, "b": {4: 1.0}}}, ValueError, "a: errors must be finite"),
        ({"average_bits": 4, "errors": {"a": {4: 1.0}, "b": {9: 1.0}}}, ValueError, "9"),
    ],
)
def test_assign_bits_refuses(limits, error, match):
    arguments = {"errors": {"a": {2: 1.0, 8: 0.25}, "b": {2: 1.0, 8: 0.25}}, "sizes": {"a": 4, "b": 4}, **limits}
    with pytest.raises(error, match=match):
        assign_bits(**arguments)


# --- BitAssignment


@pytest.fixture
def assignment():
    errors = {"vit.layers.0.mlp.fc1": {2: 0.5, 4: 0.125, 8: 0.0}, "classifier": {2: 0.25, 4: 0.0625, 8: 0.0}}
    return BitAssignment(
        {"vit.layers.0.mlp.fc1": 4, "classifier": 8}, {"vit.layers.0.mlp.fc1": 3000, "classifier": 1000}, errors
    )


def test_what_an_assignment_says(assignment):
    assert assignment.average_bits == 5
    assert assignment.predicted_error == 0.125
    assert assignment.overrides == {"vit.layers.0.mlp.fc1": {"bits": 4}, "classifier": {"bits": 8}}
    lines = str(assignment).splitlines()
    assert lines[1].split() == ["vit.layers.0.mlp.fc1", "3,000", "4", "0.12"]
    assert lines[-1].startswith("2 layers, 4,000 weights, 5.00 bits on average")


def test_overrides_are_accepted_and_match_only_their_layer():
    name = "odd[0].*.query"
    (glob,) = BitAssignment({name: 3}, {name: 1}).overrides
    assert fnmatchcase(name, glob)
    assert not fnmatchcase("odd0.a.query", glob)
    config = QuantizationConfig(overrides=BitAssignment({name: 3}, {name: 1}).overrides)
    assert config.for_layer(name).bits == 3


def test_saved_edited_and_loaded(assignment, tmp_path):
    path = tmp_path / "bits.json"
    path.write_text("an older file")
    assignment.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["bits.json"]
    assert BitAssignment.load(path) == assignment
    data = json.loads(path.read_text())
    data["layers"]["vit.layers.0.mlp.fc1"]["bits"] = 2
    path.write_text(json.dumps(data))
    edited = BitAssignment.load(path)
    assert edited.bits == {"vit.layers.0.mlp.fc1": 2, "classifier": 8}
    assert edited.average_bits == 3.5
    assert edited.predicted_error == 0.5
    data["layers"]["classifier"]["bits"] = 7
    path.write_text(json.dumps(data))
    assert math.isnan(BitAssignment.load(path).predicted_error)  # nobody measured 7 bits


def test_a_failed_save_leaves_the_file(assignment, tmp_path, monkeypatch):
    path = tmp_path / "bits.json"
    path.write_text("an older file")

    def fail(*args):
        raise OSError("no space")

    monkeypatch.setattr(sensitivity.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        assignment.save(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older file"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"bits.json: Expecting property name"),
        ("[]", r'bits.json must hold \{"layers"'),
        ('{"layers": []}', "must hold"),
        ('{"layers": {}}', "at least one"),
        ('{"layers": {"a": 4}}', "a: expected"),
        ('{"layers": {"a": {"bits": 4}}}', "a: expected"),
        ('{"layers": {"a": {"bits": 4, "weights": 9, "bit": 3}}}', "a: expected"),
        ('{"layers": {"a": {"bits": "4", "weights": 9}}}', "bits.json: a: bits must be an int from 2 to 8, got '4'"),
        ('{"layers": {"a": {"bits": 9, "weights": 9}}}', "a: bits must be an int from 2 to 8, got 9"),
        ('{"layers": {"a": {"bits": true, "weights": 9}}}', "a: bits must be an int"),
        ('{"layers": {"a": {"bits": 4.0, "weights": 9}}}', "a: bits must be an int"),
        ('{"layers": {"": {"bits": 4, "weights": 9}}}', "layer name"),
        ('{"layers": {"a": {"bits": 4, "weights": -1}}}', "a: the number of weights"),
        ('{"layers": {"a": {"bits": 4, "weights": 9, "errors": {"4": "x"}}}}', "a: errors must map"),
        ('{"layers": {"a": {"bits": 4, "weights": 9, "errors": {"x": 1}}}}', "a: errors must map"),
    ],
)
def test_load_refuses(tmp_path, text, match):
    path = tmp_path / "bits.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        BitAssignment.load(path)


def test_the_names_of_bits_and_sizes_agree():
    with pytest.raises(ValueError, match=r"same layers.*\['b'\]"):
        BitAssignment({"a": 4}, {"a": 1, "b": 1})


def test_the_whole_way(tiny_vit, pixels):
    errors = measure(tiny_vit, pixels, CHANNEL)
    sizes = {name: tiny_vit.get_parameter(f"{name}.weight").numel() for name in errors}
    got = assign_bits(errors, sizes, average_bits=4.5)
    assert 4.3 < got.average_bits <= 4.5
    assert len(set(got.bits.values())) > 1
    config = QuantizationConfig(method="channel", overrides=got.overrides)
    assert {name: config.for_layer(name).bits for name in sizes} == got.bits
