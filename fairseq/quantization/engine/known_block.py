"""KnownBlock: an encoder block whose parts were read, and whether they still are what they were."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.packed.kernels import arguments
from fairseq.quantization.architectures.blocks import class_of
from fairseq.quantization.engine.calls import Calls
from fairseq.quantization.engine.plan import (
    EACH_CALL,
    AttentionFunction,
    FusedPlan,
    attention_function,
    settings_of,
    unfused_class,
)
from fairseq.quantization.engine.reading import attention_of, read
from fairseq.quantization.engine.spec import BlockSpec, Call

CODE: dict[type, tuple[Any, Any]] = {}
"""The code of the classes of blocks that were fused, and of what is in them, as it was when the first was."""
ATTENTION: dict[tuple[type, str | None], AttentionFunction] = {}
"""The attention functions that they called, by class and name."""
Snapshot = tuple[dict[str, Any], Callable[[dict[str, Any]], tuple[Any, ...]], tuple[Any, ...]]
"""A dictionary, what takes certain values out of it, and these values."""


def remember_code(block: nn.Module) -> None:
    """Of a block that was seen to give what its layers give."""
    for kind in _kinds(block):
        CODE.setdefault(kind, (kind.__call__, kind.forward))
    attention = attention_of(block)
    function = attention_function(attention)
    ATTENTION.setdefault((type(attention), function.name), function)


def has_known_code(block: nn.Module) -> bool:
    """Whether a block, of whatever tensors, is of classes that were fused, which nobody has changed since."""
    attention = attention_of(block)
    function = attention_function(attention)
    return ATTENTION.get((type(attention), function.name)) == function and all(
        CODE.get(kind) == (kind.__call__, kind.forward) for kind in _kinds(block)
    )


def _kinds(block: nn.Module) -> set[Any]:
    return {unfused_class(type(block)), *(type(module) for module in block.modules() if module is not block)}


class KnownBlock:
    """An encoder block as its parts are now; what runs it is derived from this.

    Attributes:
        plan: where its parts are.
        spec: its parts, by role.
        device: where they are.
        inner: the modules within the encoder block.
        parameters: of the encoder block.
        versions: tensors that were copied, and how often each had been written to by then.
    """

    def __init__(self, block: nn.Module, plan: FusedPlan):
        self.plan, kind = plan, unfused_class(type(block))
        known = class_of(kind)
        spec = known and read(block, known)
        if not isinstance(spec, BlockSpec) or known is None:
            raise ValueError(f"no native block computes a {kind.__qualname__}: {spec}")
        self.spec, self.calls = spec, Calls(block, known, spec, kind.forward)
        self.device = cast(PackedLinear, spec.layers["query"]).scale.device
        self.parameters = list(block.parameters())
        self.modules = list(block.modules())
        self.inner = self.modules[1:]
        self.classes = list(map(type, self.modules))
        kinds = {*self.classes, kind}
        self.code = [(each, each.__call__, each.forward) for each in kinds]
        self.attention = attention_of(block)
        self.attention_function = attention_function(self.attention)
        settings = [pair for pair in settings_of(block) if pair[0] is not block.__dict__ or pair[1] not in EACH_CALL]
        self.seen = _snapshots([*_held(block), *settings])
        found = {id(thing): thing for *_, things in self.seen for thing in things if isinstance(thing, Tensor)}
        self.addressed = list(found.values())
        self.pointers = list(map(Tensor.data_ptr, self.addressed))
        self.versions = [(tensor, arguments.version(tensor)) for tensor in _copied(block, spec)]

    def call(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """What a call of the block gives besides hidden states; None if only the layers can run it."""
        return self.calls.call(x, args, kwargs)

    def run(self, x: Tensor, call: Call) -> Tensor:
        """Hidden states, (images, tokens, width) -> the block's output."""
        raise NotImplementedError

    def holds(self, functions: dict[Any, AttentionFunction] | None = None) -> bool:
        """Whether the block still has the same code, modules, tensors and settings; of copies, that they are unchanged.

        A copied tensor that is changed behind PyTorch's back, through ``.data``, is not noticed.

        Args:
            functions: what attention modules were found to call just now, by class and settings, which it adds to; None
                to look again.
        """
        try:
            for holder, named, things in self.seen:
                if not all(map(operator.is_, named(holder), things)):
                    return False
        except KeyError:
            return False
        if list(map(type, self.modules)) != self.classes:
            return False
        for kind, call, forward in self.code:
            if kind.__call__ is not call or kind.forward is not forward:
                return False
        key = (type(self.attention), id(getattr(self.attention, "config", None)))
        function = None if functions is None else functions.get(key)
        if function is None:
            function = attention_function(self.attention)
            if functions is not None:
                functions[key] = function
        if function != self.attention_function:
            return False
        return self.pointers == list(map(Tensor.data_ptr, self.addressed)) and all(
            arguments.version(tensor) == number for tensor, number in self.versions
        )


def _held(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a block and the modules within it keep modules, parameters and buffers."""
    for module in block.modules():
        kept: tuple[dict[str, Any], ...] = (module._modules, module._parameters, module._buffers)
        yield from ((holder, name) for holder in kept for name in holder)


def _snapshots(held: list[tuple[dict[str, Any], str]]) -> list[Snapshot]:
    """What lies in each of the dictionaries under those names; every forward pass looks there."""
    names: dict[int, list[str]] = {}
    for holder, name in held:
        names.setdefault(id(holder), []).append(name)
    holders = {id(holder): holder for holder, _ in held}
    result: list[Snapshot] = []
    for key, holder in holders.items():
        named = operator.itemgetter(*names[key], names[key][0])  # two names at least, for a tuple
        result.append((holder, named, named(holder)))
    return result


def _copied(block: nn.Module, spec: BlockSpec) -> Iterator[Tensor]:
    """The tensors, besides those of packed layers, that the kernels do not read where they are."""
    floats = (tensor for tensor in spec.tensors() if tensor.dtype == torch.float32 and tensor.is_contiguous())
    read_in_place = {id(tensor) for tensor in floats}
    for module in block.modules():
        if isinstance(module, PackedLinear):
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in read_in_place:
                yield tensor
