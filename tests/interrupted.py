"""Ctrl-C and SIGTERM at random moments of the program: the old or the whole new is there afterwards, and nothing else.

    python tests/interrupted.py --moments 50

Each command runs in a process that is forked from this one, in which all is imported, so that a run takes no longer
than its work; Linux and macOS only. Every second run replaces something; after every tenth, and the last, the same
command is run to its end. The exit code is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

import torch
from families import build
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessor

from fairseq.cli.main import main as program
from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization import files as saving
from fairseq.quantization.saving.contents import inspect

ENDED = {signal.SIGINT: 130, signal.SIGTERM: 143}
OTHER = {"bits": 8, "method": "tensor"}


class Command:
    """One command that writes ``out``.

    Args:
        room: a new folder, with the models in it.
        words: of the command line; OUT stands for what is written. Or a function, called with that.
        old: writes what is there before.
        whole: AssertionError if what is there is not whole.
        output: the name of OUT.
    """

    def __init__(
        self,
        room: Path,
        words: list[str] | Callable[[Path], object],
        old: Callable[[Path], object],
        whole: Callable[[Path], object],
        output: str = "out",
    ):
        self.room, self.words, self.old, self.whole, self.output = room, words, old, whole, output
        self.seconds = 0.0

    def run(self, out: Path, *more: str) -> int:
        """In this process; the exit code."""
        if callable(self.words):
            self.words(out)
            return 0
        return program([*(str(out) if word == "OUT" else word for word in self.words), *more])

    def forked(self, out: Path, *more: str, number: int | None = None, after: float = 0.0) -> int:
        """In a process of its own, to which a signal is sent; its exit code, as of a shell."""
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(600)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                warnings.simplefilter("ignore")
                said = io.StringIO()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                    code = self.run(out, *more)
                if code not in (0, *ENDED.values()):
                    print(said.getvalue(), file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                code = 130
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if number is not None:
            time.sleep(after)
            os.kill(child, number)
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

    def try_once(self, number: int, after: float, replace: bool, again: bool) -> str:
        """What became of one run; AssertionError if that is not as it should be."""
        place = Path(tempfile.mkdtemp(dir=self.room))
        out = place / self.output
        if replace:
            self.old(out)
        before, temporary = files(place), os.listdir(tempfile.gettempdir())
        code = self.forked(out, number=number, after=after)
        left = set(os.listdir(tempfile.gettempdir())) - set(temporary)
        assert not left, f"left in the temporary folder: {left}"
        assert code in (0, ENDED[number]), f"exit code {code}"
        kept = {path: content for path, content in files(place).items() if not self.may_stay(path, code)}
        if kept.keys() == before.keys() | {out} and out.is_dir() and not any(map(out.is_relative_to, before)):
            del kept[out]  # empty
        if kept == before:
            result = "old" if replace else "nothing"
        else:
            self.whole(out)
            extra = [path for path in kept if not path.is_relative_to(out) or path.name.endswith(".tmp")]
            assert not extra, f"left: {extra}"
            result = "new"
        if again:
            resume = ["--resume"] if any(place.glob("*.checkpoints/checkpoint-*")) else []
            assert self.forked(out, *resume) == 0, "it does not run again"
            self.whole(out)
            left = [path for path in files(place) if not path.is_relative_to(out) or path.name.endswith(".tmp")]
            assert not left, f"left after the second run: {left}"
        shutil.rmtree(place)
        return result

    def may_stay(self, path: Path, code: int) -> bool:
        """Checkpoints, to go on from; and what a process had no time to remove, as SIGTERM ends Python at once."""
        killed = callable(self.words) and code == ENDED[signal.SIGTERM]
        return ".checkpoints" in str(path) or (killed and ".tmp" in str(path))

    def interrupt(self, moments: int, rng: random.Random, every: int = 10, runs: int = 3) -> Counter[str]:
        """How often there was what, over so many moments for each signal.

        Args:
            moments: of each signal.
            rng: draws them.
            every: of so many, one is followed by a second run.
            runs: at first, uninterrupted ones, to see how long one takes.
        """
        found: Counter[str] = Counter()
        saving.SECONDS_TO_ABANDON = 0  # the second run comes at once
        taken = []
        for _ in range(runs):
            out = Path(tempfile.mkdtemp(dir=self.room)) / self.output
            started = time.monotonic()
            assert self.forked(out) == 0, "it does not run"
            taken.append(time.monotonic() - started)
            self.whole(out)
        self.seconds = min(taken)
        for k in range(2 * moments):
            number = list(ENDED)[k % 2]
            part = rng.uniform(0.9, 1.02) if k % 5 == 4 else rng.uniform(0, 1)  # each fifth is shortly before the end
            found[self.try_once(number, part * self.seconds, k // 2 % 2 == 1, k % (2 * every) >= 2 * every - 2)] += 1
        return found


def files(folder: Path) -> dict[Path, bytes | None]:
    """All that lies in it and below; None is a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def commands(room: Path) -> dict[str, Command]:
    """Those that write, on a tiny model."""
    model = build("vit")
    model.save_pretrained(room / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(room / "vit")
    (room / "pictures").mkdir()
    for k in range(8):
        Image.effect_noise((16, 16), 60 + k).convert("RGB").save(room / "pictures" / f"{k}.png")
    packed = ViTQuantizer(bits=4, method="channel").quantize_model(model)
    other = ViTQuantizer(**OTHER).quantize_model(model)
    packed.save_pretrained(room / "packed")

    def whole(folder: Path) -> None:
        assert (folder / "config.json").is_file(), "there is no config.json"
        found = inspect([folder / "model.safetensors"])
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        assert loaded.config.quantization_config.description == found.description
        assert found.parts["classifier"].get("bits") == 4, "it is the old one, and not all of it"

    def runs(file: Path) -> None:
        torch.jit.load(str(file))(torch.zeros(2, 3, 16, 16))

    pictures = ["--images", str(room / "pictures"), "--calibration", "8", "--batch-size", "4"]
    quantize = ["quantize", str(room / "vit"), "-o", "OUT", "--bits", "4", "--calibration", str(room / "pictures")]
    distill = ["distill", str(room / "vit"), "-o", "OUT", *pictures, "--save-every", "1"]
    export = ["export", str(room / "packed"), "OUT"]
    return {
        "quantize": Command(room, quantize, other.save_pretrained, whole),
        "save_pretrained": Command(room, packed.save_pretrained, other.save_pretrained, whole),
        "export": Command(room, export, lambda file: file.write_bytes(b"old"), runs, "out.pt"),
        "distill": Command(room, distill, other.save_pretrained, whole),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help="quantize, save_pretrained, export, distill; all by default")
    parser.add_argument("--moments", type=int, default=50, help="of each signal and command")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = os.path.join(folder, "temporary")
        os.mkdir(tempfile.tempdir)
        for name, command in commands(Path(folder)).items():
            if chosen.commands and name not in chosen.commands:
                continue
            try:
                found = command.interrupt(chosen.moments, random.Random(chosen.seed))
            except AssertionError as error:
                wrong, found = wrong + 1, f"wrong: {error}"
            print(f"{name}: a run takes {command.seconds:.2f} s; {found}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
