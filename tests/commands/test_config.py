"""What a config comes to, as shown: against hand computations."""

import importlib.util
import math
import os
import signal
import subprocess
import sys

import numpy as np
import programs
import pytest
from conftest import ROOT, main_env
from matplotlib.image import imread
from ml_collections import ConfigDict

from jax_resnet.commands import overview
from jax_resnet.config import SCHEDULES, default, duration
from jax_resnet.config.keys import leaves
from jax_resnet.errors import NotPrepared, UserError

CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


def config(name: str, *argument: str) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def numbers(c: ConfigDict) -> dict[str, str]:
    experiment = overview.prepare(c)
    return overview.derived_numbers(experiment) | overview.parameters(experiment)


def rates(c: ConfigDict) -> dict[str, str]:
    return overview.learning_rates(overview.prepare(c))


@pytest.fixture
def resnet50(tmp_path) -> ConfigDict:
    c = config("resnet50_imagenet")
    c.data.data_dir = str(tmp_path)  # where nothing is prepared
    return c


def test_resnet50_on_imagenet_by_hand(resnet50):
    found = numbers(resnet50)
    assert found["data"].startswith(
        "imagenet2012 (not here; sizes as published): 1,281,167 train, 50,000 validation, 1000 classes, 224×224×3"
    )
    steps, warmup = 90 * 1_281_167 / 1024, 8 * 1_281_167 / 1024
    assert (round(steps), round(warmup)) == (112_603, 10_009)
    assert found["steps"].startswith("112,603 (90 epochs)")
    assert (found["warmup"], found["cooldown"], found["evaluations"]) == ("10,009 steps", "0 steps", "90")
    assert found["peak rate"] == "1.024, from learning_rate 0.256, reference_batch 256, batch_scaling linear"
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
    counts = {name: text for name, text in found.items() if "decayed" in name}
    assert counts == {
        "decayed bias": "1,000 parameters",
        "decayed kernel": f"{sum(kernels):,} parameters",
        "not decayed norm": f"{2 * sum(norms):,} parameters",
    }
    assert "batch norm over groups of 128" in found["batch"]


def test_keys_that_differ(tiny_config):
    c = tiny_config
    c.data.mixup, c.model.shortcut, c.model.num_classes = 0.2, "A", 4
    found = overview.changed_keys(c)
    usual = dict(leaves(default()))
    assert found.keys() == {key for key, value in leaves(c) if value is not None and value != usual[key]}
    assert list(dict.fromkeys(key.partition(".")[0] for key in found)) == sorted({k.partition(".")[0] for k in found})
    assert (found["batch_size"], found["train.steps"], found["data.mixup"]) == ("16", "20", "0.2")
    assert "train.epochs" not in found  # for train.steps replaces it
    assert found["model.depths"] == "(1, 1) (cifar_resnet8: (1, 1, 1))"
    assert (found["model.shortcut"], found["model.num_classes"]) == ("A (cifar_resnet8: A)", "4")
    assert overview.changed_keys(default()) == {}


def test_rates_are_those_of_the_closed_form(resnet50):
    job = overview.prepare(resnet50)
    steps = np.array([0, 5_000, 10_009, 60_000, 112_602])
    cosine = 1.024 * (1 + np.cos(np.pi * (steps - 10_009) / (112_603 - 10_009))) / 2
    expected = np.where(steps < 10_009, 1.024 * steps / 10_009, cosine)
    np.testing.assert_allclose(overview.rates_at(job, steps), expected, rtol=1e-5, atol=1e-6)


def test_cifar_boundaries(tmp_path):
    c = config("resnet_cifar", "110")
    c.data.data_dir = str(tmp_path)
    assert {name: text for name, text in rates(c).items() if name} == {
        "first": "0.01 at step 0, epoch 0",
        "warmed up": "0.1 at step 400, epoch 1.024",
        "0.5 of all": "0.01 at step 32,000, epoch 81.92",
        "0.75 of all": "0.001 at step 48,000, epoch 122.9",
        "last": "0.001 at step 63,999, epoch 163.8",
    }
    assert overview.changed_keys(c)["model.zero_init_last"] == "False (cifar_resnet110: True)"
    found = numbers(c)
    assert not any(name.startswith("not decayed") for name in found)
    assert "32×32×3" in found["data"]
    assert found["evaluations"] == "41"  # 4 epochs apart: 163.84 / 4 = 40.96, and the last is at the end


def test_phases(resnet50):
    resnet50.progressive = ((0, 128, 2048), (0.4, 160, 1024), (0.75, 192, 512))
    resnet50.schedule.name = "constant"
    resnet50.schedule.cooldown = duration(epochs=9)
    examples = 1_281_167 * 90
    first = round(0.4 * examples / 2048)
    second = round((0.75 * examples - 2048 * first) / 1024)
    found, moments = numbers(resnet50), rates(resnet50)
    assert found["progressive"].startswith(
        f"128 px × 2,048 to step {first:,}, 160 px × 1,024 to step {first + second:,}"
    )
    assert found["warmup"] == "5,005 steps"  # 8 epochs in batches of 2,048
    assert int(found["cooldown"].split()[0].replace(",", "")) == pytest.approx(0.1 * examples / 512, abs=2)
    assert moments["warmed up"].startswith("2.048 at step 5,005, ")
    assert moments["phase 2"].endswith("epoch 36")
    assert moments["phase 3"] == f"0.512 at step {first + second:,}, epoch 67.5"
    assert moments["cooldown"].endswith("epoch 81")


def test_what_is_done_otherwise_by_part(tiny_config):
    c = tiny_config
    c.freeze = ("stem",)
    c.optimizer.name, c.optimizer.weight_decay = "muon", 0.02
    c.optimizer.layer_decay = 0.5
    c.optimizer.rate_factors = (("head/kernel", 10.0), ("stage1/.*", 3.0))
    found = numbers(c)
    # Two stages of one block: what lies below the head has ½ and ¼ of its rate.
    factors = {name: text for name, text in found.items() if name.startswith("rate of")}
    assert factors == {"rate of stage1": "× 0.75", "rate of stage2": "× 0.5", "rate of head": "× 1 to × 10"}
    assert (found["frozen kernel"], found["frozen norm"]) == ("144 parameters", "32 parameters")  # 9·16 and 2·16
    kernels = 9 * (2 * 16 * 16 + 16 * 24 + 24 * 24) + 4 * 24  # shortcut A has none
    assert found["decayed kernel"] == f"{kernels:,} parameters"
    c.optimizer.weight_decay = 0.0
    assert not any(name.startswith("decayed") for name in numbers(c))


@pytest.mark.parametrize(("every", "steps"), [(8, 20), (10, 20), (7, 21), (50, 20), (1, 3)])
def test_number_of_evaluations(tiny_config, every, steps):
    tiny_config.eval.every, tiny_config.train, tiny_config.schedule.warmup = (
        duration(steps=every), duration(steps=steps), duration(steps=0),
    )  # fmt: skip
    job = overview.prepare(tiny_config)
    expected = sum(job.plan.evaluates(step) for step in range(1, steps + 1))
    assert overview.derived_numbers(job)["evaluations"] == str(expected)


def heights(curve: str) -> list[int]:
    """Eighths of a character, column by column."""
    rows = [line.partition("│")[2] for line in curve.splitlines()[: overview.LINES]]
    return [sum(overview.BARS.index(row[column]) for row in rows) for column in range(overview.COLUMNS)]


@pytest.mark.parametrize("n", [3, 40, 1000, 12_345])
def test_curve_of_a_line_down(n):
    drawn = overview.curve(np.linspace(0.5, 0, n), 90)
    columns, full = heights(drawn), 8 * overview.LINES
    assert columns[0] == full
    assert columns == sorted(columns, reverse=True)
    lines = drawn.splitlines()
    assert lines[0].startswith("      0.5 │")
    assert lines[-2].startswith("        0 └──")
    assert lines[-1].split() == ["epoch", "0", "90"]
    assert {len(line) for line in lines[:-1]} == {overview.COLUMNS + 11}


def test_curve_of_a_warmup_and_boundaries():
    rates = np.concatenate([np.linspace(0, 1, 400), np.full(400, 1.0), np.full(400, 0.1), np.full(400, 1e-6)])
    columns = heights(overview.curve(rates, 16))
    quarter = overview.COLUMNS // 4
    assert columns[:quarter] == sorted(columns[:quarter])
    assert max(columns) == columns[overview.COLUMNS // 3] == 8 * overview.LINES
    assert columns[5 * overview.COLUMNS // 8] == math.ceil(0.1 * 8 * overview.LINES)
    assert columns[-1] == 1  # small, but not nothing


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn_up_to_its_peak(tiny_config, name):
    tiny_config.schedule.name, tiny_config.schedule.final = name, 0.01
    if name == "piecewise":  # its knots are the warm-up too
        tiny_config.schedule.warmup.steps = 0
    assert max(heights(rates(tiny_config)[""])) == 8 * overview.LINES
    assert f"{name} schedule" in numbers(tiny_config)["steps"]


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
    assert overview.changed_keys(c)
    assert int(numbers(c)["steps"].split()[0].replace(",", "")) > 100
    assert max(heights(rates(c)[""])) == 8 * overview.LINES


def test_only_published_splits_stand_in(resnet50):
    resnet50.data.train_split = "train[:10%]"
    with pytest.raises(UserError, match="not prepared"):
        overview.prepare(resnet50)
    resnet50.data.train_split, resnet50.data.name = None, "svhn_cropped"
    with pytest.raises(UserError, match="svhn_cropped: not prepared"):
        overview.prepare(resnet50)


def test_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "jax_resnet", "config", "resnet20_digits"]
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, env=main_env(), cwd=ROOT, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


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
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles == ["keys that differ from the defaults", "numbers that follow", "learning rate"]
    assert "  model.name                 cifar_resnet56" in lines
    assert "  optimizer.learning_rate    0.4" in lines
    assert "3,906 (9.999 epochs)" in done.stdout
    assert imread(tmp_path / "rate.png").shape == (480, 960, 4)


def test_command_with_the_flag(tiny_npz):
    done = command(f"--config={ROOT / 'tests' / 'tiny.py'}:{tiny_npz}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cifar_resnet8" in done.stdout
    assert "not here" not in done.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "--config is missing: give a config, for example configs/resnet20_digits.py"),
        (["resnet50_imagnet"], "no file 'resnet50_imagnet' here or among the project's configs; did you mean resnet50"),
        (["resnet_cifar", "--config.optimizer.momentun=1"], "no such key; did you mean optimizer.momentum?"),
        (["resnet_cifar", "--config=finetune"], "--config: given twice, counting the first argument; give one config"),
        (["resnet_cifar", "--plto=a.png"], "--plto: no such flag; did you mean plot?"),
        (["resnet_cifar", "--plot=/no/such/a.png"], "--plot=/no/such/a.png: cannot be written; is /no/such a folder"),
    ],
)
def test_mistakes(args, expected):
    done = command(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert expected in done.stderr
