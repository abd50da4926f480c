"""config.profile: the updates that it names are traced, no others, and nothing else changes."""

from pathlib import Path

import pytest
from conftest import ROOT, run_main
from jax.profiler import ProfileData
from ml_collections import ConfigDict

from jax_resnet.config import validate
from jax_resnet.errors import UserError
from jax_resnet.runs.metrics_reader import read_metrics

TINY = ROOT / "tests" / "tiny.py"


def traced(file: Path) -> list[int]:
    """The numbers of the steps that a trace names, ascending."""
    events = (
        event for plane in ProfileData.from_file(str(file)).planes for line in plane.lines for event in line.events
    )
    return sorted({dict(event.stats)["step_num"] for event in events if event.name == "train"})


def test_the_steps_that_are_asked_for_are_traced_also_by_a_run_that_goes_on(tiny_npz: Path, tmp_path: Path) -> None:
    args = [f"--config={TINY}:{tiny_npz}", "--config.log_every=1", "--config.checkpoint.every.steps=4"]
    plain, run = tmp_path / "plain", tmp_path / "run"
    for workdir, more in (
        (plain, ["--config.stop_after_steps=8"]),
        (run, ["--config.stop_after_steps=4", "--config.profile=3:6"]),  # ends in the midst of them
        (run, ["--config.stop_after_steps=8", "--config.profile=3:6"]),
    ):
        done = run_main(*args, f"--workdir={workdir}", *more, devices=2)
        assert done.returncode == 0, done.stderr
    files = sorted((run / "profile").rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    assert [traced(file) for file in files] == [[3, 4], [5, 6]]
    assert not (plain / "profile").exists()
    losses = [[r["loss"] for r in read_metrics(at) if r["kind"] == "train"] for at in (plain, run)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("steps", ["100", "0:5", "7:6", "100:105:2", "-1:5", "a:b", ""])
def test_what_names_no_steps_is_one_line(tiny_config: ConfigDict, steps: str) -> None:
    tiny_config.profile = steps
    with pytest.raises(UserError, match=f"^config.profile={steps}: must be the first and the last update to trace"):
        validate(tiny_config)


def test_steps_after_the_end_are_one_line(tiny_npz: Path, tmp_path: Path) -> None:
    done = run_main(f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path}", "--config.profile=21:25")
    expected = "error: config.profile=21:25: begins after the last update, 20"
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (2, expected)
