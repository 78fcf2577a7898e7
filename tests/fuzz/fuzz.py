"""Let a fuzzer look for files that a loader does not refuse as it should: python tests/fuzz/fuzz.py --seconds 1800

With atheris (libFuzzer with Python's coverage; ``pip install atheris``) where it is installed, else with the same
mutations drawn by chance. Any error but the documented ones is a finding, and so is a load of over 10 seconds or a
gigabyte more of memory.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

from transformers.utils import logging

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"
SECONDS, MEGABYTES = 10, 1000

try:
    import atheris
except ImportError:
    atheris = None


def memory() -> float:
    """The most that this process took so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Watch:
    """Runs targets again and again, and keeps the first input of each kind of finding.

    An input is a byte that says which target, and what that gets.

    Args:
        names: of the targets.
        folder: where inputs are kept.
    """

    def __init__(self, names: list[str], folder: Path):
        from targets import DOCUMENTED, TARGETS

        self.names, self.folder, self.documented = names, folder, DOCUMENTED
        self.run = [TARGETS[name].run for name in names]
        self.seeds = [bytes([k]) + seed for k, name in enumerate(names) for seed in TARGETS[name].seeds()]
        for seed in self.seeds:
            self.run[seed[0]](seed[1:])
        self.before = memory()
        self.runs, self.refused = collections.Counter[str](), collections.Counter[str]()
        self.findings: collections.Counter[str] = collections.Counter()

    def __call__(self, data: bytes) -> None:
        name = self.names[data[0] % len(self.names)] if data else self.names[0]
        self.runs[name] += 1
        started = time.monotonic(), time.process_time()
        try:
            self.run[self.names.index(name)](data[1:])
        except self.documented:
            self.refused[name] += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._found(f"{name}: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}", data, error)
        if (took := time.process_time() - started[1]) > SECONDS:  # or it waits for something
            self._found(f"{name}: {took:.0f} seconds", data)
        if (took := time.monotonic() - started[0]) > 10 * SECONDS:
            self._found(f"{name}: {took:.0f} seconds of waiting", data)
        if (now := memory()) > self.before + MEGABYTES:
            self._found(f"{name}: {now - self.before:.0f} MB", data)
            self.before = now

    def _found(self, what: str, data: bytes, error: Exception | None = None) -> None:
        if not self.findings[what]:
            file = self.folder / f"finding-{len(self.findings)}.bin"
            file.write_bytes(data)
            print(f"{what}, {str(error)[:300]!r}; input in {file}", flush=True)
        self.findings[what] += 1

    def summary(self) -> str:
        lines = [f"{name}: {self.runs[name]} runs, {self.refused[name]} refused" for name in self.names]
        found = "; ".join(f"{what} ({count} times)" for what, count in self.findings.items())
        return "\n".join([*lines, f"{sum(self.runs.values())} runs; findings: {found or 'none'}"])


def fuzz(names: list[str], seconds: float, seed: int, folder: Path) -> None:
    """In this process, and to its end: libFuzzer does not return."""
    if atheris is None:
        import targets
    else:
        with atheris.instrument_imports(include=["fairseq"]):
            import targets
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    watch = Watch(names or list(targets.TARGETS), folder)
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    if atheris is None:
        while time.monotonic() < end:
            data = rng.choice(watch.seeds)
            watch(data[:1] + targets.mutated(data[1:], rng))
        print(watch.summary(), flush=True)
        return

    def one(data: bytes) -> None:
        watch(data)
        if time.monotonic() > end:
            print(watch.summary(), flush=True)
            os._exit(0)

    def mutate(data: bytes, limit: int, number: int) -> bytes:
        own = random.Random(number)
        data = data if own.random() < 0.9 and len(data) > 1 else own.choice(watch.seeds)
        made = targets.mutated(data[1:], own) if own.random() < 0.7 else atheris.Mutate(data[1:], limit - 1)
        return data[:1] + made[: limit - 1]

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(watch.seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    longest = 4 * max(map(len, watch.seeds)) + 4096
    options = [sys.argv[0], str(corpus), f"-max_len={longest}", f"-seed={seed + 1}", "-timeout=600", "-verbosity=0"]
    atheris.Setup([*options, "-rss_limit_mb=0", "-len_control=0"], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="of tests/fuzz/targets.py; all by default")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("fuzz-findings"), help="for inputs that are findings")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    fuzz(chosen.targets, chosen.seconds, chosen.seed, chosen.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
