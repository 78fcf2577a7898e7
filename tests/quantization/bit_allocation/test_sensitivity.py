"""sensitivity: what is measured is what a narrower layer does in the packed model, and the float model stays."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import vit_config
from rounded import CHANNEL, directly, probabilities
from torch import nn
from transformers import ViTModel

from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.bit_allocation import replay, sensitivity
from fairseq.quantization.bit_allocation.sensitivity import measure, measure_twins
from fairseq.quantization.bit_allocation.twins import Twins
from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert


@pytest.mark.parametrize("changes", [{}, {"activation_bits": 4}], ids=str)
def test_measured_widths_are_those_of_a_model_with_one_narrower_layer(tiny_vit, pixels, changes):
    config = replace(CHANNEL, **changes)
    errors = measure(tiny_vit, pixels, config, choices=(3, 8), batch_size=2)
    assert list(errors) == list(linear_layers(tiny_vit))
    widest = probabilities(tiny_vit, pixels, config)
    for name, layer in list(errors.items())[::3]:
        assert layer[8] == 0
        assert layer[3] == pytest.approx(directly(tiny_vit, pixels, name, 3, config, widest), rel=1e-3, abs=1e-9), name
        assert layer[3] > 0


def test_it_is_the_final_rounding_that_is_measured(tiny_vit, pixels):
    """On the pictures, its bias corrected: what the last layer reads is the same, so that it is the very one."""
    config = QuantizationConfig(method="channel", bias_correction=True)
    error = measure(tiny_vit, pixels, config, choices=(2, 8))["classifier"][2]
    assert error == pytest.approx(directly(tiny_vit, pixels, "classifier", 2, config), rel=1e-3)
    plain = directly(tiny_vit, pixels, "classifier", 2, replace(config, rounding="nearest"))
    assert error != pytest.approx(plain, rel=0.05)


def test_derived_widths_are_near_the_measured_ones(tiny_vit, pixels):
    errors = measure(tiny_vit, pixels, CHANNEL)
    off, widest = [], probabilities(tiny_vit, pixels)
    for name, layer in list(errors.items())[::3]:
        assert list(layer) == [2, 3, 4, 5, 6, 8]
        found = {bits: directly(tiny_vit, pixels, name, bits, widest=widest) for bits in (2, 3, 4, 5, 6)}
        for bits in (3, 6):
            assert layer[bits] == pytest.approx(found[bits], rel=1e-3, abs=1e-9)
        off += [abs(math.log(layer[bits] / found[bits])) for bits in (2, 4, 5)]
    assert sorted(off)[len(off) // 2] < math.log(1.6)
    assert sorted(off)[9 * len(off) // 10] < math.log(6)


def test_every_width_is_run_where_two_disagree(tiny_vit, pixels, monkeypatch):
    monkeypatch.setattr(sensitivity, "SAME_CURVATURE", 1.0)
    errors, widest = measure(tiny_vit, pixels, CHANNEL, choices=(2, 4, 5, 8)), probabilities(tiny_vit, pixels)
    for name in list(errors)[::5]:
        for bits, error in errors[name].items():
            assert error == pytest.approx(directly(tiny_vit, pixels, name, bits, widest=widest), rel=1e-3, abs=1e-9)


def test_a_bare_model_is_measured_by_its_last_hidden_state(pixels):
    torch.manual_seed(0)
    model = ViTModel(vit_config(), add_pooling_layer=False).eval()
    name = list(linear_layers(model))[-1]
    error = measure(model, pixels, CHANNEL, choices=(4, 8))[name][4]
    models = [
        convert(model, replace(CHANNEL, overrides=own), pixels, engine="layers")[0] for own in ({}, {name: {"bits": 4}})
    ]
    with torch.no_grad():
        y, z = (m(pixels).last_hidden_state.double() for m in models)
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
    config = QuantizationConfig(
        rounding="nearest", equalize=False, overrides={"classifier": {"skip": True}, names[0]: {"method": "channel"}}
    )
    errors = measure(tiny_vit, pixels, config, choices=(3, 8))
    assert list(errors) == names[:-1]
    for name in names[:2]:
        assert errors[name][3] == pytest.approx(directly(tiny_vit, pixels, name, 3, config), rel=1e-3)


def test_a_width_that_an_override_gives_is_the_only_one(tiny_vit, pixels):
    config = replace(CHANNEL, overrides={"classifier": {"bits": 7}, "*.0.*": {"symmetric": True}})
    errors = measure(tiny_vit, pixels, config, choices=(3, 4))
    assert errors["classifier"] == {7: 0.0}
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


def test_errors_are_those_on_pictures_that_rounding_does_not_know(tiny_vit):
    pictures = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    held_back = torch.arange(32) % 4 == 3
    config = QuantizationConfig(method="channel", activations=None)
    errors = measure(tiny_vit, pictures, config, choices=(3, 8))
    twins = Twins(tiny_vit, pictures[~held_back], config, choices=(3, 8))
    assert errors == measure_twins(twins, pictures[held_back])
    assert errors != measure_twins(Twins(tiny_vit, pictures, config, choices=(3, 8)), pictures[held_back])


def test_what_the_output_does_not_depend_on_stays_wide(pixels):
    """The pooler of a bare model: its own output would be ruined without a word."""
    model = ViTModel(vit_config()).eval()
    errors = measure(model, pixels, CHANNEL, choices=(2, 4, 8))
    assert errors["pooler.dense"][2] > errors["pooler.dense"][4] > errors["pooler.dense"][8] > 0
    assert max(errors["pooler.dense"].values()) > max(
        max(own.values()) for n, own in errors.items() if "pooler" not in n
    )


def test_an_output_that_is_no_number_is_not_the_best():
    outputs = torch.zeros(2, 3), torch.full((2, 3), math.nan)
    assert math.isnan(replay.output_error(outputs[:1], outputs[1:], 1))
    assert math.isnan(replay.output_error(outputs[:1], outputs[1:], None))
