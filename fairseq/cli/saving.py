"""A folder that is written whole or not at all, whatever stops the program."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq.cli.output import UserError
from fairseq.quantization.files import folder_beside, move_into
from fairseq.quantization.json_files import read_json

FORMAT = "fairseq_vit"  # as in fairseq.quantization.saving.contents, which is not imported for a look at a folder


def check_output(folder: Path, source: str, force: bool) -> None:
    """UserError if a model from ``source`` must not be saved in ``folder``.

    It may be new, empty, or hold a packed model, which is replaced; with ``force`` it may hold anything but the
    original, and its other files stay.
    """
    if not folder.parent.is_dir():
        raise UserError(f"-o {folder}: the folder {folder.parent} does not exist; create it first")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"-o {folder}: is a file; the model needs a folder")
    if Path(source).is_dir() and folder.samefile(source):
        raise UserError(f"-o {folder}: is the folder of the original model, which would be lost; choose another one")
    if any(folder.iterdir()) and not force and not holds_packed_model(folder):
        raise UserError(f"-o {folder}: is not empty and holds no quantized model; --force writes there nevertheless")


def holds_packed_model(folder: Path) -> bool:
    """Whether a folder's config.json is that of a packed model."""
    try:
        method = read_json(folder / "config.json")["quantization_config"]["quant_method"]
        return str(method).partition(" ")[0] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` to write to, which takes its place at the end; nothing is left of an error.

    If ``folder`` is there already, it gets the new files, config.json last, and loses the weights of an earlier save.
    """
    folder = Path(os.path.abspath(folder))
    with folder_beside(folder) as temporary:
        yield temporary
        if folder.exists():
            move_into(temporary, folder)
        else:
            os.replace(temporary, folder)
