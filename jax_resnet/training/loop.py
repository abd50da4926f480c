"""The training loop: a config and a workdir in, a trained network, its checkpoints and its result out."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_resnet.config import to_json
from jax_resnet.data.loader import Feed
from jax_resnet.errors import Interrupted, UserError
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.log import Telemetry
from jax_resnet.runs.metrics_reader import evaluations
from jax_resnet.runs.paths import AnyPath, open_path
from jax_resnet.runs.retention import Keep
from jax_resnet.runs.workdir import claimed, has_checkpoints, keeping_compiled, write_json
from jax_resnet.runtime.distributed import Agreement, all_agree
from jax_resnet.runtime.host import COMPILING, WAITING, Host
from jax_resnet.training.evaluate import IN_FLIGHT, evaluate_all
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.header import header
from jax_resnet.training.metrics import Sums
from jax_resnet.training.network import initial_weights
from jax_resnet.training.precompile import StepsAhead
from jax_resnet.training.resume import check_same_past, restore_or_begin
from jax_resnet.training.skipped import Skipped
from jax_resnet.training.state import TrainState, to_fields
from jax_resnet.training.window import Window, check_finite


def train(config: ConfigDict, workdir: str | os.PathLike[str], *, host: Host | None = None) -> dict[str, Any]:
    """Train as `config` says, going on from the newest sound checkpoint in `workdir` if there is one.

    Leaves in workdir: config.json, data.json, checkpoints/, metrics.jsonl, tensorboard/, compiled/, with config.profile
    profile/; at the end curves.png and result.json.

    The calling program stays as it is: no signal handler, thread, watchdog or process is left behind, and none of its
    own is touched. Two settings stay: OpenCV uses no threads of its own, and absl's flags count as parsed where worker
    processes read. `host` may ask to stop: see runtime.host.Host.

    Returns {"step": updates done, "splits": {split: metrics}}, with metrics as `evaluate` gives them.

    Raises UserError for what the user can mend, and Interrupted, with everything saved, when `host` asks to stop.
    KeyboardInterrupt passes through; the run goes on from its newest checkpoint.
    """
    host = host or Host()
    experiment, workdir = build(config), open_path(workdir)
    weights, about_weights = dict[str, np.ndarray](), dict[str, str]()
    if not has_checkpoints(workdir):
        weights, about_weights = initial_weights(experiment.config, experiment.network)
    with (
        claimed(workdir, experiment.config) as stored,
        keeping_compiled(workdir),
        Checkpoints(workdir, _keep(experiment)) as checkpoints,
        _compiled_ahead(experiment, checkpoints.latest_step() or 0, host) as steps,
    ):
        notes: list[str] = []
        start, state = restore_or_begin(experiment, checkpoints, weights, notes.append)
        check_same_past(stored, experiment, start, workdir)
        with (
            host.watching(config.stuck_after),
            _telemetry(experiment, workdir, start) as telemetry,
            closing(experiment.train_batches(start, experiment.last_step, telemetry.broken)) as batches,
        ):
            telemetry.screen.header(header(experiment, workdir, start) | about_weights)
            for note in notes:
                telemetry.say(note)
            _describe_data(experiment, workdir)
            # Tell the other processes from inside: closing the contexts above may wait for them.
            # Forbid implicit transfers; every transfer below is explicit.
            with host.one_fate(checkpoints.wait), jax.transfer_guard("disallow"):
                return Loop(experiment, Supply(steps, batches), checkpoints, telemetry, host).run(start, state)


def _compiled_ahead(experiment: Experiment, start: int, host: Host) -> StepsAhead:
    steps, phases = experiment.steps, experiment.plan.between(start, experiment.last_step)
    evaluation = steps.evaluate, experiment.eval_shapes()
    return StepsAhead(steps.train, phases, experiment.shapes, evaluation, joins=host.joins_threads)


def _telemetry(experiment: Experiment, workdir: AnyPath, start: int) -> Telemetry:
    plan = experiment.plan
    return Telemetry(workdir, plan.steps, plan.epoch, start_step=start, profile=experiment.config.profile)


def _keep(experiment: Experiment) -> Keep:
    c = experiment.config.checkpoint
    return Keep(latest=c.keep, best=c.keep_best, metric=c.best_by, always=experiment.plan.keeps)


def _describe_data(experiment: Experiment, workdir: AnyPath) -> None:
    if jax.process_index() == 0:
        data = experiment.data
        facts = {"class_names": data.class_names, f"{data.inputs.name}_shape": data.input_shape}
        write_json(workdir / "data.json", facts)


@dataclass(frozen=True)
class Supply:
    """What an update takes beside the state: the compiled step of its phase, and its batch."""

    steps: StepsAhead
    batches: Feed


class Loop:
    """One process's way through a training."""

    def __init__(
        self, experiment: Experiment, supply: Supply, checkpoints: Checkpoints, telemetry: Telemetry, host: Host
    ):
        self.experiment, self.supply, self.host = experiment, supply, host
        self.checkpoints, self.telemetry = checkpoints, telemetry
        self._agreement = Agreement(experiment.mesh, IN_FLIGHT)
        self._window = Window(supply.batches, experiment.task)
        self._began = time.monotonic()
        self._splits: dict[str, Any] = {}  # the evaluation of the step that is done, where it has one
        self._stop = False

    def run(self, start: int, state: TrainState) -> dict[str, Any]:
        """Train on from `state`, the state after `start` updates. Unless `start` is 0 it is saved already.

        Returns what `train` does.
        """
        experiment, plan = self.experiment, self.experiment.plan
        self._saved = done = start
        self._skipped = Skipped(experiment, state, start, self.telemetry)
        if 0 < start < plan.steps and plan.evaluates(start):
            self._evaluate(start, state, even_if_recorded=False)
        for step in range(start + 1, experiment.last_step + 1):
            if self._stop:
                break
            try:
                updated = self._update(step, state, first=step == start + 1)
            except UserError:  # of files at fault: mended, the run goes on from here
                self._save_before_leaving(step - 1, state)
                raise
            if updated is None:
                self._stop = True
                break
            state, sums = updated
            done = step
            self._follow(step, sums)
            saves = plan.saves(step) or step == experiment.last_step
            reports = saves or self._stop or step % experiment.config.log_every == 0 or step == start + 1
            if reports:
                self._skipped.read()
            if self._skipped.too_many:
                raise self._skipped.study(state, self.telemetry.workdir)
            if reports:
                self._report(step)
            # Skipped updates in a row may end the run: do not save over a good checkpoint what comes between them.
            if saves and (not self._skipped.row or step == experiment.last_step):
                self._save_and_evaluate(step, state)
        if done > self._saved:
            self._save(done, state)
        self.checkpoints.wait()
        self.telemetry.saving(done, self.checkpoints.blocked, time.monotonic() - self._began)
        return self._finish(done, state)

    def _update(self, step: int, state: TrainState, *, first: bool) -> tuple[TrainState, Sums] | None:
        """Return the state after update `step`, counted from 1, and its sums; None if asked to stop before it began."""
        with self._all_saved("compiling the step", step - 1) if first else nullcontext():
            train_step = self.supply.steps.at(step - 1, stopped=self._stopped_alone)
            batch = self.supply.batches.take(stopped=self._stopped_alone) if train_step else None
            if batch is None:
                return None
            self.host.beat(f"step {step:,} on the devices", COMPILING if first else WAITING)
            with self.telemetry.trace.of(step):
                return train_step(state, batch, *self.experiment.steps.teacher_weights)

    def _stopped_alone(self) -> bool:
        """Whether to stop at once. Only where there is one process: several must agree, see Agreement."""
        return bool(self.host.stop_requested()) and jax.process_count() == 1

    def _follow(self, step: int, sums: Sums) -> None:
        """Take note of a step that is on the devices, and of whether to stop after it."""
        self.telemetry.trace.after(step, sums)
        self._window.add(sums)
        self._skipped.add(step, sums)
        self.host.beat(f"what comes before step {step + 1:,}")
        self.checkpoints.check()
        self._stop = self._agreement.ask(bool(self.host.stop_requested()))

    def _report(self, step: int) -> None:
        rate = self.experiment.steps.learning_rate(jax.device_put(np.int32(step - 1)))
        self.telemetry.train(step, learning_rate=float(jax.device_get(rate)), **self._window.close(step))

    def _save_and_evaluate(self, step: int, state: TrainState) -> None:
        self._save(step, state)
        self._splits = {}
        if self.experiment.plan.evaluates(step) and not self._stop:
            self._evaluate(step, state)
        self._window.restart()

    def _save(self, step: int, state: TrainState) -> None:
        check_finite(bool(jax.device_get(self.experiment.steps.all_finite(state))), "the state", step)
        self.host.beat(f"saving step {step:,}", COMPILING)
        self.telemetry.upload()  # first, so that no saved step lacks its lines
        self.checkpoints.save(step, to_fields(state), to_json(self.experiment.config))
        self._saved = step

    def _save_before_leaving(self, step: int, state: TrainState) -> None:
        """Save what is done when an error ends the run.

        Not in a job, as saving takes all processes; nor after skipped updates, whose weights may hold NaNs.
        """
        self._skipped.read()
        if step > self._saved and jax.process_count() == 1 and not self._skipped.row:
            self._save(step, state)

    def _evaluate(self, step: int, state: TrainState, *, even_if_recorded: bool = True) -> None:
        """Evaluate and record every split, or stop without having done so.

        Unless `even_if_recorded`, metrics that are recorded for this step are used as they are. A resumed run needs
        this: it may have ended after saving and before evaluating.
        """
        name = self.experiment.data.eval.name
        recorded: Mapping[str, Any] = {}
        if not even_if_recorded:
            recorded = evaluations(self.telemetry.workdir).get(step, {})
            wanted = [name, f"{name}_ema"][: 1 + bool(state.ema)]
            if all_agree(set(wanted) <= recorded.keys()):
                self._splits = {split: recorded[split] for split in wanted}
                return
        with self._all_saved("the evaluation", step):
            splits = evaluate_all(
                self.experiment, state, self.telemetry.broken, self._asked_in_evaluation, self.supply.steps.evaluation()
            )
        self._stop = splits is None
        self._splits = splits or {}
        for split, metrics in self._splits.items():
            if even_if_recorded or split not in recorded:
                self.telemetry.evaluation(step, split, metrics)
        if splits:
            self.checkpoints.evaluated(step, splits)

    def _asked_in_evaluation(self) -> bool:
        self.host.beat("a batch of the evaluation")
        return self._agreement.ask(bool(self.host.stop_requested()))

    @contextmanager
    def _all_saved(self, doing: str, step: int) -> Iterator[None]:
        """Do work that may take long inside, and may be cut short, because `step` is saved already."""
        self.host.beat(doing, COMPILING)
        with self.host.all_saved(self._stopped(step), self.checkpoints.wait):
            yield
        self.host.beat("the next step")

    def _finish(self, step: int, state: TrainState) -> dict[str, Any]:
        """Return the result, or raise Interrupted; everything is saved."""
        plan, telemetry = self.experiment.plan, self.telemetry
        if not (self._splits or self._stop) and step == plan.steps:
            # A finished run that is started again has taken no step.
            self._evaluate(step, state, even_if_recorded=False)
        asked = self.host.stop_requested()
        if self._stop or (asked and not self._splits):
            raise Interrupted(self._stopped(step), asked or signal.SIGTERM)
        if step < plan.steps:
            telemetry.say(self._stopped(step, "without --config.stop_after_steps "))
            return {"step": step, "splits": self._splits}
        telemetry.result(step, self._splits, to_json(self.experiment.config))
        texts = [f"{split} {self.experiment.task.text(metrics)}" for split, metrics in self._splits.items()]
        telemetry.say(f"done: step {step:,}, {', '.join(texts)}, in {telemetry.workdir}")
        commands = (f"jax-resnet {name} --workdir={telemetry.workdir}" for name in ("eval", "export"))
        telemetry.say(f"next: {' or '.join(commands)}")
        return {"step": step, "splits": self._splits}

    def _stopped(self, step: int, how: str = "") -> str:
        if step == 0:
            return "stopped before the first step; the same command begins again"
        total, workdir = self.experiment.plan.steps, self.telemetry.workdir
        return f"stopped after step {step:,} of {total:,}, saved in {workdir}; the same command {how}goes on from there"
