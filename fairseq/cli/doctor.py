"""``fairseq-vit doctor``: what this machine is, whether the native kernels run on it, and what they gain here."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer

from fairseq.cli.options import Json, Quiet
from fairseq.cli.output import finish, table, with_examples, working

GAIN = 1.05  # times as fast, from which on it is no noise
BUSY = 0.5  # load for each core, above which threads that wait for one another often wait for other programs


class Advice(NamedTuple):
    """What to do, in one sentence, and whether something is wrong until it is done."""

    sentence: str
    attention: bool


@with_examples("doctor", "doctor --json", "doctor --no-measure")
def doctor(
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Leave out the seconds of measuring.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Tell what this machine is, whether the native kernels run on it, and how fast 8 and 4 bits are here.

    Exit code 1: there are no native kernels, one fails its check, an environment variable names what cannot be, or
    there are more threads than cores. With --json it is what an issue needs.
    """
    with working(quiet) as say:
        from fairseq.cli import machine

        say("Looking at this machine, and checking the native kernels")
        found = machine.facts()
        found["measured"] = None
        if not no_measure and found["native"]["mistake"] is None:
            from fairseq.cli import machine_speed

            say("Measuring for six seconds")
            native = found["native"]["used"] is not None
            found["measured"] = machine_speed.measure(native, found["processor"]["memory"])
    sentence, attention = advise(found)
    found |= {"advice": sentence, "attention": attention}
    return finish(found, text(found), as_json, int(attention))


def advise(found: dict[str, Any]) -> Advice:
    """The first rule that applies to the facts, of which "measured" may be None."""
    native, processor, set_here = found["native"], found["processor"], found["environment"]
    if native["mistake"]:
        return Advice(f"Correct the environment variable: {native['mistake']}.", True)
    if native["problem"] and "FAIRSEQ_QUANTIZATION_LIBRARY" in set_here:
        return Advice(f"Unset FAIRSEQ_QUANTIZATION_LIBRARY; the native kernels are missing: {native['problem']}.", True)
    if native["problem"]:
        return Advice(
            f"The native kernels are missing, which make quantized models fast on the CPU: {_where_kernels_are(found)}",
            True,
        )
    wrong = [level for level in native["levels"] if level["problem"]]
    if wrong:
        names = " and ".join(level["name"] for level in wrong)
        runs = f"{native['used']} runs instead" if native["used"] else "no native kernels run"
        return Advice(f"{names} is left out, as its self-check fails, and {runs}: please report it.", True)
    if processor["threads"] > processor["cores"]:
        return Advice(
            f"PyTorch uses {processor['threads']} threads on {_count(processor['cores'], 'core')}: set "
            f"OMP_NUM_THREADS={processor['cores']}.",
            True,
        )
    return Advice(_speed(found), False)


def _where_kernels_are(found: dict[str, Any]) -> str:
    """How to get them; the rest of the sentence."""
    native = found["native"]
    if found["system"].startswith("Windows"):
        return "Windows has none, its Linux (WSL) has them: install fairseq there."
    wheel = "a wheel, which has them (bash .ci/wheels, on any Linux with gcc, makes it), or " if native["wheel"] else ""
    compiler = "" if native["compiler"] else "a C++ compiler (Debian and Ubuntu: apt install g++), and then "
    return f"install {wheel}{compiler}fairseq again, in the folder of the clone: {native['install']}"


def _speed(found: dict[str, Any]) -> str:
    """What is worth doing where nothing is wrong."""
    native, processor, set_here, devices = (
        found["native"], found["processor"], found["environment"], found["gpu"]["devices"]
    )  # fmt: skip
    backend = set_here.get("FAIRSEQ_QUANTIZATION_BACKEND") or "auto"
    if backend in ("reference", "cpu", "floats"):
        return f"FAIRSEQ_QUANTIZATION_BACKEND={backend} rules out faster kernels: unset it for speed."
    fastest = [level["name"] for level in native["levels"] if level["runs_here"]][-1]
    if native["used"] != fastest:
        return f"FAIRSEQ_QUANTIZATION_LEVEL={native['used']} is set, though {fastest} runs here: unset it for speed."
    if devices:
        slow = found["gpu"]["triton_problem"]
        return (
            f'{devices[0]["name"]} is here: move the model to it, model.to("cuda", torch.bfloat16), or take --device '
            f"cuda{f'; the faster kernels do not run there, as {slow}' if slow else ''}."
        )
    if found["measured"] is None:
        return "Nothing needs attention; without --no-measure this says how fast 8 and 4 bits are here."
    if processor["load"] is not None and processor["load"] > BUSY * processor["cores"]:
        spins = processor["openmp"] and processor["threads"] > 1
        spins &= set_here.get("OMP_WAIT_POLICY", "").lower() != "passive"
        return (
            f"Other programs keep this machine busy (load {processor['load']:.1f} on "
            f"{_count(processor['cores'], 'core')}), so these times say little: measure again when it is idle"
            f"{'; to work beside them, set OMP_WAIT_POLICY=passive' if spins else ''}."
        )
    eight, four = (found["measured"]["products"][f"{bits} bits"] for bits in (8, 4))
    if eight["to_float32"] < GAIN:
        return "An 8-bit model will not be faster than float32 here; it will be smaller, a quarter of the size."
    return (
        f"8 bits are {eight['to_float32']:.1f} times as fast as float32 here ({eight['to_bfloat16']:.1f} times "
        f"bfloat16); quantize with bits=8, or with bits=4 for half of the size at {four['to_float32']:.1f} times."
    )


def text(found: dict[str, Any]) -> str:
    """For people."""
    processor, torch, native = found["processor"], found["torch"], found["native"]
    cores = _count(processor["cores"], "core")
    if processor["cores"] != processor["cores_of_machine"]:
        cores += f" of {processor['cores_of_machine']}"
    memory = f", {processor['memory'] / 1e9:.1f} GB of memory" if processor["memory"] else ""
    half = {True: "bfloat16 in hardware", False: "bfloat16 not in hardware", None: "bfloat16 not known"}
    threads = f"{processor['threads']}, {'OpenMP' if processor['openmp'] else 'without OpenMP'}"
    threads += "" if processor["load"] is None else f"; load of the machine {processor['load']:.1f}"
    onednn = "oneDNN" if torch["onednn"] else "no oneDNN"
    missing = [f"{name} ({one['install']})" for name, one in found["optional"].items() if not one["version"]]
    there = [f"{name} {one['version']}" for name, one in found["optional"].items() if one["version"]]
    state = native["problem"] or native["mistake"] or f"{native['used'] or 'none'} runs"
    lines = [
        ("System", found["system"]),
        ("Processor", f"{processor['name']}, {cores}{memory}"),
        ("Threads", threads),
        ("PyTorch", f"{torch['capability']}, BLAS {torch['blas']}, {torch['parallel']}, {onednn}, "
                    f"{half[torch['bfloat16']]}"),
        *(("GPU", line) for line in _gpus(found["gpu"])),
        ("Versions", _wrapped([f"{name} {version or 'not installed'}" for name, version in found["versions"].items()])),
        ("Optional", _wrapped(there) or "none"),
        *(("Missing", line) for line in missing),
        *(("Environment", f"{key}={value}") for key, value in found["environment"].items()),
        ("Kernels", state),
    ]  # fmt: skip
    parts = ["\n".join(f"{name + ':':<13}{line}" for name, line in lines)]
    if native["levels"]:
        failed = [f"{level['name']}: {level['problem']}" for level in native["levels"] if level["problem"]]
        shown = table(["instruction set", "this processor", "self-check"], [*map(_level, native["levels"])])
        parts.append("\n".join([shown, *failed]))
    if found["measured"]:
        parts.append(_measured(found["measured"]))
    return "\n\n".join([*parts, found["advice"]])


def _gpus(gpu: dict[str, Any]) -> list[str]:
    driver = f"driver {gpu['driver']}" if gpu["driver"] else "driver unknown"
    if not gpu["devices"]:
        return [f"none that PyTorch can use, {driver}" if gpu["driver"] else "none"]
    triton = gpu["triton_problem"] or "Triton imports"
    return [
        f"{one['name']}, {one['memory'] / 1e9:.1f} GB, compute capability {one['capability']}, {driver}, "
        f"CUDA {gpu['cuda']}; {triton}"
        for one in gpu["devices"]
    ]


def _level(level: dict[str, Any]) -> list[str]:
    if not level["runs_here"]:
        return [level["name"], "no", ""]
    return [level["name"], "yes", "failed" if level["problem"] else "passed"]


def _measured(measured: dict[str, Any]) -> str:
    shape = f"{measured['tokens']} x {measured['inputs']} -> {measured['outputs']}"
    rows = [
        [name, f"{one['ms']:.2f}", f"{one['gops']:.0f}", f"{one['to_float32']:.2f}x", f"{one['to_bfloat16']:.2f}x"]
        for name, one in measured["products"].items()
    ]
    return (
        f"A layer of {shape}, {_count(measured['rounds'], 'round')}, integers by the {measured['kernels']} kernels\n"
        + table(["weights", "ms", "GOP/s", "to float32", "to bfloat16"], rows)
        + f"\nMemory: {measured['copy_gb_per_second']:.1f} GB/s while copying"
    )


def _wrapped(words: list[str], width: int = 100) -> str:
    """Joined by commas, in lines that begin below the first."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{', ' if lines[-1] else ''}{word}"
    return (",\n" + " " * 13).join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
