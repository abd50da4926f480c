"""What lies in the workdirs of runs, for tests that compare them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs

from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.metrics_reader import read_metrics
from jax_resnet.runs.workdir import read_config
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.state import AS_SAVED, TrainState, from_fields, to_fields


def restored(checkpoints: Checkpoints, step: int, experiment: Experiment) -> TrainState:
    """Restore the state at `step` as a training does."""
    like = experiment.network.abstract_state
    return from_fields(checkpoints.restore(step, to_fields(like), as_saved=AS_SAVED), like)


def final_state(workdir: Path) -> dict[str, Any]:
    """Every array of the newest checkpoint, by name."""
    config = read_config(workdir)
    assert config is not None
    experiment = build(config)
    with Checkpoints(workdir) as checkpoints:
        state = restored(checkpoints, checkpoints.latest_step() or 0, experiment)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def assert_bit_identical(one: Path, other: Path) -> None:
    a, b = final_state(one), final_state(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def wait_for_step(workdir: Path, step: int, process: programs.Program) -> None:
    programs.until(lambda: any(row["step"] >= step for row in read_metrics(workdir)), process)
