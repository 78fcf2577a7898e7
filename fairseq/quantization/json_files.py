"""JSON, read as if somebody else had written it: bounded in size and depth, nothing twice, of the types that belong."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from fairseq.quantization.files import plain_file

MOST_BYTES = 8 * 2**20
"""Of JSON; objects in memory take up to twenty times as many. What this library writes has some hundred kilobytes."""
MOST_DEPTH = 100
"""Of lists and objects in one another."""

Record = TypeVar("Record")


def read_json(path: str | os.PathLike[str], finite: bool = True) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        finite: False takes NaN and Infinity, too, as Python writes them.

    Raises:
        FileNotFoundError, OSError: as :func:`~fairseq.quantization.files.plain_file`.
        ValueError: as :func:`~fairseq.quantization.files.plain_file` and :func:`parse_json`.
    """
    path = plain_file(path)
    with path.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    try:
        text = content[:MOST_BYTES].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return parse_json(text + " " * (len(content) > MOST_BYTES), str(path), finite)


def parse_json(text: str, where: str, finite: bool = True) -> Any:
    """What a text in JSON says.

    Args:
        text: at most :data:`MOST_BYTES` long.
        where: it came from, for messages.
        finite: as for :func:`read_json`.

    Raises:
        ValueError: it is longer, is no JSON, is nested deeper than :data:`MOST_DEPTH`, has a name twice in one object,
            or a number that is not finite.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{where} is too large: JSON has at most {MOST_BYTES:,} bytes here")
    try:
        found = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_not_finite if finite else None,
            parse_float=_number if finite else None,
        )
        _check_depth(found)
    except RecursionError:
        raise ValueError(f"{where} is damaged: it is nested deeper than {MOST_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from None
    return found


def record(kind: type[Record], values: Any, **more: Any) -> Record:
    """A dataclass with fields from JSON, each of the type that its annotation says.

    Args:
        kind: the dataclass; its fields are of simple types, of None, of tuples of a length, or mappings.
        values: an object with the fields.
        more: fields that are made already.

    Raises:
        ValueError: no object; a field is unknown, or is of another type.
        TypeError: one is missing, as Python says it.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected an object with the fields of {kind.__name__}, got {values!r:.80}")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{kind.__name__} has no {name!r:.80}")
        if not _is_of(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or hints[name]
            raise ValueError(f"{name} must be of type {wanted}, got {value!r:.80}")
    return kind(**values, **more)


def _is_of(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, value, parts))
    if hint in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
        return whole or (hint is float and isinstance(value, float))
    return isinstance(value, origin or hint)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} is twice in one object")
        found[name] = value
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text:.80} is no finite number")


def _number(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _not_finite(text)


def _check_depth(found: Any) -> None:
    """RecursionError past :data:`MOST_DEPTH`: whoever walks through it later stands on a stack of their own already."""
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(MOST_DEPTH):
        values = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in values if isinstance(item, dict | list)]
        if not level:
            return
    raise RecursionError
