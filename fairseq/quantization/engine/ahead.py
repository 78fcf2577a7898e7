"""Ahead: blocks that follow one another run in one native call, and each output waits until its block is called.

Which block follows is seen, not read from a model: it is called with what another one returned. From the next call
on it runs along. What it gave is taken only if it is called with that very tensor, unchanged, and with equal arguments;
if not, it runs as if nothing had been computed. All outputs are real: whoever looks at hidden states sees them.

Nothing may change between two such calls. So both must come from one running function of transformers or timm, and no
block of a call may have hooks: then no code of a user runs in between, and a block is looked at once, beforehand.
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.kernels import functional, native, native_calls
from fairseq.quantization.engine.native_block import NativeBlock
from fairseq.quantization.engine.spec import Call
from fairseq.quantization.engine.watching import any_watched

MOST_BYTES = 2**22
"""Of all outputs of one call: what is in a cache yet when it is read. With more, a ViT-Tiny with eight images takes 2
to 3% longer (AMD EPYC of the fifth generation), and what Python costs between two calls does not matter there."""
PATIENCE = 3
"""Calls whose last outputs nobody asked for, after which these are not computed ahead any more."""
KNOWN = ("transformers.models.", "timm.models.", "torch.nn.modules.container")
"""Beginnings of the names of modules whose functions call blocks one after the other, and do nothing else to them."""
BETWEEN = (
    "torch.nn.modules.module", "transformers.modeling_layers", "transformers.utils.generic",
    "transformers.utils.output_capturing", "fairseq.quantization.engine.fused_block", __name__,
)  # fmt: skip
"""Modules whose functions stand between those and the forward of a block."""


@dataclass
class Chain:
    """The blocks of one native call.

    Attributes:
        first: of them.
        length: how many they are.
        asked: how many of them were called.
    """

    first: weakref.ref[NativeBlock]
    length: int
    asked: int = 1


class Given:
    """Arguments of a block besides hidden states, as they were.

    Attributes:
        bare: whether they are nothing but None, True and False.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.args, self.kwargs, self.bare = args, kwargs, _bare(args, kwargs)
        self.versions = None if self.bare else _versions((args, kwargs))

    def same(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether others are the same tensors, unchanged, and else equal numbers and words, in the same places."""
        if self.bare:
            return _bare(args, kwargs) and args == self.args and kwargs == self.kwargs
        return _same((self.args, self.kwargs), (args, kwargs)) and self.versions == _versions((args, kwargs))


@dataclass
class Record:
    """What is known of the output of a block while it is alive.

    Attributes:
        made_by: the native block.
        version: of the tensor, as it was made.
        gradients: whether gradients were being recorded.
        chain: that it was computed in.
        caller: the running function that called for it, see :func:`_caller`.
        follower: the block that is expected to take it, or None.
        given: its arguments besides hidden states, a :class:`Given`.
        output: what it then returns.
    """

    made_by: NativeBlock
    version: int
    gradients: bool
    chain: Chain
    caller: int | None
    follower: Any = None
    given: Given | None = None
    output: Tensor | None = None


_records: dict[int, tuple[weakref.ref[Tensor], Record]] = {}
"""By the id of outputs that are alive."""


class _Thread(threading.local):
    """The last chain of this thread."""

    chain: Chain | None = None


_thread = _Thread()


def taken(block: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a fused block for hidden states ``x`` if it was computed ahead for such a call, or None."""
    reference, record = _records.pop(id(x), (None, None))
    if record is None or reference is None or reference() is not x:
        return None
    if record.version != x._version or record.caller is None or record.caller != _caller():
        return None
    if record.follower is None:
        record.made_by.follower = weakref.ref(block)
        return None
    known = record.follower is block and not block.training and not functional.recording()
    alike = record.gradients == torch.is_grad_enabled() and not x.requires_grad
    if not known or not alike or record.given is None or not record.given.same(args, kwargs):
        record.made_by.follower = None
        return None
    record.chain.asked += 1
    output: Tensor | None = record.output
    return output


def run(block: Any, x: Tensor, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The output of a fused block, float32 hidden states (images, tokens, width) -> the same, and of those behind it.

    Args:
        block: a :class:`~.fused_block.FusedBlock`, whose native block holds.
        x, call: what it is called with.
        args, kwargs: the same as they came, without hidden states.
    """
    _look_back()
    first = block._native
    blocks, natives, translated = [block], [first], [first.translated(call)]
    given, caller = Given(args, kwargs), _caller()
    functions: dict[Any, Any] = {}
    most = min(first.most, MOST_BYTES // (x.numel() * x.element_size() + 1))
    if caller is None or any_watched([block]):
        most = 1
    while len(blocks) < most and call.rows is None:
        follower = natives[-1].follower and natives[-1].follower()
        ready = None if follower is None or follower in blocks else _ready(follower, x, first, call, given, functions)
        if ready is None:
            break
        blocks.append(follower)
        natives.append(ready[0])
        translated.append(translated[0] if ready[1] is call else ready[0].translated(ready[1]))
    outputs = native_calls.run_blocks([each.block for each in natives], x, translated, native.level_number())
    chain = _thread.chain = Chain(weakref.ref(first), len(blocks))
    for i, output in enumerate(outputs):
        record = Record(natives[i], output._version, torch.is_grad_enabled(), chain, caller)
        if i + 1 < len(outputs):
            record.follower, record.given, record.output = blocks[i + 1], given, outputs[i + 1]
        _remember(output, record)
    return outputs[0]


def _remember(output: Tensor, record: Record) -> None:
    """Keep the record of an output until that is taken or gone."""
    number = id(output)

    def forget(reference: weakref.ref[Tensor]) -> None:
        kept = _records.get(number)
        if kept is not None and kept[0] is reference:
            _records.pop(number, None)

    _records[number] = weakref.ref(output, forget), record


def _caller() -> int | None:
    """The running function that calls blocks, by its identity; None if it is none of :data:`KNOWN`."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return id(frame) if str(frame.f_globals.get("__name__")).startswith(KNOWN) else None


def _ready(block: Any, x: Tensor, first: NativeBlock, call: Call, given: Given, functions: dict[Any, Any]) -> Any:
    """The native block and the call of a block that may run behind ``first``, called so; None if it may not.

    It is the same call if that is of nothing but images and tokens: tables may be of a block, or of how it attends.
    """
    found = block._native
    if not isinstance(found, NativeBlock) or not found.holds(functions) or any_watched([block, *found.inner]):
        return None
    if found.block.width != x.shape[-1]:
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in found.parameters):
        return None
    plain = given.bare and call.bias is None and call.mask is None and call.cos is None
    if plain and found.halves == first.halves and found.calls.in_common_with(first.calls):
        return found, call
    own = found.call(x, given.args, given.kwargs)
    if own is None or own.rows is not None or (own.images, own.tokens) != (call.images, call.tokens):
        return None
    return found, own


def _look_back() -> None:
    """Compute less ahead where the last chain of this thread was not used up, time and again."""
    chain, _thread.chain = _thread.chain, None
    first = None if chain is None else chain.first()
    if chain is None or first is None:
        return
    first.unused = 0 if chain.asked == chain.length else first.unused + 1
    if first.unused >= PATIENCE:
        first.most, first.unused = chain.asked, 0


def _bare(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether arguments are nothing but None, True and False."""
    return all(value is None or value is True or value is False for value in (*args, *kwargs.values()))


def _versions(value: Any) -> Any:
    """How often tensors among arguments were written to."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [_versions(item) for item in items]


def _same(a: Any, b: Any) -> bool:
    """Whether arguments are the same tensors, and else equal numbers and words, in the same places."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) if isinstance(a, bool | int | float | str | torch.Size) else False
