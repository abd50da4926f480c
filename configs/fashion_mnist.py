"""An 8-layer residual network on Fashion-MNIST in minutes on two CPU cores.

Commands:  python -m jax_resnet.main --config configs/fashion_mnist.py
           python -m jax_resnet.main --config configs/fashion_mnist.py:fashion_mnist.npz
           With XLA_FLAGS=--xla_force_host_platform_device_count=2 before it two cores train 1.5 times as fast.
Argument:  a .npz of x_train, y_train, x_test, y_test; if left out, TFDS's fashion_mnist, prepared.
Hardware:  two CPU cores.
Time:      8.4 minutes as two simulated devices (benchmarks/fashion_mnist.py, AMD EPYC, 2026-11-25).
Accuracy:  92.49 %, 9,249 of 10,000 test images, in the same run.
Data:      tfds build fashion_mnist --file_format=array_record   (the README says what that needs)
Source:    no paper's: the network of He et al. 2015, section 4.2, at its smallest, made wider where images are small.
"""

from ml_collections import ConfigDict

from jax_resnet.config import default, duration


def get_config(file: str = "") -> ConfigDict:
    c = default()
    c.batch_size = 64
    c.train = duration(epochs=4.5)
    c.log_every = 100

    c.model.name = "cifar_resnet8"
    c.model.widths = (16, 48, 96)
    c.model.bn_group_size = 32

    c.data.name = f"npz:{file}" if file else "fashion_mnist"
    c.data.image.channels = 1
    c.data.image.mean, c.data.image.std = (0.2860,), (0.3530,)
    c.data.image.crop = "none"

    c.optimizer.name = "muon"
    c.optimizer.learning_rate, c.optimizer.reference_batch = 0.035, 64
    c.optimizer.newton_schulz_steps = 3
    c.optimizer.rest.name = "sgd"
    c.optimizer.rest.learning_rate = 0.07
    c.optimizer.weight_decay = 5e-4
    c.schedule.name = "linear"
    c.schedule.warmup = duration(epochs=0.5)
    c.loss.label_smoothing = 0.05

    c.eval.every = c.checkpoint.every = duration(epochs=4.5)
    return c
