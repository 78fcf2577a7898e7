"""How far a packed layer's output may be from the exact one: bounds that follow from the arithmetic, nothing measured.

u = eps / 2 is the relative error of one rounding; an output is a sum of terms, and T the sum of their magnitudes. A
chain of n roundings changes it by n u T at most, and by terms of u**2 that the generous counts below cover.
"""

import torch


def eps(dtype):
    return torch.finfo(dtype).eps


def terms(layer, x):
    """T of each output, float64 (M, out), for x of shape (M, in)."""
    if layer.input_factor is not None:
        x = x * layer.input_factor.to(x.dtype)
    q, scale = layer.input_grid.quantize(x.to(layer.scale.dtype)) if layer.config.activations else (x, 1)
    result = (q.double() * scale).abs() @ layer.weight_matrix.dequantize().double().abs().T
    for addend in (layer.bias, layer.input_correction):
        result = result if addend is None else result + addend.double().abs()
    return result


def integer_bound(layer, x):
    """Between two that multiply integers, whose sums are exact.

    Rounded are, in the dtype of the scale: each group's sum as a float, its product with the weight's scale, the sum of
    groups, the product with the token's scale, the sum with the bias, 2 G + 3 roundings with G groups; with a static
    range its correction and the sum of that and the bias, too; and once more to the dtype of x.
    """
    groups = layer.scale.shape[1] if layer.scale.ndim == 2 else 1
    roundings = 2 * groups + (5 if layer.config.activations == "static" else 3)
    return (roundings * eps(layer.scale.dtype) + _to_another(layer, x)) * terms(layer, x)


def weight_only_bound(layer, x):
    """Between two that multiply floats.

    Rounded are: the weight, to the dtype of its scale and to that of x; K products and their sums, in float32 at
    least; the product, its scale and the bias, in the dtype of x.
    """
    sums = x.shape[-1] * eps(torch.promote_types(x.dtype, torch.float32))
    return (sums + eps(layer.scale.dtype) + 3 * eps(x.dtype) + _to_another(layer, x)) * terms(layer, x)


def half_steps(layer, x):
    """Between a packed layer, with a scale for each output, and the float one that it was made from.

    Each weight and each entry of x is off by half a step at most, and the float layer's K products and sums round, too.
    """
    sizes, w = x.double().abs(), layer.dequantize().double().abs()
    step = layer.input_scale
    if step is None:
        step = sizes.amax(-1, keepdim=True) / 127 if layer.config.activations else torch.zeros(1)
    steps = step / 2 * w.sum(-1) + layer.scale / 2 * sizes.sum(-1, keepdim=True)
    return 1.001 * steps + bound(layer, x) + x.shape[-1] * eps(x.dtype) * terms(layer, x)


def bound(layer, x):
    """The one of the two that holds for the layer."""
    return integer_bound(layer, x) if layer.config.activations else weight_only_bound(layer, x)


def is_within(got, expected, bound):
    """Whether no entry is off by more than its bound; NaN is."""
    return bool(((got.double() - expected.double()).abs() <= bound).all())


def _to_another(layer, x):
    return 0 if x.dtype == layer.scale.dtype else eps(x.dtype)
