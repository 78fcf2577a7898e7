"""sensitivity: what is measured is what rounding one layer does, and the model stays as it was."""

import copy
import itertools
import math

import pytest
import torch
from conftest import vit_config
from rounded import CHANNEL, directly
from torch import nn
from transformers import ViTModel

from fairseq.modules.quantization.scalar.ops import emulate_int
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.bit_allocation import replay, sensitivity
from fairseq.quantization.bit_allocation.sensitivity import measure
from fairseq.quantization.config import QuantizationConfig


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

        monkeypatch.setattr(replay, "output_error", broken)
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


def test_a_width_that_an_override_gives_is_the_only_one(tiny_vit, pixels):
    config = QuantizationConfig(method="channel", overrides={"classifier": {"bits": 7}, "*.0.*": {"symmetric": True}})
    errors = measure(tiny_vit, pixels, config, choices=(3, 4))
    assert list(errors["classifier"]) == [7]
    assert errors["classifier"][7] == pytest.approx(directly(tiny_vit, pixels, "classifier", 7), rel=1e-3)
    assert all(list(layer) == [3, 4] for name, layer in errors.items() if name != "classifier")


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
