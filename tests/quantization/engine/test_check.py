"""Code that the engine does not know: such blocks run layer by layer, and the report says what is not known."""

import copy
import re

import pytest
import torch
from families import shortened
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import library, native
from fairseq.quantization.engine import check
from fairseq.quantization.engine.fused_block import FusedBlock
from fairseq.quantization.engine.native_block import NativeBlock

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)


def blocks(model):
    return model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers


def attention(block):
    """The module of a block that calls the attention function, in either generation."""
    return getattr(block.attention, "attention", block.attention)


def mlp(block):
    """The module of a block that holds fc1."""
    return block.mlp if hasattr(block, "mlp") else block.intermediate


def derive(module, forward):
    """Give a module a class of its own, derived from the one it has, with another forward."""
    kind = type(module)
    members = {"forward": lambda self, *args, **keywords: forward(kind, self, *args, **keywords)}
    module.__class__ = type(f"My{kind.__name__}", (kind,), {**members, "__module__": __name__})


def scaled_mlp(model):
    for block in blocks(model):
        derive(mlp(block), lambda kind, self, x: 0.25 * kind.forward(self, x))


def scaled_attention(model):
    def forward(kind, self, x, *args, **keywords):
        context, weights = kind.forward(self, x, *args, **keywords)
        return 0.25 * context, weights

    for block in blocks(model):
        derive(attention(block), forward)


def merged_tokens(model):
    def forward(kind, self, x, *args, **keywords):
        return kind.forward(self, torch.cat([x[:, :1], (x[:, 1::2] + x[:, 2::2]) / 2], 1), *args, **keywords)

    for block in blocks(model):
        derive(block, forward)


class ViTLayer(nn.Module):
    """Only called like the class of transformers, with parts of one: it has no attention."""

    def __init__(self, block):
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)

    def forward(self, x, *args, **keywords):
        y = self.layernorm_after(x)
        return x + (self.mlp(y) if hasattr(self, "mlp") else self.output.dense(self.intermediate(y)))


def namesake(model):
    for i, block in enumerate(list(blocks(model))):
        blocks(model)[i] = ViTLayer(block)


class Adapter(nn.Module):
    """A low-rank branch beside a layer, as adapters are added."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.down = layer, nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)
        nn.init.normal_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapter(model):
    for block in blocks(model):
        name = "fc1" if hasattr(mlp(block), "fc1") else "dense"
        setattr(mlp(block), name, Adapter(getattr(mlp(block), name)))


class Doubling(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def another_norm(model):
    for block in blocks(model):
        block.layernorm_after.__class__ = Doubling


class Wrapper(nn.Module):
    """A block in a module of one's own, which scales what the block adds."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args, **keywords):
        y = self.block(x, *args, **keywords)
        return x + 0.25 * ((y[0] if isinstance(y, tuple) else y) - x)


def wrapped(model):
    """What is wrapped is fused, as it is what it was; the wrapper runs around it."""
    for i, block in enumerate(list(blocks(model))):
        blocks(model)[i] = Wrapper(block)


def class_patched(model):
    """The very class of transformers, with another forward: nothing but running it shows that."""
    kind = type(mlp(blocks(model)[0]))
    forward = kind.forward
    kind.forward = lambda self, x: 0.25 * forward(self, x)
    return lambda: setattr(kind, "forward", forward)


def sharper(module, query, key, value, mask, **keywords):
    return sdpa_attention_forward(module, 8 * query, key, value, mask, **keywords)


def registered(model):
    AttentionInterface.register("sharper", sharper)
    model.set_attn_implementation("sharper")


def replaced(model):
    AttentionInterface.register("sdpa", sharper)
    return lambda: AttentionInterface.register("sdpa", sdpa_attention_forward)


CASES = {
    scaled_mlp: r"its (mlp|intermediate) is a My\w+, whose code is not known",
    scaled_attention: r"its attention(\.attention)? is a My\w+, whose code is not known",
    merged_tokens: r"its class \S+ is derived from ViTLayer, and may compute something else",
    namesake: r"its class \S+test_check\.ViTLayer is none that the native block computes",
    adapter: r"its fc1 layer is not packed",
    another_norm: r"its layernorm_after is a Doubling, whose code is not known",
    class_patched: r"its native block differs from its layers by \d+\.\d% of what the block adds",
    registered: r"its attention function is 'sharper', not one of 'eager', 'sdpa'",
    replaced: r"its attention function 'sdpa' was replaced by <function sharper",
    wrapped: None,
}


def logits(model, pixels):
    with torch.no_grad():
        return model(pixels).logits


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_what_is_not_known_runs_layer_by_layer(tiny_vit, pixels, change):
    plain = logits(tiny_vit, pixels)
    undo = change(tiny_vit) or (lambda: None)
    quantizer = ViTQuantizer(bits=8, method="channel")
    try:
        auto = quantizer.quantize_model(tiny_vit)
        report = quantizer.report
        layers = quantizer.quantize_model(tiny_vit, engine="layers")
        got, expected, exact = (logits(model, pixels) for model in (auto, layers, tiny_vit))
    finally:
        undo()
    assert (exact - plain).abs().max() > 5 * (expected - exact).abs().max(), "the change must be felt"
    if CASES[change] is None:
        assert report.fused_blocks == 2
        # flips of rounding, and attention in bfloat16: as much as rounding does
        assert (got - expected).abs().max() < 2 * (expected - exact).abs().max()
        return
    assert (report.fused_blocks, len(report.not_fused)) == (0, 2)
    assert all(re.match(CASES[change], reason) for reason in report.not_fused.values())
    assert "Not fused: 2 encoder blocks" in str(report)
    assert not any(isinstance(module, FusedBlock) for module in auto.modules())
    natively = copy.deepcopy(layers)
    for layer in natively.modules():
        if isinstance(layer, PackedLinear):
            layer.use_native()
    if change not in (class_patched, replaced):  # undone by now
        assert torch.equal(got, logits(natively, pixels))


def test_what_changes_after_a_block_was_fused_is_seen(tiny_vit, pixels):
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused = quantizer.quantize_model(tiny_vit, engine="fused")
    layers = quantizer.quantize_model(tiny_vit, engine="layers")
    for change in (scaled_mlp, scaled_attention, registered, class_patched, replaced):
        changed, by_layers = copy.deepcopy(fused), copy.deepcopy(layers)
        before = logits(changed, pixels)
        undo = change(changed) or (lambda: None)
        try:
            if change not in (class_patched, replaced):
                change(by_layers)
            got, expected = logits(changed, pixels), logits(by_layers, pixels)
        finally:
            undo()
        assert (got - before).abs().max() > 3 * (got - expected).abs().max(), change.__name__
        if undo() is None and change in (class_patched, replaced):
            assert torch.equal(logits(changed, pixels), before)  # fused again


@pytest.mark.parametrize("change", ["eps", "scaling", "class", registered, class_patched, replaced])
def test_a_compiler_sees_what_changed_since(tiny_vit, pixels, change):
    """A graph is recorded after the change: it must not hold the native block of what was there before."""
    quantizer = ViTQuantizer(bits=8, method="channel")
    fused = quantizer.quantize_model(shortened(tiny_vit), engine="fused")
    before = logits(fused, pixels)
    undo = change(fused) if callable(change) else None
    for block in [] if callable(change) else blocks(fused):
        if change == "eps":
            block.layernorm_before.eps = 1.0
        elif change == "scaling":
            attention(block).scaling *= 8
        else:
            derive(mlp(block), lambda kind, self, x: 0.25 * kind.forward(self, x))
    torch.compiler.reset()
    try:
        compiled = torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)
        got = logits(compiled, pixels)  # a copy has not run yet
        expected = logits(fused, pixels)
        with torch.no_grad():
            recorded = [torch.export.export(each, (pixels,)).module() for each in (fused, copy.deepcopy(fused))]
            exported = [each(pixels) for each in recorded]
    finally:
        (undo or (lambda: None))()
    for found in (got, *(output.logits if hasattr(output, "logits") else output[0] for output in exported)):
        assert (expected - before).abs().max() > 5 * (found - expected).abs().max()


@pytest.mark.parametrize("activations", ["dynamic", "static", None])
def test_a_native_block_that_is_wrong_is_not_fused(tiny_vit, pixels, monkeypatch, activations):
    """However few levels an input has: one that adds nothing, or half of what it should."""
    run = NativeBlock.run
    for bits in range(2, 9) if activations else (8,):
        quantizer = ViTQuantizer(
            bits=8, method="channel", activations=activations, activation_bits=bits, rounding="nearest"
        )
        calibration = pixels if activations == "static" else None
        for share, fused in ((0.0, 0), (0.5, 0), (1.0, 2)):
            with monkeypatch.context() as patch:
                patch.setattr(check, "_checked", {})
                patch.setattr(NativeBlock, "run", lambda self, x, c, share=share: x + share * (run(self, x, c) - x))
                quantizer.quantize_model(tiny_vit, calibration=calibration)
            assert quantizer.report.fused_blocks == fused, (bits, share)


def test_a_block_that_adds_nothing_is_fused(tiny_vit):
    with torch.no_grad():
        for block in blocks(tiny_vit):
            for name, parameter in block.named_parameters():
                if "fc2" in name or "output.dense" in name or "o_proj" in name:
                    parameter.zero_()
    quantizer = ViTQuantizer(bits=8, method="channel")
    quantizer.quantize_model(tiny_vit)
    assert quantizer.report.fused_blocks == 2
    assert not quantizer.report.not_fused


def test_hooks_do_not_see_the_comparison(tiny_vit):
    calls = []
    for block in blocks(tiny_vit):
        block.register_forward_hook(lambda *args: calls.append(1))
    quantizer = ViTQuantizer(bits=8, method="channel")  # for which nothing has to be run
    quantizer.quantize_model(tiny_vit, engine="fused")
    assert not calls
