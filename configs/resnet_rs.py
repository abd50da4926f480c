"""ResNet-RS on ImageNet (Bello et al. 2021, "Revisiting ResNets"), 350 epochs.

Commands:  python -m jax_resnet.main --config configs/resnet_rs.py
           python -m jax_resnet.main --config configs/resnet_rs.py:152
Argument:  the depth: 50 (if left out), 101, 152, 200, 270, 350 or 420; size and regularisation go with it.
Hardware:  published on TPUs, a batch of 4096. Fewer chips: --config.accumulate=8.
Time:      not measured here.
Accuracy:  published top-1: 78.8 % at depth 50, then 81.2, 83.0, 83.4, 83.8, 84.2, 84.4; not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    the YAML files of tensorflow/tpu, models/official/resnet/resnet_rs; warmup and decay's exceptions recalled.
           The running average takes the batch statistics as they come (momentum 0) and smooths them with the weights.
Differs:   RandAugment has timm's operations, each always done. Their magnitudes end at 10, TensorFlow's go on to the
           15 that the files have from depth 101 on. Batch statistics are over 64 images: chips did not share them, but
           the files do not say how many there were. Evaluation keeps 0.91 of the short side, which is timm's for these
           weights.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from jax_resnet.config.recipes import imagenet, variant


class Scale(NamedTuple):
    """What changes with the depth."""

    size: int
    dropout: float
    drop_path: float


SCALES = {
    "50": Scale(160, 0.25, 0.0),
    "101": Scale(192, 0.25, 0.0),
    "152": Scale(256, 0.25, 0.0),
    "200": Scale(256, 0.25, 0.1),
    "270": Scale(256, 0.25, 0.1),
    "350": Scale(320, 0.4, 0.1),
    "420": Scale(320, 0.4, 0.1),
}


def get_config(depth: str = "50") -> ConfigDict:
    scale = variant("depth", depth, SCALES)
    c = imagenet(f"resnetrs{depth}", batch_size=4096, epochs=350)
    c.model.dropout = scale.dropout
    c.model.drop_path = scale.drop_path
    c.model.bn_group_size = 64
    c.model.bn_momentum = 0.0

    c.data.image.size = scale.size
    c.data.image.randaugment_timm = (2, 10.0, 0.0, 1.0)
    c.data.image.eval_crop = 0.91

    c.loss.label_smoothing = 0.1
    c.optimizer.learning_rate, c.optimizer.reference_batch = 0.1, 256
    c.optimizer.weight_decay = 4e-5
    c.optimizer.no_decay = ("norm",)
    c.ema.decay, c.ema.ramp = 0.9999, True
    return c
