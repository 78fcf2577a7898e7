"""The program ``fairseq-vit``: its commands, and how what goes wrong becomes a line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import fairseq
from fairseq.cli import check, distill, doctor, files, pareto, quantize, report
from fairseq.cli.output import UserError, first_line

FINE, MISTAKE, STOPPED = 0, 2, 130
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
nothing quantized, no kernels), 2 a mistake in the call, 130 stopped by Ctrl-C.""",
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
        code = typer.main.get_command(app).main(
            None if arguments is None else list(arguments), prog_name="fairseq-vit", standalone_mode=False
        )
    except UserError as error:
        return _mistake(str(error), error.code)
    except COMMAND_LINE_ERROR as error:
        path = error.ctx.command_path if error.ctx else "fairseq-vit"
        return _mistake(f"{first_line(error.format_message()).rstrip('.')}. See {path} --help")
    except OSError as error:  # a full disk, a folder that cannot be written
        return _mistake(first_line(error))
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    if code == STOPPED:
        print("stopped", file=sys.stderr)
    return code or FINE


def _mistake(message: str, code: int = MISTAKE) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
