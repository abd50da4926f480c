"""Updates whose numbers are wrong: they change nothing but the step, are told, and too many in a row end the run."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, run_main
from ml_collections import ConfigDict
from workdirs import restored

from jax_resnet.config import validate
from jax_resnet.data.image import device
from jax_resnet.data.sampling import train_indices
from jax_resnet.errors import UserError
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.log import Telemetry, read_metrics
from jax_resnet.training import step as step_module
from jax_resnet.training import tasks
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.loop import train
from jax_resnet.training.skipped import Skipped
from jax_resnet.training.state import TrainState
from jax_resnet.training.step import _guarded


@pytest.fixture
def config(tiny_config: ConfigDict) -> ConfigDict:
    """A net that compiles fast, and that keeps all that a state can hold."""
    c = tiny_config
    c.model.update({"depths": (1,), "widths": (16,), "bn_group_size": 4, "zero_init_last": False})
    c.ema.update({"decay": 0.7})
    c.schedule.warmup.steps = 0
    return c


IMAGE, LOSS = 2, 4  # the steps, counted from 0, of an image and of a loss that are no numbers


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch has as poison, float32 [N], is added to its images; the loss of a label 9 is no number.

    XLA's maximum on CPUs, so ReLU, takes 0 for what is no number: of such images only the gradients are none. Of such a
    loss the gradients are numbers.
    """
    augment, make_loss = device.augment, tasks.make_loss

    def poisoned(image: Any, rows: Any, *of: Any) -> Any:
        images = augment(image, rows, *of)
        return images + rows["poison"][:, None, None, None].astype(images.dtype) if "poison" in rows else images

    monkeypatch.setattr(device, "augment", poisoned)

    def make_poisoned(*of: Any, **given: Any) -> Any:
        loss = make_loss(*of, **given)
        return lambda logits, labels: loss(logits, labels) + jnp.where(labels == 9, jnp.nan, 0.0)

    monkeypatch.setattr(tasks, "make_loss", make_poisoned)


@pytest.fixture
def poison_steps(poison: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[jax.Array], jax.Array]], None]:
    """Call it with which steps, counted from 1, are to have an image that is no number."""
    drawn = step_module._drawn

    def of(bad: Callable[[jax.Array], jax.Array]) -> None:
        def poisoned(batch: Any, step: Any, *of: Any) -> Any:
            rows, whole, key = drawn(batch, step, *of)
            first = jnp.arange(len(batch["label"])) == 0
            return rows | {"poison": jnp.where(first & bad(step + 1), jnp.nan, 0.0)}, whole, key

        monkeypatch.setattr(step_module, "_drawn", poisoned)

    return of


def batches(experiment: Experiment, steps: int, *, poisoned: bool = True) -> Iterator[dict[str, jax.Array]]:
    """Those of the first updates."""
    c = experiment.config
    feed = experiment.train_batches(0, steps, print)
    for step, batch in enumerate(feed):
        poison, label = np.zeros(c.batch_size, np.float32), np.array(batch["label"])
        if poisoned and step == IMAGE:
            poison[5] = np.nan
        if poisoned and step == LOSS:
            label[5] = 9
        yield batch | jax.device_put({"poison": poison, "label": label}, experiment.sharding)


def without(experiment: Experiment, steps: int, left_out: set[int]) -> TrainState:
    """Return the state after the updates but those left out, of which only the step is counted."""
    state = experiment.network.fresh_state()
    for step, batch in enumerate(batches(experiment, steps, poisoned=False)):
        if step in left_out:
            state = replace(state, step=state.step + 1)
        else:
            state, _ = experiment.steps.train(state, batch)
    return jax.device_get(state)


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit."""
    assert [x.tobytes() for x in jax.tree.leaves(found)] == [x.tobytes() for x in jax.tree.leaves(expected)]


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected)


def of_weights(state: TrainState) -> Any:
    return state.params, state.batch_stats, state.ema


PROCEDURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "in parts": {"accumulate": 2},
    "uphill": {"optimizer": {"sam_rho": 0.05}},
    "adamw, clipped": {"optimizer": {"name": "adamw", "clip_value": 0.01, "learning_rate": 1e-3}},
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("procedure", PROCEDURES)
def test_a_bad_update_is_as_if_left_out(config: ConfigDict, procedure: str) -> None:
    config.update(PROCEDURES[procedure])
    experiment = build(config)
    state, finite = experiment.network.fresh_state(), {}
    for step, batch in enumerate(batches(experiment, 7)):
        before = jax.device_get(state)
        state, sums = jax.device_get(experiment.steps.train(state, batch))
        assert state.step == step + 1
        assert sums["skipped"] == state.guard["row"] == (step in (IMAGE, LOSS))
        if sums["skipped"]:
            assert_same((state.opt_state, of_weights(state)), (before.opt_state, of_weights(before)))
            assert sums["examples"] == sums["correct_top1"] == sums["loss"] == 0
            finite[step] = math.isfinite(sums["skipped_loss"])
        else:
            assert not np.array_equal(state.params["head"]["kernel"], before.params["head"]["kernel"])
            assert (sums["examples"], sums["skipped_loss"]) == (16, 0)
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, experiment.network.abstract_state))
    assert finite == {IMAGE: True, LOSS: False}
    state, expected = jax.device_get(state), without(experiment, 7, {IMAGE, LOSS})
    assert_same(state, expected)
    config.guard.max_skipped = 0
    expected = without(build(config), 7, {IMAGE, LOSS})  # another program: to rounding
    assert expected.guard == {}
    assert_close((state.opt_state, of_weights(state)), (expected.opt_state, of_weights(expected)))


@pytest.mark.usefixtures("poison")
def test_the_rate_follows_the_steps_and_adams_counts_what_it_has_seen(config: ConfigDict) -> None:
    c = config
    c.optimizer.update({"momentum": 0.0, "weight_decay": 0.0})
    c.schedule.update({"name": "linear"})
    experiment = build(c)
    state, rates = experiment.network.fresh_state(), []
    for step, batch in enumerate(batches(experiment, 6)):
        if step == 5:  # the run goes on without a guard
            c.guard.max_skipped = 0
            experiment, state = build(c), replace(state, guard={})
        kernel, gradient = (
            x["head"]["kernel"] for x in jax.device_get((state.params, experiment.steps.gradients(state, batch)[0]))
        )
        state, _ = experiment.steps.train(state, batch)
        if step not in (IMAGE, LOSS):
            moved = kernel - np.asarray(state.params["head"]["kernel"])
            rates.append((moved * gradient).sum() / np.square(gradient).sum())
    np.testing.assert_allclose(rates, [0.1 * (1 - step / 20) for step in (0, 1, 3, 5)], rtol=1e-3)
    c.optimizer.name, c.guard.max_skipped = "adam", 10
    experiment = build(c)
    state = experiment.network.fresh_state()
    for batch in batches(experiment, 6):
        state, _ = experiment.steps.train(state, batch)
    (count,) = (int(s.count) for s in state.opt_state if isinstance(s, optax.ScaleByAdamState))
    assert count == 4


# ---- what is skipped -------------------------------------------------------------------------------------------------


def judged(losses: list[float], grads: Any) -> list[tuple[bool, dict[str, float]]]:
    """Whether each update was taken, and what the guard keeps after it."""
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, {"w": jnp.zeros(())}, {}, (), guard={"row": zero})
    guarded = jax.jit(lambda old, new, sums: _guarded(old, new, grads, sums, 3))
    found = []
    for loss in losses:
        new = replace(state, step=state.step + 1, params={"w": state.params["w"] + 1})
        after, sums = guarded(state, new, {"examples": jnp.int32(4), "loss": jnp.float32(4 * loss)})
        taken = after.params["w"] == new.params["w"]
        assert after.step == new.step
        assert sums["skipped"] == 1 - taken
        found.append((bool(taken), {name: float(x) for name, x in after.guard.items()}))
        state = after
    return found


def test_after_too_many_nothing_is_taken_any_more() -> None:
    nan = math.nan
    found = judged([1, nan, nan, 1, nan, nan, nan, 1, 1], {"w": jnp.ones(3)})
    assert [taken for taken, _ in found] == [True, False, False, True, *[False] * 5]
    assert [kept["row"] for _, kept in found] == [0, 1, 2, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_of_one_gradient_is_enough(bad: float) -> None:
    assert judged([1.0], {"a": jnp.ones(3), "b": jnp.ones((2, 2))})[0][0]
    assert not judged([1.0], {"a": jnp.ones(3), "b": jnp.ones((2, 2)).at[1, 0].set(bad)})[0][0]


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_with_one_bad_update_goes_on(
    config: ConfigDict, tmp_path: Path, poison_steps: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    poison_steps(lambda step: (step == 8) | (step == 11))  # at 8 it is to evaluate and save
    config.log_every = 2
    result = train(config, tmp_path)
    out = capsys.readouterr().out
    assert result["step"] == 20
    assert re.findall(r"step (\d+): update skipped: loss [\d.]+, gradients not finite", out) == ["8", "11"]
    with Checkpoints(tmp_path) as saved:
        assert saved.steps() == [16, 20]
    rows = {row["step"]: row for row in read_metrics(tmp_path) if row["kind"] == "train"}
    assert {step: row["skipped"] for step, row in rows.items() if "skipped" in row} == {8: 1, 12: 1}
    assert {row["step"] for row in read_metrics(tmp_path) if row["kind"] == "eval"} == {16, 20}
    assert not list(tmp_path.glob("skipped-*"))


def test_reports_leave_out_what_was_skipped(config: ConfigDict, tmp_path: Path, poison_steps: Any) -> None:
    poison_steps(lambda step: (step == 3) | (step == 6))
    config.train.steps, config.log_every = 7, 1
    train(config, tmp_path / "each")
    config.log_every = 4
    train(config, tmp_path / "fours")
    each, fours = ({row["step"]: row for row in read_metrics(tmp_path / name) if row["kind"] == "train"}
                   for name in ("each", "fours"))  # fmt: skip
    for name in ("loss", "accuracy_top1"):
        assert {step for step, row in each.items() if name not in row} == {3, 6}
        assert fours[4][name] == pytest.approx((each[2][name] + each[4][name]) / 2)
        assert fours[7][name] == pytest.approx((each[5][name] + each[7][name]) / 2)
    assert [fours[step].get("skipped") for step in (1, 4, 7)] == [None, 1, 1]


def test_too_many_in_a_row_end_the_run_with_what_to_study(
    config: ConfigDict, tmp_path: Path, poison_steps: Any
) -> None:
    """Over two stops, the second within the row."""
    poison_steps(lambda step: (step == 4) | (step >= 10))
    c = config
    c.guard.max_skipped, c.log_every = 3, 50
    c.eval.every.steps = c.checkpoint.every.steps = 4
    weights = []
    for c.stop_after_steps in (9, 11):
        train(c, tmp_path)
        with Checkpoints(tmp_path) as saved:
            weights.append(saved.weights(c.stop_after_steps, averaged=False))
            row = restored(saved, c.stop_after_steps, build(c)).guard["row"]
        assert row == {9: 0, 11: 2}[c.stop_after_steps]
    assert_same(*weights)
    c.stop_after_steps = None
    with pytest.raises(UserError, match=r"the updates of steps 10 to 12 were all skipped.*skipped-12\.json.*rate") as e:
        train(c, tmp_path)
    assert "\n" not in str(e.value)
    with Checkpoints(tmp_path) as saved:
        assert saved.latest_step() == 11
    found = json.loads((tmp_path / "skipped-12.json").read_text())
    assert (found["first_step"], found["last_step"]) == (10, 12)
    params = weights[0][0]
    assert found["parameters"].keys() == params.keys() == {"stem", "stage1", "head"}
    for part, norm in found["parameters"].items():
        flat = np.concatenate([x.ravel() for x in jax.tree.leaves(params[part])]).astype(np.float64)
        assert norm == pytest.approx(np.linalg.norm(flat), rel=1e-12)
    assert [update["step"] for update in found["updates"]] == [10, 11, 12]
    for update in found["updates"]:
        assert update["records"] == train_indices(c.seed, 16 * (update["step"] - 1), 16, 100)[0].tolist()
        assert 0 < update["loss"] < 100
        assert update["gradients"] == {"stem": "nan", "stage1": "nan", "head": update["gradients"]["head"]}


def test_what_is_written_are_the_norms_of_the_gradients(config: ConfigDict, tmp_path: Path) -> None:
    c = config
    c.optimizer.update({"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0})
    c.schedule.update({"name": "constant"})
    c.schedule.warmup.steps = 0
    experiment = build(c)
    first, *others = batches(experiment, 3, poisoned=False)
    state, _ = experiment.steps.train(experiment.network.fresh_state(), first)
    state = jax.device_get(state)
    (tmp_path / "skipped-9.json").mkdir()
    with Telemetry(tmp_path, experiment.plan.steps, experiment.plan.epoch) as telemetry:
        in_row = jax.device_put(
            replace(state, guard={"row": np.int32(2)}), experiment.network.abstract_state.step.sharding
        )
        error = Skipped(experiment, in_row, 3, telemetry).study(in_row, tmp_path)
        unwritten = Skipped(experiment, in_row, 9, telemetry).study(in_row, tmp_path)
    assert str(error).startswith("the updates of steps 2 to 3 were all skipped")
    assert re.search(
        r"skipped-9\.json, of their records and norms, cannot be written \(Is a directory\)", str(unwritten)
    )
    updates = json.loads((tmp_path / "skipped-3.json").read_text())["updates"]
    assert len(updates) == 2
    for done, (batch, update) in enumerate(zip(others, updates, strict=True), 1):
        at = jax.device_put(replace(state, step=np.int32(done)), experiment.network.abstract_state.step.sharding)
        after, sums = jax.device_get(experiment.steps.train(at, batch))
        assert update["loss"] == pytest.approx(sums["loss"] / 16, rel=1e-5)
        for part, norm in update["gradients"].items():
            moved = jax.tree.map(
                lambda a, b: np.square(np.float64(a) - b).sum(), state.params[part], after.params[part]
            )
            assert norm == pytest.approx(math.sqrt(sum(jax.tree.leaves(moved))), rel=1e-4)


def test_a_run_may_go_on_with_and_without_a_guard(config: ConfigDict, tmp_path: Path) -> None:
    c = config
    c.optimizer.learning_rate = 0.01
    whole = train(c, tmp_path / "whole")
    for c.stop_after_steps, c.guard.max_skipped in ((5, 0), (9, 10), (12, 7), (None, 0)):
        result = train(c, tmp_path / "parts")
    assert result["splits"]["test"]["loss"] == pytest.approx(whole["splits"]["test"]["loss"], rel=1e-3)


def test_a_negative_number_is_refused(tiny_config: ConfigDict) -> None:
    tiny_config.guard.max_skipped = -1
    with pytest.raises(UserError, match=r"config\.guard\.max_skipped=-1: must be a number, not negative"):
        validate(tiny_config)


def test_a_run_that_diverges_on_four_devices_ends_in_one_line(tiny_npz: Path, tmp_path: Path) -> None:
    done = run_main(f"--config={ROOT / 'tests' / 'tiny.py'}:{tiny_npz}", f"--workdir={tmp_path}",
                    "--config.optimizer.learning_rate=1e20", "--config.guard.max_skipped=5", devices=4)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: the updates of steps 3 to 7 were all skipped.*", done.stderr.strip().splitlines()[-1])
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "skipped-7.json").read_text())
    assert {update["loss"] for update in found["updates"]} == {"nan"}
    assert all(isinstance(norm, float) for norm in found["parameters"].values())  # of the last that were numbers
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
