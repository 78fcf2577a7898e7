"""BitAssignment: what it says, its overrides, and files that survive being edited and loaded."""

import json
import math
from fnmatch import fnmatchcase

import pytest
from rounded import CHANNEL

from fairseq.quantization.bit_allocation import assignment as module
from fairseq.quantization.bit_allocation.assignment import BitAssignment, assign_bits
from fairseq.quantization.bit_allocation.sensitivity import measure
from fairseq.quantization.config import QuantizationConfig


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


GIVEN = {"*fc1": {"method": "channel", "group_size": 32}, "pooler": {"skip": True}, "*q": {"bits": 8}}


def test_overrides_carry_on_what_the_user_asked_for(tmp_path):
    bits = {"vit.0.fc1": 3, "vit.0.q": 8, "classifier": 4}
    assignment = BitAssignment(bits, dict.fromkeys(bits, 32), {name: {2: 0.5} for name in bits}, GIVEN)
    assert assignment.overrides == {
        "vit.0.fc1": {"method": "channel", "group_size": 32, "bits": 3},
        "classifier": {"bits": 4},
        **GIVEN,
    }
    config = QuantizationConfig(overrides=assignment.overrides)
    assert {name: config.for_layer(name).bits for name in bits} == bits
    assert config.for_layer("pooler").skip
    assignment.save(tmp_path / "bits.json")
    assert BitAssignment.load(tmp_path / "bits.json") == assignment
    assert BitAssignment.load(tmp_path / "bits.json").overrides == assignment.overrides


@pytest.mark.parametrize(
    ("bits", "match"),
    [
        ({"pooler": 4}, "pooler: an override in given skips it, and bits has 4"),
        ({"vit.0.q": 4}, "vit.0.q: an override in given says 8 bits, and bits has 4"),
    ],
)
def test_widths_that_the_users_overrides_contradict_are_refused(tmp_path, bits, match):
    """Also in an edited file: one of the two would be dropped."""
    with pytest.raises(ValueError, match=match):
        BitAssignment(bits, dict.fromkeys(bits, 9), given=GIVEN)
    path = tmp_path / "bits.json"
    layers = {name: {"bits": width, "weights": 9} for name, width in bits.items()}
    path.write_text(json.dumps({"overrides": GIVEN, "layers": layers}))
    with pytest.raises(ValueError, match=f"bits.json: {match}"):
        BitAssignment.load(path)


def test_a_file_without_overrides_loads(tmp_path):
    """As they were written before there were any in it."""
    (tmp_path / "bits.json").write_text('{"layers": {"a": {"bits": 4, "weights": 9, "errors": {"4": 0.5}}}}')
    loaded = BitAssignment.load(tmp_path / "bits.json")
    assert loaded == BitAssignment({"a": 4}, {"a": 9}, {"a": {4: 0.5}})
    assert loaded.overrides == {"a": {"bits": 4}}


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

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        assignment.save(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["an older file"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"bits.json is damaged: Expecting property name"),
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
        ('{"layers": {"a": {"bits": 4, "weights": 9}}, "overrides": ["*"]}', "overrides must map globs to settings"),
        ('{"layers": {"a": {"bits": 4, "weights": 9}}, "overrides": {"*": 4}}', "overrides must map globs to settings"),
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
