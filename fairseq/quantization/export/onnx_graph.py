"""ONNX graphs of packed models: PyTorch exports a skeleton, in which a placeholder stands for each packed layer."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.patches import PackedPatchEmbedding
from fairseq.modules.quantization.scalar.modules.replace import names_of
from fairseq.quantization.export.onnx_nodes import CONTRIB, DOMAIN, GraphBuilder
from fairseq.quantization.export.openvino_nodes import OpenVINOBuilder

OPSET = 21
ONNX_OPS = ("onnxruntime", "standard")
ATTENTION = "fairseq_onnx_attention"


class Placeholder(nn.Module):
    """Stands for a packed layer while PyTorch exports: one node, with the number of the layer.

    The node takes x, or where its rounding has no node of its own, the rounded x and the scale of each token. Models
    read the dtype of the patches' weight, which for that layer is computed before PyTorch watches.
    """

    def __init__(self, layer: PackedLinear, number: int, of_patches: bool):
        super().__init__()
        self.layer = layer
        self.number = number
        self.weight = layer.dequantize() if of_patches else None

    def dequantize(self) -> Tensor:
        assert self.weight is not None
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        layer, inputs = self.layer, [x]
        if layer.input_factor is not None:
            inputs = [x * layer.input_factor]
        if not has_rounding_node(layer):
            rounded, scale = layer.input_grid.quantize(inputs[0])
            inputs = [layer.input_grid.centre(rounded), scale.expand(*x.shape[:-1], 1)]
        shape = (*x.shape[:-1], layer.out_features)
        result: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::PackedLinear", inputs, {"number": self.number}, dtype=x.dtype, shape=shape, version=1
        )
        return result


def has_rounding_node(layer: PackedLinear) -> bool:
    """Whether the placeholder's node takes x as it is: rounding at 8 bits, or none."""
    return layer.config.activations is None or layer.config.activation_bits == 8


def onnx_model(
    wrapper: nn.Module, inputs: dict[str, Tensor], outputs: list[str], dynamic_shapes: Any, ops: str = "onnxruntime"
) -> Any:
    """The ONNX model of a portable packed model.

    Args:
        wrapper: takes the inputs as positional arguments and returns a tuple of tensors; it is not changed.
        inputs: by name, the batch first and at least 2.
        outputs: their names.
        dynamic_shapes: as ``torch.export`` takes them.
        ops: "standard" uses operators of ONNX only; "onnxruntime" also those that onnxruntime adds; "openvino" those
            of ONNX, in the forms that OpenVINO leaves as integers.
    """
    wrapper = copy.deepcopy(wrapper)
    layers: list[PackedLinear] = []
    names: list[str] = []
    patches = {part.linear for part in wrapper.modules() if isinstance(part, PackedPatchEmbedding)}
    for name, layer in list(wrapper.named_modules()):
        if isinstance(layer, PackedLinear):
            for alias in names_of(wrapper, layer):
                wrapper.set_submodule(alias, Placeholder(layer, len(layers), layer in patches))
            layers.append(layer)
            names.append(name.removeprefix("model."))
    with fast_attention(wrapper) if ops == "onnxruntime" else contextlib.nullcontext():
        program = torch.onnx.export(
            wrapper, tuple(inputs.values()), dynamo=True, dynamic_shapes=dynamic_shapes, opset_version=OPSET,
            input_names=list(inputs), output_names=outputs, verbose=False,
        )  # fmt: skip
    assert program is not None
    if ops == "openvino":
        return OpenVINOBuilder(program.model_proto, layers, names).build()
    return GraphBuilder(program.model_proto, layers, names, ops).build()


@contextlib.contextmanager
def fast_attention(wrapper: nn.Module) -> Iterator[None]:
    """Let the models of transformers in ``wrapper`` use onnxruntime's MultiHeadAttention, where they can."""
    modeling = sys.modules.get("transformers.modeling_utils")
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    model: Any = getattr(wrapper, "model", None)
    if functions is None or not hasattr(model, "set_attn_implementation"):
        yield
        return
    plain = functions["sdpa"]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **settings: Any) -> Any:
        """(batch, heads, tokens, d) each -> (batch, tokens, heads, d)."""
        scaling = settings.get("scaling")
        if mask is not None or getattr(module, "is_causal", True) or not query.shape == key.shape == value.shape:
            return plain(module, query, key, value, mask, **settings)
        batch, heads, tokens, width = query.shape
        flat = [t.transpose(1, 2).reshape(batch, tokens, heads * width) for t in (query, key, value)]
        attributes: dict[str, Any] = {"num_heads": heads, "scale": float(width**-0.5 if scaling is None else scaling)}
        y = torch.onnx.ops.symbolic(
            f"{CONTRIB}::MultiHeadAttention", flat, attributes, dtype=query.dtype, shape=flat[0].shape, version=1
        )
        return y.reshape(batch, tokens, heads, width), None

    functions[ATTENTION] = attend
    try:
        with contextlib.suppress(ValueError, KeyError, AttributeError):  # a model that cannot choose keeps its own
            model.set_attn_implementation(ATTENTION)
        yield
    finally:
        del functions[ATTENTION]
