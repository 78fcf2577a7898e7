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


# Of one packed layer. u = eps / 2 is the relative error of one rounding; an output is a sum of terms, and T the sum of
# their magnitudes. A chain of n roundings changes it by n u T at most, and by terms of u**2 that the counts cover.


def eps(dtype):
    return torch.finfo(dtype).eps


def scaled(layer, x):
    """The input as the layer multiplies it, in the dtype of x."""
    return x if layer.input_factor is None else x * layer.input_factor.to(x.dtype)


def terms(layer, x):
    """T of each output, float64 (M, out), for x of shape (M, in)."""
    x = scaled(layer, x)
    q, scale = layer.input_grid.quantize(x.to(layer.scale.dtype)) if layer.config.activations else (x, 1)
    result = (q.double() * scale).abs() @ layer.weight_matrix.dequantize().double().abs().T
    for addend in (layer.bias, layer.input_correction):
        result = result if addend is None else result + addend.double().abs()
    return result


def exact(layer, x):
    """The output for x of shape (M, in) if nothing rounds but the integers, (M, out): float64."""
    x, weight = scaled(layer, x), layer.weight_matrix
    if layer.config.activations:
        q, scale = layer.input_grid.quantize(x.to(layer.scale.dtype))
        x = layer.input_grid.centre(q).double() * scale.double()
    y = x.double() @ weight._replace(scale=weight.scale.double()).dequantize().T
    return y if layer.bias is None else y + layer.bias.double()


def bound(layer, x, y):
    """How far an output for x of shape (M, in) may be from the exact one, ``y``."""
    u, tiny = eps(x.dtype) / 2, torch.finfo(x.dtype).tiny
    if layer.config.activations:
        last = 0 if x.dtype == layer.scale.dtype else u * (1 + u) * y.double().abs() + u * tiny
        return _integer_roundings(layer) * eps(layer.scale.dtype) / 2 * terms(layer, x) + last
    # The weight rounds to the dtype of its scale and to that of x, K products and their sums in float32 at least, and
    # the product, its product with the scale, and the sum with the bias in the dtype of x.
    sums = x.shape[-1] * eps(torch.promote_types(x.dtype, torch.float32)) / 2
    bias = 0 if layer.bias is None else layer.bias.double().abs()
    products = (sums + eps(layer.scale.dtype) + u) * terms(layer, x)
    return products + 3.01 * u * (y.double().abs() + products + bias) + 2 * u * tiny


def _integer_roundings(layer):
    """Those in the dtype of the scale, where sums of integers are exact.

    Each group's sum as a float, its product with the weight's scale, the sum of groups, the product with the token's
    scale, the sum with the bias: 2 G + 2 with G groups; of a static range its correction and the sum of that and the
    bias, too; and one for u**2.
    """
    groups = layer.scale.shape[1] if layer.scale.ndim == 2 else 1
    return 2 * groups + (5 if layer.config.activations == "static" else 3)


def half_steps(layer, x):
    """Between a packed layer, with a scale for each output, and the float one that it was made from.

    Each weight and each entry of x is off by half a step at most, and the float layer's K products and sums round, too.
    """
    sizes, w = x.double().abs(), layer.dequantize().double().abs()
    step = layer.input_scale
    if step is None:
        step = sizes.amax(-1, keepdim=True) / 127 if layer.config.activations else torch.zeros(1)
    steps = step / 2 * w.sum(-1) + layer.scale / 2 * sizes.sum(-1, keepdim=True)
    return 1.001 * steps + bound(layer, x, exact(layer, x)) + x.shape[-1] * eps(x.dtype) * terms(layer, x)


def is_within(got, expected, bound):
    """Whether no entry is off by more than its bound; NaN is."""
    return bool(((got.double() - expected.double()).abs() <= bound).all())


def agrees(got, layer, x):
    """Whether an output of the layer for x of shape (M, in) is the exact one within :func:`bound`."""
    y = exact(layer, x)
    return got.shape == y.shape and is_within(got, y, bound(layer, x, y))
