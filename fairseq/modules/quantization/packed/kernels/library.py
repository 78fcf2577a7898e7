"""The compiled library: how it is loaded, how its errors are raised, and where the time of its calls goes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
import warnings
from collections.abc import Iterator
from ctypes import c_char_p, c_double, c_int
from pathlib import Path
from typing import Any

from fairseq.modules.quantization.packed.kernels.structures import (
    SIGNATURES,
    STAGES,
    Block,
    Call,
    IntegerBlock,
    IntegerModel,
    Linear,
    Patches,
)

LIBRARY = "FAIRSEQ_QUANTIZATION_LIBRARY"
"""Names another build of the library, such as one with a sanitizer."""
MAPS = Path("/proc/self/maps")
"""What is loaded into this process, on Linux: five words, and the file if it is one."""
OPENMP = re.compile(r"lib(gomp|omp|iomp5)\b")
"""Begins the names of the files of OpenMP that have gcc's functions: gcc's own, LLVM's and Intel's."""
NOT_BUILT = "they were not built; install a C++ compiler (gcc or clang) and reinstall fairseq"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built or does not load; torch is imported before it.

    torch's OpenMP is in the process by then, and is this library's, too: one pool of threads.
    """
    try:
        return _open()
    except (OSError, AttributeError) as error:
        if os.environ.get(LIBRARY):
            raise
        if _file().exists():
            warnings.warn(f"the native kernels do not load: {error}", stacklevel=2)
        return None


def reason_not_loaded() -> str | None:
    """Why there is no compiled library here: :data:`NOT_BUILT`, or what loading it says; None if there is one."""
    try:
        _open()
    except (OSError, AttributeError) as error:
        return f"they do not load: {error}" if os.environ.get(LIBRARY) or _file().exists() else NOT_BUILT
    return None


def _file() -> Path:
    chosen = os.environ.get(LIBRARY)
    return Path(chosen) if chosen else Path(__file__).with_name("_native.so")


def _open() -> ctypes.CDLL:
    file = _file()
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        if "undefined symbol" not in str(error):
            raise
        _show_openmp()
        loaded = ctypes.CDLL(str(file))
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int
    loaded.fairseq_level_name.restype = c_char_p
    kinds = (Linear, Block, Call, Patches, IntegerBlock, IntegerModel)
    if [loaded.fairseq_size(i) for i in range(len(kinds))] != [ctypes.sizeof(kind) for kind in kinds]:
        raise OSError(f"{file} was built from another version of its sources; reinstall fairseq")
    return loaded


def _show_openmp() -> None:
    """Make the OpenMP of this process visible to the library, or the system's where there is none.

    Most builds of torch do so themselves; those for ARM of 2.9 keep theirs to themselves.
    """
    files = [file for line in MAPS.read_text().splitlines() for file in line.split(maxsplit=5)[5:]]
    ctypes.CDLL(next((file for file in files if OPENMP.match(Path(file).name)), "libgomp.so.1"), ctypes.RTLD_GLOBAL)


def loaded() -> ctypes.CDLL:
    """The compiled library; RuntimeError where there is none."""
    found = load()
    if found is None:
        raise RuntimeError(f"no native kernels: {NOT_BUILT}")
    return found


def check_memory(code: int) -> None:
    """MemoryError where a call says, by a number that is not 0, that it got no memory."""
    if code:
        raise MemoryError("the native kernels got no memory to work in")


class _Recorder(threading.local):
    """Where this thread's calls add the time that they take, or None."""

    stages: Any = None


recorder = _Recorder()


@contextlib.contextmanager
def profile() -> Iterator[dict[str, float]]:
    """Collects where the time of this thread's native calls goes: stage -> seconds, added up over their threads.

    Filled when the context ends. Looking at the clock makes the calls a few percent slower.
    """
    seconds: dict[str, float] = {}
    before, recorder.stages = recorder.stages, (c_double * len(STAGES))()
    try:
        yield seconds
    finally:
        seconds.update(zip(STAGES, recorder.stages, strict=True))
        recorder.stages = before
