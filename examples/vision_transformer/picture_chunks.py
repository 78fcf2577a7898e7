"""Many pictures, in a folder, in Parquet files or in tar files, as chunks that are read one by one, anywhere."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError, first_line

from fairseq.quantization.calibration.images import SUFFIXES

ARCHIVES = (".tar", ".parquet")
Picture = tuple[str, bytes | str]
"""What a picture is called, and its file's content, or why that cannot be read."""


@dataclass(frozen=True)
class Chunk:
    """Some of the pictures.

    Attributes:
        number: of this chunk, from 0.
        source: the folder, or a Parquet or tar file.
        parts: of a folder, names in it; of a tar file (name, place, size); of a Parquet file (row group, row).
        column: of a Parquet file.
    """

    number: int
    source: str
    parts: Sequence[Any]
    column: str

    def pictures(self) -> Iterator[Picture]:
        """Read one after the other.

        Raises:
            OSError: the source is gone, or cannot be read.
        """
        source = Path(self.source)
        if source.is_dir():
            return ((name, _content(source / name, name)) for name in self.parts)
        return self._from_parquet() if source.suffix == ".parquet" else self._from_tar()

    def _from_tar(self) -> Iterator[Picture]:
        name = Path(self.source).name
        with open(self.source, "rb") as opened:
            for member, place, size in self.parts:
                opened.seek(place)
                yield f"{name}/{member}", opened.read(size)

    def _from_parquet(self) -> Iterator[Picture]:
        from pyarrow import parquet

        name = Path(self.source).name
        with parquet.ParquetFile(self.source) as opened:
            group, column = -1, None
            for wanted, row in self.parts:
                if wanted != group:
                    group, column = wanted, opened.read_row_group(wanted, [self.column]).column(0)
                value = column[row].as_py()
                if isinstance(value, dict):  # of the datasets library: {"bytes": ..., "path": ...}
                    value = value.get("bytes")
                place = f"{name}/{wanted}/{row}"
                yield place, value if isinstance(value, bytes) else f"{place}: holds no bytes of a picture"


def chunks_of(source: Path, size: int, column: str) -> list[Chunk]:
    """All pictures of a folder, a Parquet or tar file, or a folder of such files, ``size`` in each chunk or fewer.

    In the order of their names, so that the same pictures make the same chunks. Files are listed, not read; of Parquet
    and tar files what says where each picture lies.

    Raises:
        UserError: no pictures, or a file is damaged.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    found: list[tuple[str, Sequence[Any]]] = []
    archives = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix in ARCHIVES)
    files = (path.relative_to(source) for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    names = sorted(path.as_posix() for path in files)
    if names and archives:
        raise UserError(f"{source} holds pictures ({names[0]}) and archives ({archives[0].name}); pass one kind")
    if names:
        found.append((str(source), names))
    for archive in archives:
        if archive.suffix not in ARCHIVES:
            raise UserError(f"{archive} must be a folder of pictures, or end in .tar or .parquet")
        parts = _in_tar(archive) if archive.suffix == ".tar" else _in_parquet(archive, column)
        found.append((str(archive), parts))
    cut = [(name, parts[at : at + size]) for name, parts in found for at in range(0, len(parts), size)]
    if not cut:
        raise UserError(f"{source}: no picture in it")
    return [Chunk(number, name, parts, column) for number, (name, parts) in enumerate(cut)]


def fingerprint(chunks: Sequence[Chunk]) -> str:
    """A hash of the names and sizes of pictures, or of the files that hold them, and of how the chunks are cut."""
    digest = hashlib.sha256()
    for chunk in chunks:
        source = Path(chunk.source)
        sizes = [_size(source / name) for name in chunk.parts] if source.is_dir() else _size(source)
        digest.update(f"{source.name}:{chunk.column}:{chunk.parts!r}:{sizes!r}\n".encode())
    return digest.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _content(path: Path, name: str) -> bytes | str:
    try:
        return path.read_bytes()
    except OSError as error:
        return f"{name}: {error.strerror}"


def _in_tar(path: Path) -> list[tuple[str, int, int]]:
    try:
        with tarfile.open(path, "r:") as opened:
            members = [m for m in opened if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path}: not a readable tar file, which must not be compressed ({first_line(error)})"
        ) from None
    return [(m.name, m.offset_data, m.size) for m in members]


def _in_parquet(path: Path, column: str) -> list[tuple[int, int]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as opened:
            names = opened.schema_arrow.names
            rows = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from None
    if column not in names:
        raise UserError(f"{path} has no column {column!r}; it has {', '.join(names)}: pass --column")
    return [(group, row) for group, count in enumerate(rows) for row in range(count)]
