"""ResNet-20 on scikit-learn's handwritten digits, real images that come with the package: 1,437 train, 360 test.

Command:   python -m jax_resnet.main --config configs/resnet20_digits.py
Hardware:  two CPU cores; about half a minute after the compiler's few seconds.
Accuracy:  357, 360 and 358 of 360 with seeds 0, 1, 2 (benchmarks/digits.py).
Source:    the network of He et al. 2015, section 4.2; the 8×8 digits are enlarged to 16×16 and, unlike CIFAR's images,
           not mirrored. The train loss that is shown is that of smoothed labels, above the test loss by design.
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
    c.data.image.size = 16
    c.data.image.channels = 1
    c.data.image.mean, c.data.image.std = (0.31,), (0.38,)
    c.data.image.crop, c.data.image.pad = "pad", 2
    c.data.image.flip = False

    c.optimizer.learning_rate = 0.1
    c.optimizer.reference_batch = 64
    c.optimizer.weight_decay = 5e-4
    c.schedule.warmup = duration(epochs=2)
    c.loss.label_smoothing = 0.1

    c.eval.every = duration(epochs=5)
    c.checkpoint.every = duration(epochs=5)
    return c
