"""What weights are rounded on: the pictures as the integer blocks before have left them."""

import families
import pytest
import torch

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.integer_only.stream import IntegerInputs

PICTURES = families.pictures(10)


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "head"), [("vit", "classifier"), ("timm-vit", "head")])
def test_layers_are_rounded_on_what_the_integer_model_gives(name, head, activations, monkeypatch):
    entered, read = {}, {}
    inputs = IntegerInputs.inputs

    def recorded(self, layer):
        entered[self.position] = torch.cat([args[0] for args, _ in self.stored])
        tokens = read[layer] = []
        for x in inputs(self, layer):
            tokens.append(x)
            yield x

    monkeypatch.setattr(IntegerInputs, "inputs", recorded)
    original = families.build(name)
    quantizer = ViTQuantizer(bits=4, method="channel", activations=activations, arithmetic="integer")
    integers = quantizer.quantize_model(original, calibration=PICTURES)
    with torch.no_grad():
        h = integers.embed(integers.round_pixels(PICTURES))
        step = 2.0 ** -round(torch.log2(h.abs().max() / entered[0].abs().max()).item())
        for i, block in enumerate(integers.blocks):
            assert torch.equal(entered[i].double(), h * step)
            h = block(h)
        norm = [module for module in original.modules() if isinstance(module, torch.nn.LayerNorm)][-1]
        assert torch.allclose(torch.cat(read[head]), norm((h * step).float())[:, 0], atol=1e-5)
