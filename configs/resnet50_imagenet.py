"""ResNet-50 v1.5 on ImageNet, 90 epochs with the modern baseline: cosine, warmup, label smoothing, no decay of norms.

Commands:  python -m jax_resnet.main --config configs/resnet50_imagenet.py
           python -m jax_resnet.main --config configs/resnet50_imagenet.py:101
Argument:  the depth: 18, 34, 50 (if left out), 101, 152, 200.
Hardware:  8 chips at 128 images each, or as many as divide 1024.
Time:      not yet measured. The TPU compiler's estimate for one v5e chip, about 1,680 images a second, would make it
           2.4 hours on 8 of them.
Accuracy:  not yet run to its end here. The same procedure is published at 77.1 % top-1 (NVIDIA DeepLearningExamples,
           ResNet-50 v1.5, 90 epochs).
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    NVIDIA DeepLearningExamples, ResNet-50 v1.5: rate 0.256 for a batch of 256, momentum 0.875, 8 epochs of
           warmup, cosine to 0, decay 1/32768 on all but norms, smoothing 0.1.
"""

from ml_collections import ConfigDict

from jax_resnet.config import default, duration
from jax_resnet.models.zoo import model_spec


def get_config(depth: str = "50") -> ConfigDict:
    c = default()
    c.batch_size = 1024
    c.train = duration(epochs=90)
    c.loss.label_smoothing = 0.1

    c.model.name = f"resnet{depth}"
    model_spec(c.model.name)  # an impossible depth is an error here already
    c.model.bn_group_size = 128

    c.data.name = "imagenet2012"
    c.data.image_size = 224

    c.optimizer.learning_rate = 0.256
    c.optimizer.reference_batch = 256
    c.optimizer.momentum = 0.875
    c.optimizer.nesterov = False
    c.optimizer.weight_decay = 1 / 32768
    c.optimizer.no_decay = ("norm",)
    c.schedule.warmup = duration(epochs=8)
    return c
