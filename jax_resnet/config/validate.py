"""Validation of a user's config: rules for single values, and for values that must fit together."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ml_collections import ConfigDict

from jax_resnet.config.defaults import default
from jax_resnet.config.durations import DURATIONS, MAY_BE_0, in_steps, phase_rows, traced_steps
from jax_resnet.config.keys import get_key, leaves, near_key
from jax_resnet.errors import UserError, choose

LOSSES = ("cross_entropy", "bce")
OPTIMIZERS = (
    *("sgd", "rmsprop", "rmsprop_tf", "adagrad", "adam", "adamw", "lamb", "lars", "lion", "adafactor"),
    "muon",
)
SCHEDULES = (
    *("constant", "cosine", "linear", "polynomial", "exponential", "step", "piecewise", "one_cycle"),
    "inverse_sqrt",
)
PARAMETER_KINDS = ("kernel", "norm", "bias")
# Each rule has words for the message, a test and the keys it applies to. None passes all of them.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "at least 1",
        lambda v: v >= 1,
        "batch_size accumulate log_every checkpoint.keep data.threads eval.batch_size stop_after_steps "
        "model.num_classes model.bn_group_size data.image.size data.repeats optimizer.sam_every ema.every "
        "optimizer.newton_schulz_steps",
    ),
    (
        "more than 0",
        lambda v: 0 < v < math.inf,
        "optimizer.learning_rate optimizer.rest.learning_rate optimizer.trust_coefficient model.bn_epsilon "
        "distill.temperature schedule.power",
    ),
    (
        "a number, not negative",
        lambda v: 0 <= v < math.inf,
        "optimizer.epsilon optimizer.weight_decay optimizer.l1 optimizer.reference_batch optimizer.clip_norm "
        "optimizer.clip_value optimizer.sam_rho data.image.pad data.mixup data.image.cutmix "
        "data.image.pca_noise data.workers model.head_std guard.max_skipped checkpoint.keep_best stuck_after",
    ),
    (
        "at least 0 and less than 1",
        lambda v: 0 <= v < 1,
        "loss.label_smoothing model.dropout model.drop_path model.bn_momentum "
        "optimizer.momentum optimizer.rest.momentum optimizer.beta1 optimizer.beta2 data.holdout data.image.colout "
        "ema.decay",
    ),
    (
        "at least 0 and at most 1",
        lambda v: 0 <= v <= 1,
        "schedule.warmup_from schedule.final schedule.factor data.image.erase data.max_broken",
    ),
    (
        "more than 0 and at most 1",
        lambda v: 0 < v <= 1,
        "optimizer.layer_decay data.image.eval_crop distill.alpha",
    ),
    ("more than 0 and at most 1000", lambda v: 0 < v <= 1000, "stretch"),
    ("at least 0 and less than 2**32", lambda v: 0 <= v < 2**32, "seed"),
    (
        "numbers",
        lambda v: all(isinstance(x, int | float) and math.isfinite(x) for x in v),
        "data.image.mean data.image.std data.image.crop_area data.image.crop_ratio data.image.crop_resize "
        "data.image.color_jitter data.image.randaugment_timm schedule.boundaries",
    ),
)
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "loss.name": LOSSES,
    "optimizer.name": OPTIMIZERS,
    "optimizer.rest.name": ("adam", "sgd"),
    "optimizer.batch_scaling": ("linear", "sqrt"),
    "schedule.name": SCHEDULES,
    "data.image.crop": ("random_resized", "scaled", "stretched", "pad", "none"),
    "data.image.pad_mode": ("zeros", "reflect"),
    "data.image.interpolation": ("bilinear", "bicubic"),
    "data.image.augment_interpolation": ("nearest", "bilinear"),
    "checkpoint.best_by": ("accuracy_top1", "accuracy_top5", "loss"),
}


def validate(config: ConfigDict) -> None:
    """Check all that can be checked without the data.

    Raises UserError with one line for the first fault.
    """
    defaults = dict(leaves(default()))
    values = dict(leaves(config))
    for key in values:
        if key not in defaults:
            raise UserError(f"config.{key}: no such key; {near_key(key, list(defaults))}")
    for key in defaults:
        if key not in values:
            raise UserError(f"config.{key} is missing: start the config file from jax_resnet.config.default()")
    for key, names in CHOICES.items():
        choose(f"config.{key}", values[key], names)
    for words, holds, keys in RULES:
        for key in keys.split():
            if values[key] is not None and not holds(values[key]):
                raise UserError(f"config.{key}={values[key]}: must be {words}")
    _check_progressive(config)
    _check_image(config.data.image)
    _check_batches(config)
    _check_optimizer(config.optimizer)
    _check_schedule(config.schedule)
    if config.profile is not None:
        traced_steps(config.profile)
    loss = config.loss
    if loss.name != "bce" and loss.bce_sum:
        key = "config.loss.bce_sum"
        raise UserError(f"{key}: says how bce is done, but config.loss.name={loss.name}")
    distill = config.distill
    if distill.model and not distill.teacher:
        wanted = "whose weights? Give config.distill.teacher"
        raise UserError(f"config.distill.model={distill.model}: {wanted}")
    for key in DURATIONS:
        steps = in_steps(get_key(config, key), key, batch_size=1, num_examples=1)
        if not steps and key not in MAY_BE_0:
            raise UserError(f"config.{key} is 0: must be more")


def _check_batches(config: ConfigDict) -> None:
    accumulate = config.accumulate
    data = config.data
    batch_key = "config.progressive: batch_size" if config.progressive else "config.batch_size"
    for _, _, batch_size in phase_rows(config):
        batch = f"{batch_key}={batch_size}"
        if batch_size % accumulate:
            raise UserError(f"config.accumulate={accumulate} does not divide {batch}")
        part_size = batch_size // accumulate
        part = batch if accumulate == 1 else f"{batch} / accumulate={accumulate}"
        if (data.mixup or data.image.cutmix) and part_size % 2:
            raise UserError(f"{part}: must be even, for mixup and cutmix mix pairs of images")
        if batch_size % data.repeats:
            raise UserError(f"config.data.repeats={data.repeats} does not divide {batch}")
        group_size = config.model.bn_group_size
        if group_size and part_size % group_size:
            raise UserError(f"config.model.bn_group_size={group_size} does not divide {part}")


def _check_optimizer(optimizer: ConfigDict) -> None:
    name = optimizer.name
    epsilon = optimizer.epsilon
    if not epsilon and name not in ("sgd", "lars", "lion", "adafactor"):
        raise UserError(f"config.optimizer.epsilon={epsilon}: must be more than 0 for {name}")
    if optimizer.rate_in_momentum and name not in ("sgd", "rmsprop", "rmsprop_tf", "lars"):
        key = "config.optimizer.rate_in_momentum"
        raise UserError(f"{key}: {name} has no momentum to have the rate in")
    factors = optimizer.rate_factors
    pairs = all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in factors)
    if not pairs or not all(isinstance(f, int | float) and 0 <= f < math.inf for _, f in factors):
        raise UserError(
            f"config.optimizer.rate_factors={factors}: must be pairs of a kind or pattern and "
            "a number, not negative, such as (('head/.*', 10.0),)"
        )
    patterns = {"no_decay": optimizer.no_decay, "rate_factors": [rule for rule, _ in factors]}
    for key, rules in patterns.items():
        for rule in rules:
            if not isinstance(rule, str):
                setting = f"config.optimizer.{key}={optimizer[key]}"
                raise UserError(f"{setting}: {rule!r} is no name, such as 'norm'")
            if rule.isidentifier():
                choose(f"config.optimizer.{key}", rule, PARAMETER_KINDS)
            try:
                re.compile(rule)
            except re.error as e:
                raise UserError(f"config.optimizer.{key}: {rule!r} is no pattern ({e})") from None


def _check_schedule(schedule: ConfigDict) -> None:
    if schedule.name == "piecewise" and any(schedule.warmup.values()):
        raise UserError(
            "config.schedule.warmup: a piecewise schedule has it in its knots; give --config.schedule.warmup.steps=0"
        )
    if schedule.name == "exponential" and schedule.final <= 0:
        raise UserError("config.schedule.final: an exponential schedule needs more than 0")
    boundaries = schedule.boundaries
    if list(boundaries) != sorted(boundaries) or any(not 0 < b < 1 for b in boundaries):
        raise UserError(
            f"config.schedule.boundaries={boundaries}: rising shares of the training, "
            "between 0 and 1, such as 30/90, 60/90, 80/90"
        )
    knots = schedule.knots
    pairs = all(isinstance(knot, tuple | list) and len(knot) == 2 for knot in knots)
    numbers = [value for knot in knots if pairs for value in knot]
    valid = pairs and all(isinstance(v, int | float) and 0 <= v < math.inf for v in numbers)
    valid = valid and all(a[0] < b[0] for a, b in pairwise(knots))
    if not valid or len(knots) < 2 or knots[-1][0] > 1:
        raise UserError(
            f"config.schedule.knots={knots}: must be pairs, rising shares of the training from "
            "0 to 1 and shares of the peak: ((0.0, 0.0), (0.2, 1.0), (1.0, 0.0))"
        )


def _check_image(image: ConfigDict) -> None:
    if image.channels not in (1, 3):
        raise UserError(f"config.data.image.channels={image.channels}: must be 1 or 3")
    for key in ("mean", "std"):
        if len(image[key]) != image.channels:
            needed = f"needs {image.channels} numbers, one for each channel"
            raise UserError(f"config.data.image.{key}={image[key]}: {needed}")
    if min(image.std) <= 0:
        raise UserError(f"config.data.image.std={image.std}: must be more than 0")
    for key in ("crop_area", "crop_ratio", "crop_resize"):
        pair = image[key]
        limit, words = (1, ", at most 1") if key == "crop_area" else (math.inf, "")
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= limit:
            rule = f"must be two rising numbers more than 0{words}"
            raise UserError(f"config.data.image.{key}={pair}: {rule}")
    if image.size:
        check_crop_resize(image, image.size)
    _check_policies(image)
    if image.flip_alternate and not image.flip:
        raise UserError(
            "config.data.image.flip_alternate=True: which images are mirrored? None, with config.data.image.flip=False"
        )
    if image.pca_noise and image.channels != 3:
        raise UserError(
            f"config.data.image.pca_noise={image.pca_noise}: is along colours, and "
            f"config.data.image.channels={image.channels}"
        )
    jitter = image.color_jitter
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        raise UserError(
            f"config.data.image.color_jitter={jitter}: must be four numbers, not negative: brightness, contrast, "
            "saturation and hue, this at most 0.5"
        )


def _check_policies(image: ConfigDict) -> None:
    operations = image.randaugment
    if len(operations) != 2 or any(type(v) is not int or v < 0 for v in operations) or operations[1] > 30:
        raise UserError(
            f"config.data.image.randaugment={operations}: must be two whole numbers, operations and magnitude (0 … 30)"
        )
    timm = image.randaugment_timm
    if len(timm) != 4 or type(timm[0]) is not int or min(timm) < 0 or timm[1] > 10 or timm[3] > 1:
        raise UserError(
            f"config.data.image.randaugment_timm={timm}: must be a whole number of operations, "
            "their magnitude (0 … 10), its deviation and their probability"
        )
    names = ("randaugment", "randaugment_timm", "trivial_augment")
    enabled = (operations[0], timm[0], image.trivial_augment)
    chosen = [name for name, on in zip(names, enabled, strict=True) if on]
    if len(chosen) > 1:
        raise UserError(f"config.data.image.{' and '.join(chosen)}: choose one of them")


def check_crop_resize(image: ConfigDict, size: int) -> None:
    """Check that crop_resize fits crops of `size` pixels a side where they are scaled or stretched.

    Raises UserError if images are resized to less than a crop, or to more than 4 times its side.
    """
    if image.crop not in ("scaled", "stretched"):
        return
    if image.crop_resize[0] < size:
        raise UserError(
            f"config.data.image.crop_resize={image.crop_resize}: is less than the {size} pixels of "
            f"a crop; images are resized to at least those for config.data.image.crop={image.crop}"
        )
    if image.crop_resize[0] > 4 * size:
        raise UserError(
            f"config.data.image.crop_resize={image.crop_resize}: of images so large the {size} "
            "pixels of a crop show next to nothing; give what goes with "
            f"config.data.image.crop={image.crop}, such as "
            f"({size * 8 // 7}, {size * 15 // 7})"
        )


def _check_progressive(config: ConfigDict) -> None:
    for row in config.progressive:
        valid = isinstance(row, tuple | list) and 2 <= len(row) <= 3
        valid = valid and all(type(v) is int and v > 0 for v in row[1:])
        if not valid or type(row[0]) not in (int, float):
            raise UserError(
                f"config.progressive: {row!r} is no phase; give each as (share of the training at which it begins, "
                "image size) or (share, image size, batch size), all in one tuple: ((0.0, 128), (0.5, 224))"
            )
    begins = [begin for begin, _, _ in phase_rows(config)]
    if begins[0] != 0 or not all(a < b for a, b in pairwise([*begins, 1])):
        raise UserError(f"config.progressive begins its phases at {begins}: must be rising shares below 1, the first 0")
    in_steps_keys = [key for key in DURATIONS if get_key(config, key).steps is not None]
    batch_sizes = {batch_size for _, _, batch_size in phase_rows(config)}
    if in_steps_keys and batch_sizes != {config.batch_size}:
        key = in_steps_keys[0]
        raise UserError(
            f"config.{key}.steps={get_key(config, key).steps}: steps are of no one length where "
            "config.progressive has other batches than "
            f"config.batch_size={config.batch_size}; give epochs or examples"
        )
