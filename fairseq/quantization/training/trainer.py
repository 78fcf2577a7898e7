"""DistillationTrainer: HuggingFace's Trainer for an emulated student that learns from a teacher, without labels."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.scalar.modules import QuantizedWeight
from fairseq.quantization.architectures.forward import evaluating, output_of, picture_inputs
from fairseq.quantization.files import check_stored
from fairseq.quantization.json_files import read_json
from fairseq.quantization.saving import checkpoint
from fairseq.quantization.training.losses import Losses, attention_loss, feature_loss, output_loss
from fairseq.quantization.training.pack import pack
from fairseq.quantization.training.progress import Progress
from fairseq.quantization.training.recorder import Anatomy, Recorder, anatomy
from fairseq.quantization.training.student import emulated_layers, learn_scales

if importlib.util.find_spec("accelerate") is None:
    raise ImportError('training with a teacher needs accelerate; install it with: pip install -e ".[training]"')

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

WEIGHTS = "pytorch_model.bin"
STATE = "trainer_state.json"
TORCH_FILES = (".bin", ".pt", ".pth")


class DistillationTrainer(Trainer):
    """Trains an emulated model towards the outputs and hidden states of a teacher; for the rest it is a ``Trainer``.

    So it runs in one process or under ``torchrun`` and ``accelerate launch``, in bfloat16 (``bf16=True``), saves
    checkpoints, resumes, and logs where transformers does; beside ``loss`` it logs its parts. A batch needs
    ``pixel_values`` alone. In several processes a last batch that is not whole is left out, so that no picture comes
    twice in an epoch.

    Checkpoints hold the student's weights and grids under their own names. :meth:`save_model` writes the packed model.

    Args:
        model: the student, what ``ViTQuantizer(execution="emulated").quantize_model`` returned, in float32 or float64;
            it is trained in place.
        args: transformers' ``TrainingArguments``. ``remove_unused_columns`` is turned off.
        teacher: any model with the student's outputs, such as the float model; it is moved to the student's device,
            and runs in eval mode without gradients.
        losses: what is compared.
        scales: whether weights' and static inputs' scales are learned; see :func:`~.student.learn_scales`. If not,
            the range of a weight is observed again every 100 steps, as it follows the weight.
        scale_learning_rate: the learning rate of a scale as a share of its own mean value at the start.
        dropout: whether the student's dropout, and whatever else differs in training mode, is on.
        keywords: as for ``Trainer``: ``train_dataset``, ``eval_dataset``, ``callbacks``, ``optimizers``, ...

    Raises:
        ImportError: accelerate is missing.
        TypeError, ValueError: the student has no emulated layer or is in half precision; student and teacher have
            other outputs, or blocks that cannot be compared.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        teacher: nn.Module,
        losses: Losses | None = None,
        scales: bool = True,
        scale_learning_rate: float = 1e-3,
        dropout: bool = False,
        **keywords: Any,
    ):
        check_student(model)
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"the teacher must be a torch.nn.Module, got {type(teacher).__name__}")
        if scales:
            learn_scales(model)
        args.remove_unused_columns = False
        args._n_gpu = min(args.n_gpu, 1)  # torchrun makes processes; threads in one would mix up what blocks give
        if args.world_size > 1 and hasattr(model, "get_image_features"):
            raise ValueError(
                f"a {type(model).__name__} has two towers and trains in one process; there are {args.world_size}. "
                "Pass the vision tower to train it in several"
            )
        if args.world_size > 1:
            args.dataloader_drop_last = True  # or the sampler would fill the last batches up with the first ones
        super().__init__(model, args, **keywords)
        self.model_accepts_loss_kwargs = False  # the loss is the mean over a batch
        self.losses, self.scale_learning_rate, self.dropout = losses or Losses(), scale_learning_rate, dropout
        self.student, self.teacher = model, teacher.to(args.device)
        self._anatomies = anatomy(model), anatomy(teacher)
        check_blocks(*self._anatomies, self.losses)
        wanted = self.losses.features > 0, self.losses.attention > 0
        self._recorders = [
            Recorder(m, known, *wanted) for m, known in zip((model, self.teacher), self._anatomies, strict=True)
        ]
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._check_outputs()

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses, for a batch with ``pixel_values``; their parts are kept for the log."""
        pixels = inputs["pixel_values"]
        arguments = picture_inputs(self.student, pixels)
        of_student, of_teacher = self._recorders
        with torch.no_grad(), evaluating(self.teacher), of_teacher:
            name, expected = output_of(self.teacher, arguments)
        training = model.training
        if training and not self.dropout:
            _only_quantized_layers_train(self.student)
        with of_student:
            _, got = output_of(model, arguments)
        parts = self._parts(name, got, expected, pixels)
        loss = torch.stack([getattr(self.losses, part) * value for part, value in parts.items()]).sum()
        if training:
            for part, value in parts.items():
                self._sums[part] = self._sums.get(part, torch.zeros((), device=value.device)) + value.detach()
            self._count += 1
        return (loss, {"logits": got}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of a batch of ``eval_dataset``, which has no labels either, and the student's outputs."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(dict(inputs)), return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs["logits"], None

    def _parts(self, name: str, got: Tensor, expected: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        losses, (of_student, of_teacher) = self.losses, self._recorders
        if got.shape != expected.shape:
            raise ValueError(
                f"student and teacher must have the same outputs; of {len(pixels)} pictures the student's {name} are "
                f"{_shape(got)}, the teacher's {_shape(expected)}"
            )
        parts = {"outputs": output_loss(name, got, expected, losses.temperature, pixels)}
        if losses.features:
            pairs = zip(self._anatomies[0].blocks, of_student.features, of_teacher.features, strict=True)
            for block, mine, its in pairs:
                if mine.shape != its.shape:
                    raise ValueError(
                        f"{block} gives {_shape(mine)}, and the teacher's block {_shape(its)}; features=0 trains on "
                        "the outputs alone"
                    )
                if torch.is_grad_enabled() and not mine.requires_grad:
                    raise RuntimeError(
                        f"no gradient reaches {block} from what it gives; gradient checkpointing needs "
                        "gradient_checkpointing_kwargs={'use_reentrant': False}, or features=0"
                    )
            parts["features"] = feature_loss(of_student.features, of_teacher.features)
        if losses.attention:
            heads = [count for _, _, count in self._anatomies[0].attention]
            parts["attention"] = attention_loss(of_student.attention, of_teacher.attention, heads)
        return parts

    @torch.no_grad()
    def _check_outputs(self) -> None:
        """Run both on the first picture, so that what does not fit is found out before training."""
        data: Any = self.train_dataset
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or len(data) == 0:
            return
        inputs = self._prepare_inputs(self.data_collator([data[0]]))
        with evaluating(self.student), self.compute_loss_context_manager():
            self.compute_loss(self.student, inputs)

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        """The one that ``args`` name; each scale has a group of its own, its learning rate a share of it."""
        given: torch.optim.Optimizer | None = vars(self)["optimizer"]
        if given is not None:
            return given
        scales = {
            id(p): p
            for layer in emulated_layers(self.student).values()
            for p in (layer.scale, layer.input_scale)
            if isinstance(p, nn.Parameter) and p.requires_grad
        }
        decayed = set(self.get_decay_parameter_names(self.student))
        groups: list[dict[str, Any]] = [
            {
                "params": [
                    p
                    for n, p in self.student.named_parameters()
                    if p.requires_grad and id(p) not in scales and (n in decayed) == decays
                ],
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        for scale in scales.values():
            rate = self.scale_learning_rate * float(scale.detach().mean())
            groups.append({"params": [scale], "weight_decay": 0.0, "lr": rate})
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.student)
        optimizer: torch.optim.Optimizer = kind([group for group in groups if group["params"]], **settings)
        self.optimizer = optimizer
        return optimizer

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """As ``Trainer``, and the means of the losses' parts since the last time, of this process."""
        if "loss" in logs and self._count:
            logs = logs | {f"loss_{part}": float(value) / self._count for part, value in self._sums.items()}
            self._sums, self._count = {}, 0
        super().log(logs, *arguments, **keywords)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the packed model: a folder that ``from_pretrained`` loads, or model.safetensors of another model."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            packed, folder = pack(self.student), Path(output_dir or cast(str, self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            if hasattr(packed, "save_pretrained"):
                cast(Any, packed).save_pretrained(folder)
            else:
                checkpoint.save(packed, folder / "model.safetensors")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The weights of a checkpoint, under the names that the student has: transformers would save them by others."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or cast(str, self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.student.state_dict() if state_dict is None else state_dict, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / WEIGHTS
        for packed in sorted(path for path in file.parent.iterdir() if path.suffix in TORCH_FILES):
            check_stored(packed)  # those that transformers reads, too
        if not file.is_file():  # sharded, which transformers knows
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.student.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))


def training_arguments(**settings: Any) -> TrainingArguments:
    """Of transformers; TypeError for one that its version does not have."""
    return TrainingArguments(**settings)


def check_student(model: nn.Module) -> None:
    """TypeError or ValueError unless ``model`` can be trained: it has emulated layers, and none in half precision."""
    for name, layer in emulated_layers(model).items():
        if layer.weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} has weights of {layer.weight.dtype}, too coarse for small steps: quantize model.float(), and "
                "train with bf16=True where that is wanted"
            )


def check_blocks(student: Anatomy, teacher: Anatomy, losses: Losses) -> None:
    """ValueError unless what ``losses`` compare is there, in both."""
    if (losses.features or losses.attention) and (not student.blocks or len(student.blocks) != len(teacher.blocks)):
        raise ValueError(
            f"blocks are compared one by one; the student has {len(student.blocks)} and the teacher "
            f"{len(teacher.blocks)}. features=0 and attention=0 train on the outputs alone"
        )
    if losses.attention:
        heads = [[count for _, _, count in side.attention] for side in (student, teacher)]
        if not heads[0] or heads[0] != heads[1]:
            raise ValueError(
                "attention needs blocks whose query, key and heads are known, as many heads in both; the student has "
                f"{heads[0] or 'none'} and the teacher {heads[1] or 'none'}. attention=0 goes without"
            )


class Report(TrainerCallback):
    """Tells a function of each logging, in the place of transformers' own bar and lines.

    Args:
        tell: takes a :class:`~.progress.Progress`.
    """

    def __init__(self, tell: Callable[[Progress], None]):
        self.tell = tell
        self._started, self._first = 0.0, 0

    def instead_of_lines(self, trainer: Trainer) -> None:
        """Report what ``trainer`` does."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._started, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            step, losses = state.global_step, {k: float(v) for k, v in logs.items() if k.startswith("loss")}
            pace = (time.monotonic() - self._started) / max(step - self._first, 1)
            left = pace * (state.max_steps - step)
            self.tell(Progress(step, state.max_steps, float(state.epoch or 0), losses, left))


def last_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in ``folder`` that is whole: its state is written last. None if there is none."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and _is_json(path / STATE):
            found.append((int(number[1]), path))
    return max(found)[1] if found else None


def _is_json(file: Path) -> bool:
    try:
        read_json(file)
    except (OSError, ValueError):
        return False
    return True


def _only_quantized_layers_train(model: nn.Module) -> None:
    """Eval mode for all but emulated layers, whose ranges keep to training, and what gradient checkpointing asks."""
    for module in model.modules():
        if not isinstance(module, QuantizedWeight) and not getattr(module, "gradient_checkpointing", False):
            module.training = False


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
