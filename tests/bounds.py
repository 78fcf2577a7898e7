"""How far two right results can lie apart: bounds from the arithmetic, and none from what a machine printed.

Three kinds of difference. Sums in another order: :func:`sum_error`. A chain of layers, whose rounding errors nobody
adds up by hand: it runs in float64, and :data:`EXACT` is half of float64's digits. And an activation that lies on the
edge between two integers, which may round to either, and so may all that follows from it: :func:`flips`.
"""

import math

import torch

from fairseq.models.vit_quantization import ViTQuantizer

HALF = math.sqrt(torch.finfo(torch.float64).eps)
EXACT = {"rtol": HALF, "atol": HALF}
"""For float64 results of order 1 that are equal but for rounding: 1.5e-8 is room for 7e7 roundings of eps.

A number that was kept in float32 on the way shows: it is off by 6e-8 of it.
"""


def sum_error(terms, magnitude, dtype=torch.float32):
    """The most that two sums of ``terms`` products differ, each added up in an order of its own.

    Each is off by at most terms * eps / 2 of ``magnitude``, the sum of the absolute values, to first order (Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, equation 3.5).
    """
    return terms * torch.finfo(dtype).eps * magnitude


def rounding_noise(roundings, bits=8, crest=4.0):
    """The energy that so many roundings put into an output, as a share of its own, each of them independent.

    A rounding errs by step^2 / 12 on average; the step is that of a grid from -crest to crest standard deviations.
    """
    return roundings * (2 * crest / (2**bits - 1)) ** 2 / 12


def rms(x):
    return float(x.double().square().mean().sqrt())


def flips(quantized, x):
    """What activations that round to the other side change in the logits of ``quantized``, root mean square, at most.

    Two runs of the same integers, each as far from what they give without rounding activations, are at most twice as
    far from one another; sqrt(2) if their roundings know nothing of each other. In the fused engine they hardly do,
    since attention there rounds to bfloat16 before.
    """
    with torch.no_grad():
        return 2 * rms(quantized(x).logits - ViTQuantizer.dequantize_model(quantized)(x).logits)
