"""The losses against their definitions, written out."""

import math

import pytest
import torch

from fairseq.quantization.training.losses import (
    Losses,
    attention_loss,
    feature_loss,
    output_loss,
    relative_error,
)

PIXELS = torch.zeros(2, 3, 4, 4)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_of_classes_it_is_the_divergence_at_a_temperature():
    student, teacher = random(2, 5), random(2, 5, seed=1)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(v / 3) for v in values] for values in (t, s))
        p, q = ([v / sum(values) for v in values] for values in (p, q))
        expected += 9 / 2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(output_loss("logits", student, teacher, 3.0, PIXELS)) == pytest.approx(expected, rel=1e-5)
    assert float(output_loss("logits", teacher, teacher, 3.0, PIXELS)) == pytest.approx(0, abs=1e-6)


def test_of_a_map_of_classes_they_are_the_channels():
    student, teacher = random(2, 5, 4, 4), random(2, 5, 4, 4, seed=1)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher)]
    expected = output_loss("logits", *rows, 1.0, PIXELS)
    torch.testing.assert_close(output_loss("logits", student, teacher, 1.0, PIXELS), expected)


def test_of_anything_else_it_is_a_share_of_the_energy():
    student, teacher = random(2, 5), random(2, 5, seed=1)
    expected = float((student - teacher).square().sum() / teacher.square().sum())
    assert float(relative_error(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(output_loss("image_embeds", student, teacher, 3.0, PIXELS)) == pytest.approx(expected, rel=1e-5)
    both = feature_loss([student, teacher], [teacher, teacher])
    assert float(both) == pytest.approx(expected / 2, rel=1e-5)


def test_attention_is_compared_head_by_head():
    sides = [[random(2, 3, 8, seed=i) for i in (2 * side, 2 * side + 1)] for side in (0, 1)]
    expected = 0.0
    for picture in range(2):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            s, t = (q[picture, :, part] @ k[picture, :, part].T / 2 for q, k in sides)
            p, q = t.softmax(-1), s.softmax(-1)
            expected += float((p * (p / q).log()).sum() / 3) / 4
    assert float(attention_loss(*sides, [2])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"features": -1}, ValueError, "features must be a finite number of at least 0, got -1"),
        ({"attention": "yes"}, TypeError, "attention must be a number, got 'yes'"),
        ({"outputs": 0}, ValueError, "outputs and temperature must be above 0: .* got outputs=0"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite"),
    ],
)
def test_weights_that_are_none(wrong, error, message):
    with pytest.raises(error, match=message):
        Losses(**wrong)
