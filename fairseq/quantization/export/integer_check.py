"""The proof that an ONNX file is of integers: its graph, walked with the type of every value inferred."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

INTEGERS = ("BOOL", "INT", "UINT")
"""What the names of integer types begin with."""


def not_integers(model: Any, after: str | None = None) -> list[str]:
    """What in an ONNX model is not of integers, a sentence each; empty if everything is.

    Values of a floating, complex, string or unknown type, whether a node gives or reads them; floating constants and
    attributes; and subgraphs and local functions, which are not looked into.

    Args:
        model: a ModelProto. Large constants may lie in another file, which need not be there.
        after: a value in it. Only what the outputs need from there on is looked at; by default all there is.

    Raises:
        onnx.shape_inference.InferenceError: no valid model.
        ValueError: there is no such value.
    """
    onnx = importlib.import_module("onnx")
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {tensor.values.name: tensor.values.data_type for tensor in graph.sparse_initializer}
    kinds = onnx.TensorProto.DataType
    nodes, values = _needed(graph, after)

    def kind(name: str) -> str:
        return str(kinds.Name(types.get(name, kinds.UNDEFINED)))

    found = [f"{name} is of type {kind(name)}" for name in values if not kind(name).startswith(INTEGERS)]
    for node in nodes:
        found += [f"{node.op_type} {node.name}: {what}" for what in _in_attributes(node, onnx)]
    return found + [f"the function {function.name} is not looked into" for function in model.functions]


def _needed(graph: Any, after: str | None) -> tuple[list[Any], list[str]]:
    """The nodes and values that the outputs need, back to ``after``; or all."""
    if after is None:
        named = (*graph.input, *graph.output, *graph.initializer)
        inside = (name for node in graph.node for name in (*node.input, *node.output))
        sparse = (tensor.values.name for tensor in graph.sparse_initializer)
        return list(graph.node), _names((*(value.name for value in named), *inside, *sparse))
    maker = {name: node for node in graph.node for name in node.output}
    if after not in maker and after not in {value.name for value in graph.input}:
        raise ValueError(f"the model has no value {after!r}")
    wanted, nodes, values = [value.name for value in graph.output], [], []
    seen = set(wanted)
    while wanted:
        name = wanted.pop()
        values.append(name)
        node = None if name == after else maker.get(name)
        if node is not None:
            nodes.append(node)
            new = [other for other in (*node.input, *node.output) if other not in seen]
            seen.update(new)
            wanted += new
    return nodes, _names(values)


def _names(values: Iterable[str]) -> list[str]:
    """Each once; an input that is left out is called ""."""
    return [name for name in dict.fromkeys(values) if name]


def _in_attributes(node: Any, onnx: Any) -> Iterator[str]:
    kinds = onnx.AttributeProto
    for attribute in node.attribute:
        if attribute.type in (kinds.FLOAT, kinds.FLOATS):
            yield f"{attribute.name} is a floating number"
        elif attribute.type in (kinds.TENSOR, kinds.TENSORS):
            for tensor in (attribute.t, *attribute.tensors):
                name = onnx.TensorProto.DataType.Name(tensor.data_type)
                if not name.startswith((*INTEGERS, "UNDEFINED")):
                    yield f"{attribute.name} is a constant of type {name}"
        elif attribute.type not in (kinds.INT, kinds.INTS, kinds.STRING, kinds.STRINGS):
            yield f"{attribute.name} is a subgraph or a sparse constant, which is not looked into"
