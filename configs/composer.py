"""ResNet-50 on ImageNet by MosaicML Composer's recipes, and its ResNet-56 on CIFAR-10.

Commands:  python -m jax_resnet.main --config configs/composer.py:mild
           python -m jax_resnet.main --config configs/composer.py:mild --config.stretch=0.8
Argument:  baseline (90 epochs), mild (36; if left out), medium (135), hot (270), or cifar56.
Hardware:  published on 8 GPUs of 256 images each. Fewer chips: --config.accumulate=8.
Time:      not measured here.
Accuracy:  published top-1: baseline 76.6 %, mild 75–78.1, medium 78.1–79.5, hot higher; not run here. MLPerf 2.0's run
           is mild for 28.8 epochs, which --config.stretch=0.8 makes of it.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    mosaicml/examples (main.py and YAML files) and MosaicML's submission to MLPerf 2.0.
Differs:   images grow in 4 steps where Composer takes 22, or 18, of 4 pixels: each size is compiled. Scales of norms
           begin at 1, not uniform between 0 and 1. RandAugment (one operation, severity 9 of 10) has timm's operations
           and magnitudes. Batch statistics of cifar56 are over its one batch. Weight decay is given for the peak rate
           and falls with it; here it is divided by that, which is the same.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import cifar, imagenet, variant


class Recipe(NamedTuple):
    """A column of Composer's table."""

    epochs: int
    smoothing: float = 0.0
    sizes: tuple[tuple[float, int], ...] = ()  # of training images, and from which share of the training on
    mixup: float = 0.0
    sam_every: int = 0


# Half of 176 pixels, or 0.6 of it, until 0.4, or 0.2, of the training, then larger until 0.8 of it.
FROM_HALF = ((0.0, 88), (0.45, 112), (0.55, 132), (0.65, 152), (0.75, 176))
FROM_MORE = ((0.0, 104), (0.275, 124), (0.425, 140), (0.575, 160), (0.725, 176))

RECIPES = {
    "baseline": Recipe(90),
    "mild": Recipe(36, 0.08, FROM_HALF),
    "medium": Recipe(135, 0.1, FROM_HALF, 0.2, 10),
    "hot": Recipe(270, 0.13, FROM_MORE, 0.25, 5),
}


def get_config(name: str = "mild") -> ConfigDict:
    if name == "cifar56":
        return _cifar56()
    recipe = variant("recipe", name, {**RECIPES, "cifar56": None})
    c = imagenet("resnet50", batch_size=2048, epochs=recipe.epochs)
    c.model.bn_group_size = 256
    c.model.zero_init_last = False
    c.model.init = "fan_in"

    c.optimizer.learning_rate = 2.048
    c.optimizer.momentum = 0.875
    c.optimizer.weight_decay, c.optimizer.decoupled = 5e-4 / 2.048, True
    c.optimizer.no_decay = ()
    c.schedule.warmup = duration(epochs=8)
    if name == "baseline":
        return c

    c.progressive = recipe.sizes
    c.data.image.eval_crop = 224 / 232
    c.data.mixup = recipe.mixup
    c.model.antialias, c.model.stem_pool = "blur_conv", "blur_max"

    c.loss.name, c.loss.bce_sum = "bce", True
    c.loss.label_smoothing = recipe.smoothing
    c.model.head_prior = True  # without it binary cross-entropy begins with 1000 wrong answers

    if recipe.sam_every:
        c.optimizer.sam_rho, c.optimizer.sam_every = 0.5, recipe.sam_every
    c.ema.decay, c.ema.every = 2 ** (-20 / 100), 20  # half of it is gone after 100 updates
    if name == "hot":
        c.data.image.colout = 0.05
        c.data.image.randaugment_timm = (1, 9.0, 0.0, 1.0)
        c.model.drop_path = 0.1
    return c


def _cifar56() -> ConfigDict:
    c = cifar("cifar_resnet56", batch_size=1024)
    c.train = duration(epochs=160)
    c.model.shortcut = "B"
    c.model.zero_init_last = False
    c.model.init = "fan_in"
    c.optimizer.learning_rate = 1.2
    c.optimizer.weight_decay, c.optimizer.decoupled = 2e-3 / 1.2, True
    c.optimizer.no_decay = ()
    c.schedule.name = "step"
    c.schedule.boundaries = (80 / 160, 120 / 160)
    c.schedule.warmup = duration(epochs=5)
    return c
