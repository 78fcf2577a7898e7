"""Verification of an exported file: run without this library in a process of its own, and looked into for integers."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.export.export_report import ExportReport
from fairseq.quantization.export.onnx_nodes import PROBE_CODES, may_saturate, rounds_both
from fairseq.quantization.export.openvino_ir import multiplies_exactly, openvino_tensors

INTEGER_OPS = (
    "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QuantizeLinear", "DequantizeLinear",
    "FakeQuantize",
)  # fmt: skip
PERTURBATION = 1e-4
"""Of the inputs, relative to their largest value: rounding turns it into the difference that another runtime makes."""

CHILD = """
import sys
sys.modules["fairseq"] = None  # from here on, importing it is an error
import numpy as np
form, path, source, target = sys.argv[1:]
runs = np.load(source)
names = [str(name) for name in runs["names"]]
if form == "onnx":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run = lambda inputs: session.run(None, dict(zip(names, inputs)))
elif form == "openvino":
    import openvino
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = lambda inputs: list(compiled(dict(zip(names, inputs))).values())
else:
    import torch
    model = torch.jit.load(path) if form == "torchscript" else torch.export.load(path).module()
    def run(inputs):
        with torch.no_grad():
            return [y.numpy() for y in model(*map(torch.from_numpy, inputs))]
results = {}
for k in range(int(runs["count"])):
    for i, y in enumerate(run([runs[f"{k}.{name}"] for name in names])):
        results[f"{k}.{i}"] = y
np.savez(target, **results)
"""


def verify(
    wrapper: Any, inputs: dict[str, Tensor], file: Path, format: str, others: Sequence[dict[str, Tensor]] = ()
) -> ExportReport:
    """Run an exported file and look into it.

    Args:
        wrapper: the :class:`~fairseq.quantization.export.export.Positional` that was exported.
        inputs: what it was exported with, the batch first.
        file: alone in its folder, but for that of its constants; the report names it as if it lay one folder higher.
        format: "onnx", "openvino", "torchscript" or "torch_export".
        others: further inputs that it must take, with pictures of other sizes.

    Raises:
        RuntimeError: it does not run, or it is not what the model is: other numbers, or float weights; or OpenVINO does
            not multiply its 8-bit weights exactly on this processor.
    """
    integers, floats, operators = tensors_of(format, file)
    if inside := float_layers(wrapper.model, floats.values()):
        raise RuntimeError(f"the exported file holds {len(inside)} layers in float: {', '.join(inside[:8])}")
    weights = [size for name, (_, _, size) in integers.items() if name.endswith("weight_codes")]

    def run(batch: dict[str, Tensor]) -> list[Tensor]:
        return list(wrapper(*batch.values()))

    batches = [inputs, {name: tensor[:1] for name, tensor in inputs.items()}, *others]
    with _called(wrapper) as layers:
        expected = [run(batch) for batch in batches]
    count = len({id(layer.weight_codes) for layer in layers})
    if len(weights) < count and len(weights) < count - len(_idle(run, inputs, layers, expected[0])):
        raise RuntimeError(f"the exported file holds {len(weights)} integer weights; the model runs {count} layers")
    wide = [layer.name for layer in layers if rounds_both(layer) and may_saturate(layer)]
    if format == "openvino" and wide and not multiplies_exactly():
        raise RuntimeError(
            f"OpenVINO's products of 8-bit weights saturate on this processor ({', '.join(sorted(wide)[:3])}), as on "
            "x86 without VNNI; take at most 7 bits, or export and run on one that has VNNI"
        )
    limits = [tolerance(run, inputs, expected[0])] * 2
    limits += [tolerance(run, batch, ys) for batch, ys in zip(others, expected[2:])]
    got = run_elsewhere(format, file, batches)
    largest, total, count, limit = 0.0, 0.0, 0, max(map(max, limits))
    for ys, wanted, bounds in zip(got, expected, limits):
        for name, y, e, bound in zip(wrapper.outputs, ys, wanted, bounds):
            if y.shape != e.shape:
                raise RuntimeError(f"{name} has the shape {tuple(y.shape)} in the exported file, not {tuple(e.shape)}")
            difference = (y - e).abs()
            if not float(difference.max()) <= bound:
                raise RuntimeError(
                    f"{name} of the exported file differs by {float(difference.max()):.3g} from the model's; rounding "
                    f"accounts for {bound:.3g}"
                )
            largest, total = max(largest, float(difference.max())), total + float(difference.sum())
            count += difference.numel()
    agreement = (got[0][0].argmax(-1) == expected[0][0].argmax(-1)).float().mean()
    files = sorted(file.parent.iterdir(), key=lambda written: written != file)
    return ExportReport(
        format, tuple(str(file.parent.parent / f.name) for f in files), sum(f.stat().st_size for f in files),
        len(weights), sum(weights), sum(t.nbytes for t in floats.values()),
        {name: operators[name] for name in INTEGER_OPS if operators[name]}, tuple(wrapper.outputs),
        largest, total / max(count, 1), limit, float(agreement),
    )  # fmt: skip


@contextmanager
def _called(model: nn.Module) -> Iterator[set[PackedLinear]]:
    """The packed layers of ``model`` that are called inside."""
    seen: set[PackedLinear] = set()
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    handles = [layer.register_forward_pre_hook(lambda layer, _: seen.add(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _idle(run: Any, inputs: dict[str, Tensor], layers: set[PackedLinear], expected: list[Tensor]) -> list[PackedLinear]:
    """The layers on which no output depends; an exporter leaves them out."""
    found = []
    for layer in layers:
        handle = layer.register_forward_hook(lambda layer, args, output: torch.zeros_like(output))
        try:
            found += [layer] if all(map(torch.equal, run(inputs), expected)) else []
        finally:
            handle.remove()
    return found


def run_elsewhere(form: str, path: Path, batches: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """The outputs of an exported file for each batch, from a new process that cannot import this library.

    Raises:
        RuntimeError: it does not load or run; the message ends as the other process did.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.npz", Path(folder) / "out.npz"
        arrays: dict[str, Any] = {f"{k}.{n}": t.numpy() for k, batch in enumerate(batches) for n, t in batch.items()}
        np.savez(source, names=np.array(list(batches[0])), count=np.array(len(batches)), **arrays)
        command = [sys.executable, "-I", "-c", CHILD, form, str(path.absolute()), str(source), str(target)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise RuntimeError(f"the exported file does not run by itself: {last}")
        with np.load(target) as results:
            found = {key: torch.from_numpy(results[key]) for key in results.files}
    count = len(found) // len(batches)
    return [[found[f"{k}.{i}"] for i in range(count)] for k in range(len(batches))]


def tolerance(run: Any, inputs: dict[str, Tensor], expected: list[Tensor]) -> list[float]:
    """For each output, the largest difference that rounding accounts for.

    A value on the edge between two integers rounds to either side, and what is behind it changes. How much that is, is
    measured: four times the largest change of the output when the inputs change by :data:`PERTURBATION`, three times
    anew, and a ten-thousandth of the largest output.
    """
    generator = torch.Generator().manual_seed(0)
    bounds = [1e-4 * float(y.abs().max()) for y in expected]
    changes = [0.0] * len(expected)
    for _ in range(3):
        moved = {}
        for name, x in inputs.items():
            noise = torch.empty(x.shape).uniform_(-1, 1, generator=generator) * PERTURBATION
            moved[name] = x + noise * x.abs().max() if x.is_floating_point() else x
        changes = [max(c, float((y - e).abs().max())) for c, y, e in zip(changes, run(moved), expected)]
    return [bound + 4 * change for bound, change in zip(bounds, changes)]


def tensors_of(
    form: str, path: Path
) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, Tensor], Counter[str]]:
    """What an exported file holds: integers by name (type, shape, bytes), float tensors by name, and its operators."""
    if form == "onnx":
        return _onnx_tensors(path)
    if form == "openvino":
        return openvino_tensors(path)
    if form == "torchscript":
        loaded = torch.jit.load(str(path))
        operators = Counter(node.kind() for node in loaded.inlined_graph.nodes())
        constants = [n for n in loaded.inlined_graph.nodes() if n.kind() == "prim::Constant"]
        found = {
            n.output().debugName(): n.t("value")
            for n in constants
            if n.hasAttribute("value") and n.kindOf("value") == "t"
        }
        found.update(loaded.named_buffers())
        found.update(loaded.named_parameters())
    else:
        program = torch.export.load(str(path))
        operators = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
        found = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
    integers = {
        n: (str(t.dtype), tuple(t.shape), t.nbytes) for n, t in found.items() if t.dtype in (torch.uint8, torch.int8)
    }
    return integers, {n: t.detach() for n, t in found.items() if t.is_floating_point()}, operators


def _onnx_tensors(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, Tensor], Counter[str]]:
    onnx = importlib.import_module("onnx")
    model = onnx.load(str(path))
    kinds = onnx.TensorProto
    integers, floats = {}, {}
    widths = {kinds.INT8: 8, kinds.UINT8: 8, kinds.INT4: 4, kinds.UINT4: 4}
    for tensor in model.graph.initializer:
        if tensor.data_type in widths:
            count = int(np.prod(tensor.dims, dtype=np.int64))
            kind = kinds.DataType.Name(tensor.data_type).lower()
            integers[tensor.name] = (kind, tuple(tensor.dims), -(-count * widths[tensor.data_type] // 8))
        elif tensor.data_type in (kinds.FLOAT, kinds.FLOAT16, kinds.DOUBLE, kinds.BFLOAT16):
            floats[tensor.name] = torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor), dtype=np.float32))
    return integers, floats, Counter(node.op_type for node in nodes_of(model.graph))


def nodes_of(graph: Any) -> Iterator[Any]:
    """The nodes of a graph, those of its If by the first branch, without the product that they ask."""
    for node in graph.node:
        if PROBE_CODES in node.input:
            continue
        if node.op_type == "If":
            yield from nodes_of(next(a.g for a in node.attribute if a.name == "then_branch"))
        else:
            yield node


def float_layers(model: nn.Module, floats: Iterable[Tensor]) -> list[str]:
    """Names of the packed layers whose weight is among these float tensors, either way round and to a hundredth."""
    by_size: dict[int, list[Tensor]] = {}
    for tensor in floats:
        by_size.setdefault(tensor.numel(), []).append(tensor.float())
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        weight = layer.weight_matrix.dequantize(torch.float32)
        limit = 1e-2 * float(weight.abs().max())
        for tensor in by_size.get(weight.numel(), ()):
            shaped = (tensor.reshape(weight.shape), tensor.reshape(weight.T.shape).T)
            if any(torch.allclose(t, weight, rtol=0, atol=limit) for t in shaped):
                found.append(name)
                break
    return found
