"""One, two and four processes with four devices in all, and gloo between them: the same training."""

from pathlib import Path

import faults
import numpy as np
import pytest
from conftest import ROOT, SOAK

from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.metrics_reader import read_metrics

TINY = ROOT / "tests" / "tiny.py"
# 50 updates at a rate at which the rounding of sums in another order does not grow, and the loss still falls.
STEPS = ["--config.train.steps=50", "--config.eval.every.steps=20", "--config.checkpoint.every.steps=20"]
MORE = ["--config.log_every=1", "--config.eval.batch_size=8", "--config.optimizer.learning_rate=0.006"]


def run(npz: Path, workdir: Path, processes: int, devices: int, *more: str) -> list[faults.Ended]:
    args = [f"--config={TINY}:{npz}", f"--workdir={workdir}", *STEPS, *MORE, *more]
    ended = faults.finish(faults.start(args, processes=processes, devices=devices))
    assert [end.status for end in ended] == [0] * processes, ended
    return ended


def column(workdir: Path, kind: str, name: str) -> list[float]:
    return [row[name] for row in read_metrics(workdir) if row["kind"] == kind]


def files(workdir: Path) -> set[str]:
    """What a run leaves, but for what bears a time, a host or a digest of the program in its name."""
    names = {str(file.relative_to(workdir)) for file in workdir.rglob("*") if file.is_file()}
    return {name for name in names if not name.startswith(("tensorboard/", "compiled/", "checkpoints/"))}


@pytest.mark.slow
@pytest.mark.timed  # with two processes too
def test_four_devices_in_one_two_and_four_processes(tiny_npz: Path, tmp_path: Path) -> None:
    found = {}
    for processes in (1, 2, 4) if SOAK else (1, 4):
        workdir = tmp_path / str(processes)
        first, *others = run(tiny_npz, workdir, processes, 4 // processes)
        assert "devices  4 × cpu" in first.stdout
        assert "step 50 of 50" in first.stdout
        assert not any("step" in end.stdout for end in others)
        assert column(workdir, "train", "step") == list(range(1, 51))  # written once, by one of them
        assert column(workdir, "eval", "examples") == [37, 37, 37]  # which batches of 8 do not divide
        assert len(list((workdir / "tensorboard" / "train").iterdir())) == 1
        found[processes] = {kind: np.array(column(workdir, kind, "loss")) for kind in ("train", "eval")}
        found[processes]["files"] = files(workdir)  # type: ignore[assignment]
        with Checkpoints(workdir) as checkpoints:
            assert checkpoints.steps() == [40, 50]
    one = found[1]
    assert one["train"][-5:].mean() < 0.99 * one["train"][:5].mean()  # it is a training, not a constant
    assert one["files"] == {"config.json", "data.json", "lock", "metrics.jsonl", "result.json", "curves.png"}
    for other in found.values():
        assert other["files"] == one["files"]
        for kind in ("train", "eval"):
            difference = np.abs(other[kind] / one[kind] - 1).max()
            assert difference < 1e-6, difference


@pytest.mark.soak  # test_job has the same with signals
def test_saved_by_four_processes_gone_on_with_by_two_and_by_one(tiny_npz: Path, tmp_path: Path) -> None:
    """Each alone with one device: the sums are taken in another order each time."""
    for processes, stop in ((4, ["--config.stop_after_steps=17"]), (2, ["--config.stop_after_steps=33"]), (1, [])):
        run(tiny_npz, tmp_path / "run", processes, 1, *stop)
    run(tiny_npz, tmp_path / "whole", 1, 1)
    for kind, name in (("train", "step"), ("train", "loss"), ("eval", "examples"), ("eval", "loss")):
        went_on, whole = (column(tmp_path / of, kind, name) for of in ("run", "whole"))
        np.testing.assert_allclose(went_on, whole, rtol=1e-5)
