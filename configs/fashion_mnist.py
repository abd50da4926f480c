"""placeholder"""

from ml_collections import ConfigDict

from jax_resnet.config import default, duration


def get_config(path: str = "../shared/data/fashion_mnist.npz") -> ConfigDict:
    c = default()
    c.batch_size = 128
    c.train = duration(epochs=5)
    c.log_every = 50

    c.model.name = "cifar_resnet8"
    c.model.widths = (16, 32, 64)

    c.data.name = f"npz:{path}"
    c.data.channels = 1
    c.data.mean, c.data.std = (0.2860,), (0.3530,)
    c.data.crop = "none"

    c.optimizer.learning_rate = 0.2
    c.optimizer.reference_batch = 128
    c.optimizer.weight_decay = 5e-4
    c.schedule.name = "linear"
    c.schedule.warmup = duration(epochs=1)
    c.loss.label_smoothing = 0.05
    c.eval.every = duration(epochs=1)
    return c
