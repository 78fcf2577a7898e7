"""How far two right results can lie apart: bounds from the arithmetic, and none from what a machine printed.

Three kinds of difference. Sums in another order (:func:`sum_error`). A chain of layers, whose rounding errors nobody
adds up by hand: it runs in float64, and :data:`EXACT` is half of float64's digits. And an activation that lies on the
edge between two integers: it may round to either, and so may all that follows from it; :func:`flips` bounds what comes
of that.
"""

import math

import torch

EXACT = {"rtol": math.sqrt(torch.finfo(torch.float64).eps), "atol": math.sqrt(torch.finfo(torch.float64).eps)}
"""For float64 results of order 1 that are equal but for rounding: 1.5e-8, room for 7e7 roundings in one direction.

What is no rounding error, a number kept in float32 on the way included (6e-8 of it), shows.
"""


def sum_error(terms, magnitude, dtype=torch.float32):
    """The most that two sums of ``terms`` products differ, each added up in an order of its own.

    Each is off by at most terms * eps / 2 of ``magnitude``, the sum of the absolute values, to first order (Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, equation 3.5).
    """
    return terms * torch.finfo(dtype).eps * magnitude


def layers_error(layers, terms, dtype=torch.float32):
    """``rtol`` and ``atol`` for ``layers`` layers of that many ``terms`` each, with outputs and gains of order 1."""
    error = layers * sum_error(terms, 1.0, dtype)
    return {"rtol": error, "atol": error}


def rms(x):
    return float(x.double().square().mean().sqrt())


def flips(rounded, exact):
    """What activations that round to other integers change, root mean square.

    Args:
        rounded: the output of a model that rounds its activations.
        exact: that of the same weights without it, as of ``ViTQuantizer.dequantize_model``.

    Two models whose roundings know nothing of one another differ by sqrt(2) of what rounding does to one of them, and
    those of a few flips by less.
    """
    return math.sqrt(2) * rms(rounded - exact)
