"""Wide residual networks on CIFAR-10 or CIFAR-100 (Zagoruyko and Komodakis 2016), 200 epochs.

Commands:  python -m jax_resnet.main --config configs/wide_resnet.py
           python -m jax_resnet.main --config configs/wide_resnet.py:16_4 --config.data.name=cifar100
Argument:  depth, 6n+4, and widening factor: 28_10 (if left out), 16_4, 40_2, …
Hardware:  any one GPU or TPU chip.
Time:      not measured here.
Accuracy:  published for 28_10: 96.0 % on CIFAR-10, 80.75 on CIFAR-100; not run here.
Data:      tfds build cifar10 --file_format=array_record   (the README says what that needs)
Source:    the paper, section 3, and its code; values recalled, not read again.
Differs:   the variant without dropout, which the paper puts between the two convolutions of a block.
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import cifar


def get_config(size: str = "28_10") -> ConfigDict:
    c = cifar(f"wrn_{size}", batch_size=128)
    c.train = duration(epochs=200)
    c.data.image.pad_mode = "reflect"

    c.optimizer.learning_rate = 0.1
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 5e-4
    c.optimizer.no_decay = ()
    c.schedule.name = "step"
    c.schedule.boundaries = (60 / 200, 120 / 200, 160 / 200)
    c.schedule.factor = 0.2
    c.schedule.warmup = duration(epochs=0)
    return c
