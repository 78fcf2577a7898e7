"""What a narrower layer does, found without the twins, the replay and the derived widths of the library."""

from dataclasses import replace

import torch

from fairseq.quantization.config import QuantizationConfig
from fairseq.quantization.conversion.convert import convert

CHANNEL = QuantizationConfig(method="channel", rounding="nearest", equalize=False)
"""Each layer is rounded whatever the others are, so that a twin is the layer of the narrower model, bit for bit."""


def directly(model, pixels, name, bits, config=CHANNEL):
    """The KL divergence of the model with one narrower layer from the one with every layer at 8 bits."""
    own = {name: {**config.overrides.get(name, {}), "bits": bits}}
    narrower = replace(config, overrides={**config.overrides, **own})
    with torch.no_grad():
        p, q = (
            convert(model, own, pixels, engine="layers")[0](pixels).logits.double().softmax(-1)
            for own in (config, narrower)
        )
    return (p * (p.log() - q.log())).sum(-1).mean().item()
