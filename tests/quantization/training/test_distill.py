"""Training with a teacher: it learns, in one process or two, goes on where it stopped, says what is wrong."""

import json
import sys
from collections import Counter

import pytest
import torch
import trained_together
from beside import TORCHRUN, Beside, new_folder, python
from conftest import vit_config
from families import build
from transformers import AutoModelForImageClassification, TrainerCallback, TrainingArguments, ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.scalar.modules import EmulatedLinear
from fairseq.quantization.training.distill import distill
from fairseq.quantization.training.losses import Losses
from fairseq.quantization.training.trainer import DistillationTrainer, last_checkpoint


def error(model, teacher, x):
    """The squared error of the logits, as a share of the teacher's energy."""
    with torch.no_grad():
        got, expected = (m(x).logits for m in (model, teacher))
    return float((got - expected).square().sum() / expected.square().sum())


def quietly(student, teacher, data, **settings):
    told = []
    distill(student, teacher, data, progress=told.append, logging_steps=1, batch_size=8, **settings)
    return told


def test_a_short_training_says_something_too(student, tiny_vit, data):
    told = []
    distill(student, tiny_vit, data, progress=told.append, batch_size=8, epochs=3)
    assert [p.step for p in told] == [1, 10]
    told.clear()
    distill(student, tiny_vit, data, progress=told.append, batch_size=20, epochs=1)
    assert [(p.step, p.steps) for p in told] == [(1, 2)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_learns_what_the_teacher_gives_and_is_packed(student, tiny_vit, data, pixels):
    before, teacher, weights = error(student, tiny_vit, pixels), state(tiny_vit), state(student)
    tiny_vit.train()
    told = quietly(student, tiny_vit, data, epochs=6, learning_rate=1e-3, scale_learning_rate=1e-2)
    assert tiny_vit.training
    tiny_vit.eval()
    assert all(torch.equal(value, teacher[name]) for name, value in tiny_vit.state_dict().items())
    assert [p.step for p in told] == list(range(1, 31))
    assert told[-1].steps == 30
    assert told[-1].losses["loss"] < 0.7 * told[0].losses["loss"]
    parts = told[0].losses["loss_outputs"] + told[0].losses["loss_features"]
    assert told[0].losses["loss"] == pytest.approx(parts, rel=1e-4)
    assert error(student, tiny_vit, pixels) < 0.8 * before  # on other pictures
    assert not student.training
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, weights[name])}
    layers = [name for name, module in student.named_modules() if isinstance(module, EmulatedLinear)]
    assert {f"{name}.{kind}" for name in layers for kind in ("weight", "scale")} <= moved
    assert not any(name.endswith("zero_point") for name in moved)
    packed = ViTQuantizer.pack_model(student, engine="layers")
    for name in layers:
        assert torch.equal(packed.get_submodule(name).integers(), student.get_submodule(name).integers())


def test_dropout_is_off_unless_it_is_wanted(student, tiny_vit, data, tmp_path):
    """The first loss is that of the model in eval mode, twice; with dropout it is another."""
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    batch = {"pixel_values": data[:4]}

    def losses(dropout):
        trainer = DistillationTrainer(student, args, teacher=tiny_vit, dropout=dropout, train_dataset=[{}])
        return [float(trainer.compute_loss(student.train(), batch)) for _ in range(2)], trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "_check_outputs", lambda self: None)
        (one, other), trainer = losses(False)
        assert one == other == float(trainer.compute_loss(student.eval(), batch))
        (one, other), _ = losses(True)
        assert one != other


class Stop(TrainerCallback):
    """Ends a training after so many steps, as if it was interrupted after a checkpoint."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **more):
        control.should_training_stop = state.global_step >= self.steps


def test_it_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tiny_vit, data, tmp_path):
    def fresh():
        return ViTQuantizer(bits=3, method="tensor", execution="emulated").quantize_model(tiny_vit)

    data, settings = data[:16], {"epochs": 4, "augment": True, "learning_rate": 1e-3}
    whole, stopped = fresh(), fresh()
    expected = quietly(whole, tiny_vit, data, **settings)
    more = {**settings, "output_dir": tmp_path}
    quietly(stopped, tiny_vit, data, **more, callbacks=[Stop(4)])
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-6").mkdir()  # one that was being written
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 3')
    resumed = fresh()
    told = quietly(resumed, tiny_vit, data, **more, resume=True)
    assert [p.step for p in told] == list(range(5, 9))
    for mine, its in zip(told, expected[4:], strict=True):
        assert mine.losses["loss"] == pytest.approx(its.losses["loss"], rel=1e-5)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], msg=name)


def test_save_model_writes_the_packed_model(student, tiny_vit, data, pixels, tmp_path):
    args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True, max_steps=1, disable_tqdm=True)
    dataset = [{"pixel_values": x} for x in data]
    trainer = DistillationTrainer(student, args, teacher=tiny_vit, train_dataset=dataset, losses=Losses(attention=1))
    trainer.train()
    batch = {"pixel_values": data[:8]}
    with torch.no_grad():
        expected = float(trainer.compute_loss(student.eval(), batch))
    assert trainer.evaluate(dataset[:8])["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.save_model(tmp_path / "packed")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = ViTQuantizer.pack_model(student)(pixels).logits
        assert torch.equal(loaded(pixels).logits, expected)


def test_each_scale_has_a_learning_rate_of_its_own(student, tiny_vit, data, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, learning_rate=0.5, weight_decay=0.1)
    trainer = DistillationTrainer(
        student, args, teacher=tiny_vit, train_dataset=[{"pixel_values": data[0]}], scale_learning_rate=0.01
    )
    groups = trainer.create_optimizer().param_groups
    scales = [module.scale for module in student.modules() if isinstance(module, EmulatedLinear)]
    assert [group["params"][0] is scale for group, scale in zip(groups[-13:], scales)] == [True] * 13
    for group, scale in zip(groups[-13:], scales):
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.01 * float(scale.mean())), 0.0)
    assert {group["lr"] for group in groups[:-13]} == {0.5}
    trained = [p for group in groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained}) == len(list(student.parameters()))


def test_what_did_not_help_pictures_held_back_is_undone(student, tiny_vit, data):
    before, reads = state(student), []

    class Read(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    with pytest.warns(UserWarning, match=r"the loss on 8 pictures held back was \S+ before and is \S+ after"):
        told = quietly(student, tiny_vit, Read(data), epochs=3, held_back=8, learning_rate=1.0)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert told[-1].steps == 3 * 4
    once = Counter(reads[2:])  # the first was looked at before
    assert sorted(once.values()) == [2] * 8 + [3] * 32  # before and after; in each epoch
    quietly(student, tiny_vit, data, epochs=3, held_back=8, learning_rate=1e-3)
    assert not all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_pictures_held_back_may_be_others(student, tiny_vit, data):
    """All of ``data`` are trained on, and the others decide."""
    before, others = state(student), torch.randn(8, *data.shape[1:], generator=torch.Generator().manual_seed(5))
    seen = []

    class Read(list):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    with pytest.warns(UserWarning, match=r"the loss on 8 pictures held back was \S+ before and is \S+ after"):
        told = quietly(student, tiny_vit, data, epochs=1, held_back=Read(others), learning_rate=1.0)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert told[-1].steps == 5
    assert Counter(seen[1:]) == dict.fromkeys(range(8), 2)  # before and after


def wide(**changes):
    torch.manual_seed(1)
    return ViTForImageClassification(vit_config(**changes)).eval()


def test_what_does_not_fit(student, tiny_vit, data):
    cases = [
        ((tiny_vit, tiny_vit, data), {}, ValueError, r"has no emulated layer: the student is what ViTQuantizer\(exec"),
        ((student, "vit", data), {}, TypeError, r"the teacher must be a torch\.nn\.Module, got str"),
        ((student, tiny_vit, data[:0]), {}, ValueError, "there is no picture to train on"),
        ((student, wide(num_labels=9), data), {}, ValueError,
         r"of 1 pictures the student's logits are \(1, 7\), the teacher's \(1, 9\)"),
        ((student, wide(num_hidden_layers=3), data), {}, ValueError,
         "the student has 2 and the teacher 3. features=0 and attention=0 train"),
        ((student, wide(hidden_size=48), data), {}, ValueError,
         r"layer.* gives \(1, 17, 24\), and the teacher's block \(1, 17, 48\); features=0 trains"),
        ((student, wide(num_attention_heads=4), data), {"losses": Losses(attention=1)}, ValueError,
         r"as many heads in both; the student has \[3, 3\] and the teacher \[4, 4\]"),
        ((student, tiny_vit, data), {"resume": True}, ValueError, "resume=True needs the output_dir"),
        ((student, tiny_vit, data), {"held_back": 40}, ValueError, "held_back must be from 0 to 39, as there are 40"),
        ((student, tiny_vit, data), {"held_back": 0.5}, TypeError, r"or pictures; got 0\.5"),
        ((student, tiny_vit, data), {"held_back": []}, ValueError, "held_back: there is no picture"),
    ]  # fmt: skip
    for arguments, more, kind, message in cases:
        with pytest.raises(kind, match=message):
            distill(*arguments, **more)
    half = ViTQuantizer(execution="emulated").quantize_model(tiny_vit.half())
    with pytest.raises(ValueError, match=r"q.* has weights of torch\.float16, too coarse for small steps"):
        distill(half, tiny_vit, data)


def test_a_wider_teacher_trains_by_its_outputs(student, data):
    told = quietly(student, wide(hidden_size=48), data, losses=Losses(features=0), max_steps=2)
    assert set(told[-1].losses) == {"loss", "loss_outputs"}


@pytest.mark.parametrize("name", ["vit-bare", "swin", "clip-vision-projection", "timm-vit"])
def test_families_with_and_without_classes(name, data, tmp_path):
    teacher = build(name)
    student = ViTQuantizer(bits=3, method="channel", execution="emulated").quantize_model(teacher)
    told = quietly(student, teacher, data[:16], max_steps=2, output_dir=tmp_path, save_steps=1, save_strategy="steps")
    assert len(told) == 2
    quietly(student, teacher, data[:16], max_steps=3, output_dir=tmp_path, resume=True)


def test_without_accelerate_it_says_what_to_install():
    hidden = "import importlib.util as u; found = u.find_spec; "
    hidden += "u.find_spec = lambda name, *more: None if name == 'accelerate' else found(name, *more); "
    done = python("-c", f"{hidden}import fairseq.quantization.training.trainer")
    assert 'install it with: pip install -e ".[training]"' in done.stderr


def _run_together():
    """Two processes with batches of 4."""
    folder = new_folder("together")
    return lambda: (folder, python(*TORCHRUN, trained_together.__file__, folder))


RUN_TOGETHER = Beside(_run_together)


@pytest.mark.slow
@RUN_TOGETHER
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo was not tried on Windows")
def test_two_processes_train_as_one_and_share_the_pictures():
    one = trained_together.train(8)
    folder, both = RUN_TOGETHER.result()
    assert both.returncode == 0, both.stderr
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["seen"]) == len(second["seen"]) == 2 * 16  # the last 4 of 36 are no whole step
    for epoch in (slice(0, 16), slice(16, 32)):
        assert len({*first["seen"][epoch], *second["seen"][epoch]}) == 32
    assert first["weights"] == second["weights"]
    # One process takes the last 4 pictures, too, in a step that is not whole. Until then a process weighs features by
    # the energy of its own pictures, and now and then a weight or an activation rounds to the other side.
    assert one["losses"][:4] == pytest.approx(first["losses"][:4], rel=1e-2)
    assert (len(one["losses"]), len(first["losses"])) == (10, 8)
