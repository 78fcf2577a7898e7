"""distill: train an emulated model towards its teacher on unlabelled pictures, in one call."""

from __future__ import annotations

import numbers
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import Subset

from fairseq.quantization.training.losses import Losses
from fairseq.quantization.training.pictures import Pictures, hold_back
from fairseq.quantization.training.progress import Progress

Model = TypeVar("Model", bound=nn.Module)


def distill(
    student: Model,
    teacher: nn.Module,
    data: Any,
    processor: Callable[..., Any] | None = None,
    *,
    epochs: float = 1,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    scale_learning_rate: float = 1e-3,
    losses: Losses | None = None,
    scales: bool = True,
    augment: bool = False,
    held_back: Any = 0,
    seed: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    callbacks: Sequence[Any] = (),
    **arguments: Any,
) -> Model:
    """Train ``student`` in place until it gives what ``teacher`` gives, and return it in eval mode.

    ``ViTQuantizer.pack_model(student)`` is then the packed model with the integers that were trained. Under
    ``torchrun`` or ``accelerate launch`` each process calls this alike, and they train together.

    Args:
        student: what ``ViTQuantizer(execution="emulated").quantize_model(model)`` returned, in float32.
        teacher: the float model, or another with the same outputs and, unless ``losses`` go without, blocks.
        data: pictures like those that the model will see, without labels: see :class:`~.pictures.Pictures`.
        processor: the model's image processor, for pictures that are not tensors.
        epochs: how often each picture is seen.
        batch_size: pictures in a step, of each process.
        learning_rate: of weights, biases and norms, with AdamW; it falls to 0 along half a cosine.
        scale_learning_rate: of scales, as a share of themselves.
        losses: outputs and features, 1 each, unless they say otherwise.
        scales: learn them; see :func:`~.student.learn_scales`.
        augment: another crop and perhaps a flip of each picture each time.
        held_back: pictures that are not trained on, or how many of ``data`` are not. What was trained stays only if the
            loss on them is smaller than before; if not, the student stays as it was, with a warning. A student that was
            calibrated on them was fitted to them before, and training then seems not to help. 0 for no such guard.
        seed: of the order of pictures, of ``augment`` and of which are held back.
        output_dir: where checkpoints go, one at the end of each epoch, the last one kept; None for no checkpoints.
        resume: go on from the last whole checkpoint in ``output_dir``, if there is one.
        progress: called after the first step and every ``logging_steps`` (10); None for transformers' bar and lines.
        callbacks: of transformers' ``Trainer``.
        arguments: further ``TrainingArguments``: ``bf16=True``, ``gradient_accumulation_steps=4``,
            ``report_to="tensorboard"``, ``max_steps=1000``, ...

    Raises:
        ImportError: accelerate is missing.
        TypeError, ValueError: the student is not an emulated model or has half-precision weights; there are no
            pictures to train on, or fewer than a step of all processes takes; the teacher's outputs or blocks are
            others; or as :class:`~.pictures.Pictures` says.
    """
    from fairseq.quantization.training import trainer as on_transformers

    on_transformers.check_student(student)
    if resume and output_dir is None:
        raise ValueError("resume=True needs the output_dir in which the checkpoints are")
    trained, held = _split(data, processor, augment, held_back, seed)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if output_dir is None else os.fspath(output_dir)
        settings = {
            "output_dir": folder, "num_train_epochs": epochs, "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate, "lr_scheduler_type": "cosine", "seed": seed,
            "save_strategy": "no" if output_dir is None else "epoch", "save_total_limit": 1, "report_to": "none",
            "use_cpu": all(p.device.type == "cpu" for p in student.parameters()), "dataloader_pin_memory": False,
            "logging_steps": 10, "logging_first_step": True, "disable_tqdm": progress is not None,
        } | arguments  # fmt: skip
        args = on_transformers.training_arguments(**settings)
        needed = args.world_size * batch_size
        if args.world_size > 1 and len(trained) < needed:
            raise ValueError(
                f"{args.world_size} processes with batch_size={batch_size} need {needed} pictures for one step, and "
                f"there are {len(trained)}"
            )
        if len(held) % args.world_size:
            raise ValueError(f"{args.world_size} processes cannot share held_back={len(held)} pictures evenly")
        if len(held):  # whole batches, as several processes leave out what is none
            own = len(held) // args.world_size
            args.per_device_eval_batch_size = max(size for size in range(1, batch_size + 1) if own % size == 0)
        trainer = on_transformers.DistillationTrainer(
            student, args, teacher=teacher, losses=losses, scales=scales, scale_learning_rate=scale_learning_rate,
            train_dataset=trained, callbacks=list(callbacks),
        )  # fmt: skip
        if progress is not None:
            on_transformers.Report(progress).instead_of_lines(trainer)
        whole = on_transformers.last_checkpoint(folder) if resume else None
        start = {name: value.clone() for name, value in student.state_dict().items()} if len(held) else {}
        before = trainer.evaluate(held)["eval_loss"] if len(held) else None
        trainer.train(resume_from_checkpoint=None if whole is None else str(whole))
        if before is not None and not (after := trainer.evaluate(held)["eval_loss"]) < before:
            student.load_state_dict(start)
            warnings.warn(
                f"training did not help: the loss on {len(held)} pictures held back was {before:.4g} before and is "
                f"{after:.4g} after it; the student is as it was. Try a lower learning rate, more pictures or augment",
                stacklevel=2,
            )
    return student.eval()


def _split(data: Any, processor: Any, augment: bool, held_back: Any, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """The pictures to train on, and those held back, which are never augmented."""
    pictures = Pictures(data, processor, augment)
    if held_back is not None and not isinstance(held_back, numbers.Number):
        try:
            others = Pictures(held_back, processor)
        except (TypeError, ValueError) as error:
            raise type(error)(f"held_back: {error}") from error
        return Subset(pictures, range(len(pictures))), Subset(others, range(len(others)))
    rest, held = hold_back(len(pictures), held_back, seed)
    return Subset(pictures, rest), Subset(Pictures(data, processor) if augment else pictures, held)
