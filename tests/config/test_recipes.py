"""Every recipe: its config is sound with each argument, says what was published, and trains."""

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from conftest import ROOT
from flax import nnx
from ml_collections import ConfigDict, config_flags
from published import NOTES, TABLES
from safetensors.numpy import save_file

from jax_resnet.config import UNITS, duration, find_config, model_overrides, validate
from jax_resnet.errors import UserError
from jax_resnet.models.torch_names import flatten, to_torch
from jax_resnet.models.zoo import create_model, model_spec
from jax_resnet.runs.metrics_reader import read_metrics
from jax_resnet.training.loop import train
from jax_resnet.training.plan import Plan

ARGUMENTS = {
    "bag_of_tricks": ("efficient", "cosine", "smoothing", "mixup", "distill"),
    "cifar_speed": ("10", "15"),
    "composer": ("baseline", "mild", "medium", "hot", "cifar56"),
    "ffcv": ("16", "24", "32", "40", "56", "88", "16,18", "88,18"),
    "deep_learning_examples": ("50", "90", "250"),
    "finetune": ("resnet50",),
    "he2015_imagenet": ("18", "34", "50", "101", "152"),
    "mlperf_lars": ("1536", "2048", "3200", "3264", "4096", "8192", "32768", "57344", "65536"),
    "resnet50_imagenet": ("18", "34", "50", "101", "152", "200"),
    "resnet_cifar": ("20", "32", "44", "56", "110"),
    "resnet_rs": ("50", "101", "152", "200", "270", "350", "420"),
    "strikes_back": ("a1", "a2", "a3"),
    "torchvision": ("v1", "v2"),
    "wide_resnet": ("28_10", "16_4", "40_2"),
}
FILES = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
OPENS_ITS_DATA = "bit_hyperrule"  # its argument is a dataset


@cache
def loaded(config: str) -> ConfigDict:
    """The config that `--config=CONFIG` gives; not to be changed."""
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=parsed)
    parsed(["test", f"--config={find_config(config)}"])
    return parsed.config


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As bit_hyperrule takes them: of each class of its rule, one; FEW has images of 96 pixels a side, the others 2."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, count, side in (("FEW", 64, 96), ("SOME", 20_000, 2), ("MANY", 500_000, 2)):
        images, labels = np.zeros((count, side, side, 3), np.uint8), np.arange(count) % 2
        np.savez(folder / name, x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    return {name: f"npz:{folder / name}.npz" for name in ("FEW", "SOME", "MANY")}


# ---- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [file for file in FILES if file != OPENS_ITS_DATA])
def test_every_argument_gives_a_sound_config(file: str) -> None:
    says = (ROOT / "configs" / f"{file}.py").read_text().split('"""')[1]
    for field in ("Command", "Hardware:", "Accuracy:", "Source:"):
        assert field in says
    for config in (file, *(f"{file}:{argument}" for argument in ARGUMENTS.get(file, ()))):
        validate(loaded(config))
        assert all(part in says for part in config.partition(":")[2].split(","))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("he2015_imagenet:51", "--config: depth after the colon: unknown name '51'; known: 101, 152, 18, 34, 50"),
        ("strikes_back:a4", "--config: procedure after the colon: unknown name 'a4'; known: a1, a2, a3"),
        ("composer:mile", "--config: recipe after the colon: unknown name 'mile'; did you mean mild?"),
        ("bag_of_tricks:mixupp", "--config: refinement after the colon: unknown name 'mixupp'; did you mean mixup?"),
        ("ffcv:88,34", "--config: depth after the colon: unknown name '34'; known: 18, 50"),
        ("torchvision:v3", "--config: version after the colon: unknown name 'v3'; known: v1, v2"),
        ("cifar_speed:soon", "--config: epochs after the colon: 'soon' must be a whole number, such as 10"),
        ("wide_resnet:28", "model 'wrn_28': unknown name; did you mean wrn_28_10?"),
        ("bit_hyperrule:npz:/nowhere.npz", "npz:/nowhere.npz: no such file"),
    ],
)
def test_a_wrong_argument(config: str, line: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        loaded(config)


def test_the_size_of_encoded_images_decides_too(shared: Path, tmp_path: Path) -> None:
    for i, file in enumerate(sorted((shared / "data" / "imagenet_jpegs").iterdir())[:8]):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        (tmp_path / str(i % 2) / file.name).symlink_to(file)
    c = loaded(f"bit_hyperrule:folder:{tmp_path}")
    validate(c)
    assert (c.data.image.size, c.data.holdout, c.train.steps) == (480, 0.2, 500)


# ---- what they say ---------------------------------------------------------------------------------------------------


def value(c: ConfigDict, key: str) -> Any:
    if key == "peak":
        o = c.optimizer
        return o.learning_rate * (c.batch_size / o.reference_batch if o.reference_batch else 1)
    if key.startswith("spec."):
        field = key.removeprefix("spec.")
        override = model_overrides(c).get(field)
        return getattr(model_spec(c.model.name), field) if override is None else override
    for part in key.split("."):
        c = c[part]
    return c


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-8)
    return type(found) is type(expected) and found == expected


PUBLISHED = [
    *(
        (section, config, text, values)
        for section, (configs, rows) in TABLES.items()
        for _, cells in rows
        for config, (text, values, _) in zip(configs, cells, strict=True)
    ),
    *((section, config, text, values) for section, text, config, values in NOTES),
]


@pytest.mark.parametrize("section", TABLES)
def test_values_are_those_published(section: str, datasets: dict[str, str]) -> None:
    wrong = []
    for _, column, text, values in (entry for entry in PUBLISHED if entry[0] == section):
        for key, expected in values.items():
            config, _, key = key.rpartition(" ")
            file, _, argument = (config or column).partition(":")
            c = loaded(f"{file}:{datasets.get(argument, argument)}" if argument else file)
            if not same(found := value(c, key), expected):
                wrong.append(f"{text!r}: {config or column}: {key} is {found}, not {expected}")
    assert not wrong, "\n".join(wrong)


def test_every_cell_of_the_published_tables_is_accounted_for(shared: Path) -> None:
    text = (shared / "RECIPES.md").read_text()
    sections = {part.split()[0]: part for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]}
    assert sections.keys() == TABLES.keys()
    for section, (configs, rows) in TABLES.items():
        lines = [line for line in sections[section].splitlines() if line.startswith("|")]
        found = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
        if len(found) == 1:
            labelled = [("", [cell]) for cell in found[0]]
        else:
            head, _, *body = found
            columns = body if section != "2.6" else [list(column) for column in zip(*[head, *body], strict=True)][1:]
            labelled = [(label, cells) for label, *cells in columns]
        assert [(label, [cell[0] for cell in cells]) for label, cells in rows] == labelled
        for _, cells in rows:
            assert len(cells) == len(configs)
            assert all(values or why for _, values, why in cells)  # no cell is passed over in silence
    for section, quotation, _, _ in NOTES:
        assert quotation in sections[section]


# ---- that they train -------------------------------------------------------------------------------------------------

SIDE, CLASSES = 32, 10


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training and 16 test images of noise, 32 pixels a side, 10 classes."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("images") / "images.npz"
    x, y = rng.integers(0, 256, (80, SIDE, SIDE, 3)).astype(np.uint8), np.arange(80) % CLASSES
    np.savez(file, x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])
    return file


def shrunk(config: ConfigDict, images: Path) -> ConfigDict:
    """`config` for two updates of a net of a small block or two on `images`: sizes and lengths change, no procedure.

    The weights to begin with are left out.
    """
    c = config.copy_and_resolve_references()

    def size(pixels: int) -> int:  # of 256 → 32
        return max(16, 4 * round(pixels / 32))

    c.data.name, c.data.data_dir, c.data.holdout = f"npz:{images}", None, 0.0
    c.data.image.size = SIDE
    c.data.image.crop_resize = tuple(max(SIDE, size(pixels)) for pixels in c.data.image.crop_resize)
    stages = 2 if c.model.antialias else 1  # only from the second on have blocks a stride
    width = 32 if "_bit" in c.model.name else 8  # its norm has 32 groups
    c.model.depths, c.model.widths, c.model.stem_width = (1,) * stages, (width,) * stages, width
    batch = 4 * max(2, c.data.repeats)
    c.batch_size, c.accumulate = batch, 1
    c.model.bn_group_size = c.model.bn_group_size and batch // 2
    if c.progressive:  # the first and the last phase, an update each
        last = c.progressive[-1][1]
        c.progressive = ((0.0, size(c.progressive[0][1])), (0.25, size(last)))[: len(c.progressive)]
    c.train, c.stop_after_steps = duration(steps=4), 2  # a run that is stopped draws no curves
    c.eval.every = c.checkpoint.every = duration(steps=2)
    for length in (c.schedule.warmup, c.schedule.cooldown, c.ema.warmup):
        some = any(length[unit] for unit in UNITS)
        length.epochs, length.steps, length.examples = None, 1 if some else 0, None
    c.optimizer.sam_every = min(2, c.optimizer.sam_every)  # so that one of the two is such a step
    c.log_every, c.init_from = 1, None
    return c


def trains(c: ConfigDict, workdir: Path) -> None:
    assert train(c, workdir)["step"] == 2
    found = [row for row in read_metrics(workdir) if row["kind"] != "save"]
    assert [line["step"] for line in found] == [1, 2, 2] + [2] * bool(c.ema.decay)  # and evaluated, twice with it
    assert found[-1]["examples"] == 16
    assert all(np.isfinite(line["loss"]) for line in found)


# Of each file, what has most of it.
TRAINED = [
    "bag_of_tricks:mixup", "cifar_speed:10", "composer:cifar56", "composer:hot", "deep_learning_examples:250",
    "ffcv:16", "finetune", "goyal2017", "he2015_imagenet", "mlperf_lars:4096", "resnet20_digits", "resnet50_imagenet",
    "resnet_cifar:110", "resnet_rs:200", "strikes_back:a1", "torchvision:v2", "wide_resnet:28_10",
]  # fmt: skip
# Stem, attention, progressive sizes, mixing, binary cross-entropy, Adam-like and LARS between them.
OFTEN = ("resnet50_imagenet", "resnet_rs:200", "strikes_back:a1", "cifar_speed:10", "goyal2017")


@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.soak) for name in TRAINED]
)
def test_it_trains(config: str, images: Path, tmp_path: Path) -> None:
    c = loaded(config)
    if c.data.image.channels == 1:
        c = c.copy_and_resolve_references()
        c.data.image.channels, c.data.image.mean, c.data.image.std = 3, (0.5,) * 3, (0.25,) * 3
    trains(shrunk(c, images), tmp_path)


def test_it_is_taught(images: Path, tmp_path: Path) -> None:
    trains(shrunk(loaded("bag_of_tricks:smoothing"), images), tmp_path / "teacher")
    c = shrunk(loaded("bag_of_tricks:distill"), images)
    c.distill.teacher = str(tmp_path / "teacher")
    trains(c, tmp_path / "student")


def test_it_is_fine_tuned(images: Path, tmp_path: Path) -> None:
    c = shrunk(loaded(f"bit_hyperrule:npz:{images}"), images)
    overrides = model_overrides(c)
    there = nnx.eval_shape(lambda: create_model(c.model.name, num_classes=3, rngs=nnx.Rngs(0), **overrides))
    arrays = {name: np.ones(x.shape, np.float32) for name, x in flatten(nnx.state(there)).items()}
    save_file(to_torch(arrays, there.spec), tmp_path / "weights.safetensors")
    c.init_from = str(tmp_path / "weights.safetensors")
    trains(c, tmp_path / "run")


def test_every_file_with_an_argument_is_trained() -> None:
    assert {config.partition(":")[0] for config in TRAINED} >= ARGUMENTS.keys()


def test_a_stretched_recipe_keeps_its_shape() -> None:
    """MLPerf's 28.8 epochs of Composer's mild recipe: 0.8 of it, in all its parts."""
    c = loaded("composer:mild").copy_and_resolve_references()
    whole = Plan.of(c, 1_281_167)
    c.stretch = 0.8
    shorter = Plan.of(c, 1_281_167)
    assert shorter.steps == round(28.8 * 1_281_167 / 2048)
    assert shorter.warmup_steps == round(6.4 * 1_281_167 / 2048)
    for phase, longer in zip(shorter.phases, whole.phases, strict=True):
        assert phase.image_size == longer.image_size
        assert abs(phase.end - 0.8 * longer.end) <= 1
