"""What a narrower layer does, found without the twins, the replay and the derived widths of the library."""

from dataclasses import replace

import torch

from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert

CHANNEL = QuantizationConfig(method="channel", rounding="nearest", equalize=False)
"""Each layer is rounded whatever the others are, so that a twin is the layer of the narrower model, bit for bit."""


def probabilities(model, pixels, config=CHANNEL):
    """Of the classes, by the model that is quantized so, float64."""
    with torch.no_grad():
        return convert(model, config, pixels, engine="layers")[0](pixels).logits.double().softmax(-1)


def directly(model, pixels, name, bits, config=CHANNEL, widest=None):
    """The KL divergence of the model with one narrower layer from the one with every layer at 8 bits.

    The probabilities of that one may be given: they are the same for all layers.
    """
    own = {name: {**config.overrides.get(name, {}), "bits": bits}}
    p = probabilities(model, pixels, config) if widest is None else widest
    q = probabilities(model, pixels, replace(config, overrides={**config.overrides, **own}))
    return (p * (p.log() - q.log())).sum(-1).mean().item()
