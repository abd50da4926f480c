"""Training by phases of image and batch size: what a step takes, its rate; each kind of batch compiles once, ahead."""

import json
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import programs
import pytest
from conftest import ROOT, main_command, main_env, run_main
from ml_collections import ConfigDict
from programs import until
from tiny import data_config
from workdirs import assert_bit_identical, wait_for_step

from jax_resnet.config import default, differences, duration, from_json, to_json, validate
from jax_resnet.data.sampling import Phase, train_indices
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import UserError
from jax_resnet.runs.log import Telemetry
from jax_resnet.runs.metrics_reader import read_metrics
from jax_resnet.runtime.host import COMPILER_THREAD
from jax_resnet.training.experiment import build
from jax_resnet.training.loop import train
from jax_resnet.training.plan import Plan, describe
from jax_resnet.training.precompile import StepsAhead

ROWS = ((0.0, 6, 32), (0.4, 10), (0.75, 12, 8))


def planned(rows: Any, num_examples: int = 1437, batch_size: int = 64, **units: Any) -> Plan:
    c = default()
    c.batch_size, c.progressive, c.train = batch_size, rows, duration(**(units or {"epochs": 3}))
    validate(c)
    return Plan.of(c, num_examples)


@pytest.fixture
def config(tiny_config: ConfigDict) -> ConfigDict:
    """3 epochs of 100 images: 4 steps of 32 (128 examples), 6 of 16 (to 224), 10 of 8 (to 304)."""
    c = tiny_config
    c.model.depths, c.model.widths = (1,), (16,)
    c.data.image.crop = "none"
    c.train, c.progressive, c.log_every = duration(epochs=3), ROWS, 1
    c.schedule.warmup, c.eval.every, c.checkpoint.every = (duration(examples=n) for n in (48, 100, 50))
    return c


# ---- phases and what their steps take --------------------------------------------------------------------------------


def test_phases_end_where_the_next_begin_to_half_a_batch():
    assert planned(ROWS, 100, 16).phases == (
        Phase(0, 4, 6, 32, 0),  # 0.4 of 300 examples: 120 are 3.75 batches
        Phase(4, 6, 10, 16, 128),  # 225 − 128 examples: 6.06 batches
        Phase(10, 10, 12, 8, 224),  # 300 − 224: 9.5
    )


@pytest.mark.parametrize("rows", [ROWS, ((0, 8, 100), (0.1, 9, 7), (0.11, 10, 1000), (0.9, 9, 33))])
@pytest.mark.parametrize("num_examples", [1000, 1437])
@pytest.mark.parametrize("epochs", [1, 2.5, 90])
def test_phases_follow_one_another_and_their_shares(rows, num_examples, epochs):
    plan = planned(rows, num_examples, epochs=epochs)
    step = example = 0
    for phase, end in zip(plan.phases, [*(row[0] for row in rows[1:]), 1], strict=True):
        assert (phase.first_step, phase.first_example) == (step, example)
        step, example = step + phase.steps, example + phase.steps * phase.batch_size
        assert phase.steps == 1 or abs(example - end * epochs * num_examples) <= phase.batch_size / 2 + 1e-6
    assert plan.steps == step
    assert plan.position(step) == example / 64


@pytest.mark.parametrize("units", [{"epochs": 30}, {"epochs": 2.5}, {"steps": 25}, {"steps": 3}, {"examples": 288}])
def test_sizes_alone_change_no_number_of_steps(units):
    plain, sized = planned((), **units), planned(((0, 8), (0.3, 10), (0.77, 12)), **units)
    assert plain.phases == (Phase(0, plain.steps, None, 64, 0),)
    assert sized.steps == plain.steps
    steps = range(1, plain.steps + 1)
    assert [sized.position(s) for s in steps] == [plain.position(s) for s in steps] == list(steps)
    assert [sized.evaluates(s) for s in steps] == [plain.evaluates(s) for s in steps]


def test_no_phase_is_without_a_step():
    assert [p.steps for p in planned(((0, 8), (0.001, 9), (0.002, 10)), steps=4).phases] == [1, 1, 2]
    assert [p.steps for p in planned(ROWS, epochs=0.001).phases] == [1, 1, 1]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(100, 16), (37, 16), (1437, 64)])
def test_each_epoch_has_each_record_once_across_changes_of_the_batch(num_examples, batch_size):
    plan = planned(((0, 8, batch_size * 2), (0.3, 9), (0.6, 10, 5)), num_examples, batch_size, epochs=4)
    seen: list[int] = []
    for phase in plan.phases:
        for step in range(phase.first_step, phase.end):
            records, epochs = train_indices(1, phase.examples(step), phase.batch_size, num_examples)
            assert epochs.tolist() == [n // num_examples for n in range(len(seen), len(seen) + phase.batch_size)]
            seen += records.tolist()
    assert abs(len(seen) - 4 * num_examples) <= 2.5
    steady = train_indices(1, 0, len(seen), num_examples)[0]
    assert seen == steady.tolist()  # the order is that of batches that never change
    for epoch in range(len(seen) // num_examples):
        assert sorted(seen[epoch * num_examples :][:num_examples]) == list(range(num_examples))


def test_evaluations_follow_the_examples():
    plan = planned(ROWS, 100, 16)  # examples: 32, 64, 96, 128, 144 … 224, 232 … 304; an epoch is 100
    assert [step for step in range(1, plan.steps + 1) if plan.evaluates(step)] == [4, 9, 20]


def test_the_plan_in_words():
    assert describe(planned(ROWS, 100, 16)) == "6 px × 32 to step 4, 10 px × 16 to step 10, 12 px × 8 to the end"
    assert describe(planned(((0, 128), (0.5, 224)), 100_000)) == "128 px to step 2,344, 224 px to the end"


def test_phases_travel_to_other_processes():
    phases = planned(ROWS).phases
    assert pickle.loads(pickle.dumps(phases)) == phases


def test_a_stored_config_is_the_same_config(config):
    stored = from_json(json.loads(json.dumps(to_json(config))))
    assert differences(config, stored) == []
    config.progressive = ((0.0, 6, 32), (0.4, 10), (0.75, 12, 16))
    assert differences(config, stored) == [f"progressive: {config.progressive} there, {ROWS} here"]


@pytest.mark.parametrize("reference", [16, 0])
@pytest.mark.parametrize("name", ["cosine", "linear", "step", "constant"])
def test_the_rate_of_each_update_is_that_of_its_place_in_the_data(config, name, reference):
    config.optimizer.learning_rate, config.optimizer.reference_batch = 0.5, reference
    config.schedule.update({"name": name, "final": 0.1, "boundaries": (0.5, 0.8), "factor": 0.2})
    experiment = build(config)
    found = [float(experiment.steps.learning_rate(step)) for step in range(20)]
    batches = [32] * 4 + [16] * 6 + [8] * 10
    for step, (batch, rate) in enumerate(zip(batches, found, strict=True)):
        seen = Fraction(sum(batches[:step]))
        t = float((seen - 48) / (304 - 48))
        share = {
            "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * t)) / 2,
            "linear": 0.1 + 0.9 * (1 - t),
            "step": max(0.1, 0.2 ** sum(seen / 16 >= round(b * 304 / 16) for b in (0.5, 0.8))),
            "constant": 1.0,
        }[name]
        expected = 0.5 * (float(seen / 48) if seen < 48 else share) * (batch / 16 if reference else 1)
        assert rate == pytest.approx(expected, rel=1e-5, abs=1e-7), step


@pytest.mark.parametrize("own", [None, 9])
def test_images_in_memory_come_at_the_size_that_is_asked_for(tiny_npz: Path, own: int | None):
    c = data_config(name=f"npz:{tiny_npz}", channels=1, crop="pad", size=own)
    split, indices = open_dataset(c).train, np.array([5, 0, 99])
    pixels = np.load(tiny_npz)["x_train"]
    for size in (6, 12, 15, None):
        arrays, _ = split.read(indices, None, size)
        side = size or own or 12
        area = cv2.INTER_AREA if side == 6 else cv2.INTER_LINEAR
        expected = [cv2.resize(pixels[i], (side, side), interpolation=area)[..., None] for i in indices]
        np.testing.assert_array_equal(arrays["image"], expected)
        assert arrays["label"].tolist() == np.load(tiny_npz)["y_train"][indices].tolist()


@pytest.mark.parametrize("crop", ["random_resized", "pad"])
def test_images_in_files_come_at_the_size_that_is_asked_for(tmp_path: Path, crop: str):
    rng = np.random.default_rng(0)
    for part in ("train/a", "val/a"):
        (tmp_path / part).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / part / "1.png"), rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    c = data_config(name=f"folder:{tmp_path}", size=8, crop=crop)
    split = open_dataset(c).train
    c.image.size = 14
    own = open_dataset(c).train  # its images are of 14 pixels anyway
    for rngs in (lambda: None, lambda: [np.random.default_rng(3)]):
        images = split.read(np.array([0]), rngs(), 14).arrays["image"]
        assert images.shape == (1, 14, 14, 3)
        np.testing.assert_array_equal(images, own.read(np.array([0]), rngs()).arrays["image"])


# ---- compiled ahead of need ------------------------------------------------------------------------------------------


class FakeStep:
    """Has the methods of a jitted step; compiling for a size waits until it is allowed."""

    def __init__(self) -> None:
        self.allowed = {size: threading.Event() for size in (1, 2, 3, EVALUATION)}
        self.begun: list[int] = []

    def lower(self, size: int) -> Any:
        return type("Lowered", (), {"compile": lambda _: self._compile(size)})()

    def _compile(self, size: int) -> str:
        self.begun.append(size)
        assert self.allowed[size].wait(10)
        if size == 3:
            raise MemoryError("no room")
        return f"compiled for {size}"


EVALUATION = 9  # pixels
PHASES = (Phase(0, 2, 1, 4, 0), Phase(2, 2, 2, 4, 8), Phase(4, 2, 1, 4, 16), Phase(6, 2, 3, 4, 24))


@pytest.fixture
def fake() -> Iterator[FakeStep]:
    step = FakeStep()
    yield step
    for event in step.allowed.values():
        event.set()


def ahead(fake: FakeStep, phases: Sequence[Phase] = PHASES) -> StepsAhead:
    return StepsAhead(fake, phases, lambda phase: (phase.image_size,), (fake, (EVALUATION,)), joins=False)


def test_a_step_waits_for_its_own_size_only_and_sizes_compile_once(fake: FakeStep) -> None:
    fake.allowed[1].set()
    with ahead(fake) as steps:
        assert [steps.at(0), steps.at(1)] == ["compiled for 1"] * 2
        until(lambda: fake.begun == [1, 2])
        assert steps.at(1) == "compiled for 1"  # while 2 is being compiled
        threading.Timer(0.05, fake.allowed[2].set).start()
        assert steps.at(2) == "compiled for 2"
        assert steps.at(4) == "compiled for 1"
        until(lambda: fake.begun == [1, 2, 3])


def test_what_the_compiler_raises_for_a_later_phase_is_raised_at_once(fake: FakeStep) -> None:
    for event in fake.allowed.values():
        event.set()
    with ahead(fake) as steps, pytest.raises(MemoryError, match="room"):
        until(lambda: steps.at(0) is None)


def test_being_asked_to_stop_ends_the_wait_and_leaving_the_compilations(fake: FakeStep) -> None:
    fake.allowed[1].set()
    with ahead(fake) as steps:
        until(lambda: fake.begun == [1, 2])
        assert steps.at(2, stopped=lambda: True) is None
        (thread,) = (t for t in threading.enumerate() if t.name == COMPILER_THREAD)
    fake.allowed[2].set()
    thread.join()
    assert fake.begun == [1, 2]


def test_the_evaluation_is_compiled_last_and_waited_for(fake: FakeStep) -> None:
    fake.allowed[1].set()
    with ahead(fake, PHASES[:1]) as steps:
        assert steps.at(0) == "compiled for 1"
        threading.Timer(0.05, fake.allowed[EVALUATION].set).start()
        assert steps.evaluation() == "compiled for 9"
        assert fake.begun == [1, EVALUATION]


def test_an_evaluation_that_cannot_be_compiled_ahead_is_compiled_when_called(fake: FakeStep) -> None:
    for event in fake.allowed.values():
        event.set()
    with ahead(fake, PHASES[3:]) as steps:  # of which the step cannot be compiled
        assert steps.evaluation() is fake
    with StepsAhead(fake, PHASES[:1], lambda phase: (phase.image_size,), (fake, (3,))) as steps:
        assert steps.evaluation() is fake
        assert steps.at(0) == "compiled for 1"


def test_what_is_not_among_the_phases_is_compiled_when_called(fake: FakeStep) -> None:
    """No update is left; or, of the checkpoints, the newest was damaged."""
    with ahead(fake, ()) as steps:
        assert steps.evaluation() is fake
        assert not [t for t in threading.enumerate() if t.name == COMPILER_THREAD]
    fake.allowed[1].set()
    with ahead(fake, PHASES[2:3]) as steps:
        assert steps.at(3) is fake
        assert steps.at(4) == "compiled for 1"


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_each_kind_of_batch_compiles_once_and_stops_and_devices_change_nothing(
    config: ConfigDict, tiny_npz: Path, tmp_path: Path
) -> None:
    compiled: list[str] = []

    def listener(event: str, _: float, **about: Any) -> None:
        if "backend_compile" in event and "train_step" in about["fun_name"]:
            compiled.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    config.checkpoint.keep = 20
    train(config, tmp_path / "whole")
    assert compiled == [COMPILER_THREAD] * 3  # and none by the loop
    rows = [row for row in read_metrics(tmp_path / "whole") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [*range(1, 21)]
    evaluated = [row["step"] for row in read_metrics(tmp_path / "whole") if row["kind"] == "eval"]
    assert evaluated == [4, 9, 20]

    # Stopped one step before the third phase.
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "9", tmp_path / "stopped" / "checkpoints" / "9")
    compiled.clear()
    train(config, tmp_path / "stopped")
    assert compiled == [COMPILER_THREAD] * 2
    assert_bit_identical(tmp_path / "whole", tmp_path / "stopped")

    # From the command line, on two devices.
    options = [f"--config={ROOT / 'tests' / 'tiny.py'}:{tiny_npz}", f"--config.progressive={ROWS}"]
    options += ["--config.model.depths=(1,)", "--config.model.widths=(16,)", "--config.data.image.crop=none"]
    options += ["--config.train.epochs=3", "--config.schedule.warmup.examples=48", "--config.log_every=1"]
    options += ["--config.eval.every.examples=100", "--config.checkpoint.every.examples=50"]
    done = run_main(*options, f"--workdir={tmp_path / 'two'}", devices=2)
    assert done.returncode == 0, done.stderr
    assert "batch        8 to 32 (4 to 16 per device)" in done.stdout
    assert "steps        20 (3.04 epochs), evaluated every 1 epochs" in done.stdout
    assert "progressive  6 px × 32 to step 4, 10 px × 16 to step 10, 12 px × 8 to the end" in done.stdout
    one, two = (
        [row["loss"] for row in read_metrics(tmp_path / d) if "loss" in row and row["step"] <= 20]
        for d in ("whole", "two")
    )
    np.testing.assert_allclose(one, two, rtol=2e-4)  # as in test_devices.py
    assert json.loads((tmp_path / "two" / "config.json").read_text())["progressive"] == [list(row) for row in ROWS]
    config.progressive = ROWS[:2]
    with pytest.raises(UserError, match="only those to come may change"):
        train(config, tmp_path / "two")


class Killed(BaseException):
    """Ends a run as abruptly as can be within a process."""


@pytest.mark.slow
def test_a_run_killed_in_each_phase_goes_on_bit_for_bit(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, tmp_path / "whole")
    report = Telemetry.train
    for last in (3, 8, 17):  # saved after 2, 6 and 14, one of each phase

        def killing(self: Telemetry, step: int, last: int = last, **values: Any) -> None:
            if step == last:
                raise Killed
            report(self, step, **values)

        monkeypatch.setattr(Telemetry, "train", killing)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed")
    monkeypatch.setattr(Telemetry, "train", report)
    train(config, tmp_path / "killed")
    assert_bit_identical(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "begins", [pytest.param(0.9, id="training", marks=pytest.mark.soak), pytest.param(0.001, id="waiting")]
)
def test_a_signal_while_a_later_phase_compiles_saves_and_leaves_at_once(
    tiny_npz: Path, tmp_path: Path, begins: float
) -> None:
    """Sizes enough that compiling them all takes many times longer than saving."""
    sizes = tuple((i and begins + i / 1000, 12 + i) for i in range(12))
    options = [f"--config={ROOT / 'tests' / 'tiny.py'}:{tiny_npz}", f"--config.progressive={sizes}"]
    options += ["--config.train.steps=2000", "--config.log_every=1", "--config.model.name=cifar_resnet32"]
    options += ["--config.eval.every.steps=5000", "--config.checkpoint.every.steps=5000", f"--workdir={tmp_path}"]
    env = main_env() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = programs.start(main_command(*options), env=env)
    wait_for_step(tmp_path, 1 if begins > 0.5 else 2, process)  # the third step has another size
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143, stderr  # not aborted by a thread that is cut off
    last = read_metrics(tmp_path)[-1]["step"]
    assert f"stopped after step {last:,} of 2,000, saved in " in stderr
    assert (tmp_path / "checkpoints" / str(last)).is_dir()
    assert begins > 0.5 or last < 22  # two steps a size: the last ones are not waited for


# ---- a user's mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (((0.0, 16), 5), {}, r"config\.progressive: 5 is no phase; give each as \(share"),
        ((0.0, 16), {}, r"config\.progressive: 0\.0 is no phase"),
        (((0.0, 16), (0.5,)), {}, r"config\.progressive: \(0\.5,\) is no phase"),
        (((0.0, 16, 4, 4),), {}, r"is no phase"),
        (((0.0, 16.5),), {}, r"\(0\.0, 16\.5\) is no phase"),
        (((0.0, 0),), {}, r"\(0\.0, 0\) is no phase"),
        (((0.0, 16, -4),), {}, r"is no phase"),
        ((("0", 16),), {}, r"\('0', 16\) is no phase"),
        (((0.1, 16), (0.5, 20)), {}, r"config\.progressive begins its phases at \[0\.1, 0\.5\]: .* the first 0"),
        (((0.0, 16), (0.5, 20), (0.5, 24)), {}, r"rising shares below 1"),
        (((0.0, 16), (1.0, 20)), {}, r"rising shares below 1"),
        (((0.0, 16), (float("nan"), 20)), {}, r"rising shares below 1"),
        (((0.0, 16), (0.5, 20, 32)), {}, r"config\.train\.steps=20: .*give epochs or examples"),
        (((0, 12), (0.5, 16, 9)), {"data.mixup": 0.2}, r"progressive: batch_size=9: must be even"),
        (((0, 12), (0.5, 16, 24)), {"model.bn_group_size": 16}, r"size=16 does not divide config\.progressive: .*=24"),
        (((0, 12), (0.5, 16, 101)), {}, r"config\.progressive: batch_size=101 is larger than the train split .* 100 e"),
        (((0, 12), (0.5, 1)), {}, r"config\.progressive: cifar_resnet8 takes images of at least 2 .* these have 1; gi"),
    ],
)
def test_mistakes_are_named_in_one_line(tiny_config: ConfigDict, rows: Any, changes: dict, message: str) -> None:
    tiny_config.progressive = rows
    if "steps" not in message:
        for key in ("train", "schedule.warmup", "eval.every", "checkpoint.every"):
            tiny_config.update_from_flattened_dict({f"{key}.epochs": 4.0, f"{key}.steps": None})
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as e:
        build(tiny_config)
    assert "\n" not in str(e.value)
