"""Saved models and pictures, and the program in this process."""

import csv
from pathlib import Path
from typing import NamedTuple

import pytest
from families import build, shortened
from PIL import Image
from transformers import ViTImageProcessor
from transformers.utils import logging

from fairseq.cli import output
from fairseq.cli.main import main
from fairseq.models.vit_quantization import ViTQuantizer

ASSETS = Path(__file__).parents[2] / "examples" / "vision_transformer" / "assets"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys, monkeypatch):
    """The program: takes words, returns exit code, stdout and stderr."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(output, "NO_PROGRESS", True)
    verbosity = logging.get_verbosity()

    def run(*words):
        code = main([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with "vit", "short" (its first block) and "clip" in float, and "packed": "vit"; not to be written to.

    That is at 4 bits, and its classifier at 8.
    """
    folder = tmp_path_factory.mktemp("models")
    model = build("vit")
    packed = ViTQuantizer(bits=4, method="channel", overrides={"*classifier": {"bits": 8}}).quantize_model(model)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    floats = {"vit": model, "short": shortened(build("vit")), "clip": build("clip")}
    for name, saved in {**floats, "packed": packed}.items():
        saved.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with 36 pictures, and labels.csv beside it."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    with Image.open(ASSETS / "chelsea.jpg") as photo:
        for i in range(36):
            photo.crop((3 * i, 2 * i, 3 * i + 120, 2 * i + 120)).save(folder / f"{i}.png")
    with (folder.parent / "labels.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("file", "class_index"), *((f"{i}.png", i % 7) for i in range(36))])
    return folder
