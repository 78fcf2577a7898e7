"""The scripts that train on CIFAR-10: the small ViT, with and without a teacher, and its distillation."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

TINY = ["--hidden", 64, "--layers", 2, "--mlp", 64, "--batch-size", 20]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A data set of two easy classes in CIFAR-10's layout; not to be written to."""
    data = tmp_path_factory.mktemp("cifar") / "data"
    for split, count in (("train", 1100), ("test", 20)):
        for name, brightness in (("bright", 200), ("dark", 50)):
            folder = data / split / name
            folder.mkdir(parents=True)
            for i in range(count // 2):
                pixels = np.random.default_rng(i).integers(-40, 40, (32, 32, 3)) + brightness
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg", quality=50)
    return data


def test_training_resumes_and_writes_a_folder_that_loads(script, cifar, tmp_path):
    arguments = ["--data", cifar, "--output", tmp_path / "run", *TINY]
    code, out, _ = script("train_cifar10", *arguments, "--epochs", 1)
    assert code == 0
    code, out, _ = script("train_cifar10", *arguments, "--epochs", 2)
    assert code == 0
    assert "after 1 epochs" in out
    code, _, _ = script("train_cifar10", *arguments, "--epochs", 3, "--lr", 0.1)
    assert code == (
        f"error: {tmp_path / 'run' / 'checkpoint.pt'} was written with lr 0.002, not 0.1; "
        "give the same, or another --output"
    )
    result = json.loads((tmp_path / "run" / "training.json").read_text())
    assert result["epochs"] == 2
    assert result["test_accuracy"] == 1.0
    model = ViTForImageClassification.from_pretrained(tmp_path / "run", dtype="auto")
    assert model.dtype == torch.float16
    assert model.config.label2id == {"bright": 0, "dark": 1}
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").size == {"height": 32, "width": 32}


def test_cutmix_says_whose_pixels_there_are(script):
    script("train_cifar10", "--help")  # puts the folder on the path
    from cifar10_pictures import cutmix

    labels = torch.arange(40)
    pixels = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)  # of the colour of its label
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(20):
        mixed, others, own = cutmix(pixels, labels, generator)
        mine, theirs = (mixed == x[:, None, None, None] for x in (labels, others))
        assert bool((mine | theirs).all())
        moved = others != labels
        assert mine[moved].float().mean((1, 2, 3)).tolist() == pytest.approx([own] * int(moved.sum()))
        assert others.sort().values.equal(labels)
        shares.append(own)
    assert min(shares) < 0.3 < 0.9 < max(shares)


def test_a_teacher_teaches_what_it_has_learned(script, cifar, tmp_path):
    arguments = ["--data", cifar, "--output", tmp_path / "run", *TINY, "--teacher-epochs", 1, "--epochs", 1]
    called, first = [], []

    def watch(module):
        class Teacher(module.Teacher):
            def __init__(self, pictures, classes):
                super().__init__(pictures, classes)
                means = pictures.mean((1, 2, 3))
                assert means.min() < -0.5 < 0.5 < means.max()  # both classes whiten

            def forward(self, pixel_values):
                if torch.is_grad_enabled() or not self.training:
                    called.append(
                        (self.training, torch.is_grad_enabled(), any(p.requires_grad for p in self.parameters()))
                    )
                return super().forward(pixel_values)

        class Guide(module.Guide):
            def __init__(self, hidden, layers):
                super().__init__(hidden, layers)
                first.extend(p.detach().clone() for p in self.parameters())

        module.Teacher, module.Guide = Teacher, Guide

    code, _, err = script("train_cifar10", *arguments, before=watch)
    assert code == 0
    learning, judged, teaching = (True, True, True), (False, False, True), (False, False, False)
    assert called == [learning] * 5 + [judged] * 2 + [teaching] * 5
    assert "ViT, epoch 1" in err
    saved = torch.load(tmp_path / "run" / "checkpoint.pt")["modules"][1]
    assert not any(torch.equal(now, then) for now, then in zip(saved.values(), first, strict=True))
    assert json.loads((tmp_path / "run" / "training.json").read_text())["teacher_minutes"] >= 0


def test_a_teacher_goes_on_where_it_was(script, cifar, tmp_path):
    arguments = ["--data", cifar, "--output", tmp_path / "run", *TINY, "--teacher-epochs", 2, "--epochs", 1]

    def stop(module):
        class Run(module.Run):
            def save(self):
                super().save()
                if self.name == "ViT" or self.epoch == 1:
                    raise SystemExit("stopped")

        module.Run = Run

    assert script("train_cifar10", *arguments, before=stop)[0] == "stopped"
    code, out, err = script("train_cifar10", *arguments, before=stop)
    assert code == "stopped"  # after the ViT's first epoch
    assert "teacher.pt after 1 epochs" in out
    assert "teacher, epoch 1:" not in err
    assert "teacher, epoch 2:" in err
    code, out, err = script("train_cifar10", *arguments[:-1], 2)
    assert code == 0
    assert "teacher.pt after 2 epochs" in out
    assert "teacher, epoch" not in err
    assert "ViT, epoch 2:" in err


def test_a_checkpoint_that_does_not_fit_is_refused_before_a_teacher_is_trained(script, cifar, tmp_path):
    arguments = ["--data", cifar, "--output", tmp_path, *TINY, "--teacher-epochs", 1]
    torch.save({"modules": [], "settings": {"lr": 0.5}}, tmp_path / "checkpoint.pt")
    code, _, err = script("train_cifar10", *arguments)
    assert "was written with lr 0.5, not 0.002" in code
    assert "teacher" not in err.replace(str(tmp_path), "")
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    code, _, err = script("train_cifar10", *arguments)
    assert "checkpoint.pt is of an earlier version" in code
    assert "teacher" not in err.replace(str(tmp_path), "")


@pytest.mark.parametrize(("option", "value", "least"), [("--epochs", 0, 1), ("--teacher-epochs", -1, 0)])
def test_a_number_of_epochs_that_is_none(script, option, value, least):
    code, _, err = script("train_cifar10", "--data", "d", "--output", "o", f"{option}={value}")
    assert code == 2
    assert f"{value} is not a whole number of at least {least}" in err


def test_a_teacher_tells_what_is_where(script):
    """A ViT whose tokens hold the teacher's features of their own places has learned them; of others it has not."""
    script("train_cifar10", "--help")  # puts the folder on the path
    from cifar10_teacher import CHANNELS, SHARE, TEMPERATURE, Guide, Taught

    generator = torch.Generator().manual_seed(0)
    stages = tuple(torch.randn(6, c, s, s, generator=generator) for c, s in zip(CHANNELS, (8, 4), strict=True))
    stages = tuple((x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0) for x in stages)
    coarse = stages[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    tokens = torch.cat([stages[0], coarse], 1).flatten(2).mT  # (6, 64, 384)
    guide = Guide(sum(CHANNELS), layers=4)
    with torch.no_grad():
        identity = torch.eye(sum(CHANNELS)).split(CHANNELS)
        for head, rows in zip(guide.heads, identity, strict=True):
            head.weight.copy_(rows)
            head.bias.zero_()
    kept = torch.stack([torch.randperm(64, generator=generator)[:20] for _ in range(6)])
    of = {True: tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2])), False: tokens}
    logits, labels = torch.randn(6, 10, generator=generator), torch.zeros(())

    def loss(dropped, told, states=(2, 3), taught=logits):
        states = [F.pad(of[dropped], (0, 0, 1, 0)) if i in states else torch.zeros(6, 21, 384) for i in range(5)]
        return guide(labels, Taught(taught, stages), logits, tuple(states), told).item()

    assert loss(True, kept) == pytest.approx(0, abs=1e-4)
    assert loss(False, None) == pytest.approx(0, abs=1e-4)
    assert loss(True, kept.roll(1, 0)) > 1
    assert loss(True, kept, states=(2,)) == pytest.approx(1, abs=0.1)  # nothing is told of the last stage
    other = torch.randn(6, 10, generator=generator)
    p, q = ((x / TEMPERATURE).softmax(-1) for x in (other, logits))
    divergence = SHARE * TEMPERATURE**2 * (p * (p / q).log()).sum(-1).mean()
    assert loss(True, kept, taught=other) == pytest.approx(float(divergence), rel=1e-3)
    labels = torch.tensor(2.0)
    assert loss(True, kept) == pytest.approx(2 * (1 - SHARE), abs=1e-4)


def test_pictures_are_mixed_to_the_end(script, cifar, tmp_path):
    script("train_cifar10", "--help")  # puts the folder on the path
    from cifar10_pictures import read_split
    from cifar10_run import Run

    given = {"output": tmp_path, "seed": 0, "batch_size": 20, "mixed_precision": False}
    layer, seen = nn.Linear(1, 1), []

    def loss_of(images, labels, others, own, progress):
        seen.append(own < 1)
        return layer(torch.ones(1)).sum()

    model = lambda pixel_values: SimpleNamespace(logits=torch.zeros(len(pixel_values), 2))  # noqa: E731
    model.eval = model.train = model.state_dict = dict
    run = Run(
        argparse.Namespace(**given),
        "run",
        "run.pt",
        [model],
        [torch.optim.SGD(layer.parameters(), lr=0.1)],
        2,
        cutmix=0.5,
    )
    run.train(read_split(cifar, "train"), torch.device("cpu"), loss_of)
    assert len(seen) == 2 * 5
    assert set(seen[-3:]) == {True, False}


def test_training_without_data(script, tmp_path):
    code, _, _ = script("train_cifar10", "--data", tmp_path, "--output", tmp_path / "run")
    assert "--data must hold one of them" in str(code)


def test_distillation_before_and_after(script, cifar):
    """On a tiny model of its two classes, and the embedded one does not know them."""
    torch.manual_seed(0)
    names = {0: "bright", 1: "dark"}
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        id2label=names, label2id={name: i for i, name in names.items()}, initializer_range=0.2,
    )  # fmt: skip
    tiny = ViTForImageClassification(config).eval()

    def with_tiny(module):
        module.load_embedded = lambda: (tiny, None, "a tiny ViT")

    arguments = ["--data", cifar, "--pictures", 40, "--epochs", 2, "--batch-size", 8]
    code, out, err = script("distill_cifar10", *arguments, before=with_tiny)
    assert code == 0, err
    assert "a tiny ViT: 40 pictures without labels to learn from, 20 others to evaluate on" in out
    assert err.count("step 10 of 10") == 2
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert [row[-6] for row in rows] == ["float", "calibrated", "distilled", "calibrated", "distilled"]
    divergence = [float(row[-2]) for row in rows]
    assert divergence[0] == 0
    assert len(set(divergence)) == 5  # each is another model
    code, _, err = script("distill_cifar10", *arguments)
    assert (code, err.splitlines()[-1]) == (2, "error: --data: the embedded CIFAR-10 ViT has no class bright, dark")
    code, _, err = script("distill_cifar10", "--pictures", 60, "--held-back", 60)
    assert (code, err.splitlines()[-1]) == (2, "error: --held-back 60: of 60 pictures some must be left to train on")
