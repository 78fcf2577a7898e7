"""Synthetic pictures: the same for a seed, all different, with a spectrum that falls like a photograph's."""

import numpy as np
import pytest
import torch

from fairseq.quantization.calibration.synthetic import synthetic_images


def pixels(*args):
    return torch.from_numpy(np.stack([np.asarray(image) for image in synthetic_images(*args)])).permute(0, 3, 1, 2)


def test_the_seed_decides_and_no_two_are_alike():
    first = pixels(4, 48, 3)
    assert first.shape == (4, 3, 48, 48)
    assert torch.equal(first, pixels(4, 48, 3))
    assert not torch.equal(first, pixels(4, 48, 4))
    assert len(first.flatten(1).unique(dim=0)) == 4
    assert torch.equal(first[:2], pixels(2, 48, 3))


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    synthetic_images(1, 16)
    assert torch.equal(before, torch.random.get_rng_state())


def test_they_fill_the_range_and_neighbours_are_alike():
    x = pixels(16, 64).float() / 255
    assert x.std() > 0.15
    assert x.flatten(1).min() < 0.05
    assert x.flatten(1).max() > 0.95
    assert all(picture.std() > 0.02 for picture in x)
    power = torch.fft.rfft2(x.mean(1)).abs().square().mean(0)
    low, high = power[0, 1:5].mean(), power[0, 16:32].mean()
    assert low > 30 * high  # white noise: 1


def test_even_a_single_pixel():
    assert synthetic_images(1, 1)[0].size == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "count must be at least 1, got 0"),
        ((1, 0), ValueError, "size must be at least 1, got 0"),
        ((1.5,), TypeError, "count must be an int of at least 1, got 1.5"),
        ((True,), TypeError, "count must be an int"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        synthetic_images(*arguments)
