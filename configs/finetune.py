"""Fine-tuning: the weights of an ImageNet network, a new head, a folder of one's own images.

Commands:  python -m jax_resnet.main --config configs/finetune.py --config.data.name=folder:/data/flowers
           python -m jax_resnet.main --config configs/finetune.py:resnet18 --config.data.name=folder:/data/flowers \
               --config.init_from=/weights/resnet18.safetensors --config.freeze="('stem', 'stage1')"
Argument:  the network: resnet50 (if left out), or any name of the zoo whose weights init_from has.
Hardware:  any one GPU or TPU chip; two CPU cores for a few hundred images and resnet18.
Time:      not measured: no ImageNet weights could be had where this was written.
Accuracy:  that of the data; see what a training from nothing gets with an empty --config.init_from=
Source:    no paper's table. A small rate that falls by layer towards the stem, a short warmup and cosine are common to
           published fine-tunings; the number of epochs is for a few thousand images.
"""

from ml_collections import ConfigDict

from jax_resnet.config import default, duration
from jax_resnet.models.zoo import model_spec


def get_config(network: str = "resnet50") -> ConfigDict:
    c = default()
    c.init_from = f"hf://timm/{network}.a1_in1k"  # "ResNet strikes back", A1; for resnet18, 34, 50, 101, 152
    c.model.name = network
    model_spec(c.model.name)  # an unknown name is an error here already
    c.model.zero_init_last = False

    c.data.name = "folder:data"
    c.data.holdout = 0.0  # of a folder without val/: --config.data.holdout=0.2
    c.data.image.size = 224
    c.data.image.crop_area = (0.25, 1.0)

    c.batch_size = 64
    c.train = duration(epochs=20)
    c.log_every = 10
    c.optimizer.learning_rate = 0.01
    c.optimizer.reference_batch = 64
    c.optimizer.layer_decay = 0.9
    c.schedule.warmup = duration(epochs=1)
    c.loss.label_smoothing = 0.1
    return c
