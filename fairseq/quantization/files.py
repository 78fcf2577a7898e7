"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    for file in files:
        os.replace(file, folder / file.name)
    for old in (*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")):
        if old.name not in new:
            old.unlink()
