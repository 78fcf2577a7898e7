"""The statistics are those of the inputs, each token with its weight."""

import pytest
import torch

from fairseq.quantization.calibration import statistics
from fairseq.quantization.calibration.statistics import collect


def whole(*shape, low=-9, high=10):
    """Small integers, whose sums of products are exact in float32, in whatever order."""
    return torch.randint(low, high, shape).float()


def test_collect_is_the_weighted_second_moment():
    torch.manual_seed(0)
    batches = [whole(7, 5), whole(4, 5)]
    x, w = torch.cat(batches), whole(11, low=1)
    weighted, plain = collect(iter(batches), [w, torch.empty(0)], ["a", "b"], None)
    assert torch.equal(weighted.second_moment, (x.T * w) @ x / w.sum())
    assert torch.equal(weighted.mean, (x.T @ w) / w.sum())
    assert torch.equal(plain.second_moment, x.T @ x / 11)


def test_collect_sees_the_drift_from_the_float_model():
    torch.manual_seed(0)
    batches, exact = [whole(7, 5), whole(4, 5)], [whole(7, 5), whole(4, 5)]
    x, lost, w = torch.cat(batches), torch.cat(exact) - torch.cat(batches), whole(11, low=1)
    weighted, plain = collect(iter(batches), [w, torch.empty(0)], ["a", "b"], None, iter(exact))
    assert torch.equal(weighted.drift, (lost.T * w) @ x / w.sum())
    assert torch.equal(weighted.drift_mean, (lost.T @ w) / w.sum())
    assert torch.equal(plain.drift, lost.T @ x / 11)
    assert weighted.samples == w.sum().item() ** 2 / w.square().sum().item()
    assert plain.samples == 11
    assert collect(iter(batches), [w], ["a"])[0].drift is None


@pytest.mark.parametrize("kind", ["drift", "missing"])
def test_collect_halves_each_share_of_the_pictures(kind, monkeypatch):
    """Of 4 batches and 3: two and two, two and one."""
    monkeypatch.setattr(statistics, "TILE", 2)  # of the rows of products, of which there are 5
    torch.manual_seed(0)
    batches = [whole(6, 5) for _ in range(7)]
    other = [whole(6, 5 if kind == "drift" else 3) for _ in range(7)]
    w = whole(42, low=1)
    given = {"exact" if kind == "drift" else kind: iter(other)}
    (found,) = collect(iter(batches), [w], ["a"], None, **given, halves=True)
    wanted = [b - a if kind == "drift" else b for a, b in zip(batches, other, strict=True)]
    chosen = [(0, 1, 4, 5), (2, 3, 6)]
    for half, numbers in zip(found.halves, chosen, strict=True):
        x, lost, own = (torch.cat([of[i] for i in numbers]) for of in (batches, wanted, w.split(6)))
        assert torch.equal(half.second_moment, (x.T * own) @ x / own.sum())
        assert torch.equal(getattr(half, kind), (lost.T * own) @ x / own.sum())
        assert half.samples == own.sum().item() ** 2 / own.square().sum().item()
    x, lost = torch.cat(batches), torch.cat(wanted)
    assert torch.equal(found.second_moment, (x.T * w) @ x / w.sum())
    assert torch.equal(getattr(found, kind), (lost.T * w) @ x / w.sum())


def test_one_batch_has_no_halves():
    x, exact = whole(6, 5), whole(6, 5)
    assert collect(iter([x]), [torch.empty(0)], ["a"], None, iter([exact]), halves=True)[0].halves is None


def test_collect_finds_a_range_for_static_activations():
    torch.manual_seed(0)
    x = torch.randn(4000, 8)
    x[0, 0] = 40
    (found,) = collect(iter([x]), [torch.empty(0)], ["a"], 4)
    assert -4 < found.low < -1.5
    assert 1.5 < found.high < 12  # not the outlier's 40
    (wide,) = collect(iter([x]), [torch.empty(0)], ["a"], 8)
    assert wide.static_sqnr > found.static_sqnr > 10


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="fc1: its input is not finite"):
        collect(iter([torch.tensor([[1.0, torch.nan]])]), [torch.empty(0)], ["fc1"], None)
