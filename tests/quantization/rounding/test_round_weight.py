"""round_weight: shapes and ranges of every rounding, what is said of them, and errors that name the layer."""

import pytest
import torch
from layer_inputs import SETTINGS, drifted, layer, statistics

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int
from fairseq.quantization.config import resolve_rounding
from fairseq.quantization.rounding.round_weight import ROUNDINGS, grid_used, round_weight
from fairseq.quantization.rounding.statistics import Statistics


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_shapes_and_ranges_are_those_of_observe_weight(settings):
    config = LinearConfig(bits=4, **settings)
    w, x = layer()
    scale, zero_point = observe_weight(w, 4, config.method, config.group_size, config.symmetric)
    seen = drifted(x, x + 0.1)
    for rounding in ROUNDINGS:
        rounded = round_weight(w, None if rounding == "nearest" else seen, config, rounding)
        assert rounded.integers.shape == w.shape
        assert rounded.integers.dtype == torch.uint8
        assert int(rounded.integers.max()) <= 15
        assert (rounded.scale.shape, rounded.zero_point.shape) == (scale.shape, zero_point.shape)
        if config.symmetric:
            assert (rounded.zero_point == 8).all()
    plain = round_weight(w, None, config)
    assert torch.equal(plain.integers, weight_to_int(w, scale, zero_point, 4, config.group_size))


@pytest.mark.parametrize(
    ("method", "group_size", "granularity"),
    [
        ("tensor", None, "tensor"),
        ("channel", None, "channel"),
        ("histogram", None, "channel"),
        ("channel", 40, "group"),
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_what_is_said_of_the_grid_is_what_was_done(method, group_size, granularity, rounding):
    """Every row has outliers, which a range of least squared error at 2 bits leaves out."""
    w, x = layer()
    w[:, ::40] = 12 * w.std()
    config = LinearConfig(bits=2, method=method, group_size=group_size)
    rounded = round_weight(w, None if rounding == "nearest" else statistics(x), config, rounding)
    used = grid_used(config, rounding)
    assert used["granularity"] == granularity
    assert rounded.scale.numel() == {"tensor": 1, "channel": len(w), "group": 2 * len(w)}[granularity]
    full = observe_weight(w, 2, "channel", group_size)[0]
    exact = rounded.scale.numel() == full.numel() and torch.equal(rounded.scale, full)
    assert used["range_search"] == ("min-max" if exact else "least squared error")
    assert exact == (method == "channel" and rounding == "nearest")


def test_the_same_input_gives_the_same_integers_and_nothing_is_written():
    w, x = layer()
    data, before = statistics(x), w.clone()
    moment = data.second_moment.clone()
    first, second = (round_weight(w, data, LinearConfig(bits=4, method="channel")) for _ in range(2))
    assert torch.equal(first.integers, second.integers)
    assert torch.equal(w, before)
    assert torch.equal(data.second_moment, moment)


def test_auto_takes_what_the_data_allow_and_the_width_wants():
    names = [resolve_rounding("auto", calibrated, bits) for calibrated in (True, False) for bits in (2, 4, 5, 8)]
    assert names == ["coordinate", "coordinate", "gptaq", "gptaq", *["nearest"] * 4]
    assert [resolve_rounding("auto", True, bits, "tensor") for bits in (2, 4)] == ["gptaq", "gptaq"]
    assert resolve_rounding("gptq", True, 2) == "gptq"


@pytest.mark.parametrize(
    ("rounding", "data", "message"),
    [
        (
            "best",
            None,
            "rounding must be one of 'auto', 'nearest', 'gptq', 'gptaq', 'qronos', .*; got 'best'",
        ),
        ("gptq", None, "fc1: rounding='gptq' needs calibration images"),
        ("gptaq", statistics(torch.ones(2, 80)), "fc1: rounding='gptaq' needs statistics with the drift of its inputs"),
        (
            "qronos",
            statistics(torch.ones(2, 80)),
            "fc1: rounding='qronos' needs statistics with the drift",
        ),
        ("auto", Statistics(torch.eye(3), torch.zeros(3)), r"fc1: the second moment must be of shape \(80, 80\)"),
        ("auto", Statistics(torch.full((80, 80), torch.nan), torch.zeros(80)), "fc1: the second moment of its inputs"),
    ],
)
def test_errors_name_the_layer(rounding, data, message):
    with pytest.raises(ValueError, match=message):
        round_weight(layer()[0], data, LinearConfig(), rounding, "fc1")
