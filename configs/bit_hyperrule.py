"""Fine-tuning Big Transfer's ResNet-50x1 by its rule (Kolesnikov et al. 2019): the dataset decides all there is.

Commands:  python -m jax_resnet.main --config configs/bit_hyperrule.py:cifar10
           python -m jax_resnet.main --config configs/bit_hyperrule.py:folder:/data/flowers --config.batch_size=128
Argument:  the dataset, as in config.data.name: cifar10 (if left out), folder:PATH, npz:PATH, prepared:PATH, … It is
           opened to count its examples and see the size of its images; of class folders alone a fifth is held out.
Hardware:  published on TPUs, a batch of 512 at 480 pixels. Fewer chips: --config.accumulate=8, or a smaller batch, with
           which the rate falls in proportion.
Time:      not measured here.
Accuracy:  that of the data; not run here.
Data:      the weights come from the Hugging Face hub, pretrained on ImageNet-21k; the dataset is yours.
Source:    google-research/big_transfer, bit_hyperrule.py; head and evaluation recalled from the paper, section 3.3.
Differs:   512 → 480 pixels, as in the code, where the paper has 448 → 384. The rate of 0.001 that the authors recommend
           for 128 images is not the 0.00075 that is in proportion.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jax_resnet.config import default, duration
from jax_resnet.data.sources import open_dataset


def get_config(dataset: str = "cifar10") -> ConfigDict:
    c = default()
    c.model.name = "resnetv2_50x1_bit"
    c.init_from = "hf://timm/resnetv2_50x1_bit.goog_in21k"
    c.model.head_std = 0.0

    c.data.name = dataset
    c.data.image.mean = c.data.image.std = (0.5, 0.5, 0.5)
    c.data.image.crop, c.data.image.crop_resize, c.data.image.size = "stretched", (512, 512), 480
    c.data.image.eval_crop = 1.0
    kind, _, path = dataset.partition(":")
    if kind == "folder" and not (Path(path).expanduser() / "train").is_dir():
        c.data.holdout = 0.2
    train = open_dataset(c.data).train
    height, width = train.original_size
    if height * width < 96 * 96:
        c.data.image.crop_resize, c.data.image.size = (160, 160), 128

    if len(train) < 20_000:
        warmup, *falls, steps = (100, 200, 300, 400, 500)
    elif len(train) < 500_000:
        warmup, *falls, steps = (500, 3_000, 6_000, 9_000, 10_000)
    else:
        warmup, *falls, steps = (500, 6_000, 12_000, 18_000, 20_000)
    c.train = duration(steps=steps)
    c.schedule.name = "step"
    c.schedule.boundaries = tuple(step / steps for step in falls)
    c.schedule.warmup = duration(steps=warmup)
    c.data.mixup = 0.1 if len(train) >= 20_000 else 0.0

    c.batch_size = 512
    c.optimizer.learning_rate, c.optimizer.reference_batch = 0.003, 512
    c.optimizer.nesterov = False
    c.optimizer.weight_decay = 0.0
    c.log_every = 10
    c.eval.every = c.checkpoint.every = duration(steps=steps // 5)
    return c
