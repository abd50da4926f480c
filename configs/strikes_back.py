"""ResNet-50 on ImageNet by the three procedures of "ResNet strikes back" (Wightman et al. 2021).

Commands:  python -m jax_resnet.main --config configs/strikes_back.py:a3
           python -m jax_resnet.main --config configs/strikes_back.py:a1
Argument:  a1 (600 epochs), a2 (300) or a3 (100 epochs at 160 pixels; if left out).
Hardware:  published on 4 GPUs of 512 images each.
Time:      not measured here.
Accuracy:  published top-1: a1 80.4 %, a2 79.8, a3 78.1; not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    the paper's table 2 and timm, whose LAMB clips the norm of all gradients to 1 though the paper says that
           nothing is clipped, and whose binary cross-entropy is the mean over classes.
Differs:   a1 and a2 take batches of 2016 rather than 2048, so that they hold each image three times; the rate is that
           of the smaller batch. Cosine and warmup move with each update, timm's with each epoch. What is sheared or
           rotated is resampled bilinearly, not bicubically.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import imagenet, variant


class Procedure(NamedTuple):
    """A column of the paper's table."""

    epochs: int
    batch: int
    rate: float
    decay: float
    smoothing: float
    drop_path: float
    repeats: int
    magnitude: float
    mixup: float


PROCEDURES = {
    "a1": Procedure(600, 2016, 5e-3, 0.01, 0.1, 0.05, 3, 7.0, 0.2),
    "a2": Procedure(300, 2016, 5e-3, 0.02, 0.0, 0.05, 3, 7.0, 0.1),
    "a3": Procedure(100, 2048, 8e-3, 0.02, 0.0, 0.0, 1, 6.0, 0.1),
}


def get_config(procedure: str = "a3") -> ConfigDict:
    p = variant("procedure", procedure, PROCEDURES)
    c = imagenet("resnet50", batch_size=p.batch, epochs=p.epochs)
    if procedure == "a3":
        c.progressive = ((0.0, 160),)  # evaluated at 224
    c.model.bn_group_size = p.batch // 4
    c.model.drop_path = p.drop_path

    c.data.image.interpolation, c.data.image.antialias = "bicubic", True
    c.data.repeats = p.repeats
    c.data.image.randaugment_timm = (2, p.magnitude, 0.5, 0.5)
    c.data.image.augment_interpolation = "bilinear"
    c.data.mixup, c.data.image.cutmix = p.mixup, 1.0
    c.data.image.eval_crop = 0.95

    c.loss.name = "bce"
    c.loss.label_smoothing = p.smoothing

    c.optimizer.name = "lamb"
    c.optimizer.learning_rate, c.optimizer.reference_batch = p.rate, 2048
    c.optimizer.batch_scaling = "sqrt"
    c.optimizer.epsilon = 1e-6
    c.optimizer.weight_decay = p.decay
    c.optimizer.clip_norm = 1.0
    c.schedule.final = 1e-6 / p.rate
    c.schedule.warmup = duration(epochs=5)
    c.schedule.warmup_from = 1e-4
    return c
