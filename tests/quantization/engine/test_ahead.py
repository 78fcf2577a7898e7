"""Blocks that follow one another in one native call: what they return, and when they run one by one after all."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import families
import pytest
import torch
import transformers
from known_blocks import inputs

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed.kernels import library, native, native_calls
from fairseq.quantization.architectures.forward import call
from fairseq.quantization.engine import ahead
from fairseq.quantization.engine.fused_block import FusedBlock

pytestmark = pytest.mark.skipif(not native.levels(), reason=library.NOT_BUILT)


@pytest.fixture
def lengths(monkeypatch):
    """How many blocks each native call was of."""
    seen, run = [], native_calls.run_blocks

    def counted(*args, **kwargs):
        seen.append(len(args[0]))
        return run(*args, **kwargs)

    monkeypatch.setattr(native_calls, "run_blocks", counted)
    return seen


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**families.BLOCK, **families.PICTURE, "num_hidden_layers": 4})
    return ViTQuantizer(bits=8, method="channel").quantize_model(
        transformers.ViTForImageClassification(config).eval(), engine="fused"
    )


@pytest.fixture
def model(built):
    return ViTQuantizer.optimize(built)  # a copy, of which nothing has run


@pytest.fixture
def trusted(monkeypatch):
    """Functions of this file may call blocks one after the other, as those of transformers may."""
    monkeypatch.setattr(ahead, "KNOWN", (*ahead.KNOWN, __name__))


def tensors(output):
    if isinstance(output, torch.Tensor):
        yield output
    else:
        for part in output.values() if isinstance(output, dict) else output or ():
            yield from tensors(part)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def logits(model):
    with torch.no_grad():
        return model(families.pictures(2)).logits


def one_by_one(model, forward=logits):
    """What a copy gives that never computes ahead."""
    other = ViTQuantizer.optimize(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "MOST_BYTES", 0)
        forward(other)
        return forward(other)


def test_blocks_run_in_one_call_once_they_were_seen_to_follow(model, lengths, monkeypatch):
    expected = logits(model)
    assert lengths == [1, 1, 1, 1]
    assert torch.equal(logits(model), expected)
    assert torch.equal(one_by_one(model), expected)
    assert lengths[4:] == [4] + 8 * [1]
    del lengths[:]
    with torch.inference_mode():
        states = model(families.pictures(2), output_hidden_states=True).hidden_states
    assert sum(lengths) == 4  # one by one where transformers 4 takes the place of their forward
    del lengths[:]
    for block, x, y in zip(blocks(model), states[:-1], states[1:], strict=True):
        assert torch.equal(block._native.run(x.clone(), block._native.call(x, (), {})), y)
    monkeypatch.setattr(ahead, "MOST_BYTES", 2 * (states[0].numel() * 4 + 1))
    assert torch.equal(logits(model), expected)
    assert lengths[4:] == [2, 2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hidden_states_that_are_written_to_in_between_are_what_the_next_block_takes(model, trusted, mode):
    def forward(model):
        def add(module, args, output):
            output.add_(1)
            return output

        with mode(), blocks(model)[1].register_forward_hook(add):
            return model(families.pictures(2)).logits

    plain = logits(model)
    logits(model)
    changed = forward(model)
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, one_by_one(model, forward))

    def inside():  # by the encoder itself, where no hook tells that somebody is there
        first, second = blocks(model)[:2]
        with mode():
            x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
            y = first(x)
            before = second(y.clone())
            y.add_(1)
            return before, second(y), second(y.clone())

    logits(model)
    before, got, expected = inside()
    assert torch.equal(got, expected)
    assert not torch.equal(got, before)


def test_what_changes_between_two_calls_is_seen(model):
    logits(model)
    logits(model)
    with torch.no_grad():
        for change in (
            lambda block: block.layernorm_before.weight.mul_(2),
            lambda block: block.get_submodule(block._native.plan.roles["fc1"]).scale.mul_(2),
            lambda block: setattr(block.layernorm_after, "eps", 0.5),
        ):
            before = logits(model)
            change(blocks(model)[2])
            after = logits(model)
            assert not torch.equal(after, before)
            assert torch.equal(after, one_by_one(model))


def scale(model):
    with torch.no_grad():
        blocks(model)[2].layernorm_before.weight.mul_(2)


def load(model):
    state = model.state_dict()
    key = next(key for key in state if key.startswith("vit.") and ".2." in key and key.endswith("before.weight"))
    model.load_state_dict({**state, key: state[key].flip(0) + 1})


def hook(model):
    blocks(model)[2].layernorm_after.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [scale, load, hook])
def test_what_a_hook_or_a_user_changes_between_two_blocks_is_seen(model, change):
    logits(model)
    logits(model)
    other, x = ViTQuantizer.optimize(model), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    change(other)
    with torch.no_grad():
        y = blocks(model)[1](x)
        change(model)
        assert torch.equal(blocks(model)[2](y), blocks(other)[2](y.clone()))  # called from here
    fresh = ViTQuantizer.optimize(model)
    logits(fresh)
    logits(fresh)
    expected = ViTQuantizer.optimize(fresh)
    handle = blocks(fresh)[1].register_forward_hook(lambda *_: change(fresh))
    changed = logits(fresh)
    handle.remove()
    change(expected)
    assert torch.equal(changed, one_by_one(expected))


def test_another_function_calls_the_next_block(model, trusted, lengths):
    """Between the two anything may have happened."""
    logits(model)
    first, second = blocks(model)[:2]
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))

    def inside():
        return first(x)

    with torch.no_grad():
        y = inside()
        assert lengths[-1] == 4
        second.layernorm_before.weight.mul_(2)
        assert torch.equal(second(y), second(y.clone()))


def test_a_hook_may_write_where_no_version_counts(model):
    def forward(model):
        with blocks(model)[0].register_forward_hook(lambda module, args, output: output.data.mul_(3)):
            return logits(model)

    plain = logits(model)
    logits(model)
    changed = forward(model)
    assert not torch.equal(changed, plain)
    assert torch.equal(changed, one_by_one(model, forward))


def test_other_arguments_than_the_first_block_had(model, trusted):
    first, second = blocks(model)[:2]
    logits(model)
    with torch.no_grad():
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
        mask = torch.zeros(1, 1, 5, 5)
        mask[..., 3:] = -torch.inf
        name = next(name for name in first._native.calls.names if "mask" in name)
        y = first(x, **{name: mask})
        expected = second(y.clone())
        assert torch.equal(second(y), expected)
        second(first(x))
        y = first(x)
        expected = second(y.clone(), **{name: mask})
        assert torch.equal(second(y, **{name: mask}), expected)
        second(first(x, **{name: mask}), **{name: mask})
        y = first(x, **{name: mask})
        mask[..., 2:] = -torch.inf  # the same tensor, and other numbers
        expected = second(y.clone(), **{name: mask})
        assert torch.equal(second(y, **{name: mask}), expected)


def test_gradients_that_are_asked_for_in_between(model, trusted):
    first, second = blocks(model)[:2]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    logits(model)
    y = first(torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)))
    y.requires_grad_()
    second(y).sum().backward()
    assert y.grad is not None
    logits(model)
    with torch.no_grad():
        y = first(torch.randn(2, 5, 24))
    assert ahead._records[id(y)][1].output is not None
    second.layernorm_before.weight.requires_grad_()
    second(y).sum().backward()
    assert second.layernorm_before.weight.grad is not None


def test_training_mode_in_between(model, trusted):
    first, second = blocks(model)[:2]
    logits(model)
    with torch.no_grad():
        y = first(torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)))
        expected = second(y.clone())
        for module in second.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        second.train()
        assert not torch.equal(second(y), expected)


def test_blocks_that_nobody_calls_are_no_longer_computed(model, trusted, lengths):
    logits(model)
    x = torch.randn(2, 5, 24)
    del lengths[:]
    with torch.no_grad():
        for _ in range(ahead.PATIENCE + 2):
            blocks(model)[2](blocks(model)[1](x))
    assert lengths == [3] * ahead.PATIENCE + [2, 2]


def test_a_block_that_follows_itself(model, trusted, lengths):
    block = blocks(model)[0]
    with torch.no_grad():
        x = torch.randn(2, 5, 24)
        expected = block(block(block(x).clone()).clone())
        for _ in range(3):
            assert torch.equal(block(block(block(x))), expected)
    assert set(lengths) == {1}


def test_another_order_is_found_out(model, trusted, lengths):
    a, b, c, _ = blocks(model)
    logits(model)
    with torch.no_grad():
        x = torch.randn(2, 5, 24)
        expected = b(c(a(x).clone()).clone())
        for _ in range(3):
            assert torch.equal(b(c(a(x))), expected)
    assert lengths[-1] == 3


def test_blocks_of_other_heads_in_one_call(lengths):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**{**families.BLOCK, **families.PICTURE, **sizes})
    ).eval()
    layers = model.vit.layers if hasattr(model.vit, "layers") else model.vit.encoder.layer
    for attention in (module for module in layers[2].modules() if hasattr(module, "num_attention_heads")):
        attention.num_attention_heads, size = 1, 48  # instead of 3 heads of 16
        attention.attention_head_size, attention.scaling = size, size**-0.5
    fused = ViTQuantizer(bits=8, method="channel").quantize_model(model, engine="fused")
    expected = one_by_one(fused)
    del lengths[:]
    assert all(torch.equal(logits(fused), expected) for _ in range(3))
    assert lengths == [1, 1, 1, 1, 4, 4]


@pytest.mark.parametrize("change", ["one head", "eager"])
def test_causal_blocks_that_are_not_alike(change):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 3}
    vision = {**families.BLOCK, **families.PICTURE}
    config = transformers.CLIPConfig(text_config={**families.TEXT, **sizes}, vision_config=vision, projection_dim=20)
    model = transformers.CLIPModel(config).eval()
    layers = [module for name, module in model.named_modules() if "text" in name and name.endswith("self_attn")]
    if change == "one head":  # a mask is a table of all heads there
        layers[0].num_heads, layers[0].head_dim, layers[0].scale = 1, 48, 48**-0.5
    else:  # which knows nothing of a causal mask that is asked for
        layers[1].config = copy.deepcopy(layers[1].config)
        layers[1].config._attn_implementation = "eager"
    fused = ViTQuantizer(bits=8, method="channel", towers="all").quantize_model(model, engine="fused")

    def states(model):
        with torch.no_grad():
            return model.text_model(input_ids=families.prompts()).last_hidden_state

    expected = one_by_one(fused, states)
    assert all(torch.equal(states(fused), expected) for _ in range(3))


def test_nothing_outlives_hidden_states(model, trusted):
    logits(model)
    with torch.no_grad():
        y = blocks(model)[0](torch.randn(2, 5, 24))
    kept = weakref.ref(ahead._records[id(y)][1].output)
    assert kept() is not None
    del y
    gc.collect()
    assert kept() is None


def test_threads_take_what_is_theirs(model):
    logits(model)
    pictures = [families.pictures(2), families.pictures(2).flip(-1)]
    with torch.no_grad():
        expected = [model(x).logits for x in pictures]

    def alike(which):
        with torch.no_grad():
            return all(torch.equal(model(pictures[which]).logits, expected[which]) for _ in range(30))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(alike, (0, 1, 0)))


@pytest.mark.parametrize(
    "name", ["beit", "dinov3", "clip-vision", "timm-vit", "timm-beit", "timm-eva", "siglip-vision", "swin"]
)
def test_families_in_one_call(name, lengths):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    quantizer = ViTQuantizer(bits=8, method="channel", towers="all")
    model = families.build(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "position_bias_table" in key:
                parameter.normal_()  # they begin as zeros, and each block has its own
    fused = quantizer.quantize_model(model, engine="fused")
    given, outputs = inputs(fused, name), []
    with torch.no_grad():
        for _ in range(3):
            del lengths[:]
            outputs.append(call(fused, given))
    assert lengths == ([1] * 4 if name == "swin" else [2])  # windows of one block share rows with those of another
    values = [list(tensors(output)) for output in outputs]
    for later in values[1:]:
        assert all(map(torch.equal, later, values[0]))
