"""The common lines of published recipes, with which files in configs/ begin."""

from collections.abc import Mapping
from typing import TypeVar

from ml_collections import ConfigDict

from jax_resnet.config import default, duration
from jax_resnet.errors import choose
from jax_resnet.models.zoo import model_spec

IMAGENET_TRAIN = 1_281_167  # examples

V = TypeVar("V")


def variant(what: str, name: str, variants: Mapping[str, V]) -> V:
    """Return the variant called `name`, a config file's argument.

    Raises UserError, naming `what`, for an unknown name.
    """
    choose(f"--config: {what} after the colon", name, variants)
    return variants[name]


def imagenet(network: str, *, batch_size: int, epochs: float) -> ConfigDict:
    """Make a config for `network` on ImageNet at 224 pixels a side.

    Learning rates are for `batch_size` examples, and scaled where a user changes it.
    """
    config = _recipe(network, batch_size)
    config.train = duration(epochs=epochs)
    config.data.name = "imagenet2012"
    config.data.image.size = 224
    return config


def cifar(network: str, *, batch_size: int) -> ConfigDict:
    """Make a config for `network` on CIFAR-10, images shifted by up to 4 pixels and mirrored.

    Learning rates are as in `imagenet`.
    """
    config = _recipe(network, batch_size)
    config.data.name = "cifar10"
    image = config.data.image
    image.crop = "pad"
    image.pad = 4
    image.mean = (0.4914, 0.4822, 0.4465)
    image.std = (0.2470, 0.2435, 0.2616)
    config.eval.every = duration(epochs=4)
    config.checkpoint.every = duration(epochs=4)
    return config


def nvidia(network: str, *, batch_size: int, epochs: float) -> ConfigDict:
    """Make a config for `network` by the recipe of NVIDIA DeepLearningExamples' ResNet-50 v1.5.

    Rate 0.256 for 256 images, momentum 0.875, 8 epochs of warmup, cosine to 0, decay 1/32768 on all
    but norms, smoothing 0.1, kernels by fan-in.
    """
    config = imagenet(network, batch_size=batch_size, epochs=epochs)
    config.model.init = "fan_in"
    config.optimizer.learning_rate = 0.256
    config.optimizer.reference_batch = 256
    config.optimizer.momentum = 0.875
    config.optimizer.weight_decay = 1 / 32768
    config.optimizer.no_decay = ("norm",)
    config.schedule.warmup = duration(epochs=8)
    config.loss.label_smoothing = 0.1
    return config


def _recipe(network: str, batch_size: int) -> ConfigDict:
    config = default()
    config.model.name = network
    # An unknown name is reported before anything is built.
    model_spec(network)
    config.batch_size = batch_size
    config.optimizer.reference_batch = batch_size
    config.optimizer.nesterov = False
    return config
