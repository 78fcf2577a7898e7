"""Files that are written whole or not at all, and what is looked at before one is read."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""That ask a program to end; Windows does not have the last."""

ABANDONED = "fairseq-[0-9a-f]{12}"
SECONDS_TO_ABANDON = 24 * 3600
"""After them a temporary folder that nobody holds goes; its owner may be on a machine whose locks are not seen here."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write to, which becomes ``path`` at the end; nothing is left after an error.

    Whoever reads ``path`` finds what was there before, or all of the new.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    with folder_beside(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def folder_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside ``path``, to write to and to move things from; at the end it is gone with all that is in it.

    Those of processes that were killed, and could not see to it, go, too.
    """
    path = Path(path)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.fairseq-{secrets.token_hex(6)}.tmp")
    made = False
    try:
        with uninterrupted():
            temporary.mkdir()
            made = True
        with _held(temporary):
            yield temporary
    finally:
        if made:
            try:
                with uninterrupted():
                    shutil.rmtree(temporary, ignore_errors=True)
            finally:  # Ctrl-C may come just before signals wait
                shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def move_into(source: Path, folder: Path) -> None:
    """Put a saved model's files into ``folder``, config.json last, and take away weights of an earlier save."""
    files = sorted(source.iterdir(), key=lambda path: path.name == "config.json")
    new = {file.name for file in files}
    with uninterrupted():
        move_files(files, folder)
        for old in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
            if old.name not in new:
                old.unlink()


def move_files(files: Sequence[Path], folder: Path) -> None:
    """Put files into ``folder`` in their order, in place of those of the same names; no signal stops it half-way."""
    with uninterrupted():
        for file in files:
            os.replace(file, folder / file.name)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that ask the program to end, Ctrl-C or SIGTERM, wait until the block is done.

    Only the main thread can see to that, and only it is interrupted by them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    # None: a handler that was not set from Python, which cannot be put back
    before = {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            if before[number] != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def plain_file(path: str | os.PathLike[str]) -> Path:
    """``path``, if it is a plain file or a link that ends at one, as those in HuggingFace's cache do.

    What is at the end is what counts: nothing is opened here that blocks, as a pipe does, or has no end, as /dev/zero.

    Raises:
        FileNotFoundError: there is nothing.
        OSError: a loop of links, or it must not be looked at.
        ValueError: it is something else, or no name of a file.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError:
        raise ValueError(f"{str(path)!r:.200} is no name of a file") from None
    if kind != stat.S_IFREG:
        raise ValueError(f"{path} must be a plain file; it is {KINDS.get(kind, 'something else')}")
    return Path(path)


def check_stored(path: str | os.PathLike[str]) -> None:
    """See that a zip file, such as torch.save writes, does not become larger when it is read, as they are not packed.

    Raises:
        FileNotFoundError, OSError: as :func:`plain_file`.
        ValueError: as :func:`plain_file`, or it is no whole zip file, or what is in it is larger than the file.
    """
    size = plain_file(path).stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if inside > size:
        raise ValueError(f"{path} is no file of torch.save: it has {size:,} bytes, and {inside:,} when it is unpacked")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Inside, the folder is locked; the system frees it whatever becomes of this process."""
    handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if handle is not None:
            with contextlib.suppress(OSError):  # a file system without locks: nobody takes the folder for abandoned
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Take away folders of :func:`folder_beside` that nobody holds."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{ABANDONED}\.tmp")
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.tmp") if fcntl is not None else ():
        with contextlib.suppress(OSError):  # it is held, or is gone by now
            if pattern.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > SECONDS_TO_ABANDON:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(handle)
