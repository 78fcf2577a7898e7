"""Fused blocks of weight-only layers, which round their input to bfloat16 where others round it to integers."""

from fnmatch import fnmatchcase

import pytest
import torch
from bounds import rms
from families import shortened
from known_blocks import count_native
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed.kernels import library, native, native_calls
from fairseq.quantization.engine import check
from fairseq.quantization.engine.fuse import fuse
from fairseq.quantization.engine.fused_block import FusedBlock

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)
HALF = 2.0**-8
"""Relative error of a number rounded to bfloat16, at most."""


def blocks(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


calls = pytest.fixture(count_native, name="calls")


def by_hand(block, x):
    """What a fused block computes, in float64 but for the numbers that its products take, which are of bfloat16."""
    layers = [block.get_submodule(path) for path in block.plan.layers]

    def half(x):
        return x.bfloat16().double()

    def run(layer, x):
        x = x if layer.input_factor is None else x * layer.input_factor.double()
        return half(x) @ layer.weight_matrix.dequantize().double().T + layer.bias.double()

    def norm(module, x):
        return nn.functional.layer_norm(x, x.shape[-1:], module.weight.double(), module.bias.double(), module.eps)

    query, key, value, output, fc1, fc2 = layers
    h = norm(block.layernorm_before, x)
    heads = (half(run(part, h)).unflatten(-1, (block.plan.heads, -1)).transpose(1, 2) for part in (query, key, value))
    q, k, v = heads
    scores = q @ k.transpose(2, 3) * block.plan.scaling
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    attended = half(weights) @ v / weights.sum(-1, keepdim=True)
    x = x + run(output, attended.transpose(1, 2).flatten(2))
    return x + run(fc2, nn.functional.gelu(run(fc1, norm(block.layernorm_after, x))))


@pytest.mark.parametrize(
    "settings",
    [{"bits": 8}, {"bits": 8, "method": "channel"}, {"bits": 5}, {"bits": 4, "method": "channel"}, {"bits": 2},
     {"bits": 4, "method": "channel", "group_size": 32}],
    ids=str,
)  # fmt: skip
def test_a_block_is_its_parts(tiny_vit, settings, calls):
    quantizer = ViTQuantizer(**settings, activations=None, rounding="nearest")
    fused = quantizer.quantize_model(tiny_vit)
    assert quantizer.report.fused_blocks == len(blocks(fused)) == 2
    calls[0] = 0
    plain = [m for m in ViTQuantizer.dequantize_model(fused).modules() if type(m).__name__ == "ViTLayer"]
    for block, floating in zip(blocks(fused), plain, strict=True):
        x = torch.randn(4, 17, 24, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            got, expected, unrounded = block(x), by_hand(block, x.double()), floating(x)
        unrounded = unrounded[0] if isinstance(unrounded, tuple) else unrounded
        # A number on the edge rounds to the other side: one weight of attention in 50, known to 7.5e-5 each, so that
        # half of the tokens have one. In the others only float32 and the GELU round.
        assert float((got - expected).abs().amax(-1).quantile(0.1)) < 1e-5 * float(expected.abs().max())
        # Six layers, whose inputs round, and attention, whose three factors and weights do, all by HALF at most.
        added = rms(unrounded - x)
        assert 0 < rms(got - unrounded) < 10**0.5 * HALF * added
    assert calls == [2]


def test_a_model_gives_what_its_layers_give(tiny_vit, pixels, calls):
    quantizer = ViTQuantizer(bits=8, method="channel", activations=None)
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    exact = ViTQuantizer.dequantize_model(layers)
    torch.testing.assert_close(logits(layers, pixels), logits(exact, pixels), rtol=1e-4, atol=1e-5)
    calls[0] = 0
    rounded = logits(fused, pixels)
    assert calls == [2]
    assert 0 < rms(rounded - logits(exact, pixels)) < 24**0.5 * HALF * rms(logits(exact, pixels))
    half = fused.to(torch.bfloat16)
    assert logits(half, pixels.bfloat16()).dtype == torch.bfloat16
    assert calls == [4]


@pytest.mark.parametrize("engine", ["auto", "fused"])
def test_weight_only_and_integer_layers_in_one_block(tiny_vit, pixels, engine, calls):
    names = {"*fc2": {"activations": None}, "*.output.dense": {"activations": None}, "*o_proj": {"activations": None}}
    names = {glob: value for glob, value in names.items() if _matches(tiny_vit, glob)}
    quantizer = ViTQuantizer(bits=8, method="channel", overrides=names)
    mixed, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in (engine, "layers"))
    kinds = [block.get_submodule(path).config.activations for block in blocks(mixed) for path in block.plan.layers]
    assert kinds == ["dynamic", "dynamic", "dynamic", None, "dynamic", None] * 2
    exact = logits(ViTQuantizer.dequantize_model(layers), pixels)
    calls[0] = 0
    got, expected = logits(mixed, pixels), logits(layers, pixels)
    assert calls == [2]
    assert rms(got - expected) < 2 * rms(expected - exact)  # see bounds.flips


def test_layers_that_read_one_tensor_round_it_alike(tiny_vit, pixels):
    glob = next(name for name in ("*attention.key", "*k_proj") if _matches(tiny_vit, name))
    quantizer = ViTQuantizer(bits=8, method="channel", overrides={glob: {"activations": None}})
    model = quantizer.quantize_model(tiny_vit)
    reason = "its query, key and value layers round their input differently"
    assert list(quantizer.report.not_fused.values()) == [reason] * 2
    assert logits(model, pixels).isfinite().all()


def test_where_bits_must_be_the_same_everywhere_its_layers_run(tiny_vit, pixels, calls, monkeypatch):
    quantizer = ViTQuantizer(bits=8, method="channel", activations=None)
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    calls[0] = 0
    rounded = logits(fused, pixels)
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    assert torch.equal(logits(fused, pixels), logits(layers, pixels))
    assert calls == [2]
    reasons = set(fuse(quantizer.quantize_model(tiny_vit), "auto").values())
    assert reasons == {
        "its query layer: activations=None: its products are of bfloat16, which "
        "FAIRSEQ_QUANTIZATION_ATTENTION=float32 rules out"
    }
    monkeypatch.delenv(native_calls.ATTENTION)
    assert torch.equal(logits(fused, pixels), rounded)
    assert calls == [4]


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.matrix), "aot_eager"])
def test_a_compiler_records_the_native_block(tiny_vit, pixels, backend, monkeypatch):
    model, quantizer = shortened(tiny_vit), ViTQuantizer(bits=4, method="channel", activations=None)
    fused, layers = (quantizer.quantize_model(model, engine=engine) for engine in ("fused", "layers"))
    expected = logits(fused, pixels)
    torch.compiler.reset()
    torch.testing.assert_close(logits(torch.compile(fused, backend=backend), pixels), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    torch.compiler.reset()
    got = logits(torch.compile(fused, backend=backend), pixels)
    torch.testing.assert_close(got, logits(layers, pixels), rtol=1e-5, atol=1e-6)


def test_a_trace_is_in_float(tiny_vit, pixels):
    quantizer = ViTQuantizer(bits=8, method="channel", activations=None)
    fused, layers = (quantizer.quantize_model(tiny_vit, engine=engine) for engine in ("fused", "layers"))
    traced = torch.jit.trace(fused, pixels)
    assert "fairseq::" not in str(traced.inlined_graph)
    with torch.no_grad():
        torch.testing.assert_close(traced(pixels)[0], logits(layers, pixels), rtol=1e-5, atol=1e-6)


def test_the_comparison_allows_for_bfloat16_alone(tiny_vit, monkeypatch):
    """Rounding to 8 bits would hide that a block adds a twentieth too much."""
    quantizer = ViTQuantizer(bits=8, method="channel", activations=None)
    model, run = quantizer.quantize_model(tiny_vit, engine="layers"), native_calls.run_blocks
    monkeypatch.setattr(check, "_checked", {})
    monkeypatch.setattr(
        native_calls, "run_blocks", lambda blocks, x, *rest: [x + 1.05 * (run(blocks, x, *rest)[0] - x)]
    )
    for reason in fuse(model, "auto").values():
        assert reason.startswith("its native block differs from its layers by 5.0% of what the block adds")


def _matches(model, glob):
    return any(fnmatchcase(name, glob) for name, _ in model.named_modules())
