"""Options that several commands have, and the settings of ``quantize`` as ViTQuantizer takes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fairseq.cli.output import UserError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where the models run.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB=key:value,...", help="Other settings for layers of such names; repeatable."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Layers of such names stay in float; repeatable.")
]
Method = Annotated[str, typer.Option(metavar="tensor|channel|histogram", help="What shares a scale.")]
GroupSize = Annotated[int | None, typer.Option(help="Input channels that share a scale, 32 to 128.")]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="Zero point in the middle of the grid.")]
ActivationBits = Annotated[int, typer.Option(help="2 to 8.")]
Force = Annotated[bool, typer.Option("--force", help="Write to OUT though it holds something else.")]
Images = Annotated[Path | None, typer.Option(metavar="DIR", help="A folder of pictures.")]


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """ "*classifier=bits:8,p:x" -> ("*classifier", {"bits": 8, "p": "x"}); "skip" alone is skip:true."""
    glob, equals, settings = text.partition("=")
    found: dict[str, Any] = {}
    for item in settings.split(","):
        key, colon, value = (part.strip() for part in item.partition(":"))
        if not glob or not equals or not key or (not colon and key != "skip") or (colon and not value):
            raise UserError(
                f"--override {text!r}: must be GLOB=key:value,key:value, such as '*classifier=bits:8' or "
                "'*layers.0.*=skip'"
            )
        found[key] = _value(value) if colon else True
    return glob.strip(), found


def parse_overrides(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Several of them, in their order; a glob that comes twice is a mistake."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        glob, settings = parse_override(text)
        if glob in found:
            raise UserError(f"--override: {glob!r} came twice; give all its settings in one")
        found[glob] = settings
    return found


def parse_images(text: str) -> int | str:
    """ "128" -> 128, and "all"."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise UserError(f"--images {text}: must be a whole number of at least 1, or all")
    return text if text == "all" else int(text)


def parse_bias_correction(text: str) -> bool | str:
    """ "no", "yes" or "add" -> False, True or "add"."""
    known: dict[str, bool | str] = {"no": False, "yes": True, "add": "add"}
    if text not in known:
        raise UserError(f"--bias-correction {text}: must be one of {', '.join(known)}")
    return known[text]


def parse_batches(texts: Iterable[str]) -> list[int]:
    """ "1,8" -> [1, 8], of one or several options."""
    words = [word.strip() for text in texts for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise UserError(f"--batch {','.join(words)}: must be whole numbers of at least 1, such as 1,8")
    return list(dict.fromkeys(map(int, words)))


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    return int(text) if text.isdecimal() else text
