"""The default config, its durations, and everything that turns a user's config into one that can be trusted.

A config file in configs/ calls `default()` and changes a few lines of it. Any value can be set on the command line,
`--config.optimizer.learning_rate=0.4`; the type of the default is the type a value must have. What comes of it all:

    jax-resnet config resnet50_imagenet --config.optimizer.learning_rate=0.4 --plot=rate.png
"""

import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from jax_resnet.errors import UserError, choose, did_you_mean

UNITS = ("epochs", "steps", "examples")
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
DURATIONS = (
    *("train", "schedule.warmup", "schedule.cooldown", "ema.warmup", "eval.every"),
    *("checkpoint.every", "checkpoint.keep_every"),
)
MAY_BE_0 = ("schedule.warmup", "schedule.cooldown", "ema.warmup", "checkpoint.keep_every")

# What a value must be, in words and as a test, and the keys that it holds for. None is left to others.
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "at least 1",
        lambda v: v >= 1,
        "batch_size accumulate log_every checkpoint.keep data.threads eval.batch_size stop_after_steps "
        "model.num_classes model.bn_group_size data.image_size data.repeats optimizer.sam_every ema.every "
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
        "optimizer.clip_value optimizer.clip_adaptive optimizer.sam_rho data.pad data.mixup data.cutmix data.pca_noise "
        "data.workers model.head_std guard.max_skipped checkpoint.keep_best stuck_after",
    ),
    ("0, or more than 1", lambda v: v == 0 or 1 < v < math.inf, "guard.loss_spike"),
    (
        "at least 0 and less than 1",
        lambda v: 0 <= v < 1,
        "loss.label_smoothing loss.bce_threshold model.dropout model.drop_path model.drop_block model.bn_momentum "
        "optimizer.momentum optimizer.rest.momentum optimizer.beta1 optimizer.beta2 data.holdout data.colout ema.decay",
    ),
    (
        "at least 0 and at most 1",
        lambda v: 0 <= v <= 1,
        "schedule.warmup_from schedule.final schedule.factor data.erase data.max_broken",
    ),
    (
        "more than 0 and at most 1",
        lambda v: 0 < v <= 1,
        "optimizer.layer_decay data.eval_crop data.mix_until distill.alpha",
    ),
    ("more than 0 and at most 1000", lambda v: 0 < v <= 1000, "stretch"),
    ("at least 0 and less than 2**32", lambda v: 0 <= v < 2**32, "seed"),
    (
        "numbers",
        lambda v: all(isinstance(x, int | float) and math.isfinite(x) for x in v),
        "data.mean data.std data.crop_area data.crop_ratio data.crop_resize data.color_jitter data.randaugment_timm "
        "schedule.boundaries",
    ),
)
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "gradient_sums": ("auto", "float32"),
    "loss.name": LOSSES,
    "optimizer.name": OPTIMIZERS,
    "optimizer.rest.name": ("adam", "sgd"),
    "optimizer.batch_scaling": ("linear", "sqrt"),
    "schedule.name": SCHEDULES,
    "data.crop": ("random_resized", "scaled", "stretched", "pad", "none"),
    "data.pad_mode": ("zeros", "reflect"),
    "data.interpolation": ("bilinear", "bicubic"),
    "data.augment_interpolation": ("nearest", "bilinear"),
    "checkpoint.best_by": ("accuracy_top1", "accuracy_top5", "loss"),
}

# What may differ when a run goes on in its workdir: nothing here changes what is computed from whole files.
MAY_CHANGE = (
    "stop_after_steps", "log_every", "stuck_after", "profile", "accumulate", "spread_optimizer", "eval.every",
    "eval.batch_size", "checkpoint", "guard.max_skipped", "data.data_dir", "data.decoder", "data.threads",
    "data.workers", "data.max_broken",
)  # fmt: skip


def duration(epochs: float | None = None, steps: int | None = None, examples: int | None = None) -> ConfigDict:
    """A length of training in exactly one of epochs, steps (optimizer updates) or examples."""
    c = ConfigDict({"epochs": placeholder(float), "steps": placeholder(int), "examples": placeholder(int)})
    c.epochs, c.steps, c.examples = epochs and float(epochs), steps, examples
    return c


def default() -> ConfigDict:
    """Every key there is, with the value it has where a config file says nothing."""
    c = ConfigDict()
    c.seed = 0  # seeds the parameters, the order of the data and every augmentation
    c.batch_size = 256  # examples in one update, over all devices
    c.accumulate = (
        1  # parts in which a batch is computed, one after another, to save memory: the update is the same, but
    )
    # for what dropout, drop_path and drop_block draw
    c.spread_optimizer = False  # each device keeps a share of the optimizer's state and of the running average, to save
    # memory, and all exchange the updates: the same numbers, but for rounding
    c.train = duration(epochs=90)  # the whole schedule
    c.stretch = 1.0  # the recipe made so many times as long: train, warmups and cooldown; all else is in shares of it
    c.progressive = ()  # of training images: ((0, 128), (0.5, 224)) begins with 128 pixels a side, halfway come 224;
    # a row may name a batch size too, (0, 128, 1024), in place of batch_size. Evaluation is at data.image_size
    c.stop_after_steps = placeholder(int)  # leave at this step with a checkpoint; the schedule stays what it was
    c.init_from = placeholder(str)  # weights to begin with: a file of safetensors or torch, a workdir, hf://ORG/NAME
    c.freeze = ()  # parts that keep their weights and statistics: stem, stage1, …, norm, head
    c.dtype = "auto"  # of activations: bfloat16 on TPU and GPU, float32 on CPU. The rest is always float32
    c.gradient_sums = "auto"  # over devices, of the convolutions' kernels: in the dtype of activations; or float32
    c.log_every = 50  # steps
    c.profile = placeholder(str)  # updates to trace, 100:105 both included, into WORKDIR/profile, for XProf
    c.stuck_after = (
        900.0  # seconds in which no step is done, four times so many where one is compiled: the process then
    )
    # ends, and says where each of its threads is. 0: it waits for ever

    c.model = ConfigDict()
    c.model.name = "resnet50"  # jax_resnet/models/zoo.py has the table; None below means: as the table says
    c.model.num_classes = placeholder(int)  # None: as many as the data has
    c.model.depths = placeholder(tuple)  # blocks of each stage
    c.model.widths = placeholder(tuple)  # channels of the 3×3 convolutions of each stage
    c.model.stem = placeholder(str)  # imagenet (7×7 stride 2), cifar (3×3), deep or tiered (three 3×3)
    c.model.stem_width = placeholder(int)  # channels that the stem gives
    c.model.stem_pool = placeholder(str)  # max, zero_max (a border of zeros), blur_max (then blurred) or conv
    c.model.shortcut = placeholder(str)  # A (subsample, pad channels), B (projection) or D (average pool, projection)
    c.model.attention = placeholder(str)  # se or eca
    c.model.antialias = placeholder(str)  # avg or blur, in place of strides; blur_conv, before convolutions with one
    c.model.norm = placeholder(str)  # batch, group, evonorm or frn
    c.model.standardise = placeholder(bool)  # the kernels of convolutions (weight standardisation)
    c.model.pool = placeholder(str)  # avg or max, over the last feature map
    c.model.dropout = 0.0  # before the head
    c.model.drop_path = 0.0  # share of the last block's residuals left out in training; earlier blocks' grows up to it
    c.model.drop_block = 0.0  # share of the residuals of the last two stages left out in squares
    c.model.zero_init_last = placeholder(bool)  # start each block as the identity: scale 0 in its last norm
    c.model.init = placeholder(str)  # fan_out or fan_in, of the convolutions' kernels
    c.model.head_std = placeholder(float)  # of the head's kernel at the start; 0: zeros
    c.model.head_prior = placeholder(bool)  # start the head's biases at −log(classes), for binary cross-entropy
    c.model.bn_group_size = placeholder(int)  # consecutive examples that share statistics; None: the whole batch
    c.model.bn_momentum = 0.9  # share of the old value a running statistic keeps each step
    c.model.bn_epsilon = 1e-5

    c.data = ConfigDict()
    c.data.name = "imagenet2012"  # a TFDS name, folder:PATH, npz:PATH, prepared:PATH or digits
    c.data.data_dir = placeholder(str)  # where TFDS keeps datasets; None: its own default
    c.data.train_split = placeholder(str)  # None: train
    c.data.eval_split = placeholder(str)  # None: validation where there is one, else test
    c.data.holdout = 0.0  # share of each class kept for evaluation, for a folder without splits
    c.data.image_size = placeholder(int)  # None: that of the images; what is kept in memory is stretched to it
    c.data.channels = 3  # 1 or 3; grey images are repeated, coloured ones weighted (ITU-R 601)
    c.data.mean = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]
    c.data.std = (0.229, 0.224, 0.225)
    c.data.crop = "random_resized"  # of training images; or scaled (short side to a size in crop_resize, a square of
    # that), stretched (both sides to it, a square), pad (shifted by up to `pad`), none
    c.data.crop_area = (0.08, 1.0)  # share of the image a random-resized crop covers
    c.data.crop_ratio = (3 / 4, 4 / 3)  # its width over its height
    c.data.crop_resize = (256, 480)  # pixels, at least image_size: of scaled and stretched
    c.data.interpolation = "bilinear"  # of every resize; or bicubic
    c.data.antialias = False  # as Pillow and PyTorch's loaders: every pixel counts, at ten times the cost of resizing
    c.data.pad = 4  # pixels
    c.data.pad_mode = "zeros"  # what lies beyond the border; or reflect
    c.data.flip = True  # left-right, every other training image
    c.data.flip_alternate = False  # each image in every other epoch rather than at random
    c.data.randaugment = (0, 9)  # operations on each image, their magnitude (0 … 30 as in torchvision); (0, …): none
    c.data.randaugment_timm = (0, 9.0, 0.5, 0.5)  # timm's: operations, magnitude (0 … 10), its deviation, and with what
    # probability each is done: rand-m9-mstd0.5-inc1 is (2, 9.0, 0.5, 0.5)
    c.data.trivial_augment = False  # one operation of any magnitude: torchvision's TrivialAugmentWide
    c.data.augment_interpolation = "nearest"  # of what these shear and rotate; or bilinear
    c.data.color_jitter = (0.0, 0.0, 0.0, 0.0)  # up to what share brightness, contrast, saturation, hue are changed
    c.data.pca_noise = 0.0  # deviation of a shift of each image along the colours' principal components (AlexNet's)
    c.data.colout = 0.0  # share of the rows, and of the columns, left out of a batch's images
    c.data.erase = 0.0  # probability that a rectangle of an image gets the mean colour
    c.data.repeats = 1  # times that a batch holds each of its records, augmented anew; an epoch then has fewer records
    c.data.mixup = 0.0  # α of the weights' Beta(α, α); 0: none
    c.data.cutmix = 0.0  # the same; with mixup too, each batch has one of them, at random
    c.data.mix_until = 1.0  # share of the training after which neither is done
    c.data.eval_crop = 0.875  # evaluation: resize the short side to image_size / eval_crop, keep the centre
    c.data.decoder = "auto"  # of JPEGs: turbojpeg, which decodes only what a crop needs, where there is one; simplejpeg
    c.data.threads = placeholder(int)  # batches read at once, in each process that reads. None: as processors, ≤ 8
    c.data.workers = placeholder(int)  # processes that read encoded images; 0: this one. None: 0 below 16 processors
    c.data.max_broken = 0.1  # share of images that may be undecodable: others take their places. More end the run

    c.loss = ConfigDict()
    c.loss.name = "cross_entropy"  # or bce: binary cross-entropy for each class
    c.loss.label_smoothing = 0.0
    c.loss.bce_threshold = 0.0  # bce: targets above it become 1, the others 0; 0: targets as they are
    c.loss.bce_sum = False  # bce: the sum over classes rather than their mean

    c.distill = ConfigDict()
    c.distill.teacher = placeholder(str)  # weights, named as in init_from
    c.distill.model = placeholder(str)  # the teacher's network; None: what its weights say
    c.distill.temperature = 1.0
    c.distill.alpha = 0.5  # share of the teacher's loss in the whole

    c.optimizer = ConfigDict()
    c.optimizer.name = "sgd"  # rmsprop, rmsprop_tf, adagrad, adam, adamw, lamb, lars, lion, adafactor; muon for hidden
    # convolutions, with optimizer.rest for all else
    c.optimizer.learning_rate = 0.1  # the peak, for a batch of reference_batch
    c.optimizer.reference_batch = 256  # the rate is scaled by batch_size / reference_batch; 0: not scaled
    c.optimizer.batch_scaling = "linear"  # or sqrt: by the root of that
    c.optimizer.momentum = 0.9  # sgd, rmsprop, lars, muon: v ← m·v + g, w ← w − rate·v
    c.optimizer.rate_in_momentum = False  # sgd, rmsprop, lars: v ← m·v + rate·g, w ← w − v: a new rate works on what
    # comes, not on v
    c.optimizer.nesterov = True  # sgd, lars, muon: w ← w − rate·(g + m·v)
    c.optimizer.beta1 = 0.9  # adam, adamw, lamb, lion
    c.optimizer.beta2 = 0.999  # adam, adamw, lamb, lion; the decay of rmsprop's mean square
    c.optimizer.epsilon = 1e-8  # of all but sgd, lion and adafactor
    c.optimizer.trust_coefficient = 1e-3  # lars
    c.optimizer.newton_schulz_steps = 5  # muon
    c.optimizer.rest = ConfigDict()
    c.optimizer.rest.name = "adam"  # or sgd: with muon, of what is no hidden convolution
    c.optimizer.rest.learning_rate = 1e-3  # its peak, likewise for a batch of reference_batch
    c.optimizer.rest.momentum = 0.9  # sgd
    c.optimizer.weight_decay = 1e-4
    c.optimizer.decoupled = placeholder(bool)  # decay works on the weights, times the rate, not through the gradient.
    # None: as published, for adamw, lamb, lion, adafactor and muon
    c.optimizer.l1 = 0.0  # times the sign of a weight, added to the gradient of what no_decay does not cover
    c.optimizer.no_decay = ("norm", "bias")  # parameters without decay: kernel, norm, bias, or a pattern of whole names
    c.optimizer.rate_factors = ()  # (("head/.*", 10.0), …): kinds or patterns, and by what their rate is multiplied
    c.optimizer.layer_decay = 1.0  # rate of each block over that of the next; the head has all of it
    c.optimizer.clip_norm = 0.0  # most that the norm of all gradients together may be; 0: any
    c.optimizer.clip_value = 0.0  # most that each number of them may be
    c.optimizer.clip_adaptive = 0.0  # most that a unit's norm may be of its weights' (AGC)
    c.optimizer.sam_rho = 0.0  # gradients from this far uphill (sharpness-aware minimisation); 0: from here
    c.optimizer.sam_every = 1  # steps

    c.schedule = ConfigDict()
    c.schedule.name = "cosine"  # constant, cosine, linear, polynomial, exponential, step, piecewise, one_cycle,
    # inverse_sqrt: from the peak down
    c.schedule.warmup = duration(epochs=5)  # linear from warmup_from × peak (one_cycle: half a cosine)
    c.schedule.warmup_from = 0.0
    c.schedule.cooldown = duration(epochs=0)  # at the end, linear to final × peak
    c.schedule.final = 0.0  # what is left of the peak at the end, and at least after the warmup
    c.schedule.power = 2.0  # polynomial
    c.schedule.boundaries = (30 / 90, 60 / 90, 80 / 90)  # step: shares of the whole training, each ×factor
    c.schedule.factor = 0.1
    c.schedule.knots = ((0.0, 0.0), (0.2, 1.0), (1.0, 0.0))  # piecewise: shares of the training and of the peak; the
    # warmup, which is in them, must be 0

    c.ema = ConfigDict()
    c.ema.decay = 0.0  # of a running average of weights and statistics, evaluated beside them; 0: none is kept
    c.ema.every = 1  # steps between its updates
    c.ema.warmup = duration(epochs=0)  # until then each update makes it a copy
    c.ema.ramp = False  # decay at most (1 + n) / (10 + n) at the n-th update after that

    c.guard = (
        ConfigDict()
    )  # an update whose loss or gradients are no numbers is skipped: all but the step stays as it is
    c.guard.max_skipped = 10  # so many skipped in a row end the run; 0: no guard, the run ends at the next report
    c.guard.loss_spike = 0.0  # an update is also skipped whose loss is more than so many times the running mean of the
    # losses before it, once that is of 100; 0: none is

    c.eval = ConfigDict()
    c.eval.every = duration(epochs=1)
    c.eval.batch_size = placeholder(int)  # None: batch_size
    c.eval.mirror = False  # the mean of the logits of an image and its mirror image

    c.checkpoint = ConfigDict()
    c.checkpoint.every = duration(epochs=1)  # besides every evaluation and the last step
    c.checkpoint.keep = 2  # the latest
    c.checkpoint.keep_best = 1  # of those evaluated, besides
    c.checkpoint.best_by = "accuracy_top1"  # or accuracy_top5, loss
    c.checkpoint.keep_every = duration(epochs=0.0)  # one is saved, and stays, each time; 0: none
    return c


def in_steps(length: ConfigDict, what: str, *, batch_size: int, num_examples: int) -> float:
    """The duration `length` in steps, not rounded.

    Raises UserError naming `what` when not exactly one unit is given, or it is negative.
    """
    given = {unit: length[unit] for unit in UNITS if length[unit] is not None}
    if len(given) != 1:
        found = " and ".join(f"{u}={v}" for u, v in given.items()) or "none of them"
        raise UserError(
            f"config.{what}: give exactly one of {', '.join(UNITS)}; found {found} "
            "(a config file sets it whole, with duration(steps=…))"
        )
    ((unit, value),) = given.items()
    if not 0 <= value < 1e15:
        raise UserError(f"config.{what}.{unit}={value}: must be a number, not negative")
    return {"epochs": value * num_examples / batch_size, "steps": value, "examples": value / batch_size}[unit]


def validate(c: ConfigDict) -> None:
    """Checks all that can be checked without the data; raises UserError with one line for the first fault."""
    known = dict(_leaves(default()))
    given = dict(_leaves(c))
    for key in given:
        if key not in known:
            raise UserError(f"config.{key}: no such key; {_near_key(key, list(known))}")
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
    _check_data(c.data)
    _check_batches(c)
    _check_optimizer(c.optimizer)
    _check_schedule(c.schedule)
    if c.profile is not None:
        traced_steps(c.profile)
    if c.loss.name != "bce" and (c.loss.bce_threshold or c.loss.bce_sum):
        raise UserError(
            f"config.loss.bce_threshold and bce_sum: say how bce is done, but config.loss.name={c.loss.name}"
        )
    if c.distill.model and not c.distill.teacher:
        raise UserError(f"config.distill.model={c.distill.model}: whose weights? Give config.distill.teacher")
    if c.guard.loss_spike and not c.guard.max_skipped:
        raise UserError(
            f"config.guard.loss_spike={c.guard.loss_spike}: needs config.guard.max_skipped, which is 0; give 1 or more"
        )
    for what in DURATIONS:
        if not in_steps(_get(c, what), what, batch_size=1, num_examples=1) and what not in MAY_BE_0:
            raise UserError(f"config.{what} is 0: must be more")


def traced_steps(profile: str) -> range:
    """The updates that config.profile, "FIRST:LAST", names. Raises UserError if it names none."""
    found = re.fullmatch(r"(\d+):(\d+)", profile)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"config.profile={profile}: must be the first and the last update to trace, such as 100:105")
    return range(first, last + 1)


def _check_batches(c: ConfigDict) -> None:
    batch_key = "config.progressive: batch_size" if c.progressive else "config.batch_size"
    for _, _, batch_size in phase_rows(c):
        if batch_size % c.accumulate:
            raise UserError(f"config.accumulate={c.accumulate} does not divide {batch_key}={batch_size}")
        part = batch_size // c.accumulate
        of = f"{batch_key}={batch_size}" + (f" / accumulate={c.accumulate}" if c.accumulate > 1 else "")
        if (c.data.mixup or c.data.cutmix) and part % 2:
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


def _check_data(c: ConfigDict) -> None:
    if c.channels not in (1, 3):
        raise UserError(f"config.data.channels={c.channels}: must be 1 or 3")
    for key in ("mean", "std"):
        if len(c[key]) != c.channels:
            raise UserError(f"config.data.{key}={c[key]}: needs {c.channels} numbers, one for each channel")
    if min(c.std) <= 0:
        raise UserError(f"config.data.std={c.std}: must be more than 0")
    for key in ("crop_area", "crop_ratio", "crop_resize"):
        pair = c[key]
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] or (key == "crop_area" and pair[1] > 1):
            raise UserError(
                f"config.data.{key}={pair}: must be two rising numbers more than 0"
                + (", at most 1" if key == "crop_area" else "")
            )
    if c.image_size:
        check_crop_resize(c, c.image_size)
    operations = c.randaugment
    if len(operations) != 2 or any(type(v) is not int or v < 0 for v in operations) or operations[1] > 30:
        raise UserError(
            f"config.data.randaugment={operations}: must be two whole numbers, operations and magnitude (0 … 30)"
        )
    timm = c.randaugment_timm
    if len(timm) != 4 or type(timm[0]) is not int or min(timm) < 0 or timm[1] > 10 or timm[3] > 1:
        raise UserError(
            f"config.data.randaugment_timm={timm}: must be a whole number of operations, their magnitude (0 … 10), its "
            "deviation and their probability"
        )
    policies = {"randaugment": operations[0], "randaugment_timm": timm[0], "trivial_augment": c.trivial_augment}
    if len(chosen := [name for name, on in policies.items() if on]) > 1:
        raise UserError(f"config.data.{' and '.join(chosen)}: choose one of them")
    if c.flip_alternate and not c.flip:
        raise UserError("config.data.flip_alternate=True: which images are mirrored? None, with config.data.flip=False")
    if c.pca_noise and c.channels != 3:
        raise UserError(f"config.data.pca_noise={c.pca_noise}: is along colours, and config.data.channels={c.channels}")
    jitter = c.color_jitter
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        raise UserError(
            f"config.data.color_jitter={jitter}: must be four numbers, not negative: brightness, contrast, saturation "
            "and hue, this at most 0.5"
        )


def check_crop_resize(c: ConfigDict, size: int) -> None:
    """Raises UserError where scaled or stretched crops, `size` pixels a side, are to be of images smaller than that."""
    if c.crop in ("scaled", "stretched") and c.crop_resize[0] < size:
        raise UserError(
            f"config.data.crop_resize={c.crop_resize}: is less than the {size} pixels of a crop; images are resized to "
            f"at least those for config.data.crop={c.crop}"
        )
    if c.crop in ("scaled", "stretched") and c.crop_resize[0] > 4 * size:
        raise UserError(
            f"config.data.crop_resize={c.crop_resize}: of images so large the {size} pixels of a crop show next to "
            f"nothing; give what goes with config.data.crop={c.crop}, such as ({size * 8 // 7}, {size * 15 // 7})"
        )


def phase_rows(c: ConfigDict) -> list[tuple[float, int | None, int]]:
    """Of each phase the share of the training at which it begins, its image size (None: the data's), its batch size."""
    rows = c.progressive or ((0.0, None),)
    return [(begin, size, batch[0] if batch else c.batch_size) for begin, size, *batch in rows]


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
    given = [what for what in DURATIONS if _get(c, what).steps is not None]
    if given and any(batch_size != c.batch_size for _, _, batch_size in phase_rows(c)):
        raise UserError(
            f"config.{given[0]}.steps={_get(c, given[0]).steps}: steps are of no one length where config.progressive "
            f"has other batches than config.batch_size={c.batch_size}; give epochs or examples"
        )


def model_overrides(c: ConfigDict) -> dict[str, Any]:
    """What `config.model` changes of the named network, for `model_spec` and `create_model`; None: nothing."""
    return {key: value for key, value in c.model.items() if key not in ("name", "num_classes")}


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """One text for each key that differs in a way that changes what is computed: `batch_size: 128 there, 256 here`."""
    a, b = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{key}: {a.get(key, 'absent')} there, {b.get(key, 'absent')} here"
        for key in sorted(a.keys() | b.keys())
        if _tuples(a.get(key)) != _tuples(b.get(key))
        and not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


def to_json(c: ConfigDict) -> dict[str, Any]:
    """The config as nested plain dicts, lists, numbers and strings."""
    return json.loads(json.dumps(c.to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
    """The inverse of `to_json`: keys unknown to this version are kept, and reported by `validate`."""

    def fill(c: ConfigDict, values: dict[str, Any]) -> ConfigDict:
        with c.unlocked():
            for key, value in values.items():
                if isinstance(value, dict):
                    c[key] = fill(c.get(key, ConfigDict()), value)
                else:
                    c[key] = _tuples(value)
        return c

    return fill(default(), values)


# ---- the command line ------------------------------------------------------------------------------------------------


def config_dirs() -> list[Path]:
    """Return where the project's config files lie: inside the package in an installed wheel, else beside it.

    What lies beside an installed package is another distribution's configs/.
    """
    package = Path(__file__).resolve().parent
    inside, beside = package / "configs", package.parent / "configs"
    return [d for d in ([inside] if inside.is_dir() else [beside]) if d.is_dir()]


def find_config(path: str) -> str:
    """The existing file that `path` (with an optional `:argument`) means; raises UserError with near names.

    Looked for as given, then in the project's configs/, with or without `.py`.
    """
    name, colon, argument = path.partition(":")
    inside = name.removeprefix("configs/")
    found = [Path(name), *(d / inside for d in config_dirs() if not Path(inside).is_absolute())]
    for candidate in found:
        for file in (candidate, candidate.parent / f"{candidate.name}.py"):
            if file.is_file():
                return f"{file}{colon}{argument}"
    known = sorted(f.stem for d in config_dirs() for f in d.glob("*.py"))
    raise UserError(
        f"--config: no file {name!r} here or among the project's configs; " + did_you_mean(Path(name).stem, known)
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line into `flags.FLAGS`; raises UserError with one line for any mistake in it.

    Of a duration's units (epochs, steps, examples) the one on the command line replaces the one in the file.
    """
    keys = [key for key, _ in _leaves(default())]
    try:
        rest = flags.FLAGS(_with_found_config(list(argv)))
    except UserError:
        raise
    except flags.UnrecognizedFlagError as e:
        if e.flagname.startswith("config."):
            raise UserError(f"--{e.flagname} needs a config to change: give --config=FILE") from None
        prefixed = [k for k in keys if k == e.flagname or k.endswith(f".{e.flagname}")]
        own = ["config", *(flag.name for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]))]
        hint = f"did you mean --config.{prefixed[0]}?" if prefixed else did_you_mean(e.flagname, own)
        raise UserError(f"--{e.flagname}: no such flag; {hint}") from None
    except (AttributeError, KeyError) as e:  # ml_collections, for a key that the config does not have
        unknown = re.search(r"'(\w+)", str(e))
        mistyped = next((m[1] for a in argv if (m := re.match(r"--?config\.([\w.]+)", a)) and m[1] not in keys), None)
        if not unknown or not mistyped or unknown[1] not in mistyped:
            raise _config_file_fault(e) from None
        raise UserError(f"--config.{mistyped}: no such key; {_near_key(mistyped, keys)}") from None
    except (flags.IllegalFlagValueError, TypeError) as e:
        match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(e), re.S)
        if isinstance(e, TypeError) or "Traceback" in str(e):
            raise _config_file_fault(e) from None
        if not match:
            raise UserError(str(e).removeprefix("flag ")) from None
        raise _wrong_type(match[1], match[2], keys) from None
    except flags.Error as e:
        raise UserError(str(e)) from None
    except Exception as e:
        raise _config_file_fault(e) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r}: not a flag; flags begin with --, values follow =")
    if flags.FLAGS["config"].present and not isinstance(flags.FLAGS.config, ConfigDict):
        raise UserError(f"--config: get_config() returned {type(flags.FLAGS.config).__name__}, not a ConfigDict")
    if flags.FLAGS.config is not None:
        _replace_units(flags.FLAGS.config, config_flags.get_override_values(flags.FLAGS["config"]))
    return rest


def _with_found_config(argv: list[str]) -> list[str]:
    for i, arg in enumerate(argv):
        if re.match(r"--?config=", arg):
            argv[i] = "--config=" + find_config(arg.partition("=")[2])
        elif re.match(r"--?config$", arg):
            if i + 1 < len(argv) and not argv[i + 1].startswith("-"):
                argv[i + 1] = find_config(argv[i + 1])
                continue
            raise UserError("--config: which file? For example --config configs/resnet20_digits.py")
    return argv


def _replace_units(c: ConfigDict, overrides: dict[str, Any]) -> None:
    for key in overrides:
        parent, _, unit = key.rpartition(".")
        siblings = [u for u in UNITS if u != unit and f"{parent}.{u}" not in overrides]
        if unit in UNITS and isinstance(_get(c, parent), ConfigDict):
            for sibling in siblings:
                _get(c, parent)[sibling] = None


def _config_file_fault(e: Exception) -> UserError:
    text = str(e).strip()
    if "has no attribute 'get_config'" in text:
        return UserError("--config: the file defines no get_config(), which must return the config")
    last = traceback.extract_tb(e.__traceback__)[-1]
    file, line = (e.filename, e.lineno) if isinstance(e, SyntaxError) else (last.filename, last.lineno)
    kind = type(e).__name__
    if "Traceback" in text:  # ml_collections hands on a fault of these types as text
        file, line = re.findall(r'File "([^"]+)", line (\d+)', text)[-1]
        kind, _, text = text.splitlines()[-1].partition(": ")
    return UserError(f"--config: {kind} in {file}, line {line}: {text}")


def _wrong_type(key: str, value: str, keys: Sequence[str]) -> UserError:
    inside = [k for k in keys if k.startswith(f"{key}.")]
    if inside:
        return UserError(f"--config.{key}={value}: {key} is a group of keys; set one, such as --config.{inside[0]}")
    group, _, name = key.rpartition(".")
    parent = _get(default(), group) if group else default()
    example = f"; for example --config.{key}={parent[name]}" if parent[name] is not None else ""
    return UserError(f"--config.{key}={value}: must be of type {parent.get_type(name).__name__}{example}")


def _near_key(mistyped: str, keys: Sequence[str]) -> str:
    """The whole key meant, also when the group was left out or mistyped."""
    groups = {key[:i] for key in keys for i, c in enumerate(key) if c == "."}
    hint = did_you_mean(mistyped, [*keys, *groups])
    if hint.startswith("did you mean"):
        return hint
    last = mistyped.rpartition(".")[2]
    return did_you_mean(last, [k for k in keys if k.rpartition(".")[2] == last] or keys)


def _leaves(c: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in c:
        if isinstance(c[key], ConfigDict):
            yield from _leaves(c[key], f"{prefix}{key}.")
        else:
            yield prefix + key, c[key]


def _get(c: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        c = c[part]
    return c


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
