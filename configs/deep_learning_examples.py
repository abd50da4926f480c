"""NVIDIA's ResNet-50 v1.5 on ImageNet (DeepLearningExamples), the 50, 90 and 250 epochs.

Commands:  python -m jax_resnet.main --config configs/deep_learning_examples.py
           python -m jax_resnet.main --config configs/deep_learning_examples.py:250
Argument:  the epochs: 50, 90 (if left out) or 250, which adds mixup.
Hardware:  published on 8 GPUs of 256 images each. Fewer chips: --config.accumulate=8 computes the same update in parts.
Time:      not measured here.
Accuracy:  published top-1: 76.3, 77.1 and 78.4 %; not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    NVIDIA DeepLearningExamples, the PyTorch, MXNet and Paddle versions.
Differs:   bfloat16 needs no scaling of the loss. MXNet's batch is 4096 and its warmup 5 epochs; these are PyTorch's.
"""

from ml_collections import ConfigDict

from jax_resnet.config.recipes import nvidia, variant

MIXUP = {"50": 0.0, "90": 0.0, "250": 0.2}


def get_config(epochs: str = "90") -> ConfigDict:
    mixup = variant("epochs", epochs, MIXUP)
    c = nvidia("resnet50", batch_size=2048, epochs=int(epochs))
    c.model.bn_group_size = 256
    c.data.mixup = mixup
    return c
