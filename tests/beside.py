"""Other processes that a test waits for: begun once tests are collected, they run beside the tests before it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_FOLDER = tempfile.TemporaryDirectory()
_POOL = ThreadPoolExecutor(1)  # one at a time: tests keep a processor to themselves where there are two


class Beside:
    """What ``prepare`` returns, called in a thread that starts processes and waits; a decorator of tests.

    ``prepare`` itself is called in the main thread, as it may build a model.
    """

    def __init__(self, prepare: Callable[[], Callable[[], Any]]) -> None:
        self._prepare = prepare
        self._future: Future[Any] | None = None

    def __call__(self, test: Callable[..., None]) -> Callable[..., None]:
        """Mark a test, so that :func:`begin` begins with this as the session does."""
        test.beside = self  # type: ignore[attr-defined]
        return test

    def begin(self) -> Future[Any]:
        if self._future is None:
            try:
                self._future = _POOL.submit(self._prepare())
            except Exception as error:  # of the test, not of the session
                self._future = Future()
                self._future.set_exception(error)
        return self._future

    def result(self) -> Any:
        return self.begin().result()


def begin(items: list[Any]) -> None:
    """All that the collected tests are going to wait for."""
    for item in items:
        if hasattr(getattr(item, "function", None), "beside"):
            item.function.beside.begin()


def cancel() -> None:
    """What has not begun yet, when the session ends early."""
    _POOL.shutdown(wait=False, cancel_futures=True)


def new_folder(name: str) -> Path:
    """A new folder, which is there until the session ends."""
    path = Path(_FOLDER.name) / name
    path.mkdir()
    return path


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
"""The first words of :func:`python` for a script, or ``-m`` and a module, in two processes."""


def python(*words: object, **keywords: Any) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, for at most two minutes."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, **keywords)
