"""search: budgets in bytes and in milliseconds, which the models that are quantized so keep."""

import pytest
import safetensors.torch
import torch
from conftest import make_tiny_vit

from fairseq.models.vit_quantization import ViTQuantizer, compare_models
from fairseq.quantization.bit_allocation import search
from fairseq.quantization.bit_allocation.assignment import assignment
from fairseq.quantization.bit_allocation.search import Widths
from fairseq.quantization.config import QuantizationConfig

CONFIG = QuantizationConfig(method="channel", overrides={"classifier": {"bits": 7}})


@pytest.fixture(scope="module")
def widths():
    """Of the tiny model on the five pictures; measured once, as no test changes them."""
    return Widths(make_tiny_vit(), torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)), CONFIG)


def saved(model, pixels, chosen, folder):
    """The bytes of tensors in the file of a model of these widths."""
    quantized = ViTQuantizer(method="channel", overrides=chosen.overrides).quantize_model(model, pixels)
    quantized.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_model_takes_the_bytes_that_were_allowed(tiny_vit, pixels, widths, tmp_path):
    costs = widths.twins.bytes
    ends = [assignment({name: f(own) for name, own in costs.items()}, widths.errors, widths.sizes) for f in (min, max)]
    low, high = (saved(tiny_vit, pixels, end, tmp_path) for end in ends)
    for share in (0, 0.3, 0.7, 1):
        limit = round(low + share * (high - low))
        chosen = widths.in_bytes(limit)
        size = saved(tiny_vit, pixels, chosen, tmp_path)
        assert size <= limit
        assert size >= limit - 0.1 * (high - low)
        assert chosen.bits["classifier"] == 7
    with pytest.raises(ValueError, match=f"max_bytes={low - 1:,}: with the narrowest choices the model takes {low:,}"):
        widths.in_bytes(low - 1)


def test_more_bytes_err_less(widths):
    costs, other = widths.twins.bytes, widths.twins.other_bytes
    limits = [other + sum(own.get(bits, own[max(own)]) for own in costs.values()) for bits in (2, 4, 8)]
    errors = [widths.in_bytes(limit).predicted_error for limit in limits]
    assert errors[0] > errors[1] > errors[2] == 0


def test_time_is_kept_as_measured(widths, monkeypatch):
    """With a clock by which a bit of a layer takes a microsecond, and whole models a tenth more than their layers."""
    clock = {name: {bits: 1000 * bits for bits in own} for name, own in widths.errors.items()}
    tried = []

    def whole(model, *rest):
        tried.append({name: model.get_submodule(name).config.bits for name in clock})
        return round(1.1 * sum(clock[name][bits] for name, bits in tried[-1].items()))

    monkeypatch.setattr(search, "layer_times", lambda *a: clock)
    monkeypatch.setattr(search, "model_time", whole)
    most, least = (1.1 * sum(f(own.values()) for own in clock.values()) / 1e6 for f in (max, min))
    assert set(widths.in_milliseconds(most * 1.01, 1).bits.values()) == {7, 8}
    assert len(tried) == 1
    limit = (most + least) / 2
    chosen = widths.in_milliseconds(limit, 1)
    taken = 1.1 * sum(clock[name][bits] for name, bits in chosen.bits.items()) / 1e6
    assert 0.9 * limit < taken <= limit
    assert chosen.bits in tried
    with pytest.raises(ValueError, match=rf"max_milliseconds=.*the fastest choices a batch of 1 takes {least:.3g} ms"):
        widths.in_milliseconds(least * 0.9, 1)


def test_time_is_measured_on_this_machine(tiny_vit, pixels, widths):
    assert set(widths.in_milliseconds(1e4, 2).bits.values()) == {7, 8}
    with pytest.raises(ValueError, match=r"with the fastest choices a batch of 3 takes [\d.]+ ms"):
        widths.in_milliseconds(1e-6, 3)


def test_classes_that_change_are_counted_in_the_model_that_is_quantized(tiny_vit, pixels):
    widths = Widths(tiny_vit, pixels, QuantizationConfig(method="channel"))
    chosen = widths.that_agree(20)
    assert chosen.average_bits < 8
    mixed = ViTQuantizer(method="channel", overrides=chosen.overrides).quantize_model(tiny_vit, pixels)
    assert compare_models(tiny_vit, mixed, pixels).top_k_match >= 0.8


def test_a_tied_model_takes_the_bytes_that_were_allowed_too(tiny_vit, pixels, tmp_path):
    first, second = [m for name, m in tiny_vit.named_modules() if name.endswith(("fc1", "intermediate.dense"))]
    second.weight = first.weight
    widths = Widths(tiny_vit, pixels, QuantizationConfig(method="channel"))
    chosen = widths.in_bytes(17_000)
    assert 15_000 < saved(tiny_vit, pixels, chosen, tmp_path) <= 17_000


def test_nothing_to_choose_and_numbers_that_are_none(tiny_vit, pixels):
    with pytest.raises(ValueError, match="no Linear layer is selected, so that there is no width to choose"):
        Widths(tiny_vit, pixels, QuantizationConfig(method="channel", p=0.0))
    for limits, match in (
        ({"average_bits": 9}, "average_bits must be from 2 to 8, got 9"),
        ({"max_bytes": -1}, "max_bytes must be finite and not negative, got -1"),
        ({"average_bits": 4, "batch_size": 2}, "batch_size=2 is for max_milliseconds"),
    ):
        with pytest.raises(ValueError, match=match):
            ViTQuantizer().assign_bits(tiny_vit, pixels, **limits)
