"""An 8-layer residual network on Fashion-MNIST in minutes on two CPU cores.

Commands:  python -m jax_resnet.main --config configs/fashion_mnist.py
           python -m jax_resnet.main --config configs/fashion_mnist.py:fashion_mnist.npz
Argument:  a .npz of x_train, y_train, x_test, y_test; if left out, TFDS's fashion_mnist, prepared.
Hardware:  two CPU cores.
Time:      TIME
Accuracy:  ACCURACY
Data:      tfds build fashion_mnist --file_format=array_record   (the README says what that needs)
Source:    no paper's: the network of He et al. 2015, section 4.2, at its smallest, made wider where images are small.
"""

from ml_collections import ConfigDict

from jax_resnet.config import default, duration


def get_config(file: str = "") -> ConfigDict:
    c = default()
    c.batch_size = 128
    c.train = duration(epochs=4)
    c.log_every = 100

    c.model.name = "cifar_resnet8"
    c.model.widths = (16, 48, 96)

    c.data.name = f"npz:{file}" if file else "fashion_mnist"
    c.data.channels = 1
    c.data.mean, c.data.std = (0.2860,), (0.3530,)
    c.data.crop = "none"
    return c
