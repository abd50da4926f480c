"""What makes a user's config trustworthy: what each value must be, and what must fit together."""

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
# What a value must be, in words and as a test, and the keys that it holds for. None is left to others.
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


def validate(c: ConfigDict) -> None:
    """Checks all that can be checked without the data; raises UserError with one line for the first fault."""
    known = dict(leaves(default()))
    given = dict(leaves(c))
    for key in given:
        if key not in known:
            raise UserError(f"config.{key}: no such key; {near_key(key, list(known))}")
    for key in known:
        if key not in given:
            raise UserError(f"config.{key} is missing: start the config file from jax_resnet.config.default()")
    for key, names in CHOICES.items():
        choose(f"config.{key}", given[key], names)
    for words, holds, keys in RULES:
        for key in keys.split():
            if given[key] is not None and not holds(given[key]):
                raise UserError(f"config.{key}={given[key]}: must be {words}")
    _check_progressive(c)
    _check_image(c.data.image)
    _check_batches(c)
    _check_optimizer(c.optimizer)
    _check_schedule(c.schedule)
    if c.profile is not None:
        traced_steps(c.profile)
    if c.loss.name != "bce" and c.loss.bce_sum:
        raise UserError(f"config.loss.bce_sum: says how bce is done, but config.loss.name={c.loss.name}")
    if c.distill.model and not c.distill.teacher:
        raise UserError(f"config.distill.model={c.distill.model}: whose weights? Give config.distill.teacher")
    for what in DURATIONS:
        if not in_steps(get_key(c, what), what, batch_size=1, num_examples=1) and what not in MAY_BE_0:
            raise UserError(f"config.{what} is 0: must be more")


def _check_batches(c: ConfigDict) -> None:
    batch_key = "config.progressive: batch_size" if c.progressive else "config.batch_size"
    for _, _, batch_size in phase_rows(c):
        if batch_size % c.accumulate:
            raise UserError(f"config.accumulate={c.accumulate} does not divide {batch_key}={batch_size}")
        part = batch_size // c.accumulate
        of = f"{batch_key}={batch_size}" + (f" / accumulate={c.accumulate}" if c.accumulate > 1 else "")
        if (c.data.mixup or c.data.image.cutmix) and part % 2:
            raise UserError(f"{of}: must be even, for mixup and cutmix mix pairs of images")
        if batch_size % c.data.repeats:
            raise UserError(f"config.data.repeats={c.data.repeats} does not divide {batch_key}={batch_size}")
        group = c.model.bn_group_size
        if group and part % group:
            raise UserError(f"config.model.bn_group_size={group} does not divide {of}")


def _check_optimizer(c: ConfigDict) -> None:
    if not c.epsilon and c.name not in ("sgd", "lars", "lion", "adafactor"):
        raise UserError(f"config.optimizer.epsilon={c.epsilon}: must be more than 0 for {c.name}")
    if c.rate_in_momentum and c.name not in ("sgd", "rmsprop", "rmsprop_tf", "lars"):
        raise UserError(f"config.optimizer.rate_in_momentum: {c.name} has no momentum to have the rate in")
    pairs = all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in c.rate_factors)
    if not pairs or not all(isinstance(f, int | float) and 0 <= f < math.inf for _, f in c.rate_factors):
        raise UserError(
            f"config.optimizer.rate_factors={c.rate_factors}: must be pairs of a kind or pattern and a number, not "
            "negative, such as (('head/.*', 10.0),)"
        )
    for key, rules in (("no_decay", c.no_decay), ("rate_factors", [rule for rule, _ in c.rate_factors])):
        for rule in rules:
            if not isinstance(rule, str):
                raise UserError(f"config.optimizer.{key}={c[key]}: {rule!r} is no name, such as 'norm'")
            if rule.isidentifier():
                choose(f"config.optimizer.{key}", rule, PARAMETER_KINDS)
            try:
                re.compile(rule)
            except re.error as e:
                raise UserError(f"config.optimizer.{key}: {rule!r} is no pattern ({e})") from None


def _check_schedule(c: ConfigDict) -> None:
    if c.name == "piecewise" and any(c.warmup.values()):
        raise UserError(
            "config.schedule.warmup: a piecewise schedule has it in its knots; give --config.schedule.warmup.steps=0"
        )
    if c.name == "exponential" and c.final <= 0:
        raise UserError("config.schedule.final: an exponential schedule needs more than 0")
    boundaries = c.boundaries
    if list(boundaries) != sorted(boundaries) or any(not 0 < b < 1 for b in boundaries):
        raise UserError(
            f"config.schedule.boundaries={boundaries}: rising shares of the training, "
            "between 0 and 1, such as 30/90, 60/90, 80/90"
        )
    pairs = all(isinstance(knot, tuple | list) and len(knot) == 2 for knot in c.knots)
    whole = pairs and all(isinstance(v, int | float) and 0 <= v < math.inf for knot in c.knots for v in knot)
    if not whole or len(c.knots) < 2 or not all(a[0] < b[0] for a, b in pairwise(c.knots)) or c.knots[-1][0] > 1:
        raise UserError(
            f"config.schedule.knots={c.knots}: must be pairs, rising shares of the training from 0 to 1 and shares of "
            "the peak: ((0.0, 0.0), (0.2, 1.0), (1.0, 0.0))"
        )


def _check_image(c: ConfigDict) -> None:
    if c.channels not in (1, 3):
        raise UserError(f"config.data.image.channels={c.channels}: must be 1 or 3")
    for key in ("mean", "std"):
        if len(c[key]) != c.channels:
            raise UserError(f"config.data.image.{key}={c[key]}: needs {c.channels} numbers, one for each channel")
    if min(c.std) <= 0:
        raise UserError(f"config.data.image.std={c.std}: must be more than 0")
    for key in ("crop_area", "crop_ratio", "crop_resize"):
        pair = c[key]
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] or (key == "crop_area" and pair[1] > 1):
            raise UserError(
                f"config.data.image.{key}={pair}: must be two rising numbers more than 0"
                + (", at most 1" if key == "crop_area" else "")
            )
    if c.size:
        check_crop_resize(c, c.size)
    operations = c.randaugment
    if len(operations) != 2 or any(type(v) is not int or v < 0 for v in operations) or operations[1] > 30:
        raise UserError(
            f"config.data.image.randaugment={operations}: must be two whole numbers, operations and magnitude (0 … 30)"
        )
    timm = c.randaugment_timm
    if len(timm) != 4 or type(timm[0]) is not int or min(timm) < 0 or timm[1] > 10 or timm[3] > 1:
        raise UserError(
            f"config.data.image.randaugment_timm={timm}: must be a whole number of operations, their magnitude "
            "(0 … 10), its deviation and their probability"
        )
    policies = {"randaugment": operations[0], "randaugment_timm": timm[0], "trivial_augment": c.trivial_augment}
    if len(chosen := [name for name, on in policies.items() if on]) > 1:
        raise UserError(f"config.data.image.{' and '.join(chosen)}: choose one of them")
    if c.flip_alternate and not c.flip:
        raise UserError(
            "config.data.image.flip_alternate=True: which images are mirrored? None, with config.data.image.flip=False"
        )
    if c.pca_noise and c.channels != 3:
        raise UserError(
            f"config.data.image.pca_noise={c.pca_noise}: is along colours, and config.data.image.channels={c.channels}"
        )
    jitter = c.color_jitter
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        raise UserError(
            f"config.data.image.color_jitter={jitter}: must be four numbers, not negative: brightness, contrast, "
            "saturation and hue, this at most 0.5"
        )


def check_crop_resize(c: ConfigDict, size: int) -> None:
    """Raises UserError where scaled or stretched crops, `size` pixels a side, are to be of images smaller than that."""
    if c.crop in ("scaled", "stretched") and c.crop_resize[0] < size:
        raise UserError(
            f"config.data.image.crop_resize={c.crop_resize}: is less than the {size} pixels of a crop; images are "
            f"resized to at least those for config.data.image.crop={c.crop}"
        )
    if c.crop in ("scaled", "stretched") and c.crop_resize[0] > 4 * size:
        raise UserError(
            f"config.data.image.crop_resize={c.crop_resize}: of images so large the {size} pixels of a crop show next "
            f"to nothing; give what goes with config.data.image.crop={c.crop}, such as "
            f"({size * 8 // 7}, {size * 15 // 7})"
        )


def _check_progressive(c: ConfigDict) -> None:
    for row in c.progressive:
        whole = isinstance(row, tuple | list) and 2 <= len(row) <= 3 and all(type(v) is int and v > 0 for v in row[1:])
        if not whole or type(row[0]) not in (int, float):
            raise UserError(
                f"config.progressive: {row!r} is no phase; give each as (share of the training at which it begins, "
                "image size) or (share, image size, batch size), all in one tuple: ((0.0, 128), (0.5, 224))"
            )
    begins = [begin for begin, _, _ in phase_rows(c)]
    if begins[0] != 0 or not all(a < b for a, b in pairwise([*begins, 1])):
        raise UserError(f"config.progressive begins its phases at {begins}: must be rising shares below 1, the first 0")
    given = [what for what in DURATIONS if get_key(c, what).steps is not None]
    if given and any(batch_size != c.batch_size for _, _, batch_size in phase_rows(c)):
        raise UserError(
            f"config.{given[0]}.steps={get_key(c, given[0]).steps}: steps are of no one length where "
            f"config.progressive has other batches than config.batch_size={c.batch_size}; give epochs or examples"
        )
