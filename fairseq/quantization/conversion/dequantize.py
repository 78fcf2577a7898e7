"""dequantize: a copy of a quantized model with plain float layers, for tools that know only those."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding
from fairseq.modules.quantization.packed.table import PackedEmbedding, PackedParameters, unpack_parameters
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, names_of
from fairseq.quantization.architectures.copies import copied
from fairseq.quantization.conversion.convert import tuple_while_tracing
from fairseq.quantization.engine.fuse import unfuse


def dequantize(model: nn.Module) -> nn.Module:
    """A copy of a quantized model with plain float layers again, which hold the rounded weights.

    For tools that know only float models, such as ``save_pretrained``. Activations are no longer rounded.

    Raises:
        TypeError: not a module.
        ValueError: nothing in ``model`` is quantized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, PackedLinear | EmulatedLinear) for module in model.modules()):
        raise ValueError("nothing in the model is quantized; pass what quantize_model returned")
    result = copied(model)
    unfuse(result)
    for key, hook in list(result._forward_hooks.items()):
        if hook is tuple_while_tracing:
            del result._forward_hooks[key]
    _dequantize_embeddings(result)
    plain: dict[int, nn.Parameter] = {}  # by the integers or weight that layers share
    for old in list(result.modules()):
        if not isinstance(old, PackedLinear | EmulatedLinear):
            continue
        dtype = next((p.dtype for p in result.parameters() if p.is_floating_point()), torch.float32)
        weight = old.dequantize() if isinstance(old, PackedLinear) else _effective_weight(old)
        new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
        shared = id(old.weight_codes if isinstance(old, PackedLinear) else old.weight)
        new.weight = plain.setdefault(shared, nn.Parameter(weight.detach().to(dtype)))
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().clone())
        carry_hooks(old, new)
        new.train(old.training)
        for alias in names_of(result, old):
            result.set_submodule(alias, new)
    return result


def _dequantize_embeddings(model: nn.Module) -> None:
    """Packed embeddings to plain ones, in place."""
    new: nn.Module
    for old in list(model.modules()):
        if isinstance(old, PackedParameters):
            unpack_parameters(old)
        if isinstance(old, PackedPatchEmbedding):
            weight, bias = old.weight, old.bias
            size, inputs = old.kernel_size, old.in_channels
            new = nn.Conv2d(inputs, old.out_channels, size, size, bias=bias is not None, device="meta")
            new.weight = nn.Parameter(weight)
            if bias is not None:
                new.bias = nn.Parameter(bias.detach().clone())
        elif isinstance(old, PackedEmbedding):
            new = nn.Embedding(old.num_embeddings, old.embedding_dim, old.padding_idx, _weight=old.weight)
        else:
            continue
        carry_hooks(old, new)
        new.train(old.training)
        for alias in names_of(model, old):
            model.set_submodule(alias, new)


def _effective_weight(layer: EmulatedLinear) -> Tensor:
    """What the layer multiplies its input by: the weight on its grid, the input factor included."""
    layer.update_range()
    weight = layer.quantized_weight()
    return weight if layer.input_factor is None else weight * layer.input_factor.to(weight.dtype)
