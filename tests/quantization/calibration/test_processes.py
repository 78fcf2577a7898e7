"""Two processes give the integers of one, and one that fails ends both."""

import pytest
import torch
from processes import together

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.calibration import processes
from fairseq.quantization.calibration.exact_sum import ExactSum, unit_of
from fairseq.quantization.calibration.statistics import collect

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


def test_two_processes_give_the_integers_of_one(tiny_vit):
    pictures = torch.randn(72, 3, 16, 16, generator=torch.Generator().manual_seed(3))  # shares of 48 and 24
    expected = all_quantized(tiny_vit, pictures)
    for got in together(all_quantized, tiny_vit, pictures):
        for one, whole in zip(got, expected, strict=True):
            assert one.keys() == whole.keys()
            for name, value in whole.items():
                assert torch.equal(one[name], value), name


def refused(model, pictures):
    with pytest.raises(ValueError, match="its input is not finite on the calibration images") as error:
        ViTQuantizer(bits=4).quantize_model(model, calibration=pictures)
    return str(error.value)


def test_what_one_process_finds_wrong_ends_all(tiny_vit):
    """Its pictures overflow float32 in the model; without a word to the others they would wait forever."""
    pictures = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    pictures[-1] *= 1e38
    assert len(set(together(refused, tiny_vit, pictures))) == 1


def collected(x, w):
    own = processes.share(len(w))
    batches = x[own.start : own.stop].split(4) if len(own) else ()
    return collect((b.flatten(0, 1) for b in batches), [w[own.start : own.stop].flatten()], ["a"], 4)


def test_a_process_without_pictures_has_the_statistics_of_all():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(12, 5, 6, generator=generator), torch.rand(12, 5, generator=generator)
    (expected,) = collected(x, w)
    for (got,) in together(collected, x, w):
        for one, whole in zip(got, expected, strict=True):
            assert torch.equal(one, whole) if isinstance(whole, torch.Tensor) else one == whole


def test_sums_do_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(6, 5, generator=generator) * 10 ** (i % 4) for i in range(40)]

    def total(order):
        found = ExactSum(unit_of(parts[0].abs().amax(1))[:, None], 5)
        for i in order:
            found.add(parts[i])
        return found.result(3.0)

    expected = total(range(40))
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        assert torch.equal(total(order), expected)
    torch.testing.assert_close(expected.double(), sum(p.double() for p in parts) / 3, rtol=2**-22, atol=1e-6)
