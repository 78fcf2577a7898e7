"""What each process of a training does, alone in the test's own or as a script under torchrun."""

import json
import os
import sys

import torch
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.training.distill import distill


class Seen(torch.utils.data.Dataset):
    """36 pictures, and which of them were read since ``seen`` is a list."""

    seen = None

    def __len__(self):
        return 36

    def __getitem__(self, index):
        if self.seen is not None:
            self.seen.append(index)
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))


class Record(TrainerCallback):
    """Notes what is read once training begins; before that, the first picture is looked at."""

    def __init__(self, pictures):
        self.pictures = pictures

    def on_train_begin(self, *arguments, **more):
        self.pictures.seen = []


def train(batch_size):
    """Two epochs: the losses of the steps, the pictures that this process read, and the sum of the weights' sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=4,
        num_labels=7,
    )  # fmt: skip
    teacher, pictures, told = ViTForImageClassification(config).eval(), Seen(), []
    student = ViTQuantizer(bits=3, method="channel", execution="emulated").quantize_model(teacher)
    distill(
        student, teacher, pictures, epochs=2, batch_size=batch_size, progress=told.append, logging_steps=1,
        callbacks=[Record(pictures)],
    )  # fmt: skip
    torch.set_num_threads(threads)
    weights = float(sum(p.double().abs().sum() for p in student.parameters()))
    return {"losses": [p.losses["loss"] for p in told], "seen": pictures.seen, "weights": weights}


if __name__ == "__main__":
    with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as opened:
        json.dump(train(4), opened)
    torch.distributed.destroy_process_group()  # gloo's threads may abort a process that ends with them
