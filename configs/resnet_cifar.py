"""CIFAR ResNets of 6n+2 layers (He et al. 2015, section 4.2, as in table 6) on CIFAR-10 or CIFAR-100.

Commands:  python -m jax_resnet.main --config configs/resnet_cifar.py:20
           python -m jax_resnet.main --config configs/resnet_cifar.py:56 --config.data.name=cifar100
Argument:  the depth, 6n+2: 20 (if left out), 32, 44, 56, 110, …
Hardware:  any one GPU or TPU chip; the network is too small to be worth more.
Time:      not yet measured on a GPU or TPU; two CPU cores train depth 20 at some 300 images a second.
Accuracy:  published error on CIFAR-10: 8.75 % at depth 20, 7.51 at 32, 7.17 at 44, 6.97 at 56, 6.43 at 110.
Data:      tfds build cifar10 --file_format=array_record   (the README says what that needs)
Source:    the paper, with its augmentation (4 pixels of padding, crop, flip), rate (0.1, a tenth at 32k and 48k of 64k
           updates) and decay (1e-4 on every parameter).
Differs:   for depth 110 the paper begins with a rate of 0.01 until the training error is below 80 %, which it was after
           400 updates; a linear warmup over these does the same here. Mean and deviation of each channel, as is usual
           now, in place of the mean image.
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import cifar


def get_config(depth: str = "20") -> ConfigDict:
    c = cifar(f"cifar_resnet{depth}", batch_size=128)
    c.train = duration(steps=64_000)
    c.model.zero_init_last = False

    c.optimizer.learning_rate = 0.1
    c.optimizer.weight_decay = 1e-4
    c.optimizer.no_decay = ()
    c.schedule.name = "step"
    c.schedule.boundaries = (32 / 64, 48 / 64)
    c.schedule.warmup = duration(steps=400 if int(depth) >= 110 else 0)
    c.schedule.warmup_from = 0.1
    return c
