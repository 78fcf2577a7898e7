"""quantize_model_: fairseq's in-place entry, which replaces every layer of a model by its trainable emulation."""

from __future__ import annotations

from torch import nn

from fairseq.modules.quantization.scalar.modules import ActivationQuantizer, IntConv2d, IntEmbedding, IntLinear
from fairseq.modules.quantization.scalar.modules.quantized_weight import QuantizedWeight

EMULATIONS: dict[type[nn.Module], type[QuantizedWeight]] = {
    nn.Linear: IntLinear,
    nn.Conv2d: IntConv2d,
    nn.Embedding: IntEmbedding,
}


def quantize_model_(
    model: nn.Module, p: float = 0.2, bits: int = 8, update_step: int = 3000, method: str = "histogram"
) -> list[str]:
    """Replace every Linear, Conv2d and Embedding in ``model``, in place, and quantize their outputs.

    Weights are quantized with probability ``p`` per element in training (Quant-Noise) and entirely in eval; outputs in
    eval only. The parameters stay the same objects, so an optimizer made before keeps working; the replaced layers
    themselves are not changed. A layer used in several places is replaced by one new layer.

    Args:
        model: any module that contains such layers.
        p: 0 to 1.
        bits: 2 to 8.
        update_step: training forwards between two observations of a range.
        method: "tensor", "channel" or "histogram", of weights and outputs.

    Returns:
        The names of the replaced layers, in order.

    Raises:
        ValueError: nothing to replace, ``model`` itself is such a layer, it was quantized already, or a layer cannot
            be replaced; the model is then as it was.
    """
    if type(model) in EMULATIONS:
        raise ValueError(f"a {type(model).__name__} cannot be replaced inside itself; pass the module that contains it")
    done = [name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)]
    if done:
        raise ValueError(f"the model is quantized already: {', '.join(done[:3])}")
    found = [
        (name, module) for name, module in model.named_modules(remove_duplicate=False) if type(module) in EMULATIONS
    ]
    if not found:
        kinds = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
        raise ValueError(f"the model has no Linear, Conv2d or Embedding to quantize; it is made of {kinds}")
    new: dict[nn.Module, QuantizedWeight] = {}
    for name, module in found:
        if module not in new:
            try:
                new[module] = EMULATIONS[type(module)].from_float(module, p, update_step, bits, method)
                ActivationQuantizer(new[module], p=0, update_step=update_step, bits=bits, method=method)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    for name, module in found:  # only now, so that an error leaves the model as it was
        model.set_submodule(name, new[module])
    return [name for name, _ in found]
