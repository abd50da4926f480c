"""What a config comes to, as shown: against hand computations, and against the optimizers that are spoken of."""

import importlib.util
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from conftest import ROOT, main_env
from matplotlib.image import imread
from ml_collections import ConfigDict

from jax_resnet.commands import overview
from jax_resnet.config import OPTIMIZERS, SCHEDULES, default, duration
from jax_resnet.errors import NotPrepared, UserError
from jax_resnet.training.optimizers import make_optimizer

CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


def config(name: str, *argument: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def shown(c: ConfigDict) -> dict[str, dict[str, str]]:
    return {title: dict(rows) for title, rows in overview.sections(c, *overview.prepare(c))}


@pytest.fixture
def resnet50(tmp_path) -> ConfigDict:
    c = config("resnet50_imagenet")
    c.data.data_dir = str(tmp_path)  # where nothing is prepared
    return c


def test_resnet50_on_imagenet_by_hand(resnet50):
    found = shown(resnet50)
    assert found["data"] == {
        "dataset": "imagenet2012 (not here; sizes as published)",
        "examples": "1,281,167 train, 50,000 validation",
        "classes": "1,000",
    }
    steps, warmup = 90 * 1_281_167 / 1024, 8 * 1_281_167 / 1024
    assert (round(steps), round(warmup)) == (112_603, 10_009)
    assert found["steps"] == {
        "training": "112,603 steps, 90 epochs",
        "an epoch": "1,251.14 steps",
        "warmup": "to step 10,009, epoch 8",
        "evaluations": "90, 1 epoch apart",
    }
    assert found["learning rate"]["peak"] == "0.256 × 1,024 / 256 = 1.024"
    # He et al. 2015, table 1: a 7×7 stem; bottlenecks of 1×1, 3×3, 1×1, with a projection in the first of a stage.
    kernels, norms, channels = [7 * 7 * 3 * 64], [64], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels += [channels * width, 9 * width * width, width * 4 * width]
            norms += [width, width, 4 * width]
            if block == 0:
                kernels.append(channels * 4 * width)
                norms.append(4 * width)
            channels = 4 * width
    kernels.append(channels * 1000)
    assert found["model"]["parameters"] == f"{sum(kernels) + 2 * sum(norms) + 1000:,}"
    assert found["parameters"] == {
        "decayed": f"kernel: {len(kernels)} tensors, {sum(kernels):,} parameters\nbias: 1 tensor, 1,000 parameters",
        "not decayed": f"norm: {2 * len(norms)} tensors, {2 * sum(norms):,} parameters",
        "weight_decay": "3.052e-05, through the gradient",
    }
    assert found["optimizer"] == {"name": "sgd", "momentum": "0.875"}
    assert found["batch"]["batch norm"] == "over groups of 128"
    assert found["images"]["evaluation"] == "224×224 in the centre of 256 on the short side"
    assert found["loss"] == {"name": "cross_entropy", "label_smoothing": "0.1"}


def test_rates_are_those_of_the_closed_form(resnet50):
    job, _ = overview.prepare(resnet50)
    steps = np.array([0, 5_000, 10_009, 60_000, 112_602])
    cosine = 1.024 * (1 + np.cos(np.pi * (steps - 10_009) / (112_603 - 10_009))) / 2
    expected = np.where(steps < 10_009, 1.024 * steps / 10_009, cosine)
    np.testing.assert_allclose(overview.rates_at(job, steps), expected, rtol=1e-5, atol=1e-6)


def test_cifar_boundaries_and_plain_images(tmp_path):
    c = config("resnet_cifar", "110")
    c.data.data_dir = str(tmp_path)
    found = shown(c)
    rate = found["learning rate"]
    assert {name: text for name, text in rate.items() if name not in ("", "schedule")} == {
        "peak": "0.1 × 128 / 128 = 0.1",
        "first": "0.01 at step 0, epoch 0",
        "warmed up": "0.1 at step 400, epoch 1.024",
        "0.5 of all": "0.01 at step 32,000, epoch 81.92",
        "0.75 of all": "0.001 at step 48,000, epoch 122.9",
        "last": "0.001 at step 63,999, epoch 163.8",
    }
    assert found["images"]["train"] == found["images"]["evaluation"] == "32×32"
    assert found["model"]["zero_init_last"] == "False (of cifar_resnet110 as it is: True)"
    assert "not decayed" not in found["parameters"]
    assert list(found["augmentation"]) == ["shift", "flip"]
    assert found["steps"]["evaluations"] == "41, 4 epochs apart"  # 163.84 / 4 = 40.96: the last is at the end


def test_phases(resnet50):
    resnet50.progressive = ((0, 128, 2048), (0.4, 160, 1024), (0.75, 192, 512))
    resnet50.schedule.name = "constant"
    resnet50.schedule.cooldown = duration(epochs=9)
    found = shown(resnet50)
    examples = 1_281_167 * 90
    first = round(0.4 * examples / 2048)
    second = round((0.75 * examples - 2048 * first) / 1024)
    assert found["steps"]["phase 1"] == f"128 px × 2,048, to step {first:,}, epoch 36"
    assert found["steps"]["phase 2"] == f"160 px × 1,024, to step {first + second:,}, epoch 67.5"
    assert found["learning rate"]["warmed up"].startswith("2.048 at step 5,005, ")  # 8 epochs in batches of 2,048
    assert found["learning rate"]["phase 3"] == f"0.512 at step {first + second:,}, epoch 67.5"
    assert found["learning rate"]["cooldown"].endswith("epoch 81")
    assert found["batch"]["size"] == "2,048, then 1,024, then 512"
    assert found["images"]["train"] == "128×128, then 160×160, then 192×192"
    assert len(found["model"]["cost"].splitlines()) == 3


def test_what_is_done_otherwise_by_part(tiny_config):
    c = tiny_config
    c.freeze = ("stem",)
    c.optimizer.name, c.optimizer.weight_decay = "muon", 0.02
    c.optimizer.layer_decay = 0.5
    c.optimizer.rate_factors = (("head/kernel", 10.0), ("stage1/.*", 3.0))
    found = shown(c)["parameters"]
    # Two stages of one block: what lies below the head has ½ and ¼ of its rate.
    assert found["rate ×"].splitlines() == ["stage1: 0.75", "stage2: 0.5", "head: kernel 10, bias 1"]
    assert found["frozen"] == "stem: 3 tensors, 176 parameters"  # 9·16 + 2·16
    assert found["weight_decay"] == "0.02, times the rate"
    hidden = 9 * (2 * 16 * 16 + 16 * 24 + 24 * 24)
    assert f"muon: 4 tensors, {hidden:,} parameters" in found["rules"].splitlines()


def test_what_is_on_is_shown_in_its_order(tiny_config):
    c = tiny_config
    c.data.image.randaugment, c.data.image.color_jitter = (2, 9), (0.4, 0.4, 0.4, 0.0)
    c.data.image.flip, c.data.image.erase, c.data.mixup, c.data.image.cutmix = True, 0.25, 0.2, 1.0
    c.ema.decay, c.ema.every = 0.999, 5
    c.loss.name = "bce"
    c.distill.teacher = "/weights/teacher.safetensors"  # not read
    c.optimizer.clip_norm, c.optimizer.sam_rho = 1.0, 0.05
    c.train, c.stop_after_steps = duration(epochs=8), 30
    found = shown(c)
    assert found["data"]["examples"] == "100 train, 37 test"
    assert list(found["augmentation"].items()) == [
        ("randaugment", "2 operations, magnitude 9 of 30, nearest"),
        ("color_jitter", "brightness 0.4, contrast 0.4, saturation 0.4, hue 0"),
        ("shift", "by up to 1 pixels, zeros beyond the border"),
        ("flip", "half of the images"),
        ("erase", "a rectangle, with probability 0.25"),
        ("mixing", "mixup α 0.2 or cutmix α 1"),
    ]
    assert found["loss"] == {
        "name": "bce, mean over classes",
        "teacher": "/weights/teacher.safetensors: 0.5 of the loss, temperature 1",
    }
    assert found["optimizer"]["ema"] == "0.999, every 5 steps"
    assert (found["optimizer"]["clip_norm"], found["optimizer"]["sam_rho"]) == ("1", "0.05")
    assert found["steps"]["stops after"] == "step 30, epoch 4.8"


@pytest.mark.parametrize(("every", "steps"), [(8, 20), (10, 20), (7, 21), (50, 20), (1, 3)])
def test_number_of_evaluations(tiny_config, every, steps):
    tiny_config.eval.every, tiny_config.train, tiny_config.schedule.warmup = (
        duration(steps=every), duration(steps=steps), duration(steps=0),
    )  # fmt: skip
    job, _ = overview.prepare(tiny_config)
    expected = sum(job.plan.evaluates(step) for step in range(1, steps + 1))
    assert dict(overview._steps(job))["evaluations"].partition(",")[0] == str(expected)


def heights(picture: str) -> list[int]:
    """Eighths of a character, column by column."""
    rows = [line.partition("┤")[2] or line.partition("│")[2] for line in picture.splitlines()[: overview.HEIGHT]]
    return [sum(overview.BARS.index(row[column]) for row in rows) for column in range(overview.WIDTH)]


@pytest.mark.parametrize("n", [3, 40, 1000, 12_345])
def test_picture_of_a_line_down(n):
    drawn = overview.picture(np.linspace(0.5, 0, n), ["0", "45", "90"])
    columns, full = heights(drawn), 8 * overview.HEIGHT
    assert columns[0] == full
    assert columns == sorted(columns, reverse=True)
    lines = drawn.splitlines()
    assert lines[0].startswith("  0.5 ┤")
    assert lines[-2].startswith("    0 └──")
    assert lines[-1].split() == ["epoch", "0", "45", "90"]
    assert {len(line) for line in lines} == {overview.WIDTH + 7}


def test_picture_of_a_warmup_and_boundaries():
    rates = np.concatenate([np.linspace(0, 1, 400), np.full(400, 1.0), np.full(400, 0.1), np.full(400, 1e-6)])
    columns = heights(overview.picture(rates, ["0", "8", "16"]))
    quarter = overview.WIDTH // 4
    assert columns[:quarter] == sorted(columns[:quarter])
    assert max(columns) == columns[overview.WIDTH // 3] == 8 * overview.HEIGHT
    assert columns[5 * overview.WIDTH // 8] == math.ceil(0.1 * 8 * overview.HEIGHT)
    assert columns[-1] == 1  # small, but not nothing


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn_up_to_its_peak(tiny_config, name):
    tiny_config.schedule.name, tiny_config.schedule.final = name, 0.01
    if name == "piecewise":  # its knots are the warm-up too
        tiny_config.schedule.warmup.steps = 0
    job, _ = overview.prepare(tiny_config)
    rate = dict(overview._learning_rate(job))
    assert rate["schedule"].startswith(name)
    assert max(heights(rate[""])) == 8 * overview.HEIGHT


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_used_of_an_optimizer_is_what_changes_its_updates(name):
    """Three updates with each key changed: other numbers if and only if the key is listed."""
    changes = {
        "momentum": 0.5, "rate_in_momentum": True, "nesterov": False, "beta1": 0.5, "beta2": 0.5, "epsilon": 0.3,
        "trust_coefficient": 0.5, "newton_schulz_steps": 1,
    }  # fmt: skip
    if name not in ("sgd", "rmsprop", "rmsprop_tf", "lars"):
        del changes["rate_in_momentum"]  # refused
    rng = np.random.default_rng(0)
    params = {
        "stage1": {"block0": {"conv1": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)}}},
        "head": {"bias": jnp.asarray(rng.normal(size=8), jnp.float32)},
    }
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(3)]

    def updates(**change):
        c = default().optimizer
        c.name, c.rest.name = name, "sgd"  # the rest's own momentum, and no betas
        c.update(change)
        optimizer = make_optimizer(c, lambda step: 0.1 * (1 + step))
        state, found = optimizer.init(params), []
        for g in grads:
            update, state = optimizer.update(g, state, params)
            found += jax.tree.leaves(update)
        return np.concatenate([np.ravel(f) for f in found])

    with jax.disable_jit():  # the loop in muon would be compiled anew each time
        usual = updates()
        changed = {key for key, value in changes.items() if not np.allclose(updates(**{key: value}), usual, rtol=1e-5)}
    assert changed == set(overview.USED[name])


@pytest.mark.soak
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config(name, tmp_path):
    try:
        c = config(name)
    except NotPrepared:
        pytest.skip("the config is made for the data, which is not here")
    c.data.data_dir = str(tmp_path)
    if c.data.name not in (*overview.PUBLISHED, "digits"):
        c.data.name = "cifar10"  # in place of what is not here, such as a folder of one's own
    found = shown(c)
    assert all(rows or title == "augmentation" for title, rows in found.items())
    assert int(found["steps"]["training"].split()[0].replace(",", "")) > 100
    assert max(heights(found["learning rate"][""])) == 8 * overview.HEIGHT


def test_only_published_splits_stand_in(resnet50):
    resnet50.data.train_split = "train[:10%]"
    with pytest.raises(UserError, match="not prepared"):
        overview.prepare(resnet50)
    resnet50.data.train_split, resnet50.data.name = None, "svhn_cropped"
    with pytest.raises(UserError, match="svhn_cropped: not prepared"):
        overview.prepare(resnet50)


def command(*args, cwd=ROOT):
    return programs.run(
        [sys.executable, "-m", "jax_resnet", "config", *map(str, args)],
        env=main_env() | {"COLUMNS": "80"},
        cwd=cwd,
    )


def test_command(tmp_path):
    done = command(
        "configs/resnet_cifar.py:56",
        "--config.optimizer.learning_rate=0.4",
        "--config.train.epochs=10",
        f"--config.data.data_dir={tmp_path}",
        f"--plot={tmp_path / 'rate.png'}",
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    titles = [line.strip() for line in lines if line and not line.startswith(" ")]
    assert titles == ["model", "data", "batch", "steps", "learning rate", "optimizer", "parameters", "images",
                      "augmentation", "loss"]  # fmt: skip
    assert "  peak            0.4 × 128 / 128 = 0.4" in done.stdout
    assert "cifar_resnet56" in done.stdout
    assert "3,906 steps, 9.999 epochs" in done.stdout
    assert max(map(len, lines)) <= 80
    assert imread(tmp_path / "rate.png").shape == (480, 960, 4)


def test_command_with_the_flag(tiny_npz):
    done = command(f"--config={ROOT / 'tests' / 'tiny.py'}:{tiny_npz}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cifar_resnet8" in done.stdout
    assert "not here" not in done.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "give a config, for example configs/resnet20_digits.py"),
        (["resnet50_imagnet"], "no file 'resnet50_imagnet' here or among the project's configs; did you mean resnet50"),
        (["resnet_cifar", "--config.optimizer.momentun=1"], "no such key; did you mean optimizer.momentum?"),
        (["resnet_cifar", "--config=finetune"], "'resnet_cifar' and --config: give one config"),
        (["resnet_cifar", "--plto=a.png"], "--plto: no such flag; did you mean plot?"),
        (["resnet_cifar", "--plot=/no/such/a.png"], "--plot=/no/such/a.png: cannot be written; is /no/such a folder"),
    ],
)
def test_mistakes(args, expected):
    done = command(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert expected in done.stderr
