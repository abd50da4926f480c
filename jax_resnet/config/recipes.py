"""What several published recipes have in common; the files in configs/ begin with it and say what is their own."""

from collections.abc import Mapping
from typing import TypeVar

from ml_collections import ConfigDict

from jax_resnet.config import default, duration
from jax_resnet.errors import choose
from jax_resnet.models.zoo import model_spec

IMAGENET_TRAIN = 1_281_167  # examples

V = TypeVar("V")


def variant(what: str, name: str, variants: Mapping[str, V]) -> V:
    """What `variants` has under `name`, a config file's argument. Raises UserError, naming `what`, for another."""
    choose(f"--config: {what} after the colon", name, variants)
    return variants[name]


def imagenet(network: str, *, batch_size: int, epochs: float) -> ConfigDict:
    """`network` on ImageNet at 224 pixels; rates are for this batch, and scaled with another."""
    c = _recipe(network, batch_size)
    c.train = duration(epochs=epochs)
    c.data.name = "imagenet2012"
    c.data.image.size = 224
    return c


def cifar(network: str, *, batch_size: int) -> ConfigDict:
    """`network` on CIFAR-10: shifted by up to 4 pixels, mirrored; rates as for `imagenet`."""
    c = _recipe(network, batch_size)
    c.data.name = "cifar10"
    image = c.data.image
    image.crop, image.pad = "pad", 4
    image.mean, image.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    c.eval.every = duration(epochs=4)
    c.checkpoint.every = duration(epochs=4)
    return c


def nvidia(network: str, *, batch_size: int, epochs: float) -> ConfigDict:
    """NVIDIA DeepLearningExamples' ResNet-50 v1.5, for `network`.

    Rate 0.256 for 256 images, momentum 0.875, 8 epochs of warmup, cosine to 0, decay 1/32768 on all but norms,
    smoothing 0.1, kernels by fan-in.
    """
    c = imagenet(network, batch_size=batch_size, epochs=epochs)
    c.model.init = "fan_in"
    c.optimizer.learning_rate, c.optimizer.reference_batch = 0.256, 256
    c.optimizer.momentum = 0.875
    c.optimizer.weight_decay = 1 / 32768
    c.optimizer.no_decay = ("norm",)
    c.schedule.warmup = duration(epochs=8)
    c.loss.label_smoothing = 0.1
    return c


def _recipe(network: str, batch_size: int) -> ConfigDict:
    c = default()
    c.model.name = network
    model_spec(network)  # an unknown name is an error here already
    c.batch_size = batch_size
    c.optimizer.reference_batch = batch_size
    c.optimizer.nesterov = False
    return c
