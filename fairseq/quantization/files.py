"""Files that are written whole or not at all, and what is looked at before one is read."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import stat
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""That ask a program to end; Windows does not have the last."""

_numbers = itertools.count()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to, which becomes ``path`` at the end; nothing is left after an error.

    Whoever reads ``path`` finds what was there before, or all of the new.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    temporary = path.with_name(f".{path.stem}.{_own_number()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with uninterrupted():
            temporary.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside ``path``, to write to and to move things from; at the end it is gone with all that is in it.

    One of the same name is what a process left that was killed, and goes first.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_own_number()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
    finally:
        with uninterrupted():
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


def _own_number() -> str:
    """Of a temporary name: two threads that write the same file do not share it."""
    return f"{os.getpid()}-{next(_numbers)}"
