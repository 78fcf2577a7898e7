"""How far a packed layer's output may be from the exact one: bounds that follow from the arithmetic, nothing measured.

u = eps / 2 is the relative error of one rounding; an output is a sum of terms, and T the sum of their magnitudes. A
chain of n roundings changes it by n u T at most, and by terms of u**2 that the generous counts below cover.
"""

import torch

from fairseq.modules.quantization.packed.kernels import reference


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
    """The output as the reference defines it, (M, out), before it is rounded to the dtype of x: float64."""
    x, weight = scaled(layer, x).double(), layer.weight_matrix
    if layer.config.activations:
        return reference.integer(x, weight, layer.bias, layer.input_grid)
    y = x @ weight._replace(scale=weight.scale.double()).dequantize().T
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
