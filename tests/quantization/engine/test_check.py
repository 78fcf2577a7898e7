"""Code that the engine does not know: such blocks run layer by layer, and the reason says what is not known."""

import copy
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, ViTConfig, ViTForImageClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed.kernels import native
from fairseq.quantization.engine import check
from fairseq.quantization.engine.fuse import fuse
from fairseq.quantization.engine.fused_block import FusedBlock

pytestmark = pytest.mark.skipif(not native.levels(), reason=native.NOT_BUILT)


def blocks(model):
    found = model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers
    return list(found)


def attention(block):
    """The module of a block that calls the attention function, in either generation."""
    return getattr(block.attention, "attention", block.attention)


def mlp(block):
    """The module of a block that holds fc1."""
    return block.mlp if hasattr(block, "mlp") else block.intermediate


def derive(module, forward):
    """Give a module a class of its own, derived from the one it has, with another forward."""
    kind = type(module)
    module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def scaled_mlp(model):
    for block in blocks(model):
        kind = type(mlp(block))
        derive(mlp(block), lambda self, x, kind=kind: 0.5 * kind.forward(self, x))


def scaled_attention(model):
    for block in blocks(model):
        kind = type(attention(block))

        def forward(self, x, *args, kind=kind, **keywords):
            context, weights = kind.forward(self, x, *args, **keywords)
            return 0.5 * context, weights

        derive(attention(block), forward)


def merging_block(model):
    for block in blocks(model):
        kind = type(block)

        def forward(self, x, *args, kind=kind, **keywords):
            return kind.forward(self, torch.cat([x[:, :1], (x[:, 1::2] + x[:, 2::2]) / 2], 1), *args, **keywords)

        derive(block, forward)


class ViTLayer(nn.Module):
    """Only called like the class of transformers: it adds nothing from its attention."""

    def __init__(self, block):
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.inner = [block]

    def forward(self, x, *args, **keywords):
        y = self.layernorm_after(x)
        y = self.mlp(y) if hasattr(self, "mlp") else self.output.dense(self.intermediate(y))
        return x + 3 * y


def namesake(model):
    holder = model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers
    for i, block in enumerate(list(holder)):
        holder[i] = ViTLayer(block)


class Adapter(nn.Module):
    """A low-rank branch beside a layer, as adapters are added."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer
        self.down, self.up = (nn.Linear(a, b, bias=False) for a, b in ((layer.in_features, 2), (2, layer.out_features)))
        nn.init.normal_(self.up.weight, std=0.3)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapter_beside_fc1(model):
    for block in blocks(model):
        name = "fc1" if hasattr(mlp(block), "fc1") else "dense"
        setattr(mlp(block), name, Adapter(getattr(mlp(block), name)))


class Doubling(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def another_norm(model):
    for block in blocks(model):
        block.layernorm_after.__class__ = Doubling


def one_class_patched(model):
    """The very class of transformers, with another forward: nothing but running it shows that."""
    kind = type(mlp(blocks(model)[0]))
    forward = kind.forward
    kind.forward = lambda self, x: 0.25 * forward(self, x)
    return lambda: setattr(kind, "forward", forward)


def registered(model):
    AttentionInterface.register("sharper", sharper)
    model.set_attn_implementation("sharper")


def replaced(model):
    AttentionInterface.register("sdpa", sharper)
    return lambda: AttentionInterface.register("sdpa", sdpa_attention_forward)


def sharper(module, query, key, value, mask, **keywords):
    return sdpa_attention_forward(module, 4 * query, key, value, mask, **keywords)


CASES = {
    scaled_mlp: r"whose code is not known",
    scaled_attention: r"whose code is not known",
    merging_block: r"derived from ViTLayer, and may compute something else",
    namesake: r"test_check\.ViTLayer is none that the native block computes",
    adapter_beside_fc1: r"lacks a layer|whose code is not known",
    another_norm: r"whose code is not known|not plain LayerNorms",
    one_class_patched: r"its native block differs from its layers by \d+\.\d% of what the block adds",
    registered: r"its attention function is 'sharper', not one of 'eager', 'sdpa'",
    replaced: r"its attention function 'sdpa' was replaced by .*sharper",
}


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_what_is_not_known_runs_layer_by_layer(tiny_vit, pixels, change, caplog):
    plain = copy.deepcopy(tiny_vit)
    undo = change(tiny_vit) or (lambda: None)
    try:
        with torch.no_grad(), caplog.at_level(logging.INFO, "fairseq"):
            quantizer = ViTQuantizer(bits=8, method="channel")
            auto = quantizer.quantize_model(tiny_vit)
            layers = ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, engine="layers")
            expected, got = layers(pixels).logits, auto(pixels).logits
            assert torch.equal(got, fuse_nothing(layers)(pixels).logits)
            assert not torch.allclose(expected, plain(pixels).logits, atol=0.1), "the change must be felt"
            assert not torch.allclose(expected, fused(plain)(pixels).logits, atol=0.1)
    finally:
        undo()
    assert quantizer.report.fused_blocks == 0
    assert not any(isinstance(module, FusedBlock) for module in auto.modules())
    reasons = fuse(copy.deepcopy(layers), "auto") if undo() is None else {}
    del reasons
    import re

    assert re.search(CASES[change], caplog.text), caplog.text


def fuse_nothing(model):
    """``model`` on the native kernels, layer by layer: what "auto" runs where no block is fused."""
    from fairseq.modules.quantization.packed import PackedLinear

    result = copy.deepcopy(model)
    for layer in result.modules():
        if isinstance(layer, PackedLinear):
            layer.use_native()
    return result


def fused(model):
    return ViTQuantizer(bits=8, method="channel").quantize_model(model, engine="auto")
