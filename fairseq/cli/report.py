"""``fairseq-vit report``: a page to look at, of a quantized model beside the float one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fairseq.cli.options import Json, Quiet
from fairseq.cli.output import UserError, finish, mistakes, with_examples, working


@with_examples(
    "report google/vit-base-patch16-224 vit-int4 --images pictures -o report.html",
    "report ./vit vit-int4 --images pictures --also vit-int8 --also vit-int3 -o report.html",
)
def report(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="The float model: a local folder or a hub id.")],
    quantized: Annotated[str, typer.Argument(metavar="QUANTIZED", help="The quantized one.")],
    images: Annotated[Path, typer.Option(metavar="DIR", help="A folder of pictures.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The page, an .html file.")],
    also: Annotated[
        list[str] | None, typer.Option(metavar="OTHER", help="Another quantized model to compare with; repeatable.")
    ] = None,
    count: Annotated[int, typer.Option("--limit", min=1, help="How many pictures, at most.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed forwards of each model, in turns.")] = 9,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Make a page of what quantization did: one HTML file that needs no network.

    It says what is kept, how large and how fast the model is here, which blocks change the output most, which pictures
    changed their class, what the last block sees, and which layers stay in float.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: its name must end in .html")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: the folder {output.absolute().parent} does not exist")
    names = [quantized, *(also or ())]
    if len({original, *names}) <= len(names):
        raise UserError(f"one of the models is named twice: {', '.join([original, *names])}")
    words = [original, quantized, "--images", str(images), "--limit", str(count), "--batch-size", str(batch_size)]
    words += ["--rounds", str(rounds), *(word for name in also or () for word in ("--also", name)), "-o", str(output)]
    command = shlex.join(["fairseq-vit", "report", *words])
    with working(quiet) as say:
        from fairseq.cli import report_page

        page = report_page.make(original, names, images, count, batch_size, rounds, command, say)
        with mistakes(ImportError, OSError):
            page.write(output)
    result: dict[str, Any] = {
        "original": original, "quantized": quantized, "page": str(output), "bytes": output.stat().st_size,
        "summary": list(page.summary), "changed": page.changed, "pictures": page.pictures, "alone": dict(page.alone),
    }  # fmt: skip
    return finish(result, "\n".join([*page.summary, f"Wrote {output}, {output.stat().st_size / 1e6:.1f} MB"]), as_json)
