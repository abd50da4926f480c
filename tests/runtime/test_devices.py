"""The number of devices changes nothing but speed: the same batches, losses, counts; few collectives."""

import re
import socket
import sys
from pathlib import Path

import numpy as np
import programs
import pytest
from conftest import ROOT, main_env, run_main

from jax_resnet.runs.metrics_reader import read_metrics

TINY = ROOT / "tests" / "tiny.py"
# Sums over a batch are taken in another order on another number of devices; over 20 steps of SGD that
# rounding grows to about 1e-5 of the loss.
TOLERANCE = 2e-4


def run(npz: Path, workdir: Path, devices: int, *more: str) -> list[dict]:
    done = run_main(f"--config={TINY}:{npz}", f"--workdir={workdir}", "--config.log_every=1",
                    "--config.eval.batch_size=8", *more, devices=devices)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{devices} × cpu" in done.stdout
    return read_metrics(workdir)


def column(rows: list[dict], kind: str, name: str) -> list[float]:
    return [row[name] for row in rows if row["kind"] == kind]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], marks=pytest.mark.soak),
        [
            "--config.model.bn_group_size=2",
            "--config.model.dropout=0.3",
            "--config.data.image.erase=0.3",
            "--config.data.mixup=0.2",
            "--config.data.image.cutmix=1.0",
        ],
    ],
)
def test_one_and_eight_devices(tiny_npz: Path, tmp_path: Path, more: list[str]) -> None:
    one, eight = (run(tiny_npz, tmp_path / str(n), n, *more) for n in (1, 8))
    assert column(one, "train", "step") == column(eight, "train", "step") == list(range(1, 21))
    np.testing.assert_allclose(column(one, "train", "loss"), column(eight, "train", "loss"), rtol=TOLERANCE)
    assert column(one, "train", "loss")[-1] < column(one, "train", "loss")[0]  # it is a training, not a constant
    for rows in (one, eight):  # batches of 8 do not divide the 37 test images
        assert column(rows, "eval", "examples") == [37, 37, 37]
    np.testing.assert_allclose(column(one, "eval", "loss"), column(eight, "eval", "loss"), rtol=TOLERANCE)


@pytest.mark.soak
def test_stopped_on_eight_devices_resumed_on_two(tiny_npz: Path, tmp_path: Path) -> None:
    whole = run(tiny_npz, tmp_path / "whole", 8)
    run(tiny_npz, tmp_path / "split", 8, "--config.stop_after_steps=11")
    split = run(tiny_npz, tmp_path / "split", 2)
    assert column(split, "train", "step") == list(range(1, 21))
    assert column(split, "train", "loss")[:11] == column(whole, "train", "loss")[:11]
    np.testing.assert_allclose(column(split, "train", "loss"), column(whole, "train", "loss"), rtol=TOLERANCE)
    np.testing.assert_allclose(column(split, "train", "accuracy_top1"), column(whole, "train", "accuracy_top1"))


TWO_PROCESSES = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
sys.path.insert(0, "tests")
import tiny
from jax_resnet.training.loop import train
config = tiny.get_config(sys.argv[3])
config.log_every, config.eval.batch_size = 1, 8
assert jax.process_count() == 2
print(train(config, sys.argv[4])["splits"])
"""


@pytest.mark.soak  # test_processes has four, by the command
def test_two_processes_train_as_one(tiny_npz: Path, tmp_path: Path) -> None:
    one = run(tiny_npz, tmp_path / "one", 1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", TWO_PROCESSES, str(port)]
    processes = [
        programs.start(
            [*command, str(i), str(tiny_npz), str(tmp_path / "two")],
            env=main_env(2),
            cwd=ROOT,
        )
        for i in range(2)
    ]
    outputs = [p.communicate() for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert "step 20 of 20" in outputs[0][0]
    assert "step 20 of 20" not in outputs[1][0]  # process 0 alone reports
    assert outputs[0][0].splitlines()[-1] == outputs[1][0].splitlines()[-1]
    two = read_metrics(tmp_path / "two")
    np.testing.assert_allclose(column(one, "train", "loss"), column(two, "train", "loss"), rtol=TOLERANCE)
    assert column(two, "eval", "examples") == [37, 37, 37]


COLLECTIVES = """
import sys
import jax, jax.numpy as jnp, optax
from jax_resnet.runtime.mesh import batch_sharding, data_mesh, parts_sharding, replicated
from jax_resnet.config import default
from jax_resnet.models.zoo import create_model
from jax_resnet.training.state import make_state
from jax_resnet.data.image.device import ImageInputs
from jax_resnet.training.step import Problem, make_train_step
from jax_resnet.training.tasks import OneLabel
mesh = data_mesh()
rows, whole, optimizer = batch_sharding(mesh), replicated(mesh), optax.sgd(0.1, momentum=0.9)
depths = tuple(map(int, sys.argv[1].split(",")))
options = {"depths": depths, "dtype": jnp.bfloat16, "bn_group_size": int(sys.argv[2]) or None}
make = lambda rngs: create_model("resnet50", num_classes=1000, rngs=rngs, **options)
graph, state, _ = make_state(make, optimizer, 0, whole)
config = default()
config.data.image.crop, config.loss.label_smoothing = "pad", 0.1
problem = Problem(graph, ImageInputs(config.data), OneLabel(config.loss, 1000))
step = make_train_step(problem, lambda step: optimizer, config, parts=parts_sharding(mesh))
batch = {"image": jax.ShapeDtypeStruct((16, 64, 64, 3), jnp.uint8, sharding=rows),
         "label": jax.ShapeDtypeStruct((16,), jnp.int32, sharding=rows)}
step = jax.jit(step, in_shardings=(whole, rows), out_shardings=whole, donate_argnums=0)
print(step.lower(state, batch).compile().as_text())
"""


def collectives(depths: str, group: int) -> list[str]:
    done = programs.run([sys.executable, "-c", COLLECTIVES, depths, group], env=main_env(4), check=True)
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= .*? ({names})(?:-start)?\(", done.stdout)


DEPTHS = pytest.mark.parametrize("depths", ["1,1,1,1", pytest.param("3,4,6,3", marks=pytest.mark.soak)])


@pytest.mark.usefixtures("turn")
@DEPTHS
def test_a_resnet_on_four_devices_with_per_device_groups_has_three_collectives(depths: str) -> None:
    found = collectives(depths, 4)
    assert set(found) == {"all-reduce"}
    assert len(found) <= 3


@pytest.mark.soak
@pytest.mark.usefixtures("turn")
@DEPTHS
def test_a_resnet_on_four_devices_with_global_statistics_reduces_in_every_norm(depths: str) -> None:
    norms = 1 + sum(3 * int(depth) + 1 for depth in depths.split(","))
    assert len(collectives(depths, 0)) >= norms  # what the test above would count if groups did not stay there
