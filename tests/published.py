"""What each recipe's published table says, cell by cell, and the config values that it means, written by hand.

A cell is its text as it stands in ../shared/RECIPES.md, and then the values, or why it means none, or both, the text
saying what of the cell is done otherwise and why. A key is one of the config's, of the recipe that its column names, or
preceded by another's name. `spec.` is the network's description; `peak` the rate at its highest.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Cell = tuple[str, Mapping[str, Any], str]

RESULT = "a published result"


class Table(NamedTuple):
    """One section: the configs that its columns are, and its rows; of a table with one row, each cell is a row."""

    configs: tuple[str, ...]
    rows: tuple[tuple[str, list[Cell]], ...]


def cell(text: str, *means: Mapping[str, Any] | str) -> Cell:
    values = next((m for m in means if not isinstance(m, str)), {})
    return text, values, next((m for m in means if isinstance(m, str)), "")


def one(*cells: tuple[Any, ...]) -> tuple[tuple[str, list[Cell]], ...]:
    return tuple(("", [cell(*c)]) for c in cells)


def row(label: str, *cells: tuple[Any, ...]) -> tuple[str, list[Cell]]:
    return label, [cell(*c) for c in cells]


def values(label: str, key: str, cells: Mapping[str, Any] | list[tuple[str, Any]]) -> tuple[str, list[Cell]]:
    """A row of which every cell is one value of `key`."""
    return label, [cell(text, {key: value}) for text, value in cells]


def alike(label: str, texts: list[str], *means: Mapping[str, Any] | str) -> tuple[str, list[Cell]]:
    """A row of which every cell means the same."""
    return label, [cell(text, *means) for text in texts]


TABLES: dict[str, Table] = {}

TABLES["2.1"] = Table(
    ("he2015_imagenet:50",),
    one(
        ("arch v1 (stride in 1x1)", {"spec.stride_in_1x1": True, "spec.depths": (3, 4, 6, 3), "spec.stem": "imagenet"}),
        ("bs 256", {"batch_size": 256}),
        (
            "lr 0.1, /10 on plateau, 60e4 iters (~120 ep) (common proxy: 90 ep, /10 at 30/60/80)",
            {
                "peak": 0.1, "schedule.name": "step", "schedule.factor": 0.1, "train.epochs": 90.0,
                "schedule.boundaries": (0.3333333333333333, 0.6666666666666666, 0.8888888888888888),
            },
            "the proxy: a fall when somebody sees a plateau cannot be repeated",
        ),
        ("SGD mom 0.9, no nesterov", {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False}),
        ("wd 1e-4 all params", {"optimizer.weight_decay": 1e-4, "optimizer.no_decay": (), "optimizer.decoupled": None}),
        ("no warmup, LS 0", {"schedule.warmup.epochs": 0.0, "loss.label_smoothing": 0.0}),
        (
            "aug: short side U[256,480], random 224 crop, flip, PCA colour",
            {
                "data.image.crop": "scaled", "data.image.crop_resize": (256, 480), "data.image.size": 224,
                "data.image.flip": True,
                "data.image.pca_noise": 0.1,
            },
        ),
        ("BN eps 1e-5 (caffe), running mom .9-.99", {"model.bn_epsilon": 1e-5, "model.bn_momentum": 0.9}),
        ("He init fan_out", {"spec.init": "fan_out", "spec.zero_init_last": False}),
        (
            "eval 10-crop; 1-crop 224/256: R50 75.3, R101 76.4, R152 77.0",
            {"data.image.eval_crop": 0.875, "he2015_imagenet:152 spec.depths": (3, 8, 36, 3)},
            "one crop, which has published results too",
        ),
    ),
)  # fmt: skip

TABLES["2.2"] = Table(
    ("resnet_cifar:20",),
    one(
        ("bs 128", {"batch_size": 128}),
        (
            "lr 0.1, x0.1 at 32k & 48k, stop **64k it (~164 ep)**",
            {
                "peak": 0.1, "schedule.name": "step", "schedule.factor": 0.1, "schedule.boundaries": (0.5, 0.75),
                "train.steps": 64000, "schedule.warmup.steps": 0,
            },
        ),
        ("SGD mom .9", {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False}),
        ("wd 1e-4 all", {"optimizer.weight_decay": 1e-4, "optimizer.no_decay": ()}),
        (
            "pad 4 zero, random crop 32, flip; per-pixel mean (practice: mean/std)",
            {
                "data.image.crop": "pad", "data.image.pad": 4, "data.image.pad_mode": "zeros", "data.image.flip": True,
                "data.image.mean": (0.4914, 0.4822, 0.4465), "data.image.std": (0.2470, 0.2435, 0.2616),
            },
            "the practice: mean and deviation of each channel",
        ),
        ("option-A (parameter-free) shortcuts", {"spec.shortcut": "A", "spec.depths": (3, 3, 3)}),
        (
            "rn110: lr .01 for first 400 it (until train err < 80 %) then .1",
            {"resnet_cifar:110 schedule.warmup.steps": 400, "resnet_cifar:110 schedule.warmup_from": 0.1},
            "linear from 0.01 to 0.1 over the 400 updates: a condition on the training error is no schedule",
        ),
        ("eval: plain 32x32", {"data.image.size": None, "data.name": "cifar10", "eval.mirror": False}),
        ("expected err rn20 8.75, rn56 6.97, rn110 6.43 (6.61+-.16)", RESULT),
    ),
)  # fmt: skip

TABLES["2.3"] = Table(
    ("goyal2017",),
    one(
        ("bs 8192 (32/GPU x 256)", {"batch_size": 8192}),
        (
            "lr 0.1*bs/256 = 3.2",
            {"peak": 3.2, "optimizer.learning_rate": 0.1, "optimizer.reference_batch": 256},
        ),
        (
            "warmup 5 ep linear from 0.1",
            {"schedule.warmup.epochs": 5.0, "schedule.warmup_from": 0.03125},
        ),
        (
            "/10 at 30/60/80, 90 ep",
            {
                "schedule.name": "step", "schedule.factor": 0.1, "train.epochs": 90.0,
                "schedule.boundaries": (0.3333333333333333, 0.6666666666666666, 0.8888888888888888),
            },
        ),
        ("mom .9 Nesterov", {"optimizer.momentum": 0.9, "optimizer.nesterov": True}),
        ("wd 1e-4, **mask BN gamma/beta**", {"optimizer.weight_decay": 1e-4, "optimizer.no_decay": ("norm",)}),
        ("last BN gamma = 0; fc N(0, .01)", {"spec.zero_init_last": True, "spec.head_std": 0.01}),
        (
            "RRC(.08-1) 224, flip (+colour)",
            {
                "data.image.crop": "random_resized", "data.image.crop_area": (0.08, 1.0), "data.image.size": 224,
                "data.image.flip": True, "data.image.pca_noise": 0.1,
            },
            "of the colour only the noise along its principal components: the paper names none",
        ),
        ("per-worker BN batch 32, no sync", {"model.bn_group_size": 32}),
        ("eval 256/224", {"data.image.eval_crop": 0.875}),
        ("76.26+-.09 (bs256 76.40)", RESULT),
    ),
)  # fmt: skip

TABLES["2.4"] = Table(
    ("bag_of_tricks:mixup",),
    one(
        ("bs 1024, fp16", {"batch_size": 1024, "dtype": "auto"}, "bfloat16, which needs no scaled loss"),
        (
            "lr 0.1*bs/256 = .4",
            {"peak": 0.4, "optimizer.learning_rate": 0.1, "optimizer.reference_batch": 256},
        ),
        ("warmup 5 ep linear from 0", {"schedule.warmup.epochs": 5.0, "schedule.warmup_from": 0.0}),
        (
            "cosine, 120 ep (200 with mixup)",
            {
                "bag_of_tricks:efficient schedule.name": "step", "bag_of_tricks:efficient train.epochs": 120.0,
                "bag_of_tricks:efficient schedule.boundaries": (0.25, 0.5, 0.75),
                "bag_of_tricks:cosine schedule.name": "cosine", "bag_of_tricks:smoothing train.epochs": 120.0,
                "schedule.name": "cosine", "train.epochs": 200.0, "bag_of_tricks:distill train.epochs": 200.0,
            },
        ),
        ("NAG mom .9", {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": True}),
        (
            "wd 1e-4, **no bias/BN decay**",
            {"optimizer.weight_decay": 1e-4, "optimizer.no_decay": ("norm", "bias")},
        ),
        ("gamma0 last BN", {"spec.zero_init_last": True}),
        (
            "LS .1, mixup alpha .2 (opt), distill T=20 from R152-D (opt)",
            {
                "loss.label_smoothing": 0.1, "data.mixup": 0.2, "distill.teacher": None,
                "bag_of_tricks:cosine loss.label_smoothing": 0.0, "bag_of_tricks:smoothing loss.label_smoothing": 0.1,
                "bag_of_tricks:smoothing data.mixup": 0.0, "bag_of_tricks:distill data.mixup": 0.2,
                "bag_of_tricks:distill distill.temperature": 20.0,
                "bag_of_tricks:distill distill.teacher": "hf://timm/resnet152d.gluon_in1k",
            },
        ),
        (
            "RRC, flip, HSV jitter .6-1.4, PCA N(0,.1)",
            {
                "data.image.crop": "random_resized", "data.image.crop_area": (0.08, 1.0), "data.image.flip": True,
                "data.image.color_jitter": (0.4, 0.4, 0.4, 0.0), "data.image.pca_noise": 0.1,
            },
            "contrast in place of the hue: so does the authors' script, and hue × 1.4 is no shift of it",
        ),
        ("arch ResNet-50-D", {"model.name": "resnet50d", "spec.shortcut": "D", "spec.stem": "deep"}),
        ("eval 256/224", {"data.image.eval_crop": 0.875, "data.image.size": 224}),
        (
            "77.16 -> cosine 77.91 -> LS 78.31 -> mixup 79.15 (w/ KD 79.29). timm bt tag: 78.44@224/79.65@288 [R]",
            RESULT,
        ),
    ),
)  # fmt: skip

TABLES["2.5"] = Table(
    ("deep_learning_examples:90",),
    one(
        (
            "bs 2048 (256x8; MXNet 512x8)",
            {"batch_size": 2048, "model.bn_group_size": 256, "resnet50_imagenet batch_size": 1024},
            "PyTorch's",
        ),
        (
            "lr .256*bs/256 = 2.048",
            {
                "peak": 2.048, "optimizer.learning_rate": 0.256, "optimizer.reference_batch": 256,
                "resnet50_imagenet peak": 1.024,
            },
        ),
        (
            "warmup 8 ep (PyTorch) / 5 (MXNet) linear",
            {"schedule.warmup.epochs": 8.0, "schedule.warmup_from": 0.0},
            "PyTorch's",
        ),
        ("cosine to 0", {"schedule.name": "cosine", "schedule.final": 0.0}),
        ("mom .875", {"optimizer.momentum": 0.875, "optimizer.nesterov": False}),
        (
            "wd 1/32768 = 3.0517578125e-5, **mask BN**",
            {"optimizer.weight_decay": 3.0517578125e-5, "optimizer.no_decay": ("norm",)},
        ),
        ("LS .1", {"loss.label_smoothing": 0.1, "loss.name": "cross_entropy"}),
        (
            "50 / 90 / 250 ep (250 adds mixup .2)",
            {
                "deep_learning_examples:50 train.epochs": 50.0, "train.epochs": 90.0,
                "deep_learning_examples:250 train.epochs": 250.0,
                "deep_learning_examples:50 data.mixup": 0.0, "data.mixup": 0.0,
                "deep_learning_examples:250 data.mixup": 0.2,
            },
        ),
        (
            "RRC224 bilinear, flip",
            {
                "data.image.crop": "random_resized", "data.image.size": 224, "data.image.interpolation": "bilinear",
                "data.image.flip": True,
            },
        ),
        ("init fan_in", {"spec.init": "fan_in"}),
        ("static loss scale 128-256", "bfloat16 has float32's range"),
        ("76.3 / 77.1 / 78.4", RESULT),
    ),
)  # fmt: skip

_LARS = {"optimizer.name": "lars", "optimizer.trust_coefficient": 1e-3}
_POLY = {"schedule.name": "polynomial", "schedule.power": 2.0}
_AS_LISTED = "as in the entries that state it"
TABLES["2.6"] = Table(  # turned: each row of the table is a config
    tuple(f"mlperf_lars:{batch}" for batch in (2048, 1536, 4096, 3200, 8192, 32768, 65536, 57344)),
    (
        row(
            "bs",
            ("2048", {"batch_size": 2048}), ("1536", {"batch_size": 1536}), ("4096", {"batch_size": 4096}),
            ("**3200/3264**", {"batch_size": 3200, "mlperf_lars:3264 batch_size": 3264}),
            ("8192", {"batch_size": 8192}), ("32768", {"batch_size": 32768}), ("65536", {"batch_size": 65536}),
            ("57344", {"batch_size": 57344}),
        ),
        row(
            "base lr",
            ("8.5", {"peak": 8.5}), ("7.2", {"peak": 7.2}), ("13", {"peak": 13.0}),
            ("**11.0/10.5**", {"peak": 11.0, "mlperf_lars:3264 peak": 10.5}),
            ("17", {"peak": 17.0}), ("27.5-29", {"peak": 28.25}, "the middle"), ("23.08", {"peak": 23.08}),
            ("23", {"peak": 23.0}),
        ),
        row(
            "warmup ep",
            ("5", {"schedule.warmup.epochs": 5.0}), ("2", {"schedule.warmup.epochs": 2.0}),
            ("2", {"schedule.warmup.epochs": 2.0}), ("2", {"schedule.warmup.epochs": 2.0}),
            ("5", {"schedule.warmup.epochs": 5.0}), ("16-18", {"schedule.warmup.epochs": 17.0}, "the middle"),
            ("33", {"schedule.warmup.epochs": 33.0}), ("32", {"schedule.warmup.epochs": 32.0}),
        ),
        row(  # updates × batch / 1,281,167, and the warmup
            "decay (poly p=2 to 1e-4)",
            ("22 530 steps", _POLY | {"train.epochs": 41.01516430, "schedule.final": 1.17647059e-5}),
            ("37 ep", _POLY | {"train.epochs": 37.0, "schedule.final": 1.38888889e-5}),
            ("12 169 steps", _POLY | {"train.epochs": 40.90532928, "schedule.final": 7.69230769e-6}),
            ("37 ep", _POLY | {"train.epochs": 37.0, "schedule.final": 9.09090909e-6}),
            ("6 095 steps", _POLY | {"train.epochs": 43.97246807, "schedule.final": 5.88235294e-6}),
            ("1 731 steps", _POLY | {"train.epochs": 61.27323526, "schedule.final": 3.53982301e-6}),
            ("1 166 steps", _POLY | {"train.epochs": 92.64482070, "schedule.final": 4.33275563e-6}),
            ("78 ep", _POLY | {"train.epochs": 78.0, "schedule.final": 4.34782609e-6}),
        ),
        values("wd", "optimizer.weight_decay", [
            ("2e-4", 2e-4), ("2e-4", 2e-4), ("2e-4", 2e-4), ("**5e-5**", 5e-5), ("2e-4", 2e-4), ("1e-4", 1e-4),
            ("1e-4", 1e-4), ("2.5e-5", 2.5e-5),
        ]),
        values("mom", "optimizer.momentum", [
            (".9", 0.9), (".9", 0.9), (".9", 0.9), (".9", 0.9), (".9", 0.9), (".93", 0.93), (".95372", 0.95372),
            (".95", 0.95),
        ]),
        row(
            "eta (M unless NVIDIA)",
            (".001", _LARS), (".001", _LARS), ("", _LARS, _AS_LISTED), (".001", _LARS),
            *[("", _LARS, _AS_LISTED)] * 4,
        ),
        alike("eps", ["0"] * 8, {"optimizer.epsilon": 0.0}),
        row(
            "BN span",
            ("128", {"model.bn_group_size": 128}),
            ("-", {"model.bn_group_size": 192}, "a GPU's part of the batch"),
            ("128", {"model.bn_group_size": 128}),
            ("400 (local)", {"model.bn_group_size": 400, "mlperf_lars:3264 model.bn_group_size": 408}),
            ("128/64", {"model.bn_group_size": 128}, "that of the smaller of the two machines"),
            ("64", {"model.bn_group_size": 64}), ("64", {"model.bn_group_size": 64}),
            ("32", {"model.bn_group_size": 32}),
        ),
        row("Result", *[(text, RESULT) for text in (
            "38 ep", "35 ep", "38 ep", "35 ep", "42-44 ep", "60 ep", "88-92 ep", "77 ep",
        )]),
    ),
)  # fmt: skip

TABLES["2.7"] = Table(
    ("strikes_back:a1", "strikes_back:a2", "strikes_back:a3"),
    (
        values("epochs", "train.epochs", [("600", 600.0), ("300", 300.0), ("100", 100.0)]),
        row(
            "train/test px",
            ("224/224", {"data.image.size": 224, "progressive": ()}),
            ("224/224", {"data.image.size": 224, "progressive": ()}),
            ("**160**/224", {"data.image.size": 224, "progressive": ((0.0, 160),)}),
        ),
        row(
            "bs",
            ("2048", {"batch_size": 2016}, "a batch holds each of its images three times, and 3 does not divide 2048"),
            ("2048", {"batch_size": 2016}, "likewise"),
            ("2048", {"batch_size": 2048}),
        ),
        alike("optimiser", ["LAMB"] * 3, {
            "optimizer.name": "lamb", "optimizer.beta1": 0.9, "optimizer.beta2": 0.999, "optimizer.epsilon": 1e-6,
        }),
        row("lr", *[
            (text, {
                "optimizer.learning_rate": rate, "optimizer.reference_batch": 2048, "optimizer.batch_scaling": "sqrt",
            })
            for text, rate in (("5e-3", 5e-3), ("5e-3", 5e-3), ("8e-3", 8e-3))
        ]),
        row("wd (mask BN+bias)", *[
            (text, {"optimizer.weight_decay": decay, "optimizer.no_decay": ("norm", "bias")})
            for text, decay in (("0.01", 0.01), ("0.02", 0.02), ("0.02", 0.02))
        ]),
        row("schedule", *[
            (text, {
                "schedule.name": "cosine", "schedule.final": final, "schedule.warmup.epochs": 5.0,
                "schedule.warmup_from": 1e-4,
            })
            for text, final in (
                ("cosine to 1e-6, warmup 5 ep from 1e-4*lr", 2e-4), ("same", 2e-4), ("same", 1.25e-4),
            )
        ]),
        alike(
            "loss", ["**BCE** sigmoid, mixed targets (timm: bce_target_thresh 0.2 option)", "BCE", "BCE"],
            {"loss.name": "bce", "loss.bce_sum": False},
        ),
        values("label smoothing", "loss.label_smoothing", [(".1", 0.1), ("0", 0.0), ("0", 0.0)]),
        values("stoch depth", "model.drop_path", [(".05", 0.05), (".05", 0.05), ("0", 0.0)]),
        values("repeated aug", "data.repeats", [("3x (timm --aug-repeats 3)", 3), ("3x", 3), ("no", 1)]),
        row("RandAugment", *[
            (text, {"data.image.randaugment_timm": (2, magnitude, 0.5, 0.5), "data.image.randaugment": (0, 9)})
            for text, magnitude in (("rand-m7-mstd0.5-inc1 (n=2)", 7.0), ("m7", 7.0), ("m6", 6.0))
        ]),
        row("mixup/cutmix", *[
            (text, {"data.mixup": mixup, "data.image.cutmix": 1.0})
            for text, mixup in ((".2/1.0", 0.2), (".1/1.0", 0.1), (".1/1.0 (switch prob .5, per batch)", 0.1))
        ]),
        alike(
            "dropout, EMA, erasing, jitter, grad clip", ["none"] * 3,
            {
                "model.dropout": 0.0, "ema.decay": 0.0, "data.image.erase": 0.0,
                "data.image.color_jitter": (0.0, 0.0, 0.0, 0.0),
                "optimizer.clip_norm": 1.0,
            },
            "timm's LAMB clips to 1 of itself, as the notes below the table say",
        ),
        alike("train interp", ["bicubic"] * 3, {"data.image.interpolation": "bicubic", "data.image.antialias": True}),
        alike("eval", ["crop ratio **.95** (resize 236 -> 224) bicubic", ".95", ".95"], {"data.image.eval_crop": 0.95}),
        row("result paper / timm csv 224 / 288", *[(text, RESULT) for text in (
            "80.4 / 80.38 / 81.24", "79.8 / 79.83 / 80.77", "78.1 / 78.05 / (160: 75.99)",
        )]),
    ),
)  # fmt: skip

_STATISTICS = {"model.bn_momentum": 0.9, "model.bn_epsilon": 1e-5}
TABLES["2.8"] = Table(
    ("torchvision:v1", "torchvision:v2"),
    (
        row(
            "bs",
            ("256 (32x8)", {"batch_size": 256, "model.bn_group_size": 32}),
            ("1024 (128x8)", {"batch_size": 1024, "model.bn_group_size": 128}),
        ),
        row(
            "lr / sched",
            (
                ".1, /10 each 30 ep, 90 ep",
                {
                    "peak": 0.1, "schedule.name": "step", "schedule.factor": 0.1, "train.epochs": 90.0,
                    "schedule.boundaries": (0.3333333333333333, 0.6666666666666666),
                },
            ),
            (
                ".5, cosine (per epoch), 600 ep",
                {"peak": 0.5, "schedule.name": "cosine", "schedule.final": 0.0, "train.epochs": 600.0},
                "falls with each update",
            ),
        ),
        row(
            "warmup",
            ("0", {"schedule.warmup.epochs": 0.0}),
            ("5 ep linear, start factor .01", {"schedule.warmup.epochs": 5.0, "schedule.warmup_from": 0.01}),
        ),
        alike("SGD", ["mom .9", "mom .9 (no nesterov)"], {
            "optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False,
        }),
        row(
            "wd / mask",
            ("1e-4 / none", {"optimizer.weight_decay": 1e-4, "optimizer.no_decay": ()}),
            (
                "2e-5 / norm layers 0 (biases decayed)",
                {"optimizer.weight_decay": 2e-5, "optimizer.no_decay": ("norm",)},
            ),
        ),
        row(
            "aug",
            (
                "RRC224 bilinear, flip",
                {
                    "data.image.crop": "random_resized", "data.image.size": 224, "data.image.interpolation": "bilinear",
                    "data.image.antialias": True, "data.image.flip": True, "data.image.trivial_augment": False,
                    "progressive": (),
                },
            ),
            (
                "RRC **176** bilinear, flip, **TrivialAugmentWide**, random erase .1, mixup .2 + cutmix 1.0 "
                "(RandomChoice per batch)",
                {
                    "data.image.crop": "random_resized", "progressive": ((0.0, 176),),
                    "data.image.interpolation": "bilinear",
                    "data.image.antialias": True, "data.image.flip": True, "data.image.trivial_augment": True,
                    "data.image.erase": 0.1,
                    "data.mixup": 0.2, "data.image.cutmix": 1.0,
                },
            ),
        ),
        row(
            "LS",
            ("0", {"loss.label_smoothing": 0.0}),
            (".1, CE", {"loss.label_smoothing": 0.1, "loss.name": "cross_entropy"}),
        ),
        values("repeated aug", "data.repeats", [("-", 1), ("**4** (`--ra-sampler --ra-reps 4`)", 4)]),
        row(
            "EMA",
            ("-", {"ema.decay": 0.0}),
            (
                "decay .99998 (adjusted by world*bs*steps/epochs), every 32 it, reset during warmup",
                {"ema.decay": 0.9989077333, "ema.every": 32, "ema.warmup.epochs": 5.0},
            ),
        ),
        alike("BN", ["mom .1 eps 1e-5, no sync", "same"], _STATISTICS),
        row(
            "eval",
            ("256/224", {"data.image.eval_crop": 0.875}),
            ("resize **232** / crop 224", {"data.image.eval_crop": 0.9655172414, "data.image.size": 224}),
        ),
        row(
            "Top-1",
            ("76.13", RESULT),
            ("80.858 (80.674 before RA); R101 81.89, R152 82.28, RNX50 81.20, RNX101-32x8d 82.83", RESULT),
        ),
    ),
)  # fmt: skip

TABLES["2.9"] = Table(
    ("ffcv:88",),
    one(
        (
            "bs 512/GPU x 8 = **4096** (verified from LR log: 312 it/epoch)",
            {"batch_size": 4096, "model.bn_group_size": 512},
        ),
        ("lr 1.7 peak (=.106/256)", {"peak": 1.7}),
        (
            "piecewise-linear: 1e-4*lr at ep 0 -> lr at **ep 2** -> 0 at end, interpolated per iteration",
            {
                "schedule.name": "linear", "schedule.warmup.epochs": 2.0, "schedule.warmup_from": 1e-4,
                "schedule.final": 0.0, "train.epochs": 88.0,
            },
        ),
        (
            "SGD mom .9 no nesterov",
            {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False},
        ),
        (
            "wd 1e-4, mask = parameter names containing 'bn' (so torchvision's `downsample.1` BN is decayed "
            "[D from names])",
            {"optimizer.weight_decay": 1e-4, "optimizer.no_decay": (r".*/norm\d/.*",)},
        ),
        ("LS .1 CE", {"loss.label_smoothing": 0.1, "loss.name": "cross_entropy"}),
        (
            "RRC, flip only",
            {
                "data.image.crop": "random_resized", "data.image.crop_area": (0.08, 1.0), "data.image.flip": True,
                "data.mixup": 0.0,
                "data.image.erase": 0.0,
            },
        ),
        (
            "progressive px: 160 until start_ramp, linear in multiples of 32 to 192 at end_ramp: (11,13)/16 ep, "
            "(29,34)/40 ep, (65,76)/88 ep",
            {
                "ffcv:16 progressive": ((0.0, 160), (0.75, 192)),
                "ffcv:40 progressive": ((0.0, 160), (0.8, 192)),
                "progressive": ((0.0, 160), (0.8068181818181818, 192)),
            },
        ),
        ("BlurPool on stride>1 convs with in>=16", {"model.antialias": "blur_conv", "model.stem_pool": None}),
        ("AMP fp16, channels_last", {"dtype": "auto"}, "bfloat16, which needs no scaled loss"),
        (
            "data: 50 % JPEG / 50 % raw, max side 500, q90",
            "the dataset's own form: jax_resnet.data.prepare shrinks the short side, and stores JPEGs",
        ),
        (
            "eval 256, ratio 224/256, flip-TTA",
            {"data.image.size": 256, "data.image.eval_crop": 0.875, "eval.mirror": True},
        ),
    ),
)  # fmt: skip

_SGDW = {
    "peak": 2.048, "optimizer.momentum": 0.875, "optimizer.weight_decay": 2.44140625e-4, "optimizer.decoupled": True,
    "optimizer.no_decay": (), "optimizer.nesterov": False,
}  # fmt: skip
_EMA = {"ema.decay": 0.8705505633, "ema.every": 20, "model.antialias": "blur_conv", "model.stem_pool": "blur_max"}
_BCE = {"loss.name": "bce", "loss.bce_sum": True}
_NO = {"progressive": ()}
_FEWER = "fewer sizes, each nearest to Composer's in the middle of its phase: every one is compiled"
TABLES["2.10"] = Table(
    ("composer:baseline", "composer:mild", "composer:medium", "composer:hot"),
    (
        row(
            "epochs",
            ("90", {"train.epochs": 90.0}),
            ("36 (MLPerf 28.8)", {"train.epochs": 36.0}, "MLPerf's is --config.stretch=0.8"),
            ("135", {"train.epochs": 135.0}), ("270", {"train.epochs": 270.0}),
        ),
        alike("bs", ["2048"] * 4, {"batch_size": 2048}),
        alike(
            "DecoupledSGDW lr / mom / wd",
            ["2.048 / .875 / 5e-4 (x lr/lr0; = 2.44e-4 coupled) all params", "=", "=", "="],
            _SGDW,
        ),
        alike("sched", ["warmup 8 ep, cosine to 0", "=", "=", "="], {
            "schedule.name": "cosine", "schedule.warmup.epochs": 8.0, "schedule.final": 0.0,
        }),
        row(
            "loss",
            ("CE", {"loss.name": "cross_entropy"}), ("BCE", _BCE), ("BCE", _BCE), ("BCE", _BCE),
        ),
        values("LS", "loss.label_smoothing", [("0", 0.0), (".08", 0.08), (".1", 0.1), (".13", 0.13)]),
        row(
            "train crop / eval",
            ("224 / 256->224", {"data.image.size": 224, "data.image.eval_crop": 0.875, "progressive": ()}),
            ("**176 / 232->224**", {"data.image.size": 224, "data.image.eval_crop": 0.9655172414}),
            ("=", {"data.image.size": 224, "data.image.eval_crop": 0.9655172414}),
            ("=", {"data.image.size": 224, "data.image.eval_crop": 0.9655172414}),
        ),
        row(
            "progressive resizing (initial, delay, finetune)",
            ("-", _NO),
            (
                ".5,.4,.2 (size incr 4)",
                {"progressive": ((0.0, 88), (0.45, 112), (0.55, 132), (0.65, 152), (0.75, 176))},
                _FEWER,
            ),
            (
                ".5,.4,.2",
                {"progressive": ((0.0, 88), (0.45, 112), (0.55, 132), (0.65, 152), (0.75, 176))},
                _FEWER,
            ),
            (
                ".6,.2,.2",
                {"progressive": ((0.0, 104), (0.275, 124), (0.425, 140), (0.575, 160), (0.725, 176))},
                _FEWER,
            ),
        ),
        row(
            "BlurPool, channels_last, EMA(half-life 100 it, every 20 it)",
            ("-", {"model.antialias": None, "ema.decay": 0.0}), ("yes", _EMA), ("yes", _EMA), ("yes", _EMA),
        ),
        values("mixup", "data.mixup", [("-", 0.0), ("-", 0.0), (".2", 0.2), (".25", 0.25)]),
        row(
            "SAM rho .5 every",
            ("-", {"optimizer.sam_rho": 0.0}), ("-", {"optimizer.sam_rho": 0.0}),
            ("10", {"optimizer.sam_rho": 0.5, "optimizer.sam_every": 10}),
            ("5", {"optimizer.sam_rho": 0.5, "optimizer.sam_every": 5}),
        ),
        row(
            "ColOut p .05, RandAugment d1 s9, StochDepth sample linear .1",
            *[
                ("-", {
                    "data.image.colout": 0.0, "data.image.randaugment_timm": (0, 9.0, 0.5, 0.5),
                    "model.drop_path": 0.0,
                })
            ] * 3,
            (
                "yes",
                {"data.image.colout": 0.05, "data.image.randaugment_timm": (1, 9.0, 0.0, 1.0), "model.drop_path": 0.1},
                "timm's operations, whose severity is also of 10",
            ),
        ),
        row(
            "init",
            (
                "torchvision; MLPerf: kaiming_normal, bn_uniform, **linear bias = -log(num_classes)** (needed for BCE; "
                "composer/models/initializers.py)",
                {"spec.init": "fan_in", "spec.zero_init_last": False, "spec.head_prior": False},
                "scales of norms begin at 1, as in the networks of the baseline",
            ),
            *[("", {"spec.init": "fan_in", "spec.zero_init_last": False, "spec.head_prior": True}, "as MLPerf's")] * 3,
        ),
        row("Top-1", ("76.6", RESULT), ("75-78.1", RESULT), ("78.1-79.5", RESULT), ("higher", RESULT)),
    ),
)  # fmt: skip

TABLES["2.11"] = Table(
    ("resnet_rs:50",),
    one(
        ("bs 4096", {"batch_size": 4096}),
        (
            "lr .1*bs/256 = 1.6, cosine [M], warmup 5 ep [M], 109 475 steps = 350 ep",
            {
                "peak": 1.6, "optimizer.learning_rate": 0.1, "optimizer.reference_batch": 256,
                "schedule.name": "cosine", "schedule.final": 0.0, "schedule.warmup.epochs": 5.0, "train.epochs": 350.0,
            },
        ),
        ("SGD mom .9", {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False}),
        ("wd 4e-5 (mask BN [M])", {"optimizer.weight_decay": 4e-5, "optimizer.no_decay": ("norm",)}),
        ("LS .1", {"loss.label_smoothing": 0.1}),
        ("dropout .25", {"model.dropout": 0.25}),
        ("stoch depth none (R50)", {"model.drop_path": 0.0}),
        (
            "RandAug n2 m10",
            {"data.image.randaugment_timm": (2, 10.0, 0.0, 1.0)},
            "timm's operations, whose magnitude is also of 10, each always done",
        ),
        ("EMA .9999", {"ema.decay": 0.9999, "ema.ramp": True, "ema.every": 1}),
        (
            "SE .25, ResNet-D stem+shortcut, replace_stem_max_pool (3x3 s2 conv)",
            {
                "spec.attention": "se", "spec.se_ratio": 0.25, "spec.stem": "deep", "spec.shortcut": "D",
                "spec.stem_pool": "conv",
            },
        ),
        ("bf16, 160 px", {"dtype": "auto", "data.image.size": 160}),
        ('BN mom "0" flag(TF: default .9 family), eps 1e-5', {"model.bn_momentum": 0.0, "model.bn_epsilon": 1e-5}),
        ("eval crop ratio .91 (timm)", {"data.image.eval_crop": 0.91}),
        ("78.8", RESULT),
    ),
)  # fmt: skip

_FEW, _SOME, _MANY = "bit_hyperrule:FEW ", "bit_hyperrule:SOME ", "bit_hyperrule:MANY "  # see test_recipes.py
TABLES["2.12"] = Table(
    ("bit_hyperrule:FEW",),
    one(
        (
            "SGD mom .9, bs 512, lr .003 (x bs/512; 128 -> .001 recommended), wd 0",
            {
                "optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False, "batch_size": 512,
                "optimizer.learning_rate": 0.003, "optimizer.reference_batch": 512, "optimizer.weight_decay": 0.0,
            },
        ),
        (
            "res: area<96^2: 160->random crop 128; else resize 512 -> crop 480 (paper 448/384) + flip",
            {
                _FEW + "data.image.crop": "stretched", _FEW + "data.image.crop_resize": (512, 512),
                _FEW + "data.image.size": 480,
                _SOME + "data.image.crop": "stretched", _SOME + "data.image.crop_resize": (160, 160),
                _SOME + "data.image.size": 128, "data.image.flip": True,
            },
            "the code's sizes",
        ),
        (
            "schedule (warmup, x.1 at, end): <20k ex: 100/200/300/400/500; <500k: 500/3000/6000/9000/10000; "
            "else 500/6000/12000/18000/20000",
            {
                "schedule.name": "step", "schedule.factor": 0.1, _FEW + "train.steps": 500,
                _FEW + "schedule.warmup.steps": 100, _FEW + "schedule.boundaries": (0.4, 0.6, 0.8),
                _SOME + "train.steps": 10000, _SOME + "schedule.warmup.steps": 500,
                _SOME + "schedule.boundaries": (0.3, 0.6, 0.9), _MANY + "train.steps": 20000,
                _MANY + "schedule.warmup.steps": 500, _MANY + "schedule.boundaries": (0.3, 0.6, 0.9),
            },
        ),
        ("mixup .1 iff n>=20k", {_FEW + "data.mixup": 0.0, _SOME + "data.mixup": 0.1}),
        (
            "GroupNorm32 + WeightStd, head zero-init [M]",
            {"spec.norm": "group", "spec.standardise": True, "spec.head_std": 0.0},
        ),
        (
            "eval resize to (crop,crop), no centre crop [M]",
            {"data.image.crop": "stretched", "data.image.eval_crop": 1.0},
        ),
    ),
)  # fmt: skip

TABLES["2.13"] = Table(
    ("wide_resnet:28_10",),
    one(
        ("bs 128", {"batch_size": 128}),
        (
            "lr .1, x.2 at 60/120/160, 200 ep",
            {
                "peak": 0.1, "schedule.name": "step", "schedule.factor": 0.2, "schedule.boundaries": (0.3, 0.6, 0.8),
                "train.epochs": 200.0, "schedule.warmup.epochs": 0.0,
            },
        ),
        ("SGD Nesterov .9", {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": True}),
        ("wd 5e-4 all", {"optimizer.weight_decay": 5e-4, "optimizer.no_decay": ()}),
        (
            "pad 4 reflect, crop, flip, mean/std",
            {
                "data.image.crop": "pad", "data.image.pad": 4, "data.image.pad_mode": "reflect",
                "data.image.flip": True,
                "data.image.mean": (0.4914, 0.4822, 0.4465), "data.image.std": (0.2470, 0.2435, 0.2616),
            },
        ),
        ("dropout 0 / .3 between convs", {"model.dropout": 0.0}, "the variant without"),
        ("pre-act, He init", {"spec.preactivation": True, "spec.widths": (160, 320, 640), "spec.init": "fan_out"}),
        ("96.0 / 80.75", RESULT),
    ),
)  # fmt: skip

_OTHER = "another recipe: cifar_speed is after 94_muon"
TABLES["2.14"] = Table(
    ("cifar_speed:8", "", "", ""),
    (
        row("epochs", ("8", {"train.epochs": 8.0}), *[(text, _OTHER) for text in ("9.9", "15", "37")]),
        row("bs", ("2000", {"batch_size": 2000}), *[("1024", _OTHER)] * 3),
        row(
            "conv opt",
            (
                "Muon lr .24, mom .6 nesterov, NS 3 steps, weights renormalised to sqrt(out)",
                {
                    "optimizer.name": "muon", "peak": 0.24, "optimizer.momentum": 0.6, "optimizer.nesterov": True,
                    "optimizer.newton_schulz_steps": 3,
                },
                "kernels are not renormalised; weight decay holds them down",
            ),
            ("SGD nesterov .85, lr 11.5 (decoupled, /[1024*(1+1/(1-m))])", _OTHER), ("10.0", _OTHER), ("9.0", _OTHER),
        ),
        row(
            "other params",
            (
                "SGD nesterov .85: whiten bias & BN bias lr .053, head .67, wd 2e-6*bs/lr",
                {"optimizer.rest.name": "sgd", "optimizer.rest.momentum": 0.85},
                "one rate: these are for a summed loss, logits / 256 and frozen scales",
            ),
            ("bias_scaler 64", _OTHER), ("64", _OTHER), ("64", _OTHER),
        ),
        row(
            "wd",
            ("2e-6*bs = .004", {"optimizer.weight_decay": 0.02}, "of the kernels too, times the rate 0.24: 0.0048"),
            *[(text, _OTHER) for text in (".0153/1024 ex", ".0153", ".012")],
        ),
        row(
            "schedule",
            (
                "linear 1 -> 0, no warmup",
                {"schedule.name": "linear", "schedule.final": 0.0, "schedule.warmup.epochs": 0.0},
            ),
            *[(text, _OTHER) for text in ("linear .2 -> 1 over 23 %, -> .07", "same", "same")],
        ),
        row(
            "LS",
            (".2, sum-CE", {"loss.label_smoothing": 0.2}, "the mean, with rates to suit"),
            *[(".2", _OTHER)] * 3,
        ),
        row(
            "lookahead/EMA",
            ("none", {"ema.decay": 0.0}),
            *[(text, _OTHER) for text in ("every 5 it, decay .95^5*(t/T)^3", "yes", "yes")],
        ),
        row(
            "aug",
            (
                "**alternating flip**, translate 2 reflect",
                {
                    "data.image.flip_alternate": True, "data.image.crop": "pad", "data.image.pad": 2,
                    "data.image.pad_mode": "reflect",
                },
            ),
            *[(text, _OTHER) for text in ("same", "same", "translate 4, cutout 12")],
        ),
        row(
            "whitening conv",
            ("2x2, 24 ch fixed, eigen +- , bias trained 3 ep", "not taken over: no other recipe wants such a layer"),
            *[("same", _OTHER)] * 3,
        ),
        row(
            "widths",
            ("64/256/256", {"model.widths": (64, 256, 256), "model.stem_width": 64}),
            *[(text, _OTHER) for text in (
                "64/256/256", "128/384/384", "128/384/512, 3 convs per group with residual",
            )],
        ),
        row(
            "BN",
            (
                "eps 1e-12, running .6 (torch .4), gamma frozen 1",
                {"model.bn_momentum": 0.6},
                "scales are trained, epsilon is the usual: both matter only to how a scale and a kernel share a norm",
            ),
            *[(text, _OTHER) for text in (
                "same", "same", "eps 1e-12, default running .9 (torch .1), gamma frozen",
            )],
        ),
        row(
            "act/init",
            (
                "GELU; Dirac init; logits x 1/256 (1/9 scaling in legacy)",
                {"spec.zero_init_last": True},
                "the zoo's residual blocks have ReLU, and begin as the identity in their own way",
            ),
            *[("", _OTHER)] * 3,
        ),
        row(
            "eval",
            (
                "TTA2 = flip x (0, +-1 px), 6 views weighted",
                {"eval.mirror": True},
                "the two mirrored views only",
            ),
            *[("same", _OTHER)] * 3,
        ),
    ),
)  # fmt: skip

# Beside the tables: a quotation of the section, the config and its values.
NOTES: tuple[tuple[str, str, str, Mapping[str, Any]], ...] = (
    (
        "2.6", "LS .1; LARS skips BN & bias", "mlperf_lars:4096",
        {"loss.label_smoothing": 0.1, "optimizer.no_decay": ("norm", "bias")},
    ),
    (
        "2.6", "RRC min-area **0.05** in NVIDIA, ratio 3/4-4/3", "mlperf_lars:3200",
        {"data.image.crop_area": (0.05, 1.0), "data.image.crop_ratio": (0.75, 1.3333333333)},
    ),
    (
        "2.6", 'net "resnet-v1b" = v1.5; eval 256/224 every 4 ep; CE loss', "mlperf_lars:4096",
        {
            "model.name": "resnet50", "data.image.eval_crop": 0.875, "eval.every.epochs": 4.0,
            "loss.name": "cross_entropy",
            "optimizer.rate_in_momentum": True,
        },
    ),
    (
        "2.7", "timm LAMB [R]: betas .9/.999, eps 1e-6, internal global-norm clip `max_grad_norm=1.0`",
        "strikes_back:a1", {"optimizer.clip_norm": 1.0, "optimizer.epsilon": 1e-6},
    ),
    (
        "2.9", "rn18: bs 1024 on 1 GPU, lr .5, wd 5e-5, rest same", "ffcv:88,18",
        {
            "model.name": "resnet18", "batch_size": 1024, "model.bn_group_size": 1024, "peak": 0.5,
            "optimizer.weight_decay": 5e-5, "progressive": ((0.0, 160), (0.8068181818181818, 192)),
        },
    ),
    (
        "2.10",
        "CIFAR rn56: bs 1024, lr 1.2, mom .9, wd 2e-3 (decoupled), warmup 5 ep, /10 at 80,120, 160 ep.",
        "composer:cifar56",
        {
            "model.name": "cifar_resnet56", "batch_size": 1024, "peak": 1.2, "optimizer.momentum": 0.9,
            "optimizer.weight_decay": 1.6666666667e-3, "optimizer.decoupled": True, "optimizer.no_decay": (),
            "schedule.warmup.epochs": 5.0, "schedule.name": "step", "schedule.factor": 0.1,
            "schedule.boundaries": (0.5, 0.75), "train.epochs": 160.0,
        },
    ),
)  # fmt: skip
