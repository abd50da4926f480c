"""ResNet-50 v1.5 on ImageNet with LARS, as submitted to MLPerf: batches of 1,536 to 65,536.

Commands:  python -m jax_resnet.main --config configs/mlperf_lars.py
           python -m jax_resnet.main --config configs/mlperf_lars.py:32768
Argument:  the batch size: 1536, 2048, 3200, 3264, 4096 (if left out), 8192, 32768, 57344 or 65536.
Hardware:  published on 8 GPUs (1536, 3200, 3264), 3,584 GPUs (57344), TPU v4-16 (2048), v3-32 (4096), v4-128 and v4-512
           (8192), v4-8192 (32768), v3-8192 (65536). Fewer chips: --config.accumulate=8.
Time:      not measured here.
Accuracy:  MLPerf's goal, 75.9 % top-1, was reached after 35 epochs (1536, 3200, 3264), 38 (2048, 4096), 42–44 (8192),
           60 (32768), 77 (57344) and 88–92 (65536); not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    MLPerf Training's submission logs of Google, NVIDIA and tinycorp. A Google entry's polynomial takes so many
           updates after the warmup; an NVIDIA or tinycorp entry's ends with the epochs given. The trust coefficient is
           0.001 in NVIDIA's configs and taken for all.
Differs:   the middle of a range (32768: rate 28.25, 17 epochs of warmup). Batch statistics of 8192 are over 128, as on
           v4-128, those of 1536 over the 192 of a GPU. The run goes on to its schedule's end, not only to the goal.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import IMAGENET_TRAIN, imagenet, variant


class Entry(NamedTuple):
    """A row of the table of submissions."""

    rate: float
    warmup: int  # epochs
    decay: float  # of weights
    momentum: float
    group: int  # consecutive examples that share batch statistics
    updates: int | None = None  # after the warmup, or
    epochs: int | None = None  # in all


ENTRIES = {
    "1536": Entry(7.2, 2, 2e-4, 0.9, 192, epochs=37),
    "2048": Entry(8.5, 5, 2e-4, 0.9, 128, updates=22_530),
    "3200": Entry(11.0, 2, 5e-5, 0.9, 400, epochs=37),
    "3264": Entry(10.5, 2, 5e-5, 0.9, 408, epochs=37),
    "4096": Entry(13.0, 2, 2e-4, 0.9, 128, updates=12_169),
    "8192": Entry(17.0, 5, 2e-4, 0.9, 128, updates=6_095),
    "32768": Entry(28.25, 17, 1e-4, 0.93, 64, updates=1_731),
    "57344": Entry(23.0, 32, 2.5e-5, 0.95, 32, epochs=78),
    "65536": Entry(23.08, 33, 1e-4, 0.95372, 64, updates=1_166),
}


def get_config(batch_size: str = "4096") -> ConfigDict:
    entry, batch = variant("batch size", batch_size, ENTRIES), int(batch_size)
    epochs = entry.epochs or entry.warmup + (entry.updates or 0) * batch / IMAGENET_TRAIN
    c = imagenet("resnet50", batch_size=batch, epochs=epochs)
    c.model.bn_group_size = entry.group
    c.data.image.crop_area = (0.05, 1.0)

    c.optimizer.name = "lars"
    c.optimizer.learning_rate = entry.rate
    c.optimizer.momentum = entry.momentum
    c.optimizer.rate_in_momentum = True
    c.optimizer.weight_decay = entry.decay
    c.optimizer.trust_coefficient = 1e-3
    c.optimizer.epsilon = 0.0
    c.schedule.name = "polynomial"
    c.schedule.power = 2.0
    c.schedule.final = 1e-4 / entry.rate  # a rate of 1e-4
    c.schedule.warmup = duration(epochs=entry.warmup)
    c.loss.label_smoothing = 0.1
    c.eval.every = duration(epochs=4)
    return c
