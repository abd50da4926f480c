"""Jobs of several processes in which one has a fault: what the others do, how fast, and how the run goes on."""

from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from conftest import ROOT, SOAK
from faults import SAVING, Ended, finish, injected_at

from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.metrics_reader import read_metrics

TINY = ROOT / "tests" / "tiny.py"


def args(npz: Path, workdir: Path, *more: str) -> list[str]:
    return [f"--config={TINY}:{npz}", f"--workdir={workdir}", "--config.log_every=1", *more]


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir) if row["kind"] == "train"]


def assert_soon(ended: list[Ended], job: list[Ended], seconds: float) -> None:
    """In the soak, on a machine with nothing else to do: `ended` were over so many seconds after the job's fault."""
    if SOAK:
        assert max(end.at for end in ended) - injected_at(job) < seconds


def job(npz: Path, workdir: Path, *more: str, **fault: object) -> list[Ended]:
    return finish(faults.start(args(npz, workdir, *more), **fault))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timed
def test_asked_to_stop_all_save_the_same_step_and_go_on_as_fewer(tiny_npz: Path, tmp_path: Path) -> None:
    """SIGTERM to one of four; then two processes, stopped again; then one: the losses of a run without a stop."""
    run = tmp_path / "run"
    for processes, devices, step, rank in ((4, 1, 5, 2), (2, 2, 13, 0)):
        ended = job(tiny_npz, run, processes=processes, devices=devices, kind="sigterm", step=step, rank=rank)
        assert [end.status for end in ended] == [143] * processes, "\n".join(end.stderr for end in ended)
        assert_soon(ended, ended, 30)
        lines = {end.last_line for end in ended}
        with Checkpoints(run) as checkpoints:
            saved = checkpoints.latest_step()
        assert saved is not None
        assert step < saved <= step + 6
        assert lines == {f"stopped after step {saved} of 20, saved in {run}; the same command goes on from there"}
    (ended_alone,) = job(tiny_npz, run)
    assert ended_alone.status == 0, ended_alone.stderr
    (whole,) = job(tiny_npz, tmp_path / "whole")
    assert whole.status == 0, whole.stderr
    assert len(losses(run)) == 20
    np.testing.assert_allclose(losses(run), losses(tmp_path / "whole"), rtol=2e-4)


def soaked(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize(
    ("kind", "rank", "seconds", "statuses", "says"),
    [
        soaked("exception", 0, 10 + SAVING, {1}, "process 0 on {host}: RuntimeError: injected fault"),
        ("exception", 1, 10 + SAVING, {1}, "process 1 on {host}: RuntimeError: injected fault"),
        soaked("exception", 2, 10 + SAVING, {1}, "process 2 on {host}: RuntimeError: injected fault"),  # of four
        ("stop", 1, 10, {143}, "stopped"),
        ("kill", 1, 40, {1, -6}, None),
        soaked("freeze", 1, 40, {1, -6}, None),
        ("stuck", 1, 10, {1}, "process 1 on {host}: stuck: what comes before step 10 has taken more than "
         "config.stuck_after allows; the stacks above say where"),
    ],
)  # fmt: skip
def test_one_fault_ends_all(
    tiny_npz: Path, tmp_path: Path, kind: str, rank: int, seconds: float, statuses: set[int], says: str | None
) -> None:
    import socket

    ended = job(tiny_npz, tmp_path, processes=4 if rank == 2 else 2, kind=kind, step=9, rank=rank)
    others = [end for number, end in enumerate(ended) if number != rank or says]
    assert {end.status for end in others} <= statuses, ended
    assert_soon(others, ended, seconds)
    if says:
        assert {end.last_line for end in ended} == {says.format(host=socket.gethostname())}
    if kind == "stuck":
        assert "in faulty" in ended[rank].stderr  # the stack of the loop
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 8  # saved before the fault, and sound
        checkpoints.arrays(8)
