"""The default config: every key there is, and what it means.

A config file in configs/ calls `default()` and changes a few lines of it. Any value can be set on the command line,
`--config.optimizer.learning_rate=0.4`; the type of the default is the type a value must have.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


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
    c.accumulate = 1  # parts in which a batch is computed, one after another, to save memory: the same update, but for
    # what dropout and drop_path draw
    c.train = duration(epochs=90)  # the whole schedule
    c.stretch = 1.0  # the recipe made so many times as long: train, warmups and cooldown; all else is in shares of it
    c.progressive = ()  # of training images: ((0, 128), (0.5, 224)) begins with 128 pixels a side, halfway come 224;
    # a row may name a batch size too, (0, 128, 1024), in place of batch_size. Evaluation is at data.image.size
    c.stop_after_steps = placeholder(int)  # leave at this step with a checkpoint; the schedule stays what it was
    c.init_from = placeholder(str)  # weights to begin with: a file of safetensors or torch, a workdir, hf://ORG/NAME
    c.freeze = ()  # parts that keep their weights and statistics: stem, stage1, …, norm, head
    c.dtype = "auto"  # of activations: bfloat16 on TPU and GPU, float32 on CPU. The rest is always float32
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
    c.data.repeats = 1  # times that a batch holds each of its records, augmented anew; an epoch then has fewer records
    c.data.mixup = 0.0  # α of the weights' Beta(α, α); 0: none
    c.data.threads = placeholder(int)  # batches read at once, in each process that reads. None: as processors, ≤ 8
    c.data.workers = placeholder(int)  # processes that read encoded images; 0: this one. None: 0 below 16 processors
    c.data.max_broken = 0.1  # share of images that may be undecodable: others take their places. More end the run

    image = c.data.image = ConfigDict()  # what concerns images alone
    image.size = placeholder(int)  # None: that of the images; what is kept in memory is stretched to it
    image.channels = 3  # 1 or 3; grey images are repeated, coloured ones weighted (ITU-R 601)
    image.mean = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]
    image.std = (0.229, 0.224, 0.225)
    image.crop = "random_resized"  # of training images; or scaled (short side to a size in crop_resize, a square of
    # that), stretched (both sides to it, a square), pad (shifted by up to `pad`), none
    image.crop_area = (0.08, 1.0)  # share of the image a random-resized crop covers
    image.crop_ratio = (3 / 4, 4 / 3)  # its width over its height
    image.crop_resize = (256, 480)  # pixels, at least size: of scaled and stretched
    image.interpolation = "bilinear"  # of every resize; or bicubic
    image.antialias = False  # as Pillow and PyTorch's loaders: every pixel counts, at ten times the cost of resizing
    image.pad = 4  # pixels
    image.pad_mode = "zeros"  # what lies beyond the border; or reflect
    image.flip = True  # left-right, every other training image
    image.flip_alternate = False  # each image in every other epoch rather than at random
    image.randaugment = (0, 9)  # operations on each image, their magnitude (0 … 30 as in torchvision); (0, …): none
    image.randaugment_timm = (0, 9.0, 0.5, 0.5)  # timm's: operations, magnitude (0 … 10), its deviation, and with what
    # probability each is done: rand-m9-mstd0.5-inc1 is (2, 9.0, 0.5, 0.5)
    image.trivial_augment = False  # one operation of any magnitude: torchvision's TrivialAugmentWide
    image.augment_interpolation = "nearest"  # of what these shear and rotate; or bilinear
    image.color_jitter = (0.0, 0.0, 0.0, 0.0)  # up to what share brightness, contrast, saturation, hue are changed
    image.pca_noise = 0.0  # deviation of a shift of each image along the colours' principal components (AlexNet's)
    image.colout = 0.0  # share of the rows, and of the columns, left out of a batch's images
    image.erase = 0.0  # probability that a rectangle of an image gets the mean colour
    image.cutmix = 0.0  # as data.mixup; with both, each batch has one of them, at random
    image.eval_crop = 0.875  # evaluation: resize the short side to size / eval_crop, keep the centre
    image.decoder = "auto"  # of JPEGs: turbojpeg, which decodes only what a crop needs, where there is one; simplejpeg

    c.loss = ConfigDict()
    c.loss.name = "cross_entropy"  # or bce: binary cross-entropy for each class
    c.loss.label_smoothing = 0.0
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

    c.guard = ConfigDict()  # an update whose loss or gradients are not finite is skipped: all but the step stays
    c.guard.max_skipped = 10  # so many skipped in a row end the run; 0: no guard, the run ends at the next report

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


def model_overrides(c: ConfigDict) -> dict[str, Any]:
    """What `config.model` changes of the named network, for `model_spec` and `create_model`; None: nothing."""
    return {key: value for key, value in c.model.items() if key not in ("name", "num_classes")}
