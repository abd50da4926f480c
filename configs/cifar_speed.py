"""CIFAR-10 in a few epochs, after Jordan's airbench: a small wide residual network trained by Muon.

Commands:  python -m jax_resnet.main --config configs/cifar_speed.py
           python -m jax_resnet.main --config configs/cifar_speed.py:15
Argument:  the epochs: 10 if left out.
Hardware:  any one GPU or TPU chip.
Time:      not measured here.
Accuracy:  not run here on the whole of CIFAR-10; airbench94, whose recipe this is after, gets 94 % in 8 epochs.
Data:      tfds build cifar10 --file_format=array_record   (the README says what that needs)
Source:    KellerJordan/cifar10-airbench, 94_muon: batch, Muon's rate, momentum and iterations, Nesterov SGD for the
           rest, each image mirrored every other epoch, shifts of 2 pixels into a reflected border, smoothing 0.2, a
           rate that falls linearly without warmup, widths 64, 256, 256, a maximum over the last map, mirrored
           evaluation.
Differs:   three residual blocks of two convolutions and ReLU in place of a plain network with GELU. Not taken over: the
           whitening first convolution, Dirac initialisation, scales frozen at 1, kernels brought back to a norm at each
           update, lookahead, the six views of evaluation (two here). The rest has one rate, not one for each part,
           chosen for logits that are not scaled down by 256. Decay, 0.004 over the rate of the rest, reaches hidden
           kernels too, but no biases.
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import cifar
from jax_resnet.errors import UserError


def get_config(epochs: str = "10") -> ConfigDict:
    if not epochs.isdigit() or not int(epochs):
        raise UserError(f"--config: epochs after the colon: {epochs!r} must be a whole number, such as 10")
    c = cifar("cifar_resnet8", batch_size=2000)
    c.train = duration(epochs=int(epochs))
    c.eval.every = c.checkpoint.every = duration(epochs=int(epochs))
    c.log_every = 25
    c.eval.mirror = True

    c.model.stem_width, c.model.widths = 64, (64, 256, 256)
    c.model.shortcut = "D"
    c.model.pool = "max"
    c.model.bn_momentum = 0.6
    c.data.image.pad, c.data.image.pad_mode = 2, "reflect"
    c.data.image.flip_alternate = True
    c.loss.label_smoothing = 0.2

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 0.24
    c.optimizer.momentum = 0.6
    c.optimizer.nesterov = True
    c.optimizer.newton_schulz_steps = 3
    c.optimizer.rest.name = "sgd"
    c.optimizer.rest.learning_rate = 0.2
    c.optimizer.rest.momentum = 0.85
    c.optimizer.weight_decay = 0.02
    c.schedule.name = "linear"
    c.schedule.warmup = duration(epochs=0)
    return c
