"""Storage: tensors one after the other, in memory while they are small and in a temporary file beyond that."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

IN_MEMORY = 4 * 2**20
"""Bytes of one storage that stay in memory."""


class _Place(NamedTuple):
    """Where a tensor lies in the file, and what it is."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Storage:
    """A list of tensors; the first :data:`IN_MEMORY` bytes stay in memory, the others go to a temporary file.

    The file has no name: the operating system frees it as soon as this object is gone, or the process, however it ends.
    It lies where ``tempfile.gettempdir()`` says, which the environment variable TMPDIR decides. It is read and written
    in pieces, not mapped, so its bytes do not count as memory of the process.

    Args:
        what: how errors call the contents.
        limit: bytes that stay in memory.

    Raises:
        OSError: on writing, the disk is full; the message says where and what for.
    """

    def __init__(self, what: str, limit: int = IN_MEMORY):
        self.what, self.limit = what, limit
        self._items: list[Tensor | _Place] = []
        self._held = self._end = 0
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        """The tensor as it was stored; one that is in memory itself, which is not to be written."""
        item = self._items[index]
        if isinstance(item, Tensor):
            return item
        assert self._file is not None
        result = torch.empty(item.shape, dtype=item.dtype)
        if item.size:
            self._file.seek(item.start)
            found = self._file.readinto(_bytes(result))  # type: ignore[attr-defined]
            if found != item.size:
                raise OSError(f"the temporary file of {self.what} was cut short")
        return result.to(item.device)

    def __setitem__(self, index: int, value: Tensor) -> None:
        """Replace a tensor; one of the same size takes its place."""
        before = self._items[index]
        if isinstance(before, Tensor):
            if before.shape == value.shape and before.dtype == value.dtype:
                before.copy_(value)  # our own memory: new results between others tear the heap
                return
            self._held -= before.nbytes
            self._items[index] = self._stored(value)
        else:
            self._items[index] = self._written(value, before.start if value.nbytes <= before.size else None)

    def append(self, value: Tensor) -> None:
        """Add a copy of a tensor."""
        self._items.append(self._stored(value))

    def clear(self) -> None:
        """Drop everything; what follows is written over it."""
        self._items.clear()
        self._held = self._end = 0

    def _stored(self, value: Tensor) -> Tensor | _Place:
        if self._held + value.nbytes > self.limit:
            return self._written(value, None)
        self._held += value.nbytes
        return value.detach().clone(memory_format=torch.contiguous_format)

    def _written(self, value: Tensor, start: int | None) -> _Place:
        if start is None:
            start, self._end = self._end, self._end + value.nbytes
        place = _Place(start, value.shape, value.dtype, value.device)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="fairseq-", buffering=0)  # noqa: SIM115
            if value.nbytes:
                self._file.seek(start)
                left = _bytes(value.detach().cpu().contiguous())
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                error.errno,
                f"no space left in {tempfile.gettempdir()} for {self.what}, {self._end / 1e9:.2f} GB so far: "
                "use fewer images, or set TMPDIR to a folder with more space",
            ) from error
        return place


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))
