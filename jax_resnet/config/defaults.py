"""The default config: every key and its meaning.

A config file in configs/ calls `default()` and changes a few lines of it. Any value can be set on
the command line, `--config.optimizer.learning_rate=0.4`, and must have the type of the default.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def duration(epochs: float | None = None, steps: int | None = None, examples: int | None = None) -> ConfigDict:
    """Make a length of training in exactly one of epochs, steps (optimizer updates) or examples."""
    units = {"epochs": placeholder(float), "steps": placeholder(int), "examples": placeholder(int)}
    length = ConfigDict(units)
    length.epochs = epochs and float(epochs)
    length.steps = steps
    length.examples = examples
    return length


def default() -> ConfigDict:
    """Return every key with its default value; a None is explained in the key's comment."""
    config = ConfigDict()
    # The seed decides the first parameters, the order of the data and every augmentation.
    config.seed = 0
    config.batch_size = 256  # examples in one step, over all devices
    # A batch is computed in so many parts, one after another, to save memory. The update is the
    # same, except for the draws of dropout and drop_path.
    config.accumulate = 1
    config.train = duration(epochs=90)  # epochs, steps or examples
    # The lengths of train, warmups and cooldown are multiplied by this factor. Boundaries, knots
    # and progressive are shares of train and follow it.
    config.stretch = 1.0
    # Phases of (share of the training at which it begins, image size in pixels):
    # ((0, 128), (0.5, 224)) trains at 128 pixels a side, from halfway on at 224. A third number,
    # (0, 128, 1024), replaces batch_size. Evaluation is always at data.image.size.
    config.progressive = ()
    # The run leaves at this step with a checkpoint; its schedule is still that of train.
    config.stop_after_steps = placeholder(int)
    # Initial weights: a file of safetensors or torch, a workdir, or hf://ORG/NAME. None: random.
    config.init_from = placeholder(str)
    # Parts that keep their weights and statistics: stem, stage1, …, norm, head.
    config.freeze = ()
    # The dtype of activations, float32 or bfloat16. auto: bfloat16 on TPU and GPU, float32 on CPU.
    # All else is float32.
    config.dtype = "auto"
    config.log_every = 50  # steps
    # Steps to trace for XProf into WORKDIR/profile, first and last: 100:105. None: no trace.
    config.profile = placeholder(str)
    # A process that finishes no step in so many seconds (four times as many while it compiles)
    # prints the stacks of its threads and ends. 0: it waits for ever.
    config.stuck_after = 900.0

    model = config.model = ConfigDict()
    # jax_resnet/models/zoo.py has the table of names. None in a key of this group: as in the table.
    model.name = "resnet50"
    model.num_classes = placeholder(int)  # None: that of the dataset
    model.depths = placeholder(tuple)  # blocks of each stage
    model.widths = placeholder(tuple)  # channels of 3×3s, by stage
    # imagenet (7×7, stride 2), cifar (3×3), deep or tiered (three 3×3).
    model.stem = placeholder(str)
    model.stem_width = placeholder(int)  # output channels of the stem
    # max, zero_max (over a border of zeros), blur_max (then blurred) or conv.
    model.stem_pool = placeholder(str)
    # A (subsample, pad channels), B (projection) or D (average pool, projection).
    model.shortcut = placeholder(str)
    model.attention = placeholder(str)  # se or eca
    # avg or blur in place of strides, or blur_conv before convolutions with a stride.
    model.antialias = placeholder(str)
    model.norm = placeholder(str)  # batch, group, evonorm or frn
    model.standardise = placeholder(bool)  # weight standardisation
    model.pool = placeholder(str)  # avg or max of the last feature map
    model.dropout = 0.0  # probability, before the head
    # The probability that an example skips the residual of the last block in training; it grows
    # linearly over the blocks, from 0 in the first.
    model.drop_path = 0.0
    # Each block starts as the identity: scale 0 in its last norm.
    model.zero_init_last = placeholder(bool)
    model.init = placeholder(str)  # fan_out or fan_in, of convolutions
    # The standard deviation of the head's kernel at the start. 0: zeros.
    model.head_std = placeholder(float)
    # The head's biases start at −log(classes), for binary cross-entropy.
    model.head_prior = placeholder(bool)
    # So many consecutive examples share statistics of batch norm. None: all of the batch.
    model.bn_group_size = placeholder(int)
    model.bn_momentum = 0.9  # share of the old value kept each step
    model.bn_epsilon = 1e-5  # of other norms too

    data = config.data = ConfigDict()
    # A name in TFDS, folder:PATH, npz:PATH, prepared:PATH or digits.
    data.name = "imagenet2012"
    data.data_dir = placeholder(str)  # of TFDS; None: its own default
    data.train_split = placeholder(str)  # None: train
    data.eval_split = placeholder(str)  # None: validation, or else test
    # The share of each class kept for evaluation, for a folder without splits.
    data.holdout = 0.0
    # A batch holds each of its records so many times, each augmented anew. An epoch then holds
    # fewer records.
    data.repeats = 1
    data.mixup = 0.0  # α of its weights' Beta(α, α); 0: none
    # Batches read at once in each reading process. None: the number of processors, at most 8.
    data.threads = placeholder(int)
    # Processes that read encoded images. 0: the training process. None: 0 below 16 processors.
    data.workers = placeholder(int)
    # An undecodable image is replaced by another. A larger share of them than this ends the run.
    data.max_broken = 0.1

    image = data.image = ConfigDict()
    # Pixels a side. None: the images' own size. Images kept in memory are stretched to it.
    image.size = placeholder(int)
    # 1 or 3. Grey images are repeated, coloured ones weighted (ITU-R 601).
    image.channels = 3
    image.mean = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]
    image.std = (0.229, 0.224, 0.225)
    # The crop of training images: random_resized, scaled (short side to a size in crop_resize, then
    # a square), stretched (both sides to that size, then a square), pad (shifted by up to `pad`
    # pixels) or none.
    image.crop = "random_resized"
    image.crop_area = (0.08, 1.0)  # random_resized: share of the image
    image.crop_ratio = (3 / 4, 4 / 3)  # random_resized: width / height
    image.crop_resize = (256, 480)  # scaled, stretched: pixels, ≥ size
    image.interpolation = "bilinear"  # of every resize; or bicubic
    # Resizing weights every pixel, as Pillow and PyTorch's loaders do, at ten times the cost.
    image.antialias = False
    image.pad = 4  # pixels
    image.pad_mode = "zeros"  # or reflect
    image.flip = True  # left-right, with probability 1/2
    # Each image is mirrored in every other epoch rather than at random.
    image.flip_alternate = False
    # Operations on each image and their magnitude (0 … 30, torchvision's). (0, …): none.
    image.randaugment = (0, 9)
    # timm's operations, magnitude (0 … 10), its standard deviation and the probability of each
    # operation: rand-m9-mstd0.5-inc1 is (2, 9.0, 0.5, 0.5).
    image.randaugment_timm = (0, 9.0, 0.5, 0.5)
    # One operation of random magnitude on each image: torchvision's TrivialAugmentWide.
    image.trivial_augment = False
    # The interpolation of what these three shear and rotate: nearest or bilinear.
    image.augment_interpolation = "nearest"
    # The largest changes of brightness, contrast, saturation and hue, as shares.
    image.color_jitter = (0.0, 0.0, 0.0, 0.0)
    # The standard deviation of a shift of each image along the colours' principal components
    # (AlexNet's).
    image.pca_noise = 0.0
    # The share of the rows, and of the columns, left out of a batch's images.
    image.colout = 0.0
    # The probability that a rectangle of an image gets the mean colour.
    image.erase = 0.0
    # As data.mixup; with both, each batch has one of them at random.
    image.cutmix = 0.0
    # Evaluation resizes the short side to size / eval_crop and keeps the centre.
    image.eval_crop = 0.875
    # The decoder of JPEGs: turbojpeg, which decodes only what a crop needs, or simplejpeg. auto:
    # turbojpeg if it is installed.
    image.decoder = "auto"

    loss = config.loss = ConfigDict()
    # cross_entropy, or bce: binary cross-entropy for each class.
    loss.name = "cross_entropy"
    loss.label_smoothing = 0.0  # share of the target spread over classes
    loss.bce_sum = False  # bce: the sum over classes, not the mean

    distill = config.distill = ConfigDict()
    distill.teacher = placeholder(str)  # weights, as in init_from
    # The teacher's network. None: the one that its weights name.
    distill.model = placeholder(str)
    distill.temperature = 1.0
    distill.alpha = 0.5  # share of the teacher's loss in the sum

    optimizer = config.optimizer = ConfigDict()
    # sgd, rmsprop, rmsprop_tf, adagrad, adam, adamw, lamb, lars, lion, adafactor, or muon for
    # hidden convolutions with optimizer.rest for all else.
    optimizer.name = "sgd"
    optimizer.learning_rate = 0.1  # the peak, for reference_batch examples
    # The rate is multiplied by batch_size / reference_batch (examples). 0: it is not scaled.
    optimizer.reference_batch = 256
    optimizer.batch_scaling = "linear"  # or sqrt: by the root of that
    # sgd, rmsprop, lars, muon: v ← m·v + g, w ← w − rate·v.
    optimizer.momentum = 0.9
    # sgd, rmsprop, lars: v ← m·v + rate·g, w ← w − v, so that a new rate does not change v.
    optimizer.rate_in_momentum = False
    # sgd, lars, muon: w ← w − rate·(g + m·v).
    optimizer.nesterov = True
    optimizer.beta1 = 0.9  # adam, adamw, lamb, lion
    # adam, adamw, lamb, lion; also the decay of rmsprop's mean square.
    optimizer.beta2 = 0.999
    optimizer.epsilon = 1e-8  # all but sgd, lion and adafactor
    optimizer.trust_coefficient = 1e-3  # lars
    optimizer.newton_schulz_steps = 5  # muon
    rest = optimizer.rest = ConfigDict()
    # adam or sgd: muon's partner, for all that is no hidden convolution.
    rest.name = "adam"
    rest.learning_rate = 1e-3  # the peak, for reference_batch examples
    rest.momentum = 0.9  # sgd
    optimizer.weight_decay = 1e-4
    # Decay acts on the weights, times the rate, rather than through the gradient. None: as
    # published, which is True for adamw, lamb, lion, adafactor and muon.
    optimizer.decoupled = placeholder(bool)
    # Times the sign of a weight, added to the gradient of what no_decay does not cover.
    optimizer.l1 = 0.0
    # Parameters without decay: kernel, norm, bias, or a pattern of full names.
    optimizer.no_decay = ("norm", "bias")
    # Kinds or patterns, and the factors of their rates: (("head/.*", 10.0), …).
    optimizer.rate_factors = ()
    # The rate of each block over that of the next; the head has the full rate.
    optimizer.layer_decay = 1.0
    optimizer.clip_norm = 0.0  # limit of the global norm; 0: none
    optimizer.clip_value = 0.0  # limit of each element; 0: none
    # Gradients are taken this far uphill (sharpness-aware minimisation). 0: at the weights.
    optimizer.sam_rho = 0.0
    optimizer.sam_every = 1  # steps

    schedule = config.schedule = ConfigDict()
    # The decay from the peak: constant, cosine, linear, polynomial, exponential, step, piecewise,
    # one_cycle or inverse_sqrt.
    schedule.name = "cosine"
    # Epochs, steps or examples: linear from warmup_from × peak (one_cycle: half a cosine).
    schedule.warmup = duration(epochs=5)
    schedule.warmup_from = 0.0
    # Epochs, steps or examples at the end: linear to final × peak.
    schedule.cooldown = duration(epochs=0)
    # The share of the peak at the end, and at least after the warmup.
    schedule.final = 0.0
    schedule.power = 2.0  # polynomial
    # step: shares of the training, at each of which the rate is multiplied by `factor`.
    schedule.boundaries = (30 / 90, 60 / 90, 80 / 90)
    schedule.factor = 0.1
    # piecewise: shares of the training and of the peak. They include the warmup, which must be 0.
    schedule.knots = ((0.0, 0.0), (0.2, 1.0), (1.0, 0.0))

    ema = config.ema = ConfigDict()
    # The decay of a running average of weights and statistics, evaluated beside them. 0: none.
    ema.decay = 0.0
    ema.every = 1  # steps between its updates
    # Epochs, steps or examples during which each update copies the weights.
    ema.warmup = duration(epochs=0)
    # The decay is at most (1 + n) / (10 + n) at the n-th update after that.
    ema.ramp = False

    # An update whose loss or gradients are not finite is skipped: only the step number changes.
    config.guard = ConfigDict()
    # So many skipped in a row end the run. 0: no guard; a loss that is not finite ends the run at
    # the next report.
    config.guard.max_skipped = 10

    config.eval = ConfigDict()
    config.eval.every = duration(epochs=1)  # epochs, steps or examples
    config.eval.batch_size = placeholder(int)  # examples; None: batch_size
    # Logits are the mean of those of an image and its mirror image.
    config.eval.mirror = False

    checkpoint = config.checkpoint = ConfigDict()
    # Epochs, steps or examples. Every evaluation and the last step are saved besides.
    checkpoint.every = duration(epochs=1)
    checkpoint.keep = 2  # latest checkpoints
    checkpoint.keep_best = 1  # best of those evaluated, besides
    checkpoint.best_by = "accuracy_top1"  # or accuracy_top5, loss
    # Epochs, steps or examples after each of which one is saved and stays. 0: none.
    checkpoint.keep_every = duration(epochs=0.0)
    return config


def model_overrides(config: ConfigDict) -> dict[str, Any]:
    """Return the fields of `config.model` for `model_spec` and `create_model`; None: no change."""
    return {key: value for key, value in config.model.items() if key not in ("name", "num_classes")}
