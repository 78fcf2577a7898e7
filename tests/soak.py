"""Forwards, conversions, saves and loads of a tiny model in one process, again and again: nothing may grow.

    python tests/soak.py --loops 2000 --export-every 400

Memory, threads, open files, Python objects and files left in the temporary folder are counted after a warm-up and at
the end (Linux only). The exit code is 1 if memory grew by more than a hundredth, or another count changed.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from families import build
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.engine.memory import release

PROCESS = Path("/proc/self")
GROWTH = 0.01
"""Of memory, that is taken for noise."""
SETTINGS = (
    {"bits": 8}, {"bits": 4, "method": "channel"}, {"bits": 3, "method": "channel", "group_size": 32},
    {"bits": 4, "method": "channel", "activations": None}, {"bits": 8, "quantize_embeddings": True},
)  # fmt: skip


class Count(NamedTuple):
    """What a process has at one moment."""

    megabytes: float
    threads: int
    files: int
    objects: int
    temporary: int

    def __str__(self) -> str:
        return (
            f"{self.megabytes:7.1f} MB, {self.threads} threads, {self.files} open files, {self.objects} objects, "
            f"{self.temporary} temporary files"
        )


def count() -> Count:
    """After what can be freed was freed."""
    for _ in range(3):
        gc.collect()
    release()
    lines = (PROCESS / "status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    places = [len(os.listdir(PROCESS / name)) for name in ("task", "fd")]
    return Count(resident / 1024, *places, len(gc.get_objects()), len(os.listdir(tempfile.gettempdir())))


class Soak:
    """One loop after the other, of one tiny model.

    Args:
        folder: to save in.
        export_every: after so many loops a file is exported and verified, which takes seconds; 0 for never.
    """

    def __init__(self, folder: Path, export_every: int = 0):
        self.folder, self.export_every, self.done = folder, export_every, 0
        self.model = build("vit")
        self.pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.images = torch.randn(36, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        self.integers = ViTQuantizer(8, "channel", arithmetic="integer").quantize_model(self.model, self.images)

    def loop(self) -> None:
        """A forward, and in turns a conversion, or a save and a load; AssertionError if what came is not what went."""
        settings, turn = SETTINGS[self.done // 4 % len(SETTINGS)], self.done % 4
        if turn == 0:
            images = self.images if self.done % 100 == 0 else None
            self.quantized = ViTQuantizer(**settings).quantize_model(self.model, images)
        model = self.quantized
        if turn == 1:
            ViTQuantizer.save(model, self.folder / "model.safetensors")
            model = ViTQuantizer.load(self.folder / "model.safetensors", self.model)
        elif turn == 2:
            model.save_pretrained(self.folder / "model")
            model = AutoModelForImageClassification.from_pretrained(self.folder / "model").eval()
        elif turn == 3 and self.done % 40 == 3:
            self.integers.save_pretrained(self.folder / "integers")
            AutoModelForImageClassification.from_pretrained(self.folder / "integers").eval()(self.pixels)
        with torch.no_grad():
            logits = model(self.pixels).logits
        assert turn == 0 or torch.equal(logits, self.logits)
        self.logits = logits
        self.done += 1
        if self.export_every and self.done % self.export_every == 0:
            ViTQuantizer.export(self.quantized, self.folder / "model.onnx")
            ViTQuantizer.export(self.quantized, self.folder / "model.pt2", "torch_export")


def soak(loops: int, warm_up: int, export_every: int = 0) -> tuple[Count, Count]:
    """What there was after the warm-up, and after all loops."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _temporary_files_in(folder):
        warnings.simplefilter("ignore")
        running = Soak(Path(folder), export_every)
        for _ in range(warm_up):
            running.loop()
        before, started = count(), time.monotonic()
        print(f"{running.done:>5}: {before}", flush=True)
        while running.done < loops:
            running.loop()
            if running.done % max(loops // 10, 1) == 0:
                print(f"{running.done:>5}: {count()}, {time.monotonic() - started:.0f} s", flush=True)
        return before, count()


@contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Where nobody else puts any: those that are left can be counted."""
    before = tempfile.tempdir
    tempfile.tempdir = os.path.join(folder, "temporary")
    os.mkdir(tempfile.tempdir)
    try:
        yield
    finally:
        tempfile.tempdir = before


def differences(before: Count, after: Count) -> list[str]:
    """What grew: memory and objects beyond what is noise, anything else at all."""
    noise = {"megabytes": GROWTH, "objects": GROWTH / 10}
    return [name for name, most in before._asdict().items() if getattr(after, name) > (1 + noise.get(name, 0)) * most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=400, help="of these loops")
    parser.add_argument("--export-every", type=int, default=400, help="loops; 0 for never")
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    before, after = soak(chosen.loops, chosen.warm_up, chosen.export_every)
    grown = differences(before, after)
    print(f"memory {after.megabytes / before.megabytes - 1:+.2%}; grown: {', '.join(grown) or 'nothing'}")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
