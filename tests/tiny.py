"""The config of tests that run the command: a 6-layer net on a .npz of 12-pixel images. Argument: the .npz file."""

from typing import Any

from ml_collections import ConfigDict

from jax_resnet.config import default, duration


def get_config(npz: str) -> ConfigDict:
    c = default()
    c.batch_size = 16
    c.train = duration(steps=20)
    c.log_every = 5
    c.model.name = "cifar_resnet8"
    c.model.depths, c.model.widths = (1, 1), (16, 24)
    c.data.name = f"npz:{npz}"
    image = c.data.image
    image.channels, image.mean, image.std = 1, (0.3,), (0.2,)
    image.crop, image.pad = "pad", 1
    image.flip = False
    c.optimizer.reference_batch = 16
    c.schedule.warmup = duration(steps=4)
    c.eval.every = duration(steps=8)
    c.checkpoint.every = duration(steps=8)
    return c


def data_config(**changes: Any) -> ConfigDict:
    """Return the default config.data but for `changes`, in which keys of its image group go by their last names."""
    data = default().data
    for key, value in changes.items():
        (data.image if key in data.image else data)[key] = value
    return data
