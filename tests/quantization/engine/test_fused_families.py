"""Blocks of every family as native ones: what is passed in, and comes out."""

import copy

import families
import pytest
import torch
import transformers
from bounds import rms
from known_blocks import inputs, known_blocks, run
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed.kernels import library, native, native_calls
from fairseq.quantization.engine import check, native_block
from fairseq.quantization.engine.fuse import fuse
from fairseq.quantization.engine.fused_block import FusedBlock

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach the native block."""
    seen, translated = [], native_block.NativeBlock.translated

    def record(self, call):
        seen.append(call)
        return translated(self, call)

    monkeypatch.setattr(native_block.NativeBlock, "translated", record)
    monkeypatch.setattr(check, "_checked", {})
    return seen


def quantized(name, **settings):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model, quantizer = families.build(name), ViTQuantizer(bits=8, method="channel", towers="all", **settings)
    layers = quantizer.quantize_model(model, engine="layers")
    return layers, quantizer.optimize(layers)


def items(output):
    return output if isinstance(output, tuple) else (output,)


def assert_alike(got, expected, x):
    """The same structure; as near as the reference of a block is to it, but for some roundings to the other side."""
    assert type(got) is type(expected)
    assert [item is None for item in items(got)] == [item is None for item in items(expected)]
    assert items(got)[0].dtype == items(expected)[0].dtype
    assert rms(items(got)[0] - items(expected)[0]) < 0.02 * rms(items(expected)[0] - x)


@pytest.mark.parametrize("name", families.NAMES)
def test_every_known_block_is_fused(name, calls):
    layers, fused = quantized(name)
    known = known_blocks(layers)
    assert {name for name, module in fused.named_modules() if isinstance(module, FusedBlock)} == set(known)
    calls.clear()
    given = inputs(layers, name)
    seen, expected = run(fused, **given), run(layers, **given)
    assert len(calls) == len(expected) == len(known)
    for (*_, args, kwargs, output), (_, plain, *_) in zip(seen, expected, strict=True):
        with torch.no_grad():
            assert_alike(output, plain(*args, **kwargs), args[0])


@pytest.mark.parametrize("name", ["beit", "swin", "swinv2", "dinov2", "dinov3", "timm-beit", "timm-eva"])
def test_whatever_changes_in_place_is_seen(name, calls):
    """A tensor that a table or a copy was made of, or that is read where it is."""
    layers, fused = quantized(name)
    given = inputs(layers, name)
    block, plain = (run(model, **given)[1] for model in (fused, layers))
    args, kwargs = block[2:4]
    paths = [path for path, _ in block[1].named_parameters()]
    assert paths
    for path in paths:
        with torch.no_grad():
            before = items(block[1](*args, **kwargs))[0]
            for owner in (block[1], plain[1]):
                parameter = owner.get_parameter(path)
                parameter.copy_(parameter * 1.5 + torch.linspace(0.2, 0.9, parameter.numel()).view_as(parameter))
            calls.clear()
            got, expected = block[1](*args, **kwargs), plain[1](*args, **kwargs)
        assert len(calls) == 1, path
        assert not torch.equal(items(got)[0], before), path
        assert_alike(got, expected, args[0])


def test_tables_are_made_once(calls, monkeypatch):
    for name in ("beit", "swin", "swinv2", "timm-beit", "timm-eva"):
        layers, fused = quantized(name)
        given = inputs(layers, name, 2)
        run(fused, **given)
        calls.clear()
        run(fused, **given)
        run(fused, **given)
        first, second = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        tables = [(call.rows, call.bias, call.mask) for call in first]
        if name != "timm-eva":
            assert any(table is not None for table in tables[0])
            for kept, other in zip(tables, second, strict=True):
                for a, b in zip(kept, (other.rows, other.bias, other.mask)):
                    assert (a is None and b is None) or a.data_ptr() == b.data_ptr()
        else:
            assert len({call.cos.data_ptr() for call in calls}) == 1  # of all blocks and calls


@pytest.mark.parametrize("name", ["beit-shared-bias", "dinov3", "swin"])
def test_gradients_are_those_of_the_layers(name, calls):
    layers, fused = quantized(name, quantize_classifier=False)
    given, found = inputs(layers, name), []
    for model in (fused, layers):
        for parameter in model.parameters():
            parameter.grad = None
        output = model(**given)
        (getattr(output, "logits", None) if hasattr(output, "logits") else output.last_hidden_state).sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.linalg.vector_norm(gradient - found[1][key]) <= 0.05 * torch.linalg.vector_norm(found[1][key]), key


def test_copies_keep_their_own(calls):
    layers, fused = quantized("swin")
    given = inputs(layers, "swin")
    expected = [items(output)[0] for *_, output in run(fused, **given)]
    other = copy.deepcopy(fused)
    assert all(torch.equal(items(a[-1])[0], b) for a, b in zip(run(other, **given), expected, strict=True))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "bias_table" in name:
                parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(items(run(other, **given)[0][-1])[0], expected[0])
    assert all(torch.equal(items(a[-1])[0], b) for a, b in zip(run(fused, **given), expected, strict=True))


def test_what_the_native_block_does_not_know_runs_by_layers(calls):
    layers, fused = quantized("dinov3")
    seen = run(fused, **inputs(layers, "dinov3"))
    _, block, (x, *_), kwargs, output = seen[0]
    names = [name for name in kwargs if name != "position_embeddings"]
    rest = {name: kwargs[name] for name in names}
    cos, sin = kwargs["position_embeddings"]
    calls.clear()
    with torch.no_grad():
        again = block(x, position_embeddings=(cos[None, None], sin[None, None]), **rest)  # the same, in four dimensions
    assert not calls
    assert rms(again - output) < 0.02 * rms(output - x)
    nn.init.zeros_(block.layer_scale1.lambda1)
    with torch.no_grad():
        block(x, **kwargs)
    assert calls  # with what ran behind it the last time


def derived(module):
    """The same module, of a class of one's own."""
    kind = type(module)
    module.__class__ = type(f"My{kind.__name__}", (kind,), {"__module__": __name__})


SWAPPED = {
    "block": (lambda block: derived(block), "is derived from"),
    "part": (
        lambda block: derived(next(part for part in block.children() if list(part.children()))),
        "whose code",
    ),
    "norm": (lambda block: derived(next(m for m in block.modules() if isinstance(m, nn.LayerNorm))), "whose code"),
}


@pytest.mark.parametrize("change", SWAPPED)
@pytest.mark.parametrize("name", ["swin", "dinov2", "dinov3", "clip-vision", "timm-vit", "timm-eva"])
def test_what_is_swapped_is_not_known(name, change, calls):
    layers, fused = quantized(name)
    swap, reason = SWAPPED[change]
    for block in known_blocks(layers).values():
        swap(block)
    found = [why for why in fuse(layers, "auto").values() if "none that the native block computes" not in str(why)]
    assert found
    assert all(reason in why for why in found)
    given, block = inputs(fused, name), list(known_blocks(fused).values())[1]
    run(fused, **given)
    calls.clear()
    if change != "block":  # whose class is what makes it fused
        swap(block)
        run(fused, **given)
        assert len(calls) == len(known_blocks(fused)) - 1  # that block's layers ran


def test_a_class_that_computes_something_else_shows(calls, monkeypatch):
    """Nothing but running it does: the very class of the library, with another forward."""
    for name in ("swin", "dinov2", "siglip-vision"):
        layers, _ = quantized(name)
        kind = type(next(m for m in next(iter(known_blocks(layers).values())).modules() if hasattr(m, "out_proj") or
                         hasattr(m, "o_proj") or type(m).__name__.endswith("SelfOutput")))  # fmt: skip
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *a, forward=forward, **k: halved(forward(self, *a, **k)))
        found = [why for why in fuse(layers, "auto").values() if "none that the native block" not in str(why)]
        assert len(found) == len(known_blocks(layers))
        assert all("differs from its layers by" in why for why in found)


def halved(output):
    return (0.5 * output[0], *output[1:]) if isinstance(output, tuple) else 0.5 * output


@pytest.mark.parametrize("name", ["swin", "clip-vision", "beit", "timm-vit"])
def test_attention_weights_that_a_block_returns_are_not_lost(name, calls):
    """Swin of later versions returns them whenever its attention computes any."""
    layers, _ = quantized(name)
    if hasattr(layers, "config"):
        layers.config._attn_implementation = "eager"
    extra = [items(output)[1:] for *_, output in run(layers, **inputs(layers, name))]
    found = [why for why in fuse(layers, "auto").values() if "none that the native block" not in str(why)]
    for rest, reason in zip(extra, found, strict=True):
        assert reason == ("it returns more than hidden states" if any(item is not None for item in rest) else None)


def test_a_clip_with_the_exact_gelu_is_fused(monkeypatch):
    """By the kernels themselves: its blocks are those of ViT, whatever they return in this version."""
    settings = {**families.BLOCK, **families.PICTURE, "hidden_act": "gelu"}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**settings)).eval()
    layers = ViTQuantizer(bits=8, method="channel").quantize_model(model, engine="layers")
    fused = ViTQuantizer.optimize(layers)
    assert len(known_blocks(fused)) == sum(isinstance(m, FusedBlock) for m in fused.modules()) == 2
    seen, run_blocks = [], native_calls.run_blocks
    monkeypatch.setattr(
        native_calls, "run_blocks", lambda *args, **kwargs: seen.append(1) or run_blocks(*args, **kwargs)
    )
    given = inputs(layers, "clip-vision")
    for got, expected in zip(run(fused, **given), run(layers, **given), strict=True):
        assert_alike(got[-1], expected[-1], got[2][0])
    assert len(seen) == 2
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(fused, backend="eager")(**given).last_hidden_state
        assert torch.equal(compiled, fused(**given).last_hidden_state)


@pytest.mark.parametrize(
    "name", ["vit", "beit", "swin", "swinv2", "dinov3-gated", "clip-vision", "timm-vit", "timm-eva"]
)
def test_blocks_with_exact_attention_have_the_same_bits_everywhere(name, calls, monkeypatch):
    """At every level, for any number of threads and of pictures at once."""
    monkeypatch.setenv(native_calls.ATTENTION, "float32")
    layers, fused = quantized(name)
    given, threads = inputs(layers, name), torch.get_num_threads()
    outputs = {}
    try:
        for level in native.levels():
            monkeypatch.setenv(native.ENVIRONMENT, level)
            for count in (1, 3):
                torch.set_num_threads(count)
                outputs[level, count] = [items(output)[0] for *_, output in run(fused, **given)]
    finally:
        torch.set_num_threads(threads)
    assert calls
    expected = outputs["portable", 1]
    for key, got in outputs.items():
        assert all(map(torch.equal, got, expected)), key


def test_a_compiled_block_keeps_its_position_bias():
    """A BEiT without LayerScale is like a ViT but for the bias, which its call brings."""
    settings = {**families.BLOCK, **families.PICTURE, "layer_scale_init_value": 0.0, "use_relative_position_bias": True}
    torch.manual_seed(0)
    model = transformers.BeitModel(transformers.BeitConfig(**settings), add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_(0, 2)
    layers = ViTQuantizer(bits=8, method="channel").quantize_model(model, engine="layers")
    fused = ViTQuantizer.optimize(layers)
    assert any(isinstance(module, FusedBlock) for module in fused.modules())
    given = {"pixel_values": families.pictures(2)}
    torch.compiler.reset()
    with torch.no_grad():
        expected = fused(**given).last_hidden_state
        compiled = torch.compile(fused, backend="eager")(**given).last_hidden_state
    assert rms(compiled - expected) < 0.02 * rms(expected)


def test_a_check_that_fails_is_made_again(monkeypatch):
    """A setting that is wrong is an error, and nothing is remembered of a failure that passes."""
    monkeypatch.setattr(check, "_checked", {})
    layers = ViTQuantizer(bits=8, method="channel").quantize_model(families.build("vit"), engine="layers")
    monkeypatch.setenv(native_calls.ATTENTION, "float64")
    with pytest.raises(ValueError, match="ATTENTION must be one of"):
        ViTQuantizer.optimize(layers)
    monkeypatch.delenv(native_calls.ATTENTION)
    with monkeypatch.context() as patched:
        patched.setattr(check, "_compared", lambda *args: 1 / 0)
        with pytest.raises(ValueError, match="the check of its native block fails with ZeroDivisionError"):
            ViTQuantizer.optimize(layers)
    assert any(isinstance(module, FusedBlock) for module in ViTQuantizer.optimize(layers).modules())
