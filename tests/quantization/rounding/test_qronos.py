"""qronos: the steps of the paper's algorithm 1, and less error at the output, on other inputs, too."""

import pytest
import torch
from bounds import sum_error
from layer_inputs import SETTINGS, drifted, errors_after_drift, layer, noisy

from fairseq.modules.quantization.packed.config import LinearConfig
from fairseq.quantization.rounding import qronos as module
from fairseq.quantization.rounding.gptq import compensated, importance
from fairseq.quantization.rounding.qronos import largest_eigenvalue, qronos
from fairseq.quantization.rounding.second_moment import inverse_factor


def test_the_first_two_steps_are_those_of_the_paper(monkeypatch):
    """The first column beside the others as they are; then the others at once beside what it was rounded to."""
    w, exact = layer(6, 40, 2000)
    w, x, exact = w.double(), noisy(exact, 0.1).double(), exact.double()
    calls = []
    monkeypatch.setattr(module, "compensated", lambda *given: calls.append(given) or compensated(*given))
    qronos(w, drifted(x, exact), LinearConfig(bits=3, method="histogram"))
    [(target, h, _, first)] = calls
    order = importance(h)
    damping = h.diagonal()[0] - (x.T @ x / len(x))[0, 0]
    g = (exact.T @ x / len(x) + damping * torch.eye(40))[order][:, order]
    h, w, target, first = h[order][:, order], w[:, order], target[:, order], first[:, order]
    tolerance = 40 * sum_error(40, float(torch.linalg.cond(h)), h.dtype) * float(w.abs().max())
    expected = (w @ g[:, 0] - w[:, 1:] @ h[0, 1:]) / h[0, 0]
    torch.testing.assert_close(first[:, 0], expected, atol=tolerance, rtol=0)

    q = first[:, 0].round()  # whatever the first column became
    expected = (w @ g[:, 1:] - torch.outer(q, h[0, 1:])) @ torch.linalg.inv(h[1:, 1:])
    factor = inverse_factor(h)
    got = target[:, 1:] - torch.outer((target[:, 0] - q) / factor[0, 0], factor[0, 1:])
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_comes_nearer_to_the_float_output_on_other_inputs_too(settings):
    config = LinearConfig(bits=4, **settings)
    for least, plain in zip(*errors_after_drift(("qronos", "gptq"), config), strict=True):
        assert least < 0.6 * plain


def test_the_largest_eigenvalue():
    x = layer()[1].double()
    h = x.T @ x
    assert largest_eigenvalue(h) == pytest.approx(float(torch.linalg.eigvalsh(h)[-1]), rel=1e-3)
    assert largest_eigenvalue(torch.zeros(3, 3)) == 0
