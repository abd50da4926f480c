"""ResNet-50 and ResNet-18 on ImageNet in few epochs, as FFCV trains them.

Commands:  python -m jax_resnet.main --config configs/ffcv.py:16
           python -m jax_resnet.main --config configs/ffcv.py:88,18
Argument:  the epochs, 16, 24, 32, 40, 56 or 88 (if left out); then, after a comma, the depth, 50 (if left out) or 18.
Hardware:  published on 8 GPUs of 512 images each; depth 18 on one, of 1,024. Depth 50 on fewer chips:
           --config.accumulate=8.
Time:      not measured here; published: 15 to 77 minutes on 8 A100, depth 18 35 to 187 on one.
Accuracy:  published top-1: 73.8, 75.6, 76.6, 77.2, 78.0, 78.4 %; depth 18: 66.9, 68.8, 70.0, 70.6, 71.3, 72.4; not run
           here.
Data:      jax-resnet prepare tfds:imagenet2012 FOLDER --resize=400 and
           --config.data.name=prepared:FOLDER come near FFCV's files (long side at most 500 or 400 pixels, quality 90).
Source:    libffcv/ffcv-imagenet: its YAML files and train_imagenet.py.
Differs:   bfloat16 for float16; crops are resized bilinearly, FFCV's by area. Images of 160 pixels grow in multiples of
           32, so that there is one step to 192: at the first whole epoch at which FFCV's rounding gives it.
"""

from ml_collections import ConfigDict

from jax_resnet.config import duration
from jax_resnet.config.recipes import imagenet, variant

FIRST_AT_192 = {"16": 12, "24": 19, "32": 25, "40": 32, "56": 45, "88": 71}  # epochs → epoch
DEPTHS = {"50": (4096, 512, 1.7, 1e-4), "18": (1024, 1024, 0.5, 5e-5)}  # batch, that of a GPU, rate, decay


def get_config(argument: str = "88") -> ConfigDict:
    epochs, _, depth = argument.partition(",")
    larger = variant("epochs", epochs, FIRST_AT_192)
    batch, group, rate, decay = variant("depth", depth or "50", DEPTHS)
    c = imagenet(f"resnet{depth or 50}", batch_size=batch, epochs=int(epochs))
    c.progressive = ((0.0, 160), (larger / int(epochs), 192))
    c.model.bn_group_size = group
    c.model.zero_init_last = False
    c.model.antialias = "blur_conv"

    c.data.image.size = 256  # of evaluation
    c.data.image.eval_crop = 224 / 256
    c.eval.mirror = True

    c.loss.label_smoothing = 0.1
    c.optimizer.learning_rate = rate
    c.optimizer.weight_decay = decay
    c.optimizer.no_decay = (r".*/norm\d/.*",)  # names with "bn" in torchvision, which those of shortcuts are not
    c.schedule.name = "linear"
    c.schedule.warmup = duration(epochs=2)
    c.schedule.warmup_from = 1e-4
    return c
