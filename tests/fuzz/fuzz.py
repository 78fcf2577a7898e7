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
import subprocess
import sys
import time
import traceback
from pathlib import Path

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
    """Runs one target again and again, and keeps the first input of each kind of finding.

    Args:
        name: of the target.
        folder: where inputs are kept.
    """

    def __init__(self, name: str, folder: Path):
        from targets import DOCUMENTED, TARGETS

        self.name, self.folder, self.documented = name, folder, DOCUMENTED
        self.run = TARGETS[name].run
        self.seeds = TARGETS[name].seeds()
        for seed in self.seeds:
            self.run(seed)
        self.before = memory()
        self.runs, self.refused = 0, 0
        self.findings: collections.Counter[str] = collections.Counter()

    def __call__(self, data: bytes) -> None:
        self.runs += 1
        started = time.monotonic()
        try:
            self.run(data)
        except self.documented:
            self.refused += 1
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._found(f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}", data, error)
        if (took := time.monotonic() - started) > SECONDS:
            self._found(f"{took:.0f} seconds", data)
        if (now := memory()) > self.before + MEGABYTES:
            self._found(f"{now - self.before:.0f} MB", data)
            self.before = now

    def _found(self, what: str, data: bytes, error: Exception | None = None) -> None:
        if not self.findings[what]:
            file = self.folder / f"{self.name}-{len(self.findings)}.bin"
            file.write_bytes(data)
            print(f"{self.name}: {what}, {str(error)[:300]!r}; input in {file}", flush=True)
        self.findings[what] += 1

    def summary(self) -> str:
        found = ", ".join(f"{what} ({count} times)" for what, count in self.findings.items())
        return f"{self.name}: {self.runs} runs, {self.refused} refused, findings: {found or 'none'}"


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> None:
    """One target, in this process, and to its end: libFuzzer does not return."""
    if atheris is None:
        import targets

        watch = Watch(name, folder)
    else:
        with atheris.instrument_imports(include=["fairseq"]):
            import targets
        watch = Watch(name, folder)
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    if atheris is None:
        while time.monotonic() < end:
            watch(targets.mutated(rng.choice(watch.seeds), rng))
        print(watch.summary(), flush=True)
        return

    def one(data: bytes) -> None:
        watch(data)
        if time.monotonic() > end:
            print(watch.summary(), flush=True)
            os._exit(0)

    def mutate(data: bytes, limit: int, number: int) -> bytes:
        own = random.Random(number)
        made = targets.mutated(data, own) if own.random() < 0.6 else atheris.Mutate(data, limit)
        return made[:limit]

    corpus = folder / f"{name}-corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(watch.seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    longest = 4 * max(map(len, watch.seeds)) + 4096
    options = [sys.argv[0], str(corpus), f"-max_len={longest}", f"-seed={seed}", "-timeout=60", "-verbosity=0"]
    atheris.Setup([*options, "-rss_limit_mb=0", "-len_control=0"], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="of tests/fuzz/targets.py; all by default, one after the other")
    parser.add_argument("--seconds", type=float, default=1800, help="for all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("fuzz-findings"), help="for inputs that are findings")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if len(chosen.targets) == 1:
        fuzz(chosen.targets[0], chosen.seconds, chosen.seed, chosen.folder)
        return 0
    from targets import TARGETS

    names = chosen.targets or list(TARGETS)
    words = ["--seconds", str(chosen.seconds / len(names)), "--seed", str(chosen.seed), "--folder", str(chosen.folder)]
    return max(subprocess.run([sys.executable, __file__, name, *words]).returncode for name in names)


if __name__ == "__main__":
    sys.exit(main())
