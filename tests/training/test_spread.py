"""config.spread_optimizer: each device keeps its share, and the training is the same."""

import sys
from pathlib import Path

import numpy as np
import programs
import pytest
from conftest import ROOT, main_env, run_main
from jax.sharding import AbstractMesh, AxisType

from jax_resnet.runs.metrics_log import read_metrics
from jax_resnet.runtime.mesh import spread

TINY = ROOT / "tests" / "tiny.py"
ON = "--config.spread_optimizer"
MORE = [
    "--config.ema.decay=0.9",
    "--config.accumulate=2",
    "--config.model.bn_group_size=4",
    "--config.optimizer.name=adamw",
    "--config.optimizer.learning_rate=0.002",
]


def train(npz: Path, workdir: Path, devices: int, *more: str) -> str:
    done = run_main(f"--config={TINY}:{npz}", f"--workdir={workdir}", "--config.log_every=1", *more, devices=devices)
    assert done.returncode == 0, done.stderr
    return done.stdout


def column(workdir: Path, kind: str, name: str) -> list[float]:
    return [row[name] for row in read_metrics(workdir) if row["kind"] == kind]


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 16, 64), (None, None, None, "data")),
        ((3, 3, 64, 16), (None, None, "data")),
        ((64, 10), ("data",)),
        ((3, 3, 6, 6), ()),
        ((), ()),
        ((0, 5), ()),
    ],
)
def test_an_array_is_cut_along_its_longest_dimension(shape: tuple[int, ...], spec: tuple[str | None, ...]) -> None:
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    found = spread(mesh, shape)  # type: ignore[arg-type]
    assert tuple(found.spec) == spec
    found.shard_shape(shape)  # which raises where the devices do not divide it


@pytest.mark.soak
def test_stopped_on_four_devices_and_on_two_it_ends_on_one_as_if_whole(tiny_npz: Path, tmp_path: Path) -> None:
    out = train(tiny_npz, tmp_path / "run", 4, ON, *MORE, "--config.stop_after_steps=7")
    assert "4 × cpu, activations float32, the optimizer's state spread over them" in out
    train(tiny_npz, tmp_path / "run", 2, ON, *MORE, "--config.stop_after_steps=13")
    train(tiny_npz, tmp_path / "run", 1, ON, *MORE)
    train(tiny_npz, tmp_path / "whole", 1, *MORE)
    for kind, name in (("train", "loss"), ("eval", "loss"), ("eval", "examples")):
        run, whole = (column(tmp_path / of, kind, name) for of in ("run", "whole"))
        np.testing.assert_allclose(run, whole, rtol=2e-4)
    assert len(column(tmp_path / "run", "train", "loss")) == 20


SHARES = """
import sys, jax
sys.path.insert(0, "tests")
import numpy as np
import tiny
from jax_resnet.training.experiment import build
from jax_resnet.training.state import TrainState
config = tiny.get_config(sys.argv[1])
config.ema.decay, config.optimizer.name, config.spread_optimizer = 0.9, "adam", sys.argv[2] == "on"
experiment = build(config)
state = experiment.network.fresh_state()
rows = np.arange(16, dtype=np.int32)
batch = {"image": np.full((16, 12, 12, 1), 100, np.uint8), "label": rows % 4}
state, _ = experiment.steps.train(state, jax.device_put(batch, experiment.sharding))
held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
print(held((state.opt_state, state.ema)), held(state.params))
print(sum(x.nbytes for x in jax.tree.leaves((state.opt_state, state.ema))))
"""


def test_each_of_four_devices_keeps_about_a_quarter(tiny_npz: Path) -> None:
    """By what the shards of a trained state hold; all widths of the tiny net but the input's 1 are divisible by 4."""
    found = {}
    for spread_out in ("on", "off"):
        command = [sys.executable, "-c", SHARES, str(tiny_npz), spread_out]
        done = programs.run(command, env=main_env(4), cwd=ROOT)
        assert done.returncode == 0, done.stderr
        found[spread_out] = list(map(int, done.stdout.split()))
    (shares, params, of_all), (whole, params_whole, of_all_whole) = found["on"], found["off"]
    assert (params, of_all) == (params_whole, of_all_whole)
    assert whole == of_all
    assert of_all / 4 <= shares < of_all / 4 + 100  # counts of steps stay whole


@pytest.mark.soak
def test_two_processes_spread_save_and_go_on(tiny_npz: Path, tmp_path: Path) -> None:
    import faults

    args = [f"--config={TINY}:{tiny_npz}", f"--workdir={tmp_path / 'run'}", "--config.log_every=1", ON, *MORE]
    for more in (["--config.stop_after_steps=9"], []):
        ended = faults.finish(faults.start([*args, *more], processes=2, devices=2))
        assert [end.status for end in ended] == [0, 0], ended
    train(tiny_npz, tmp_path / "whole", 1, *MORE)
    run, whole = (column(tmp_path / of, "train", "loss") for of in ("run", "whole"))
    np.testing.assert_allclose(run, whole, rtol=2e-4)
