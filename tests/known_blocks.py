"""The encoder blocks of a model whose class is known, and what they are called with in a forward pass."""

import contextlib

import families
import torch

from fairseq.modules.quantization.packed.kernels import native_calls
from fairseq.quantization.architectures.blocks import class_of
from fairseq.quantization.architectures.forward import call, picture_inputs
from fairseq.quantization.engine import reference_block
from fairseq.quantization.engine.calls import Calls
from fairseq.quantization.engine.plan import unfused_class
from fairseq.quantization.engine.reading import read


def known(block):
    return class_of(unfused_class(type(block)))


def known_blocks(model):
    return {name: module for name, module in model.named_modules() if known(module)}


def inputs(model, name, images=3, size=None):
    """What the model of a family is called with, in its dtype; with text where it has a tower for that."""
    pixels = families.pictures(images) if size is None else torch.randn(images, 3, *size)
    found = dict(picture_inputs(model, pixels))
    if hasattr(model, "get_text_features"):
        found["input_ids"] = families.prompts()
    if name == "encoder-decoder":
        found["decoder_input_ids"] = families.prompts()[:images]
    dtype = next(model.parameters()).dtype
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in found.items()}


@contextlib.contextmanager
def watched(model):
    """Inside, a list that grows by (name, block, args, kwargs, output) at each call of a known block."""
    seen, hooks = [], []
    for name, block in known_blocks(model).items():

        def look(block, args, kwargs, output, name=name):
            seen.append((name, block, args, kwargs, output))

        hooks.append(block.register_forward_hook(look, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def run(model, **given):
    """The calls of known blocks in a forward pass; float64 by default, without which CLIP makes no mask in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(next(model.parameters()).dtype)
    try:
        with watched(model) as seen, torch.no_grad():
            call(model, given)
    finally:
        torch.set_default_dtype(before)
    return seen


def by_reference(block, args, kwargs):
    """What the block is known to compute; None where the call is for the layers alone, a sentence for such a block."""
    spec = read(block, known(block))
    if isinstance(spec, str):
        return spec
    made = Calls(block, known(block), spec, type(block).forward).call(args[0], args[1:], kwargs)
    if made is None:
        return None
    with torch.no_grad():
        return reference_block.run(spec, made, args[0].flatten(0, 1)).view_as(args[0])


def first(output):
    return output[0] if isinstance(output, tuple) else output


def count_native(monkeypatch):
    """How many fused blocks have run natively, in a list of one number."""
    calls, run = [0], native_calls.run_blocks

    def counted(*args, **kwargs):
        calls[0] += len(args[0])
        return run(*args, **kwargs)

    monkeypatch.setattr(native_calls, "run_blocks", counted)
    return calls
