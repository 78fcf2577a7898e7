"""What a command says: results on stdout, everything else on stderr, mistakes in one line."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import fairseq

Command = TypeVar("Command", bound=Callable[..., int])
HOUSE = Path(fairseq.__file__).parent
Say = Callable[[str], None]
NO_PROGRESS = bool(os.environ.get("TQDM_DISABLE"))
SECONDS_OF_A_LINE = 30.0
"""Between two lines about progress, where there is no terminal."""
ARGUMENTS_OF_TQDM = (
    "iterable", "desc", "total", "leave", "file", "ncols", "mininterval", "maxinterval", "miniters", "ascii", "disable"
)  # fmt: skip
CURSOR_UP = "\x1b[A"


class UserError(Exception):
    """A mistake that the person at the keyboard can mend; shown without a traceback.

    Args:
        message: one line.
        code: what the program exits with.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


@contextmanager
def mistakes(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Inside, errors of these kinds (by default ValueError and OSError) are mistakes of the person at the keyboard."""
    expected = kinds or (ValueError, OSError)
    try:
        yield
    except expected as error:
        raise UserError(prefix + first_line(error)) from error


def first_line(error: BaseException | str) -> str:
    """The first line with text in it."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:600]


@contextmanager
def working(quiet: bool) -> Iterator[Say]:
    """What prints inside, prints to stderr; the result says more there, unless ``quiet``.

    Progress is a bar on a terminal, elsewhere a line every half minute; warnings are a line each.
    """

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    def show(message: Warning | str, category: type[Warning], file: str, *where: Any, **more: Any) -> None:
        if issubclass(category, UserWarning) and Path(file).is_relative_to(HOUSE):  # others are not for this person
            say(f"warning: {first_line(str(message))}")

    terminal = sys.stderr.isatty() and not quiet
    if not terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # for those of other processes
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with (
        warnings.catch_warnings(),
        redirect_stdout(sys.stderr),
        nullcontext() if terminal else _lines(quiet or NO_PROGRESS),
    ):
        warnings.showwarning = show  # type: ignore[assignment]
        yield say


class _Lines:
    """A file for one bar of tqdm: its state is a line of its own, from time to time."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def write(self, text: str) -> None:
        line = text.replace(CURSOR_UP, "").strip()
        if line and time.monotonic() - self.last >= SECONDS_OF_A_LINE:
            self.last = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


@contextmanager
def _lines(hidden: bool) -> Iterator[None]:
    """Inside, progress bars, of whoever, are lines from time to time, or nothing at all.

    tqdm reads its environment when it is imported, which may be long ago.
    """
    from tqdm import tqdm

    stored, before = vars(tqdm)["__init__"], tqdm.__init__

    def begin(bar: Any, *arguments: Any, **keywords: Any) -> None:
        given = {**dict(zip(ARGUMENTS_OF_TQDM, arguments)), **keywords}
        disable = hidden or bool(given.get("disable"))
        before(bar, **{**given, "file": _Lines(), "ncols": 79, "ascii": True, "disable": disable})

    tqdm.__init__ = begin
    try:
        yield
    finally:
        tqdm.__init__ = stored


def finish(result: Mapping[str, Any], text: str, as_json: bool, code: int = 0) -> int:
    """Print a result, as text or as one JSON object, and return the exit code."""
    print(json.dumps(_plain(result), indent=2, allow_nan=False) if as_json else text, flush=True)
    return code


def table(header: list[str], rows: list[list[str]]) -> str:
    """Plain text columns, which are also a reStructuredText table; the first to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    rule = "  ".join("=" * width for width in widths)

    def line(cells: list[str]) -> str:
        first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "  ".join([first, *others]).rstrip()

    return "\n".join([rule, line(header), rule, *map(line, rows), rule])


def with_examples(*lines: str) -> Callable[[Command], Command]:
    """Give a command the examples that its --help ends with, each without the name of the program."""

    def decorate(command: Command) -> Command:
        command.__dict__["examples"] = lines
        return command

    return decorate


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
