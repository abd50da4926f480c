"""ResNet-50-D on ImageNet with the "Bag of tricks" (He et al. 2018), one refinement after the other.

Commands:  python -m jax_resnet.main --config configs/bag_of_tricks.py
           python -m jax_resnet.main --config configs/bag_of_tricks.py:distill
Argument:  the last refinement, on top of those before it: efficient (large batch, warmup, no decay of norms and biases,
           zero scales, steps), cosine, smoothing, mixup (if left out; 200 epochs) or distill.
Hardware:  published on 8 GPUs of 128 images each.
Time:      not measured here.
Accuracy:  published top-1: efficient 77.16 %, cosine 77.91, smoothing 78.31, mixup 79.15, distill 79.29 (the paper's
           table 6); not run here.
Data:      tfds build imagenet2012 --file_format=array_record   (the README says what that needs)
Source:    the paper and GluonCV's script; values recalled, not read again. The teacher is GluonCV's own ResNet-152-D,
           as published on the Hugging Face hub; its loss has half the weight, as in GluonCV.
Differs:   bfloat16 for float16. Brightness, contrast and saturation × 0.6 … 1.4, as GluonCV does it, where the paper
           has brightness, saturation and hue.
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import imagenet
from jax_resnet.errors import choose

REFINEMENTS = ("efficient", "cosine", "smoothing", "mixup", "distill")


def get_config(refinement: str = "mixup") -> ConfigDict:
    choose("--config: refinement after the colon", refinement, REFINEMENTS)
    has = REFINEMENTS[: REFINEMENTS.index(refinement) + 1]
    c = imagenet("resnet50d", batch_size=1024, epochs=200 if "mixup" in has else 120)
    c.model.bn_group_size = 128
    c.data.image.color_jitter = (0.4, 0.4, 0.4, 0.0)
    c.data.image.pca_noise = 0.1

    c.optimizer.learning_rate, c.optimizer.reference_batch = 0.1, 256
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 1e-4
    c.schedule.warmup = duration(epochs=5)
    if "cosine" not in has:
        c.schedule.name = "step"
        c.schedule.boundaries = (30 / 120, 60 / 120, 90 / 120)
    if "smoothing" in has:
        c.loss.label_smoothing = 0.1
    if "mixup" in has:
        c.data.mixup = 0.2
    if "distill" in has:
        c.distill.teacher = "hf://timm/resnet152d.gluon_in1k"
        c.distill.temperature = 20.0
        c.distill.alpha = 0.5
    return c
