"""Two processes give the integers of one, and one that fails ends both."""

import pytest
import torch
from conftest import make_tiny_vit
from processes import together

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.bit_allocation.sensitivity import measure
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.exact_sum import ExactSum, unit_of
from fairseq.quantization.calibration.statistics import collect
from fairseq.quantization.config import QuantizationConfig

SETTINGS = (
    {"bits": 4, "method": "channel"},
    {"bits": 3, "method": "tensor", "activations": "static", "activation_bits": 6, "bias_correction": "add"},
    {"bits": 4, "quantize_embeddings": True, "activation_bits": 4},
)


def shares(count, pictures, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: count)
    found = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        found.append(processes.share(pictures))
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("pictures", [1, 15, 16, 17, 128, 1000])
def test_every_picture_is_of_one_process(count, pictures, monkeypatch):
    found = shares(count, pictures, monkeypatch)
    assert [i for share in found for i in share] == list(range(pictures))
    assert len(found[0])  # which decides the units of sums
    assert all(share.start % processes.SHARE == 0 for share in found if len(share))
    assert max(map(len, found)) - min(map(len, found)) <= 2 * processes.SHARE


def quantized(model, pictures, settings):
    return ViTQuantizer(**settings).quantize_model(model, calibration=pictures).state_dict()


def all_quantized(model, pictures):
    return [quantized(model, pictures, settings) for settings in SETTINGS]


def measured(model, pictures):
    return measure(model, pictures, QuantizationConfig(method="channel"), choices=(3, 8))


def refused(model, pictures):
    with pytest.raises(ValueError, match="its input is not finite on the calibration images") as error:
        ViTQuantizer(bits=4).quantize_model(model, calibration=pictures)
    return str(error.value)


def collected(x, w):
    own = processes.share(len(w))
    batches = x[own.start : own.stop].split(4) if len(own) else ()
    weights, exact = w[own.start : own.stop].flatten(), (2 * b.flatten(0, 1).sin() for b in batches)
    return collect((b.flatten(0, 1) for b in batches), [weights], ["a"], 4, exact, halves=True)


def entries(values):
    """Of nested tuples, one after the other."""
    for value in values:
        yield from entries(value) if isinstance(value, tuple) else [value]


def everything(model, pictures, broken, tokens):
    few = quantized(model, pictures[:16], SETTINGS[0])
    return all_quantized(model, pictures), measured(model, pictures), refused(model, broken), collected(*tokens), few


@pytest.fixture(scope="module")
def given():
    """A model, pictures for shares of 48 and 24, some of which the last overflows float32, and tokens for one share."""
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(72, 3, 16, 16, generator=generator)
    broken = pictures[:40].clone()
    broken[-1] *= 1e38
    tokens = torch.randn(12, 5, 6, generator=generator), torch.rand(12, 5, generator=generator)
    return make_tiny_vit(), pictures, broken, tokens


@pytest.fixture(scope="module")
def of_two(given):
    """What each of two processes has of everything; to start them takes longest, so that they are started once."""
    return list(zip(*together(everything, *given), strict=True))


@pytest.mark.slow
def test_two_processes_give_the_integers_of_one(given, of_two):
    expected = all_quantized(*given[:2])
    for got in of_two[0]:
        for one, whole in zip(got, expected, strict=True):
            assert one.keys() == whole.keys()
            for name, value in whole.items():
                assert torch.equal(one[name], value), name


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(given, of_two):
    assert of_two[1] == (measured(*given[:2]),) * 2


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all(of_two):
    """Without a word to the others they would wait forever."""
    assert len(set(of_two[2])) == 1


@pytest.mark.slow
def test_a_process_without_pictures_gives_the_integers_of_one(given, of_two):
    expected = quantized(given[0], given[1][:16], SETTINGS[0])
    for got in of_two[4]:
        for name, value in expected.items():
            assert torch.equal(got[name], value), name


@pytest.mark.slow
def test_a_process_without_pictures_has_the_statistics_of_all(given, of_two):
    (expected,) = collected(*given[3])
    assert expected.halves is not None
    for (got,) in of_two[3]:
        for one, whole in zip(entries(got), entries(expected), strict=True):
            assert torch.equal(one, whole) if isinstance(whole, torch.Tensor) else one == whole


def test_sums_do_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, 5, generator=generator) * 10 ** (i % 4) for i in range(40)]

    def total(order):
        found = ExactSum(unit_of(parts[0].abs().amax(1))[:, None], 5)
        for i in order:
            found.add(parts[i])
        return found.result()

    expected = total(range(40))
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        assert torch.equal(total(order), expected)
    torch.testing.assert_close(expected.double(), sum(p.double() for p in parts), rtol=2**-22, atol=1e-6)
