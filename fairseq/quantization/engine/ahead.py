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
from torch.utils.weak import WeakTensorKeyDictionary

from fairseq.modules.quantization.packed.kernels import functional, native, native_calls
from fairseq.quantization.engine.native_block import NativeBlock
from fairseq.quantization.engine.spec import Call
from fairseq.quantization.engine.watching import any_watched

MOST_BYTES = 2**24
"""Of all outputs of one call; with more, what Python costs between two calls does not matter."""
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
        given: its arguments besides hidden states, with :func:`_versions` of them.
        output: what it then returns.
    """

    made_by: NativeBlock
    version: int
    gradients: bool
    chain: Chain
    caller: int | None
    follower: Any = None
    given: Any = None
    output: Tensor | None = None


_records: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Thread(threading.local):
    """The last chain of this thread."""

    chain: Chain | None = None


_thread = _Thread()


def taken(block: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The output of a fused block for hidden states ``x`` if it was computed ahead for such a call, or None."""
    record = _records.pop(x, None)
    if record is None or record.version != x._version or record.caller is None or record.caller != _caller():
        return None
    if record.follower is None:
        record.made_by.follower = weakref.ref(block)
        return None
    known = record.follower is block and not block.training and not functional.recording()
    alike = record.gradients == torch.is_grad_enabled() and not x.requires_grad
    if not known or not alike or not _same(record.given, _with_versions(args, kwargs)):
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
    blocks, natives, calls = [block], [block._native], [call]
    first = block._native
    caller = _caller()
    most = min(first.most, MOST_BYTES // (x.numel() * x.element_size() + 1))
    if caller is None or any_watched([block]):
        most = 1
    while len(blocks) < most and call.rows is None:
        follower = natives[-1].follower and natives[-1].follower()
        ready = None if follower is None or follower in blocks else _ready(follower, x, call, args, kwargs)
        if ready is None:
            break
        blocks.append(follower)
        natives.append(ready[0])
        calls.append(ready[1])
    outputs = native_calls.run_blocks(
        [each.block for each in natives], x, [each.translated(c) for each, c in zip(natives, calls)],
        native.level_number(),
    )  # fmt: skip
    chain = _thread.chain = Chain(weakref.ref(first), len(blocks))
    given = _with_versions(args, kwargs)
    for i, output in enumerate(outputs):
        record = Record(natives[i], output._version, torch.is_grad_enabled(), chain, caller)
        if i + 1 < len(outputs):
            record.follower, record.given, record.output = blocks[i + 1], given, outputs[i + 1]
        _records[output] = record
    return outputs[0]


def _caller() -> int | None:
    """The running function that calls blocks, by its identity; None if it is none of :data:`KNOWN`."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return id(frame) if str(frame.f_globals.get("__name__")).startswith(KNOWN) else None


def _ready(block: Any, x: Tensor, first: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The native block and the call of a block that may run behind one that is called so; None if it may not."""
    found = block._native
    if not isinstance(found, NativeBlock) or not found.holds() or any_watched([block, *found.inner]):
        return None
    if found.block.width != x.shape[-1]:
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in found.parameters):
        return None
    call = found.call(x, args, kwargs)
    if call is None or call.rows is not None or (call.images, call.tokens) != (first.images, first.tokens):
        return None
    return found, call


def _look_back() -> None:
    """Compute less ahead where the last chain of this thread was not used up, time and again."""
    chain, _thread.chain = _thread.chain, None
    first = None if chain is None else chain.first()
    if chain is None or first is None:
        return
    first.unused = 0 if chain.asked == chain.length else first.unused + 1
    if first.unused >= PATIENCE:
        first.most, first.unused = chain.asked, 0


def _with_versions(*given: Any) -> Any:
    """The arguments, and how often tensors among them were written to."""
    return given, [_versions(value) for value in given]


def _versions(value: Any) -> Any:
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
