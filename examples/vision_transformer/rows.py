"""Rows of figures in a JSON file, which ``evaluate.py`` adds to and ``accuracy_picture.py`` draws."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from common import UserError, first_line


def read_rows(file: Path) -> list[dict[str, Any]]:
    """What ``evaluate.py`` added to a file."""
    try:
        rows = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {first_line(error)}") from None
    needed = {"model", "evaluated", "evaluated_on", "method", "calibration"}
    numbers = {"bits", "agreement", "divergence"}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and needed <= row.keys() and all(isinstance(row.get(key), int | float) for key in numbers)
        for row in rows
    ):
        raise UserError(f"{file}: not rows that evaluate.py --json has written")
    return rows


def add_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a JSON list of them, in whole or not at all."""
    whole = [*read_rows(file), *rows] if file.exists() else rows
    beside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(beside, file)
    except OSError as error:
        raise UserError(f"--json {file}: {first_line(error)}") from error
