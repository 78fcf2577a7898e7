"""distill: an ordinary packed folder, or nothing; and the same run goes on."""

import json

import pytest
from transformers import AutoModelForImageClassification

from fairseq.cli import distill
from fairseq.cli import pictures as cli_pictures
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.training import trainer

pytestmark = pytest.mark.filterwarnings("ignore:calibrating on")
SETTINGS = ("--bits", 3, "--batch-size", 8, "--calibration", 36, "--override", "*classifier=bits:8", "--epochs", 2)


def test_the_folder_is_a_packed_model_with_its_processor(cli, models, pictures, tmp_path):
    out = tmp_path / "out"
    found = cli(
        "distill", models / "short", "--images", pictures, *SETTINGS, "--augment", "--held-back", 2, "-o", out, "--json"
    )
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert (result["steps"], result["pictures"], result["training"]["held_back"]) == (10, 36, 2)
    assert result["losses_last"].keys() == {"loss", "loss_outputs", "loss_features"}
    assert "step 10 of 10, epoch 2.00: loss" in found.err
    assert {file.name for file in out.iterdir()} >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    layers = [m for m in AutoModelForImageClassification.from_pretrained(out).modules() if type(m) is PackedLinear]
    assert sorted({layer.config.bits for layer in layers}) == [3, 8]


def test_pictures_held_back_are_not_calibrated_on(cli, models, pictures, tmp_path, monkeypatch):
    """They would seem to be helped less by training than others are."""
    read, at = {}, ["calibrated"]

    def noted(number, reader):
        def look():
            read.setdefault(at[0], set()).add(number)
            return reader()

        return look

    readers = [noted(i, reader) for i, reader in enumerate(cli_pictures.pictures_in(pictures))]

    class Trained(trainer.DistillationTrainer):
        def evaluate(self, *words, **more):
            at[0] = "judged"
            return super().evaluate(*words, **more)

        def train(self, *words, **more):
            at[0] = "trained"
            return super().train(*words, **more)

    monkeypatch.setattr(cli_pictures, "pictures_in", lambda folder: readers)
    monkeypatch.setattr(trainer, "DistillationTrainer", Trained)
    words = ("--images", pictures, *SETTINGS, "--calibration", 128, "--held-back", 12, "-o", tmp_path / "out")
    found = cli("distill", models / "short", *words)
    assert found.code == 0, found.err
    assert "Training on 24 pictures" in found.err
    assert len(read["judged"]) == 12
    assert read["calibrated"] - read["judged"] == read["trained"]
    assert len(read["trained"]) == 24
    assert len(read["calibrated"] & read["judged"]) <= 1  # one may be looked at before, for its shape


def test_an_earlier_version_calibrated_on_them(cli, models, pictures, tmp_path):
    """Its student is another, so that its run is not gone on with; without pictures held back it is the same."""
    out, folder = tmp_path / "out", tmp_path / "again.checkpoints"
    words = ("distill", models / "short", "--images", pictures, *SETTINGS)
    for held, code in ((2, 2), (0, 0)):
        result = json.loads(cli(*words, "--held-back", held, "-o", out, "--json", "--force").out)
        kept = ("model", "teacher", "images", "calibration", "processes", "quantization", "losses", "training")
        (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({name: result[name] for name in kept}))
        found = cli(*words, "--held-back", held, "--resume", "-o", tmp_path / "again")
        assert (found.code, "has held_back_is_calibrated None, and this one False" in found.err) == (code, bool(held))


def test_a_run_that_was_stopped_leaves_checkpoints_alone_and_goes_on(cli, models, pictures, tmp_path, monkeypatch):
    out, words = tmp_path / "out", ("distill", models / "short", "--images", pictures, *SETTINGS)

    class Stopped(trainer.Report):
        def on_epoch_begin(self, args, state, control, **more):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Report", Stopped)
        assert cli(*words, "-o", out).code == 130
    folder = tmp_path / "out.checkpoints"
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-5", distill.RUN]
    again = cli(*words, "-o", out)
    assert (again.code, again.err.count("--resume goes on with it, or remove it")) == (2, 1)
    other = cli(*words, "--features", 0, "-o", out, "--resume")
    assert other.code == 2
    assert f"--resume: the run in {folder} has features 1.0, and this one 0.0" in other.err
    resumed = cli(*words, "-o", out, "--resume")
    assert resumed.code == 0, resumed.err
    assert "step 10 of 10" in resumed.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("vit", "--held-back", 36), "held_back must be from 0 to 35, as there are 36 pictures; got 36"),
        (("vit", "--images", "nowhere"), "--images nowhere: no such folder"),
        (("vit", "--temperature", 0), "outputs and temperature must be above 0"),
        (("packed",), "the model is quantized already"),
        (("vit", "--bits", 9), "bits must be from 2 to 8, got 9"),
    ],
    ids=str,
)
def test_mistakes_are_a_line(cli, models, pictures, tmp_path, words, message):
    given = words if "--images" in words else (*words, "--images", pictures)
    found = cli("distill", models / given[0], *given[1:], "-o", tmp_path / "out")
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert not (tmp_path / "out").exists()


def test_accelerate_that_starts_one_process_of_two(cli, models, pictures, tmp_path, monkeypatch):
    """What it sets for ``accelerate launch --cpu --num_processes 2``."""
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    for words in (("distill", models / "vit", "--images", pictures), ("quantize", models / "vit")):
        found = cli(*words, "-o", tmp_path / "out")
        assert found.code == 2
        assert "accelerate launch --cpu starts one process, whatever --num_processes says; torchrun" in found.err
    assert list(tmp_path.iterdir()) == []
