"""Averaging checkpoints: the mean of their weights, and statistics of its own, against numpy."""

from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from test_update import assert_close

from jax_resnet.commands.average import average, main
from jax_resnet.errors import UserError
from jax_resnet.models.torch_names import flatten, to_torch
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.training.evaluate import evaluate_checkpoint
from jax_resnet.training.experiment import build
from jax_resnet.training.loop import train


@pytest.fixture(scope="module")
def run(tiny_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints at 8, 16 and 20, and a running average that is not to be averaged."""
    import tiny

    c = tiny.get_config(str(tiny_npz))
    c.checkpoint.keep, c.ema.decay = 3, 0.9
    workdir = tmp_path_factory.mktemp("average") / "run"
    train(c, workdir)
    return workdir


def mean_of(run: Path, *steps: int) -> tuple[dict, dict]:
    with Checkpoints(run) as saved:
        trees = [saved.weights(step, averaged=False) for step in steps]
    return jax.tree.map(lambda *arrays: np.mean(np.float64(arrays), 0), *trees)


def test_weights_and_statistics_are_means_of_the_saved_ones_if_none_are_estimated(run: Path, tmp_path: Path) -> None:
    _, files = average(run, batches=0, out=str(tmp_path / "all"))
    spec = build(config_of(run)).network.spec
    assert_close(load_file(files[0]), to_torch(flatten(*mean_of(run, 8, 16, 20)), spec), rtol=1e-6, atol=1e-7)
    _, files = average(run, checkpoints=["8", "latest"], batches=0, out=str(tmp_path / "two"))
    assert_close(load_file(files[0]), to_torch(flatten(*mean_of(run, 8, 20)), spec), rtol=1e-6, atol=1e-7)


def config_of(run: Path) -> ConfigDict:
    from jax_resnet.runs.workdir import read_config

    config = read_config(run)
    assert config is not None
    return config


def test_statistics_are_those_of_training_batches(run: Path, tmp_path: Path) -> None:
    """Of the stem's norm, whose input is a convolution of the very batches: computed here in float64."""
    config = config_of(run)
    experiment = build(config)
    _, files = average(run, batches=3, out=str(tmp_path / "out"))
    params, _ = mean_of(run, 8, 16, 20)
    means, variances = [], []
    for step, batch in enumerate(experiment.train_batches(20, 23, print), 20):
        from jax_resnet.training.step import _drawn

        rows, whole, _ = _drawn(batch, np.int32(step), experiment.data.inputs, config.seed)
        images = experiment.data.inputs.augment(rows, whole)
        kernel = params["stem"]["conv1"]["kernel"]
        out = np.float64(
            jax.lax.conv_general_dilated(
                images, kernel.astype(np.float32), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        means.append(out.mean((0, 1, 2)))
        variances.append(out.var((0, 1, 2), ddof=1))
    found = load_file(files[0])
    np.testing.assert_allclose(found["bn1.running_mean"], np.mean(means, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["bn1.running_var"], np.mean(variances, 0), rtol=1e-4)


def test_what_is_written_evaluates_to_what_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    metrics, files = average(run, batches=5, out=str(tmp_path / "out"))
    assert "mean of steps 8, 16, 20: test accuracy" in capsys.readouterr().out
    config = config_of(run)
    config.init_from = str(files[0])
    found = evaluate_checkpoint(tmp_path / "eval", config=config, which="init")["splits"]["test"]
    assert found == pytest.approx(metrics, rel=1e-5)


def test_one_checkpoint_keeps_its_weights(run: Path, tmp_path: Path) -> None:
    _, files = average(run, checkpoints=["16"], batches=2, out=str(tmp_path / "out"))
    params, stats = mean_of(run, 16)
    expected = to_torch(flatten(params, stats), build(config_of(run)).network.spec)
    for name, found in load_file(files[0]).items():
        if "running" not in name:
            np.testing.assert_array_equal(found, expected[name].astype(np.float32))
    assert not np.allclose(load_file(files[0])["bn1.running_mean"], expected["bn1.running_mean"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--workdir={tmp}"], "no checkpoint has been saved here"),
        (["--workdir={run}", "--checkpoints=8,9"], "no checkpoint at step 9; saved: 8, 16, 20"),
        (["--workdir={run}", "--batches=-1"], "--batches=-1: must not be negative"),
        (["--workdir={run}", "--chekpoints=8"], "did you mean --checkpoints?"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: str) -> None:
    monkeypatch.setattr("sys.argv", ["average", *(a.format(run=run, tmp=tmp_path) for a in args)])
    with pytest.raises(UserError) as e:
        main()
    assert expected in str(e.value)
