"""The first residual networks on ImageNet (He et al. 2015), 90 epochs.

Commands:  python -m jax_resnet.main --config configs/he2015_imagenet.py
           python -m jax_resnet.main --config configs/he2015_imagenet.py:152
Argument:  the depth: 18, 34, 50 (if left out), 101 or 152; from 50 on with the stride in the first 1×1 convolution.
Hardware:  published on 8 GPUs of 32 images each.
Time:      not measured here.
Accuracy:  published top-1 on one 224-pixel crop of 256: 75.3 % at depth 50, 76.4 at 101, 77.0 at 152 (the authors'
           models); not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    the paper, section 3.4; values recalled, not read again. Batch statistics over 32, as 8 GPUs have them.
Differs:   the rate falls at 30, 60 and 80 of 90 epochs, the common stand-in for "when the error plateaus, up to 60e4
           updates", which nobody can repeat. Evaluation is on one crop, not ten. Running statistics keep 0.9 each step.
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import imagenet, variant

NETWORKS = {
    **{depth: f"resnet{depth}" for depth in ("18", "34")},
    **{depth: f"resnet{depth}_v1" for depth in ("50", "101", "152")},
}


def get_config(depth: str = "50") -> ConfigDict:
    c = imagenet(variant("depth", depth, NETWORKS), batch_size=256, epochs=90)
    c.model.bn_group_size = 32
    c.model.zero_init_last = False

    c.data.image.crop = "scaled"  # short side to 256 … 480, a square of 224
    c.data.image.crop_resize = (256, 480)
    c.data.image.pca_noise = 0.1

    c.optimizer.learning_rate = 0.1
    c.optimizer.weight_decay = 1e-4
    c.optimizer.no_decay = ()
    c.schedule.name = "step"
    c.schedule.boundaries = (30 / 90, 60 / 90, 80 / 90)
    c.schedule.warmup = duration(epochs=0)
    return c
