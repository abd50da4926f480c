"""ResNet-50 v1.5 on ImageNet, 90 epochs with the modern baseline: cosine, warmup, label smoothing, no decay of norms.

Commands:  python -m jax_resnet.main --config configs/resnet50_imagenet.py
           python -m jax_resnet.main --config configs/resnet50_imagenet.py:101
Argument:  the depth: 18, 34, 50 (if left out), 101, 152, 200.
Hardware:  8 chips at 128 images each, or as many as divide 1024.
Time:      not yet measured. The TPU compiler's estimate for one v5e chip, about 1,760 images a second, would make it
           2.3 hours on 8 of them.
Accuracy:  not yet run to its end here. The same procedure is published at 77.1 % top-1 (NVIDIA DeepLearningExamples,
           ResNet-50 v1.5, 90 epochs).
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    NVIDIA DeepLearningExamples, ResNet-50 v1.5, as in configs/deep_learning_examples.py, at half its batch.
"""

from ml_collections import ConfigDict

from jax_resnet.config.recipes import nvidia


def get_config(depth: str = "50") -> ConfigDict:
    c = nvidia(f"resnet{depth}", batch_size=1024, epochs=90)
    c.model.bn_group_size = 128
    return c
