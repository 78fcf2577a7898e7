"""shrinkage: as much of a correction as serves the half of the pictures that it was not taken from."""

import pytest
import torch
from layer_inputs import drifted, layer, noisy, statistics

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.rounding.gptaq import drift_corrected
from fairseq.quantization.rounding.round_weight import round_weight
from fairseq.quantization.rounding.second_moment import damped
from fairseq.quantization.rounding.shrinkage import LEAST_RIDGE, MOST_RIDGE, shrinkage_between, tried_out


def in_halves(x, exact):
    """Statistics as of calibration: of all tokens, and of both halves of them."""
    half = len(x) // 2
    return drifted(x, exact)._replace(halves=(drifted(x[:half], exact[:half]), drifted(x[half:], exact[half:])))


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [60, 400, 4000])
def test_shrinkage_is_what_serves_the_other_half_best(share, tokens):
    """Found by running: each half's correction on the other half's tokens, for each damping and share of a grid."""
    w, exact = layer(8, 40, tokens)
    x = noisy(exact, share)
    data = in_halves(x, exact)
    found = shrinkage_between(w, data.halves)
    parts = [(x[: tokens // 2], exact[: tokens // 2]), (x[tokens // 2 :], exact[tokens // 2 :])]

    def error(ridge, taken):
        total = 0.0
        for half, (a, b) in zip(data.halves, reversed(parts), strict=True):
            h = damped(half.second_moment, w, ridge * w.shape[1] / half.samples).float()
            change = torch.linalg.solve(h, (w @ half.drift).T).T
            total += float((a @ (w + taken * change).T - b @ w.T).square().sum()) / len(a)
        return total

    ridges = [4.0**power for power in range(-3, 6)]
    assert (ridges[0], ridges[-1]) == (LEAST_RIDGE, MOST_RIDGE)
    least = min(error(ridge, taken / 20) for ridge in ridges for taken in range(21))
    assert error(*found) <= 1.01 * least


def test_few_tokens_and_much_noise_are_damped_more():
    generator = torch.Generator().manual_seed(0)
    x, mix, noise = (torch.randn(*shape, generator=generator) for shape in ((80, 40), (40, 6), (80, 6)))
    lost = x @ mix / 5 + 3 * noise
    one, other = (
        statistics(a)._replace(missing=b.T @ a / len(a), samples=float(len(a)))
        for a, b in zip(x.split(40), lost.split(40), strict=True)
    )
    assert shrinkage_between(torch.ones(6, 40), (one, other)).ridge > 1


def test_what_does_not_repeat_is_not_made_up_for():
    """The other half wants the opposite: nothing is taken; and where both want the same, nearly all is."""
    w, exact = layer(6, 40, 4000)
    data = in_halves(noisy(exact, 0.1), exact)
    one, other = data.halves
    against = other._replace(second_moment=one.second_moment, drift=-one.drift)
    assert shrinkage_between(w, (one, against)).share == 0
    assert torch.equal(drift_corrected(w, tried_out(w, data._replace(halves=(one, against)))), w)
    assert shrinkage_between(w, (one, other)).share > 0.9


def test_few_tokens_do_less_harm_on_others_with_halves():
    """32 tokens, 80 inputs, and an error that is noise for the most part."""
    errors = []
    for seed in range(8):
        w, exact = layer(24, 80, 4032, seed)
        x = noisy(exact, 0.5, seed + 100)
        data = in_halves(x[:32], exact[:32])
        errors.append([
            float((x[32:] @ drift_corrected(w, given, 1.0).T - exact[32:] @ w.T).square().sum())
            for given in (tried_out(w, data), data)
        ])  # fmt: skip
    with_halves, without = torch.tensor(errors).log().mean(0).tolist()
    assert with_halves < without


@pytest.mark.parametrize(
    ("rounding", "augment", "tried"),
    [("gptaq", 1, True), ("coordinate", 4, True), ("coordinate", 8, False), ("qronos", 1, False)],
)
@pytest.mark.filterwarnings("ignore:calibrating on 8 pictures")
def test_calibration_tries_it_out_unless_both_halves_have_views_of_one_picture(
    tiny_vit, monkeypatch, rounding, augment, tried
):
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    found = []

    def recording(weight, statistics, *rest):
        found.append(statistics)
        return round_weight(weight, statistics, *rest)

    monkeypatch.setattr("fairseq.quantization.conversion.quantize_layer.round_weight", recording)
    ViTQuantizer(bits=3, method="channel", rounding=rounding).quantize_model(tiny_vit, images, augment=augment)
    assert found
    assert all((one.shrinkage is not None) == tried and one.halves is None for one in found)


def test_more_damping_is_tried_where_one_takes_nothing_off():
    """Inputs of very different scales and much noise: a 64th takes a little off, 1 nothing, and 64 the most."""
    generator = torch.Generator().manual_seed(44)
    scales = torch.randn(12, generator=generator).mul(3).exp2()
    x, other = (torch.randn(16, 12, generator=generator) * scales for _ in range(2))
    mix = torch.randn(12, 3, generator=generator) / scales[:, None]
    halves = tuple(
        statistics(a)._replace(
            missing=(a @ mix + 4 * torch.randn(16, 3, generator=generator)).T @ a / len(a), samples=float(len(a))
        )
        for a in (x, other)
    )
    assert shrinkage_between(torch.ones(3, 12), halves).ridge > 1
