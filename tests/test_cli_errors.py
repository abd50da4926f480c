"""Every mistake a user makes at the command line: one line that names it, status 2, nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_main

TINY = ROOT / "tests" / "tiny.py"


def error_of(*args: str, devices: int = 1, cwd: Path = ROOT) -> str:
    """The one line of stderr, checked to be all there is."""
    done = run_main(*args, devices=devices, cwd=cwd)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    return lines[0]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], ["--config is missing", "configs/resnet20_digits.py"]),
        (["--config"], ["--config"]),
        (["--config=configs/resnet20_digit.py"], ["no file 'configs/resnet20_digit.py'", "resnet20_digits"]),
        (["--config=resnet20_digits", "--config.modle.depth=3"], ["--config.modle.depth", "model.depths"]),
        (["--config=resnet20_digits", "--config.learning_rate=1"], ["optimizer.learning_rate"]),
        (["--config=resnet20_digits", "--config.optimizer.momentun=1"], ["optimizer.momentum"]),
        (["--config=resnet20_digits", "--seed=3"], ["--seed: no such flag", "did you mean --config.seed?"]),
        (["--config=resnet20_digits", "--batch_size=3"], ["did you mean --config.batch_size?"]),
        (["--config=resnet20_digits", "--wokrdir=/tmp/x"], ["--wokrdir", "did you mean workdir"]),
        (["--config.seed=3"], ["--config.seed", "--config=FILE"]),
        (
            ["--config=resnet20_digits", "--config.batch_size=abc"],
            ["--config.batch_size=abc", "type int", "--config.batch_size=256"],
        ),
        (
            ["--config=resnet20_digits", "--config.loss.label_smoothing=lots"],
            ["--config.loss.label_smoothing", "float"],
        ),
        (["--config=resnet20_digits", "--config.data.flip=perhaps"], ["--config.data.flip", "bool"]),
        (["--config=resnet20_digits", "--config.model.depths=3"], ["depths=(3,)", "one of each for every stage"]),
        (["--config=resnet20_digits", "--config.model=resnet50"], ["--config.model"]),
        (["--config=resnet20_digits", "--mode=evaluate"], ["mode", "train", "eval"]),
        (["--config=resnet20_digits", "batch_size=3"], ["'batch_size=3'", "not a flag"]),
        (["--config=resnet_cifar:21"], ["cifar_resnet21", "6n+2", "20"]),
        (["--config=resnet_cifar:deep"], ["cifar_resnetdeep"]),
    ],
)
def test_command_line(args: list[str], expected: list[str]) -> None:
    line = error_of(*args)
    for text in expected:
        assert text in line


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["model.name=resnet51"], ["resnet51", "resnet50"]),
        (["model.stem=cfar"], ["stem='cfar'", "imagenet or cifar"]),
        (["optimizer.name=sdg"], ["config.optimizer.name", "'sdg'", "sgd"]),
        (["schedule.name=cosin"], ["config.schedule.name", "cosine"]),
        (["data.name=cifar01"], ["cifar01", "cifar10"]),
        (["data.name=folder:/nowhere"], ["folder:/nowhere", "no such folder"]),
        (["data.name=npz:/nowhere.npz"], ["npz:/nowhere.npz", "no such file"]),
        (["batch_size=101"], ["config.batch_size=101", "100 examples"]),
        (["data.image_size=3"], ["cifar_resnet8", "at least 4", "have 3"]),
        (["model.num_classes=5"], ["config.model.num_classes=5", "4 classes"]),
        (["model.bn_group_size=5"], ["config.model.bn_group_size=5", "config.batch_size=16"]),
        (["train.steps=3", "train.epochs=2"], ["config.train", "exactly one"]),
        (["train.steps=0"], ["config.train is 0"]),
        (["schedule.warmup.steps=20"], ["config.schedule.warmup", "20"]),
        (["data.channels=2"], ["config.data.channels=2", "1 or 3"]),
        (["data.mean=(0.1,0.2)"], ["config.data.mean", "1 number"]),
        (["schedule.name=piecewise"], ["config.schedule.warmup", "knots", "--config.schedule.warmup.steps=0"]),
        (["schedule.name=piecewise", "schedule.knots=((0,1),(2,0))"], ["config.schedule", "0"]),
        (["loss.bce_sum=True"], ["bce_sum", "config.loss.name=cross_entropy"]),
        (["data.crop=scaled", "data.image_size=12"], ["config.data.crop_resize=(256, 480)", "12 pixels"]),
        (["data.crop=stretched", "data.image_size=12", "data.crop_resize=(8,16)"], ["crop_resize=(8, 16)", "12"]),
        (["optimizer.no_decay=('head/.*x',)"], ["config.optimizer.no_decay", "matches no parameter"]),
        (["optimizer.rate_factors=(('head/.*',2.0),('bias',1.0))"], ["rate_factors", "both cover head/bias"]),
        (["distill.teacher=/nowhere"], ["config.distill.teacher=/nowhere: no such file"]),
        (["accumulate=3"], ["config.accumulate=3 does not divide config.batch_size=16"]),
        (["schedule.cooldown.steps=16"], ["config.schedule.warmup is 4 steps and cooldown 16", "20"]),
    ],
)
def test_config_values(tiny_npz: Path, tmp_path: Path, args: list[str], expected: list[str]) -> None:
    line = error_of(f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path / 'run'}", *(f"--config.{a}" for a in args))
    for text in expected:
        assert text in line
    assert not (tmp_path / "run").exists()


def test_batch_that_the_devices_do_not_divide(tiny_npz: Path, tmp_path: Path) -> None:
    line = error_of(f"--config={TINY}:{tiny_npz}", "--config.batch_size=20", f"--workdir={tmp_path / 'run'}", devices=8)
    assert "config.batch_size=20 is not divisible by the 8 devices" in line
    assert "24" in line or "16" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"x_train": np.zeros((0, 12, 12), np.uint8), "y_train": np.zeros(0, int)}, "the train split is empty"),
        ({"y_test": np.full(37, -1)}, "test label -1 of record 0 is out of range"),
        ({"x_train": np.zeros((100, 12, 12), np.float32)}, "x_train is float32"),
        ({"y_train": np.zeros(99, int)}, "100 train images, but 99 labels"),
    ],
)
def test_faulty_arrays(tiny_npz: Path, tmp_path: Path, change: dict[str, np.ndarray], expected: str) -> None:
    np.savez(tmp_path / "bad.npz", **(dict(np.load(tiny_npz)) | change))
    line = error_of(f"--config={TINY}:{tmp_path / 'bad.npz'}", f"--workdir={tmp_path / 'run'}")
    assert expected in line


def test_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and then nothing of use")
    assert "cannot be read as .npz" in error_of(f"--config={TINY}:{tmp_path / 'bad.npz'}")


def test_unprepared_dataset_names_the_command(tiny_npz: Path, tmp_path: Path) -> None:
    line = error_of(f"--config={TINY}:{tiny_npz}", "--config.data.name=cifar10", f"--config.data.data_dir={tmp_path}")
    assert f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}" in line


def test_workdir_that_cannot_be_written(tiny_npz: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = error_of(f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path / 'file' / 'run'}")
    assert f"--workdir={tmp_path / 'file' / 'run'}: cannot be written" in line


def test_workdir_of_another_config(tiny_npz: Path, tmp_path: Path) -> None:
    args = [f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path}", "--config.stop_after_steps=1"]
    assert run_main(*args).returncode == 0
    line = error_of(*args, "--config.optimizer.momentum=0.5", "--config.seed=3")
    assert "optimizer.momentum: 0.9 there, 0.5 here" in line
    assert "seed: 0 there, 3 here" in line


def test_evaluating_a_folder_without_a_run(tmp_path: Path) -> None:
    assert "no run has been begun here" in error_of("--mode=eval", f"--workdir={tmp_path}")


def test_config_file_with_a_mistake_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def get_config():\n    return nothing\n")
    line = error_of("--config=mine.py", cwd=tmp_path)
    assert "mine.py" in line
    assert "line 2" in line
    assert "NameError" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config():\n    return int('x')\n", "ValueError in mine.py, line 2: invalid literal"),
        ("def get_config():\n    return None\n", "get_config() returned NoneType"),
        ("x = 3\n", "defines no get_config()"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 1})\n",
            "is missing",
        ),
    ],
)
def test_config_file_that_gives_no_config(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    assert expected in error_of("--config=mine.py", cwd=tmp_path)


def test_config_in_a_folder_that_is_not_there() -> None:
    assert "no file '/nowhere/resnet_cifar.py'" in error_of("--config=/nowhere/resnet_cifar.py:20")


def test_workdir_of_an_unknown_scheme(tiny_npz: Path) -> None:
    assert "gs://… or s3://…" in error_of(f"--config={TINY}:{tiny_npz}", "--workdir=az://bucket/run")
