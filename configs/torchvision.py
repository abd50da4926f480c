"""ResNet-50 on ImageNet by torchvision's two recipes, those of its weights IMAGENET1K_V1 and V2.

Commands:  python -m jax_resnet.main --config configs/torchvision.py:v1
           python -m jax_resnet.main --config configs/torchvision.py:v2 --config.model.name=resnet101
Argument:  v1 (90 epochs) or v2 (600 epochs; if left out).
Hardware:  published on 8 GPUs of 32 (v1) or 128 (v2) images each.
Time:      not measured here.
Accuracy:  published top-1: v1 76.13 %; v2 80.86, resnet101 81.89, resnet152 82.28, resnext50_32x4d 81.20; not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    torchvision's references/classification and its notes on V2. Its running average's decay is 0.99998 by name,
           but the code has 1 − 0.00002 · batch · 32 / epochs, taken every 32 updates.
Differs:   the cosine of v2 falls with each update, torchvision's with each epoch. Heads begin as N(0, 0.01).
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import imagenet
from jax_resnet.errors import choose


def get_config(version: str = "v2") -> ConfigDict:
    choose("--config: version after the colon", version, ("v1", "v2"))
    v2 = version == "v2"
    c = imagenet("resnet50", batch_size=1024 if v2 else 256, epochs=600 if v2 else 90)
    c.model.bn_group_size = c.batch_size // 8
    c.model.zero_init_last = False
    c.data.image.antialias = True  # as Pillow resizes
    if not v2:
        c.optimizer.learning_rate = 0.1
        c.optimizer.weight_decay = 1e-4
        c.optimizer.no_decay = ()
        c.schedule.name = "step"
        c.schedule.boundaries = (30 / 90, 60 / 90)
        c.schedule.warmup = duration(epochs=0)
        return c

    c.progressive = ((0.0, 176),)  # evaluated at 224
    c.data.repeats = 4
    c.data.image.trivial_augment = True
    c.data.image.augment_interpolation = "bilinear"
    c.data.image.erase = 0.1
    c.data.mixup, c.data.image.cutmix = 0.2, 1.0
    c.data.image.eval_crop = 224 / 232

    c.loss.label_smoothing = 0.1
    c.optimizer.learning_rate = 0.5
    c.optimizer.weight_decay = 2e-5
    c.optimizer.no_decay = ("norm",)
    c.schedule.warmup = duration(epochs=5)
    c.schedule.warmup_from = 0.01

    c.ema.decay = 1 - (1 - 0.99998) * 1024 * 32 / 600
    c.ema.every = 32
    c.ema.warmup = duration(epochs=5)
    return c
