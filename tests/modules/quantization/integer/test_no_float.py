"""The mode in which nothing may be floating."""

import pytest
import torch

from fairseq.modules.quantization.integer.no_float import FloatingOperation, NoFloat


def test_integers_pass_and_are_counted():
    a = torch.arange(6).reshape(2, 3)
    with NoFloat() as seen:
        b = (torch.div(a @ a.T, 3, rounding_mode="floor") >> 1).to(torch.int8)
        torch.where(b > 1, b, 0).amax(-1)
    assert seen.count >= 5


@pytest.mark.parametrize(
    "operation",
    [
        lambda a: a / 2,
        lambda a: a.float(),
        lambda a: a * 0.5,
        lambda a: torch.zeros(2),
        lambda a: torch.clamp(a, max=1.5),
        lambda a: torch.zeros(2, dtype=torch.complex64),
    ],
)
def test_a_float_raises(operation):
    with NoFloat(), pytest.raises(FloatingOperation, match="where only integers may be"):
        operation(torch.arange(3))


def test_a_float_that_comes_in_raises():
    x = torch.randn(3)
    with NoFloat(), pytest.raises(FloatingOperation):
        x.to(torch.int64)
