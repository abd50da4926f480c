"""ResNet-50 on ImageNet with a batch of 8192 (Goyal et al. 2017, "ImageNet in 1 hour"), 90 epochs.

Commands:  python -m jax_resnet.main --config configs/goyal2017.py
           python -m jax_resnet.main --config configs/goyal2017.py --config.batch_size=256
Hardware:  published on 256 GPUs of 32 images each, in one hour. Fewer chips: --config.accumulate=32, or a smaller
           batch, with which the rate falls in proportion, as the paper has it.
Time:      not measured here.
Accuracy:  published top-1: 76.26 ± 0.09 % (76.40 at batch 256); not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    the paper, sections 2 and 5.1; values recalled, not read again. Batch statistics over 32 images whatever the
           batch, scale 0 in the last norm of each block, head from N(0, 0.01), no decay of norms.
Differs:   of the colour augmentation of fb.resnet.torch, which the authors' code has, only the noise along the colours'
           principal components. At batch 256 the warmup stays, which there changes little.
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import imagenet


def get_config() -> ConfigDict:
    c = imagenet("resnet50", batch_size=8192, epochs=90)
    c.model.bn_group_size = 32
    c.model.zero_init_last = True
    c.model.head_std = 0.01
    c.data.image.pca_noise = 0.1

    c.optimizer.learning_rate, c.optimizer.reference_batch = 0.1, 256
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 1e-4
    c.optimizer.no_decay = ("norm",)
    c.schedule.name = "step"
    c.schedule.boundaries = (30 / 90, 60 / 90, 80 / 90)
    c.schedule.warmup = duration(epochs=5)
    c.schedule.warmup_from = 0.1 / 3.2  # from the rate of a batch of 256
    return c
