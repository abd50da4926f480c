"""ResNet-20 on scikit-learn's handwritten digits, which come with the package: 1,437 train, 360 test.

Command:   python -m jax_resnet.main --config configs/resnet20_digits.py
"""

from ml_collections import ConfigDict

from jax_resnet.config import default, duration


def get_config() -> ConfigDict:
    c = default()
    c.batch_size = 64
    c.train = duration(epochs=30)
    c.log_every = 25

    c.model.name = "cifar_resnet20"

    c.data.name = "digits"
    c.data.image_size = 16
    c.data.channels = 1
    c.data.mean, c.data.std = (0.31,), (0.38,)
    c.data.crop, c.data.pad = "pad", 2
    c.data.flip = False

    c.optimizer.learning_rate = 0.1
    c.optimizer.reference_batch = 64
    c.optimizer.weight_decay = 5e-4
    c.schedule.warmup = duration(epochs=2)
    c.label_smoothing = 0.1

    c.eval.every = c.checkpoint.every = duration(epochs=5)
    return c
