"""The program ``fairseq-vit``: its commands, and how what goes wrong becomes a line and an exit code."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

import fairseq
from fairseq.cli import check, distill, doctor, files, pareto, quantize, report
from fairseq.cli.output import UserError, first_line

FINE, MISTAKE, STOPPED = 0, 2, 130
ENDED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals by which a system, a scheduler or a closed terminal ends programs: exit code 128 + their number."""
COMMAND_LINE_ERROR: Any = typer.BadParameter.__mro__[2]  # click's own base class, wherever this typer has it
COMMANDS = (
    quantize.quantize,
    distill.distill,
    pareto.pareto,
    check.compare,
    check.evaluate,
    check.benchmark,
    report.report,
    files.export,
    files.inspect,
    doctor.doctor,
)

app = typer.Typer(
    rich_markup_mode=None,  # plain text: the same on a terminal and in a pipe
    pretty_exceptions_enable=False,
    help="Quantize Vision Transformers to integers of 8 to 2 bits, and see what that does to them.",
    epilog="""\b
Examples:
  fairseq-vit quantize google/vit-base-patch16-224 --bits 4 --method channel --calibration pictures -o vit-int4
  fairseq-vit compare google/vit-base-patch16-224 vit-int4 --images pictures
  fairseq-vit inspect vit-int4
\b
Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 a check failed (too large a difference,
nothing quantized, no kernels), 2 a mistake in the call, 130 stopped by Ctrl-C, 143 by SIGTERM.""",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fairseq-vit {fairseq.__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in COMMANDS:
    examples = "\n".join(f"  fairseq-vit {line}" for line in command.__dict__["examples"])
    app.command(epilog=f"\b\nExamples:\n{examples}")(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, of ``sys.argv`` by default, and return the exit code.

    Mistakes of the person at the keyboard are one line on stderr; errors of the program keep their traceback.
    """
    try:
        with _ending():
            code = typer.main.get_command(app).main(
                None if arguments is None else list(arguments), prog_name="fairseq-vit", standalone_mode=False
            )
    except BaseException as error:
        code = _stopped_by(error) or _mistaken(error)
        if code is None:
            raise
    if code in (STOPPED, *(128 + number for number in ENDED)):  # typer makes a code of Ctrl-C, too
        print("stopped", file=sys.stderr)
    return code or FINE


def _stopped_by(error: BaseException | None) -> int | None:
    """The exit code if a signal is the cause of an error; None if there is none.

    What was going on may have made another error of it: Python 3.11 does if it comes while a class gets its names
    (``__set_name__``), and transformers, which imports such classes, of that again another.
    """
    seen: list[BaseException] = []
    while error is not None and not any(error is one for one in seen):
        if isinstance(error, _Ended):
            return 128 + error.number
        if isinstance(error, KeyboardInterrupt | typer.Abort):
            return STOPPED
        seen.append(error)
        error = error.__cause__
    return None


def _mistaken(error: BaseException) -> int | None:
    """The exit code if an error is a mistake of the person at the keyboard, who is told; None if it is not."""
    if isinstance(error, UserError):
        return _mistake(str(error), error.code)
    if isinstance(error, COMMAND_LINE_ERROR):
        path = error.ctx.command_path if error.ctx else "fairseq-vit"
        return _mistake(f"{first_line(error.format_message()).rstrip('.')}. See {path} --help")
    if isinstance(error, OSError):  # a full disk, a folder that cannot be written
        return _mistake(first_line(error))
    if isinstance(error, MemoryError):
        return _mistake("there is not enough memory for this")
    return None


class _Ended(BaseException):
    """The system asked the program to end; what is half done is taken away, as with Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def _ending() -> Iterator[None]:
    """Inside, signals that would end the process at once raise :class:`_Ended`; those that are ignored still are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Ended(number)

    numbers = [number for number in ENDED if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _mistake(message: str, code: int = MISTAKE) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
