"""errors_alone: what each part of a quantized model changes by itself, in the place of the float model's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.architectures.forward import evaluating, output_of
from fairseq.quantization.architectures.layers import block_of
from fairseq.quantization.architectures.separate import separated
from fairseq.quantization.evaluation.compare import moved


def errors_alone(
    original: nn.Module, quantized: nn.Module, pixel_values: Tensor, batch_size: int = 16
) -> dict[str, float]:
    """How far the output of the float model moves with one part of the quantized model in the place of its own.

    A part is an encoder block with quantized layers in it, norms included, or a quantized layer outside of blocks. So
    what equalization has moved between layers of a block is no error.

    Args:
        original: the float model; it stays as it is.
        quantized: the packed one, made from it, on the same device.
        pixel_values: (N, C, H, W).
        batch_size: pictures per run.

    Returns:
        By the part's name, in the order of the model: the norm of the output's change by that of the output.
    """
    original = separated(original)
    reference = list(_outputs(original, pixel_values, batch_size))
    size = sum(float(value.double().square().sum()) for value in reference)
    found = {}
    for name in parts(quantized):
        mixed = _with(original, quantized, name)
        outputs = _outputs(mixed, pixel_values, batch_size)
        error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(reference, outputs, strict=True))
        found[name] = (error / size) ** 0.5 if size else 0.0
    return found


def parts(quantized: nn.Module) -> list[str]:
    """The encoder blocks that hold packed layers, and the packed layers outside of blocks, in order."""
    packed = [name for name, module in quantized.named_modules() if isinstance(module, PackedLinear)]
    return list(dict.fromkeys(block_of(name) or name for name in packed))


def _with(original: nn.Module, quantized: nn.Module, name: str) -> nn.Module:
    """The float model, on the same tensors, with one part of the quantized one."""
    shared = {id(t): t for t in (*original.parameters(), *original.buffers())}
    result = copied(original, shared)
    owner, _, last = name.rpartition(".")
    setattr(result.get_submodule(owner), last, quantized.get_submodule(name))
    return result


def _outputs(model: nn.Module, pixel_values: Tensor, batch_size: int) -> Iterator[Tensor]:
    for batch in pixel_values.split(batch_size):
        with evaluating(model), torch.no_grad():
            yield output_of(model, moved(model, batch))[1].float().cpu()
