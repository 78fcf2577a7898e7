"""Which weight is this: a fingerprint of its bits, and what tells a forward pass that is run again."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WORDS_AT_ONCE = 2**15  # 256 KB, which stay in the cache


def fingerprint(w: Tensor) -> str:
    """Two weights with one fingerprint are the same, bit for bit: shape, dtype and values.

    ``w._version`` would not do: edits through ``.data`` or in inference mode leave it as it is. The bits are mixed
    and summed along rows and along columns in int64, modulo 2**64, which is exact whatever the order, so that threads,
    devices and memory layouts agree; the sums are hashed. For a layer of ViT-Base that takes a fraction of the time
    that rounding its weight does.

    Args:
        w: at least two dimensions, floating, with data.
    """
    rows = w.detach().contiguous().flatten(1)
    size = rows.element_size()
    words = rows.view(torch.int64 if rows.shape[1] * size % 8 == 0 else WORDS[size])
    columns, sums = rows.new_zeros(0), list[Tensor]()
    for part in words.split(max(WORDS_AT_ONCE // words.shape[1], 1)):
        part = part.to(torch.int64)
        # A sign is the highest bit of a word: an even number of them would vanish from a sum, so it is moved down, too.
        mixed = (part >> 29).bitwise_xor_(part)
        sums.append(mixed.sum(1))
        columns = mixed.sum(0) if len(sums) == 1 else columns + mixed.sum(0)
    described = f"{tuple(w.shape)} {w.dtype} ".encode() + torch.cat([columns, *sums]).cpu().numpy().tobytes()
    return hashlib.blake2b(described, digest_size=16).hexdigest()


def readable(w: Tensor) -> bool:
    """Whether ``w`` has values to look at now: not so on the meta device, nor while a graph is recorded."""
    if w.is_meta or type(w) not in (Tensor, nn.Parameter):
        return False
    return not recording() and not (w.is_cuda and torch.cuda.is_current_stream_capturing())


def recording() -> bool:
    """Whether operations are being recorded (compiled, exported, traced), or run without values (FakeTensorMode)."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_compiling() or detect_fake_mode() is not None


def in_backward() -> bool:
    """Whether a backward pass is under way: a forward in it is one that gradient checkpointing runs again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
