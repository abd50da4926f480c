"""A run that is stopped, however, and started again by the same command ends where it would have ended."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import ROOT, main_command, main_env, run_main
from ml_collections import ConfigDict
from workdirs import assert_bit_identical, restored, wait_for_step

from jax_resnet.commands.host import command_host
from jax_resnet.errors import Interrupted, UserError
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.metrics_reader import read_metrics
from jax_resnet.runs.workdir import claimed
from jax_resnet.training.experiment import build
from jax_resnet.training.loop import train
from jax_resnet.training.precompile import StepsAhead

TINY = ROOT / "tests" / "tiny.py"


def killed_and_restarted(npz: Path, folder: Path, kills: int, seed: int) -> None:
    """A run that is killed so often, at moments drawn with `seed`, ends bit for bit as one that is not.

    It saves every second step, so that many kills come while a checkpoint is written; some come before the first step.
    """
    args = [f"--config={TINY}:{npz}", f"--config.train.steps={10 * kills}", "--config.log_every=1"]
    args += ["--config.checkpoint.every.steps=2", "--config.eval.every.steps=13"]
    assert run_main(*args, f"--workdir={folder / 'whole'}").returncode == 0
    killed, rng = folder / "killed", random.Random(seed)
    for _ in range(kills):
        rows = read_metrics(killed)
        step = rows[-1]["step"] if rows else 0
        process = programs.start(main_command(*args, f"--workdir={killed}"), env=main_env(), cwd=ROOT)
        if rng.random() < 0.9:
            wait_for_step(killed, min(step + rng.randint(1, 8), 10 * kills - 2), process)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 4))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
    done = run_main(*args, f"--workdir={killed}")
    assert done.returncode == 0, done.stderr
    assert_bit_identical(folder / "whole", killed)
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(folder / d) if r["kind"] == "train"] for d in ("whole", "killed")
    ]
    assert losses[0] == losses[1]  # and every step is recorded once
    results = [json.loads((folder / d / "result.json").read_text())["splits"] for d in ("whole", "killed")]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(int(os.environ.get("KILLS", "30")), marks=pytest.mark.soak)])
def test_killed_and_restarted_is_bit_identical(tiny_npz: Path, tmp_path: Path, kills: int) -> None:
    """`KILLS=100 make soak ARGS="-k killed_and_restarted"` kills more often."""
    seed = random.randrange(1000)
    print("kills drawn with seed", seed)
    killed_and_restarted(tiny_npz, tmp_path, kills, seed)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak)]
)
def test_asked_to_stop_saves_says_so_and_goes_on(
    tiny_npz: Path, tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    args = [f"--config={TINY}:{tiny_npz}", "--config.train.steps=400", "--config.log_every=1"]
    args += ["--config.eval.every.steps=1000", "--config.checkpoint.every.steps=1000"]  # only the stop saves
    stopped = tmp_path / "stopped"
    process = programs.start(main_command(*args, f"--workdir={stopped}"), env=main_env(), cwd=ROOT)
    wait_for_step(stopped, 3, process)
    process.send_signal(signum)
    _, stderr = process.communicate()
    assert process.returncode == status, stderr
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("stopped after step ")
    assert str(stopped) in last
    assert "the same command goes on from there" in last
    saved = read_metrics(stopped)[-1]["step"]
    assert 3 <= saved < 400
    done = run_main(*args, f"--workdir={stopped}")
    assert done.returncode == 0, done.stderr
    assert f"from step {saved}" in done.stdout
    assert run_main(*args, f"--workdir={tmp_path / 'whole'}").returncode == 0
    assert_bit_identical(tmp_path / "whole", stopped)


def test_a_repeated_sigterm_does_not_cut_the_save_short(tiny_npz: Path, tmp_path: Path) -> None:
    """Launchers repeat it: here as fast as can be, until the process has ended."""
    args = [f"--config={TINY}:{tiny_npz}", "--config.train.steps=400", "--config.log_every=1"]
    args += ["--config.eval.every.steps=1000", "--config.checkpoint.every.steps=1000"]  # only the stop saves
    process = programs.start(main_command(*args, f"--workdir={tmp_path}"), env=main_env(), cwd=ROOT)
    wait_for_step(tmp_path, 3, process)
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    _, stderr = process.communicate()
    assert process.returncode in (143, -signal.SIGTERM), stderr  # the latter of one that comes after the last line
    assert stderr.strip().splitlines()[-1].startswith("stopped after step ")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [read_metrics(tmp_path)[-1]["step"]]


def test_asked_to_stop_before_its_first_step_a_run_that_goes_on_says_so_too(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a step of which the evaluation is there already."""
    tiny_config.stop_after_steps = 8
    train(tiny_config, tmp_path)
    tiny_config.stop_after_steps = None
    at = StepsAhead.at

    def asked(self: StepsAhead, *args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return at(self, *args, **options)

    monkeypatch.setattr(StepsAhead, "at", asked)
    with command_host() as host, pytest.raises(Interrupted, match="stopped after step 8 of 20") as e:
        train(tiny_config, tmp_path, host=host)
    assert e.value.signum == signal.SIGTERM


def test_stop_after_steps_leaves_the_schedule_alone(tiny_config: ConfigDict, tmp_path: Path) -> None:
    whole = train(tiny_config, tmp_path / "whole")
    tiny_config.stop_after_steps = 7
    assert train(tiny_config, tmp_path / "parts") == {"step": 7, "splits": {}}
    assert not (tmp_path / "parts" / "result.json").exists()
    assert train(tiny_config, tmp_path / "parts")["step"] == 7  # there already
    tiny_config.stop_after_steps = 13
    assert train(tiny_config, tmp_path / "parts")["step"] == 13
    tiny_config.stop_after_steps = 1000
    assert train(tiny_config, tmp_path / "parts") == whole
    assert_bit_identical(tmp_path / "whole", tmp_path / "parts")
    rates = [[r["learning_rate"] for r in read_metrics(tmp_path / d) if r["step"] == 20 and r["kind"] == "train"]
             for d in ("whole", "parts")]  # fmt: skip
    assert rates[0] == rates[1]


def test_a_finished_run_started_again_says_its_result_and_trains_no_more(
    tiny_config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(tiny_config, tmp_path)
    rows = read_metrics(tmp_path)
    capsys.readouterr()
    assert train(tiny_config, tmp_path) == first
    assert "done: step 20" in capsys.readouterr().out
    assert read_metrics(tmp_path) == rows


def test_the_best_evaluation_survives_restarts(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """Kept: the latest two, and the most accurate of all, also when a later process does the keeping."""
    tiny_config.train.steps = 60
    tiny_config.eval.every.steps = 5
    for stop in (20, 40, 1000):
        tiny_config.stop_after_steps = stop
        train(tiny_config, tmp_path)
    accuracies = {r["step"]: r["accuracy_top1"] for r in read_metrics(tmp_path) if r["kind"] == "eval"}
    with Checkpoints(tmp_path) as checkpoints:
        best = checkpoints.best_step()
        assert best is not None
        assert accuracies[best] == max(accuracies.values())
        before = max((step for step in accuracies if step < 60), key=lambda step: (accuracies[step], step))
        assert set(checkpoints.steps()) == {before, 56, 60}  # saved every 5 and every 8 steps, evaluated after that


def test_a_checkpoint_of_another_network_names_the_parameter(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.stop_after_steps = 1
    train(tiny_config, tmp_path)
    tiny_config.model.widths = (16, 32)
    other = build(tiny_config)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"stage2/block0/.* is \(.*24.*\) there, \(.*32.*\) here"),
    ):
        restored(checkpoints, 1, other)


def test_a_lost_config_is_taken_from_the_checkpoint(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.stop_after_steps = 1
    train(tiny_config, tmp_path)
    (tmp_path / "config.json").unlink()
    tiny_config.optimizer.learning_rate = 7.0
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.1 there, 7\.0 here"):
        train(tiny_config, tmp_path)
    tiny_config.optimizer.learning_rate = 0.1
    train(tiny_config, tmp_path)
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("content", ["", "{}", "null", '{"batch_size": "abc"}', '{"data": 5}', "\x00"])
def test_a_damaged_config_is_one_line(tiny_config: ConfigDict, tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: cannot be read") as e:
        train(tiny_config, tmp_path)
    assert "\n" not in str(e.value)


def test_a_workdir_in_use_is_refused(tiny_config: ConfigDict, tmp_path: Path) -> None:
    with claimed(tmp_path, tiny_config), pytest.raises(UserError, match="another process is training in it"):
        train(tiny_config, tmp_path)


def test_an_unreadable_evaluation_image_loses_no_steps(
    tiny_config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise UserError("test split: record 5: not an image")

    with monkeypatch.context() as patch:
        patch.setattr("jax_resnet.training.loop.evaluate_all", broken)
        with pytest.raises(UserError, match="record 5"):
            train(tiny_config, tmp_path)
    train(tiny_config, tmp_path)
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"] == [1, 5, 8, 9, 10, 15, 16, 20]


def test_a_damaged_checkpoint_is_named(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.stop_after_steps = 1
    train(tiny_config, tmp_path)
    damaged = [f for f in (tmp_path / "checkpoints" / "1" / "state").rglob("*") if f.is_file()]
    for file in damaged:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/1: this checkpoint is damaged") as e:
        train(tiny_config, tmp_path)
    assert "\n" not in str(e.value)


def test_half_a_line_of_metrics_is_left_out(tiny_config: ConfigDict, tmp_path: Path) -> None:
    tiny_config.stop_after_steps = 8
    train(tiny_config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "kind": "train"}\n{"step": 10, "ki')
    tiny_config.stop_after_steps = 1000
    train(tiny_config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if json.loads(line)["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert 9 in steps  # recorded again, in full
    assert all("loss" in json.loads(line) for line in lines if json.loads(line)["kind"] != "save")


def test_asked_to_stop_while_compiling_leaves_at_once(tiny_npz: Path, tmp_path: Path) -> None:
    """Nothing is unsaved then: the compiler, in which Python's handlers wait, is not waited for."""
    args = [f"--config={TINY}:{tiny_npz}", "--config.model.depths=(9, 9)", f"--workdir={tmp_path}"]
    env = main_env() | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_DEBUG_LOG_MODULES": "jax._src.dispatch"}
    process = programs.start(main_command(*args), env=env)
    said = ""
    while "to MLIR module conversion jit(train_step)" not in said:  # the last that JAX says before XLA compiles
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143, stderr
    # The step is compiled on a thread; the loop may have come to wait for it, or be on its way there.
    last = stderr.strip().splitlines()[-1]
    assert last.startswith(("stopped before its first step", "stopped before the first step")), last
    assert "Finished XLA compilation of jit(train_step)" not in said + stderr


def test_the_batch_changes_only_by_saying_so(tiny_config: ConfigDict, tmp_path: Path) -> None:
    """From a step that is still to come on, as if it had been said at the beginning; what is done does not change."""
    tiny_config.eval.every.epochs, tiny_config.eval.every.steps = 2.0, None
    tiny_config.checkpoint.every.epochs, tiny_config.checkpoint.every.steps = 1.0, None
    for of in (tiny_config.train, tiny_config.schedule.warmup):
        of.steps, of.examples = None, of.steps * 16
    said = tiny_config.copy_and_resolve_references()
    said.progressive = ((0.0, 12, 16), (0.5, 12, 32))
    train(said, tmp_path / "said")
    tiny_config.stop_after_steps = 7
    train(tiny_config, tmp_path / "run")
    tiny_config.stop_after_steps = None
    other = tiny_config.copy_and_resolve_references()
    other.batch_size = 32
    with pytest.raises(UserError, match=r"batch_size: 16 there, 32 here.*--config\.progressive='\(\(0, SIZE, 16\), "):
        train(other, tmp_path / "run")
    other = said.copy_and_resolve_references()
    other.progressive = ((0.0, 12, 16), (0.25, 12, 32))
    with pytest.raises(UserError, match="the 7 steps that are done were not in these phases"):
        train(other, tmp_path / "run")
    train(said, tmp_path / "run")
    assert_bit_identical(tmp_path / "said", tmp_path / "run")


def test_a_workdir_that_goes_away_is_one_line(tiny_config: ConfigDict, tmp_path: Path) -> None:
    from jax_resnet.training.loop import Loop

    gone = tmp_path / "run"
    save = Loop._save

    def deleted(self: Loop, step: int, state: Any) -> None:
        if step == 16:
            self.checkpoints.wait()  # what is being written may bring parts of the folder back
            shutil.rmtree(gone)
        save(self, step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_save", deleted)
        with pytest.raises(UserError, match="is no longer there; it was moved or deleted during the run"):
            train(tiny_config, gone)
