"""What an update makes of a batch: parts of it, steps uphill, running averages; and that what is off is not there."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT, run_main
from ml_collections import ConfigDict

from jax_resnet.config.keys import get_key
from jax_resnet.data.loader import train_batches
from jax_resnet.errors import UserError
from jax_resnet.runs.metrics_reader import read_metrics
from jax_resnet.training.experiment import build
from jax_resnet.training.state import TrainState
from jax_resnet.training.step import _averaged, _sharpness_aware

TINY = ROOT / "tests" / "tiny.py"


def trained(config: ConfigDict, steps: int, state: TrainState | None = None) -> tuple[TrainState, list[dict[str, Any]]]:
    """The state after so many updates, and the sums of each."""
    experiment = build(config)
    state, sums = state or experiment.network.fresh_state(), []
    feed = train_batches(experiment.data.train, config.data, start=0, stop=steps, seed=config.seed,
                         phases=experiment.plan.phases, sharding=experiment.sharding, report=print)  # fmt: skip
    for batch in feed:
        state, found = experiment.steps.train(state, batch, *experiment.steps.teacher_weights)
        sums.append(jax.device_get(found))
    return jax.device_get(state), sums


def assert_close(found: Any, expected: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)


# ---- parts of a batch ------------------------------------------------------------------------------------------------


def procedure(c: ConfigDict) -> ConfigDict:
    """Much of what a recipe may have, with batch norm over groups of 4, and a net that compiles fast."""
    c.model.update({"bn_group_size": 4, "depths": (1,), "widths": (16,), "zero_init_last": False})
    c.data.mixup = 0.2
    c.data.image.update({"flip": True, "erase": 0.5, "cutmix": 1.0})
    c.optimizer.update({"clip_norm": 0.5, "sam_rho": 0.05})
    c.ema.update({"decay": 0.9, "every": 2})
    c.schedule.warmup.steps = 0
    return c


def test_parts_of_a_batch_give_the_update_of_the_whole(tiny_config: ConfigDict) -> None:
    """Parameters, optimizer, statistics, running average, sums: to float32's rounding, which four updates amplify."""
    procedure(tiny_config).optimizer.sam_rho = 0.0
    whole, sums = trained(tiny_config, 4)
    tiny_config.accumulate = 4
    in_parts, sums_of_parts = trained(tiny_config, 4)
    assert_close(in_parts, whole, rtol=2e-4, atol=2e-5)
    for a, b in zip(sums_of_parts, sums, strict=True):
        assert a["examples"] == b["examples"] == 16
        assert a["correct_top1"] == b["correct_top1"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-5)
    tiny_config.update({"accumulate": 1, "model": {"bn_group_size": 2}})
    other, _ = trained(tiny_config, 4)
    assert np.abs(other.params["stem"]["conv1"]["kernel"] - whole.params["stem"]["conv1"]["kernel"]).max() > 1e-3


@pytest.mark.soak
def test_parts_of_a_batch_on_four_devices(tiny_npz: Path, tmp_path: Path) -> None:
    losses = []
    for devices, parts in ((1, 1), (4, 2)):
        workdir = tmp_path / str(devices)
        done = run_main(f"--config={TINY}:{tiny_npz}", f"--workdir={workdir}", f"--config.accumulate={parts}",
                        "--config.log_every=1", "--config.model.bn_group_size=2", "--config.data.mixup=0.2",
                        "--config.train.steps=8", devices=devices)  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in read_metrics(workdir) if row["kind"] == "train"])
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, rtol=2e-4)


def test_parts_that_share_statistics_are_refused(tiny_config: ConfigDict) -> None:
    tiny_config.accumulate = 4
    with pytest.raises(UserError, match=r"accumulate=4: .*--config\.model\.bn_group_size=4, or a divisor of it"):
        build(tiny_config)
    tiny_config.model.bn_group_size = 8
    with pytest.raises(UserError, match=r"bn_group_size=8 does not divide config\.batch_size=16 / accumulate=4"):
        build(tiny_config)
    tiny_config.accumulate = 3
    with pytest.raises(UserError, match=r"config\.accumulate=3 does not divide config\.batch_size=16"):
        build(tiny_config)


# ---- sharpness-aware steps -------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_a_point_rho_uphill() -> None:
    curvature, at, rho = np.diag([1.0, 4.0, 9.0]), np.array([2.0, -1.0, 0.5]), 0.3
    gradient = curvature @ at
    expected = curvature @ (at + rho * gradient / np.linalg.norm(gradient))
    for step, every, sharp in ((0, 1, True), (7, 1, True), (6, 3, True), (7, 3, False)):
        for on_cpu in (True, False):
            state = TrainState(np.int32(step), {"w": at}, {}, None)
            gradients = lambda params: ({"w": curvature @ params["w"]}, None)  # noqa: E731
            found = _sharpness_aware({"w": gradient}, gradients, state, rho, every, on_cpu)
            np.testing.assert_allclose(found["w"], expected if sharp else gradient, rtol=1e-6)


def test_a_sharpness_aware_update_is_two_plain_ones(tiny_config: ConfigDict) -> None:
    c = tiny_config
    c.update({"optimizer": {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0}})
    c.schedule.update({"name": "constant"})
    c.schedule.warmup.steps = 0
    start = jax.device_get(build(c).network.fresh_state())
    plain, _ = trained(c, 1)
    gradient = jax.tree.map(lambda a, b: a - b, start.params, plain.params)
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(gradient)))
    uphill = jax.tree.map(lambda p, g: (p + 0.1 * g / norm).astype(np.float32), start.params, gradient)
    there, _ = trained(c, 1, jax.device_put(replace(start, params=uphill)))
    expected = jax.tree.map(lambda p, a, b: p + (b - a), start.params, uphill, there.params)
    c.optimizer.sam_rho = 0.1
    found, _ = trained(c, 1)
    assert_close(found.params, expected, rtol=1e-4, atol=1e-5)
    assert_close(found.batch_stats, plain.batch_stats, rtol=1e-6)  # of the parameters that are kept
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found.params, plain.params)))) > 1e-3  # noqa: B905


def test_frozen_parts_are_not_moved_uphill(tiny_config: ConfigDict) -> None:
    c = tiny_config
    c.optimizer.sam_rho, c.freeze = 0.1, ("stem", "stage1")
    start = jax.device_get(build(c).network.fresh_state())
    found, _ = trained(c, 2)
    for part in c.freeze:
        assert_close(found.params[part], start.params[part], rtol=0)


# ---- the running average ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "start", "ramp"), [(1, 0, False), (3, 0, False), (2, 4, False), (2, 2, True)])
def test_running_average_is_the_recursion(every: int, start: int, ramp: bool) -> None:
    c = ConfigDict({"decay": 0.8, "every": every, "ramp": ramp})
    weights = np.random.default_rng(0).normal(size=(13, 3))
    expected = weights[0]
    state = TrainState(np.int32(0), {"w": weights[0]}, {}, None, {"params": {"w": weights[0]}, "batch_stats": {}})
    averaged = jax.jit(functools.partial(_averaged, c=c, start=start))
    for step in range(1, 13):
        if step % every == 0:
            updates = (step - start) // every
            decay = min(0.8, (1 + updates) / (10 + updates)) if ramp else 0.8
            expected = weights[step] if step <= start else decay * expected + (1 - decay) * weights[step]
        elif step <= start:
            expected = expected if every > 1 else weights[step]
        state = replace(state, step=np.int32(step), params={"w": weights[step]})
        state = replace(state, ema=averaged(state))
        np.testing.assert_allclose(state.ema["params"]["w"], expected, rtol=1e-5)


def test_running_average_of_a_training_is_evaluated_and_checkpointed(tiny_config: ConfigDict, tmp_path: Path) -> None:
    from jax_resnet.runs.checkpoint import Checkpoints
    from jax_resnet.training.evaluate import evaluate_checkpoint
    from jax_resnet.training.loop import train

    c = tiny_config
    c.ema.decay = 0.7
    state = jax.device_get(build(c).network.fresh_state())
    expected = state.weights
    for steps in range(1, 21):
        reached, _ = trained_to(c, steps) if steps == 1 else advance(c, steps)
        expected = jax.tree.map(lambda a, b: 0.7 * a.astype(np.float64) + 0.3 * b, expected, reached.weights)
    result = train(c, tmp_path)
    assert set(result["splits"]) == {"test", "test_ema"}
    assert result["splits"]["test"]["loss"] != result["splits"]["test_ema"]["loss"]
    assert evaluate_checkpoint(tmp_path, which="latest")["splits"] == result["splits"]
    with Checkpoints(tmp_path) as saved:
        averaged, raw = (saved.weights(20, averaged=flag) for flag in (True, False))
        best = saved.best_step()
    assert_close(averaged, (expected["params"], expected["batch_stats"]), rtol=1e-4, atol=1e-5)
    assert_close(raw, (reached.params, reached.batch_stats), rtol=1e-5, atol=1e-6)
    rows = [row for row in read_metrics(tmp_path) if row.get("split") == "test_ema"]
    assert [row["step"] for row in rows] == [8, 16, 20]
    (events,) = (tmp_path / "tensorboard" / "test_ema").iterdir()
    assert b"accuracy_top1" in events.read_bytes()
    top = max(row["accuracy_top1"] for row in rows)
    assert best in [row["step"] for row in rows if row["accuracy_top1"] == top]


_REACHED: dict[str, Any] = {}


def trained_to(c: ConfigDict, _: int) -> tuple[TrainState, Any]:
    experiment = build(c)
    _REACHED.update(experiment=experiment, state=experiment.network.fresh_state(), feed=iter(train_batches(
        experiment.data.train, c.data, start=0, stop=20, seed=c.seed, phases=experiment.plan.phases,
        sharding=experiment.sharding, report=print)))  # fmt: skip
    return advance(c, 1)


def advance(_: ConfigDict, __: int) -> tuple[TrainState, Any]:
    _REACHED["state"], sums = _REACHED["experiment"].steps.train(_REACHED["state"], next(_REACHED["feed"]))
    return jax.device_get(_REACHED["state"]), sums


# ---- what is off is not there ----------------------------------------------------------------------------------------

WITHOUT_EFFECT = {  # what says how a thing is done, where it is not done
    "ema": {"every": 3, "ramp": True},
    "optimizer": {"sam_every": 3},
    "distill": {"temperature": 4.0, "alpha": 0.9},
}
WITH_EFFECT: list[tuple[str, str, Any]] = [
    ("ema", "decay", 0.9),
    ("guard", "max_skipped", 10),
    ("optimizer", "sam_rho", 0.1),
    ("data", "mixup", 0.2),
    ("data.image", "cutmix", 1.0),
    ("data.image", "erase", 0.5),
    ("data.image", "flip", True),
    ("model", "drop_path", 0.2),
    ("model", "dropout", 0.2),
    ("loss", "label_smoothing", 0.1),
    ("loss", "name", "bce"),
    ("optimizer", "clip_norm", 1.0),
    ("optimizer", "clip_value", 1.0),
    ("optimizer", "l1", 0.1),
]


def program(c: ConfigDict) -> str:
    experiment = build(c)
    return experiment.steps.train.lower(*experiment.shapes(experiment.plan.phases[0])).as_text()


def test_what_is_off_is_not_in_the_program(tiny_config: ConfigDict) -> None:
    tiny_config.guard.max_skipped = 0
    plain = program(tiny_config)
    assert "stablehlo.case" not in plain  # no choice is made in it
    for group, values in WITHOUT_EFFECT.items():
        tiny_config[group].update(values)
    assert program(tiny_config) == plain
    for group, key, value in WITH_EFFECT:
        changed = get_key(tiny_config, group)
        before = changed[key]
        changed[key] = value
        assert program(tiny_config) != plain, key
        changed[key] = before
    assert program(tiny_config) == plain
    guarded = [program(tiny_config) for tiny_config.guard.max_skipped in (10, 9)]
    assert len({plain, *guarded}) == 3
    leaves = jax.tree.leaves(build(tiny_config).network.abstract_state.params)
    for operation, more in (("is_finite", 2), ("abs", len(leaves))):  # of the loss and of sums; of each gradient
        checks = [text.count(f"stablehlo.{operation}") for text in (plain, guarded[0])]
        assert checks[1] - checks[0] == more, operation


def test_running_average_guard_and_teacher_take_no_place_where_there_is_none(tiny_config: ConfigDict) -> None:
    tiny_config.guard.max_skipped = 0
    experiment = build(tiny_config)
    assert jax.tree.leaves((experiment.network.abstract_state.ema, experiment.network.abstract_state.guard)) == []
    assert experiment.steps.teacher_weights == ()


def test_a_procedure_that_is_stopped_ends_as_one_that_is_not(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """Bit for bit: running average, steps uphill every third step, residuals left out."""
    from jax_resnet.runs.checkpoint import Checkpoints
    from jax_resnet.training.loop import train

    c = procedure(tiny_config)
    c.model.drop_path, c.optimizer.sam_every, c.ema.ramp = 0.2, 3, True
    results = [train(c, tmp_path / "whole")]
    c.stop_after_steps = 11
    train(c, tmp_path / "stopped")
    c.stop_after_steps = None
    results.append(train(c, tmp_path / "stopped"))
    assert results[0] == results[1]
    for averaged in (True, False):
        trees = []
        for name in ("whole", "stopped"):
            with Checkpoints(tmp_path / name) as saved:
                trees.append(saved.weights(20, averaged=averaged))
        jax.tree.map(np.testing.assert_array_equal, *trees)
