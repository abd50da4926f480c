"""The main job: a config and a workdir in, a trained network, its checkpoints and its result out."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_resnet.config import to_json
from jax_resnet.data.loader import Feed
from jax_resnet.errors import Interrupted, UserError
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.log import Telemetry, Trace
from jax_resnet.runs.metrics_log import evaluations
from jax_resnet.runs.paths import AnyPath, open_path
from jax_resnet.runs.retention import Keep
from jax_resnet.runs.workdir import claimed, has_checkpoints, keeping_compiled, write_json
from jax_resnet.runtime import notice
from jax_resnet.runtime.distributed import Agreement, all_agree
from jax_resnet.runtime.failure import COMPILING, WAITING, Watchdog, end, one_fate
from jax_resnet.runtime.signals import Signals
from jax_resnet.training.evaluate import IN_FLIGHT, evaluate_all
from jax_resnet.training.experiment import Job
from jax_resnet.training.metrics import Sums, accuracy_text, total
from jax_resnet.training.plan import Plan
from jax_resnet.training.precompile import StepsAhead
from jax_resnet.training.pretrained import placed
from jax_resnet.training.skipped import Skipped
from jax_resnet.training.state import AS_SAVED, TrainState, from_fields, to_fields


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains as `config` says, going on from the newest sound checkpoint in `workdir` if there is one.

    Leaves in workdir: config.json, data.json, checkpoints/, metrics.jsonl, tensorboard/, compiled/, with config.profile
    profile/; at the end curves.png and result.json.
    Returns {"step": updates done, "splits": {split: metrics}}, with metrics as `evaluate` gives them.

    Raises UserError for what the user can mend, and Interrupted, with everything saved, after SIGINT or SIGTERM. In a
    job of several processes any other end of one is the end of all, without an exception.
    """
    with one_fate(), Signals(_leave_at_once) as signals:
        notice.watch()
        job, workdir = Job(config), open_path(workdir)
        weights, about_weights = ({}, {}) if has_checkpoints(workdir) else job.weights_to_begin_with()
        with (
            claimed(workdir, job.config) as stored,
            keeping_compiled(workdir),
            Checkpoints(workdir, _keep(job)) as checkpoints,
            _compiled_ahead(job, checkpoints.latest_step() or 0) as steps,
        ):
            notes: list[str] = []
            like = job.abstract_state
            found = checkpoints.restore_newest(to_fields(like), notes.append, as_saved=AS_SAVED)
            start, state = (found[0], from_fields(found[1], like)) if found else (0, placed(job.fresh_state(), weights))
            check_same_past(stored, job, start, workdir)
            with (
                Watchdog(config.stuck_after) as watchdog,
                Telemetry(workdir, job.plan, start) as telemetry,
                closing(job.train_batches(start, job.last_step, telemetry.broken)) as batches,
                Trace(telemetry.folder, config.profile, job.plan.steps) as trace,
            ):
                telemetry.header(job.header(workdir, start) | about_weights)
                for note in notes:
                    telemetry.say(note)
                if jax.process_index() == 0:
                    facts = {"class_names": job.data.class_names, "image_shape": job.data.train.image_shape}
                    write_json(workdir / "data.json", facts)
                # Told to the other processes from here: leaving what is open above may wait for them.
                with one_fate(checkpoints.wait), jax.transfer_guard("disallow"):  # what moves does so by name
                    run = Run(job, workdir, steps, batches, checkpoints, telemetry, trace, signals, watchdog)
                    return run.from_step(start, state)


def _leave_at_once(signum: int) -> NoReturn:
    end("stopped before the first step; the same command begins again", 128 + signum)


def _compiled_ahead(job: Job, start: int) -> StepsAhead:
    phases = job.plan.between(start, job.last_step)
    return StepsAhead(job.train_step, phases, job.shapes, job.eval_step, job.eval_shapes())


def _keep(job: Job) -> Keep:
    c = job.config.checkpoint
    return Keep(latest=c.keep, best=c.keep_best, metric=c.best_by, always=job.plan.keeps)


@dataclass
class Run:
    """One process's way through a training."""

    job: Job
    workdir: AnyPath
    steps: StepsAhead
    batches: Feed
    checkpoints: Checkpoints
    telemetry: Telemetry
    trace: Trace
    signals: Signals
    watchdog: Watchdog

    def __post_init__(self) -> None:
        self._agreement = Agreement(self.job.mesh, IN_FLIGHT)
        self._began = time.monotonic()

    def from_step(self, start: int, state: TrainState) -> dict[str, Any]:
        """Trains on from `state`, which is that of `start` and is saved. Returns what `train` does."""
        job, plan, telemetry = self.job, self.job.plan, self.telemetry
        step = saved = start
        splits: dict[str, Any] = {}
        window, stop = Window(self.batches), False
        skipped = Skipped(job, state, start, telemetry)
        if start and plan.evaluates(start) and start < plan.steps:
            splits, stop = self._evaluate(start, state, again=False)
        while step < job.last_step and not stop:
            try:
                with self._nothing_unsaved("compiling the step", step) if step == start else nullcontext():
                    updated = self._update(step, state, WAITING if step > start else COMPILING)
            except UserError:  # from files at fault: mended, the run goes on from here
                skipped.read()
                # Saving takes all processes; and weights with which updates are skipped may be past mending.
                if step > saved and jax.process_count() == 1 and not skipped.row:
                    self._save(step, state)
                raise
            if updated is None:
                stop = True
                break
            state, sums = updated
            step += 1
            self.trace.after(step, sums)
            window.add(sums)
            skipped.add(step, sums)
            self.watchdog.beat(f"what comes before step {step + 1:,}")
            self.checkpoints.check()
            stop = self._agreement.ask(bool(self.signals.received))
            saves = plan.saves(step) or step == job.last_step
            reports = saves or stop or step % job.config.log_every == 0 or step == start + 1
            if reports:
                skipped.read()
            if skipped.too_many:
                raise skipped.study(state, self.workdir)
            # What may be past mending takes the place of no good checkpoint, unless the run would leave without one.
            saves = saves and (not skipped.row or step == job.last_step)
            if reports:
                rate = float(jax.device_get(job.learning_rate(jax.device_put(np.int32(step - 1)))))
                telemetry.train(step, learning_rate=rate, **window.close(step))
            if saves:
                self._save(saved := step, state)
                splits = {}
                if plan.evaluates(step) and not stop:
                    splits, stop = self._evaluate(step, state)
                window.restart()
        if step > saved:
            self._save(step, state)
        self.checkpoints.wait()
        telemetry.saving(step, self.checkpoints.blocked, time.monotonic() - self._began)

        if not (splits or stop) and step == plan.steps:  # a finished run that is started again has taken no step
            splits, stop = self._evaluate(step, state, again=False)
        if stop or (self.signals.received and not splits):
            raise Interrupted(f"{self._stopped(step)} goes on from there", self.signals.received or signal.SIGTERM)
        if step < plan.steps:
            telemetry.say(f"{self._stopped(step)} without --config.stop_after_steps goes on from there")
            return {"step": step, "splits": {}}
        telemetry.result(step, splits, to_json(job.config))
        found = ", ".join(f"{split} accuracy {accuracy_text(metrics)}" for split, metrics in splits.items())
        telemetry.say(f"done: step {step:,}, {found}, in {self.workdir}")
        return {"step": step, "splits": splits}

    def _update(self, step: int, state: TrainState, patience: float) -> tuple[TrainState, Sums] | None:
        """What one more update makes of `state`, and its sums; None if asked to stop before it began."""
        train_step = self.steps.at(step, stopped=self._asked)
        batch = self.batches.take(stopped=self._asked) if train_step else None
        if batch is None:
            return None
        # Who waits for a process that is stuck has more patience than that one: it is to say so itself.
        self.watchdog.beat(f"step {step + 1:,} on the devices", patience)
        with self.trace.of(step + 1):
            return train_step(state, batch, *self.job.teacher_weights)

    def _asked(self) -> bool:
        """Whether to stop without asking the other processes, which are not waited for here: there are none."""
        return bool(self.signals.received) and jax.process_count() == 1

    def _save(self, step: int, state: TrainState) -> None:
        check_finite(bool(jax.device_get(self.job.all_finite(state))), "the state", step)
        self.watchdog.beat(f"saving step {step:,}", COMPILING)
        self.telemetry.upload()  # before the checkpoint: no step is saved of which the lines could be lost
        self.checkpoints.save(step, to_fields(state), to_json(self.job.config))

    def _evaluate(self, step: int, state: TrainState, *, again: bool = True) -> tuple[dict[str, Any], bool]:
        """The metrics of every split, recorded; and whether the run is to stop, in which case there are none.

        Unless `again`, what is recorded already is not evaluated: a run was ended between saving and evaluating.
        """
        names = [self.job.data.eval.name] + ([f"{self.job.data.eval.name}_ema"] if state.ema else [])
        recorded = evaluations(self.workdir).get(step, {})
        if not again and all_agree(set(names) <= recorded.keys()):
            return {name: recorded[name] for name in names}, False

        def each_batch() -> bool:
            self.watchdog.beat("a batch of the evaluation")
            return self._agreement.ask(bool(self.signals.received))

        with self._nothing_unsaved("the evaluation", step):
            splits = evaluate_all(self.job, state, self.telemetry.broken, each_batch, self.steps.evaluation())
        if splits is None:
            return {}, True
        for split, metrics in splits.items():
            if again or split not in recorded:
                self.telemetry.evaluation(step, split, metrics)
        self.checkpoints.evaluated(step, splits)
        return splits, False

    @contextmanager
    def _nothing_unsaved(self, doing: str, step: int) -> Iterator[None]:
        """What may take as long as compiling does, and can be left at once: the state is that of `step`, and saved."""

        def leave(signum: int) -> NoReturn:
            self.checkpoints.wait()
            end(f"{self._stopped(step)} goes on from there", 128 + signum)

        self.watchdog.beat(doing, COMPILING)
        self.signals.otherwise = leave
        try:
            yield
        finally:
            self.signals.otherwise = None
            self.watchdog.beat("the next step")

    def _stopped(self, step: int) -> str:
        return f"stopped after step {step:,} of {self.job.plan.steps:,}, saved in {self.workdir}; the same command"


def check_same_past(stored: ConfigDict | None, job: Job, start: int, workdir: AnyPath) -> None:
    """What is still to come may have other phases than when the run was begun: config.json then takes them.

    Raises UserError if the phases of the `start` steps that are done are not those they were done in.
    """
    if stored is None or stored.progressive == job.config.progressive:
        return
    side = min(job.data.train.image_shape[:2])
    then, now = (
        [(p.first_step, min(p.end, start), p.image_size or side, p.batch_size) for p in plan.between(0, start)]
        for plan in (Plan.of(stored, len(job.data.train)), job.plan)
    )
    if then != now:
        raise UserError(
            f"config.progressive: the {start:,} steps that are done were not in these phases; only those to come may "
            f"change: {', '.join(f'steps to {end:,} at {size} px × {batch:,}' for _, end, size, batch in then)}"
        )
    if jax.process_index() == 0:
        write_json(workdir / "config.json", to_json(job.config))


def check_finite(finite: bool, what: str, step: int) -> None:
    """Raises UserError unless `finite`: a run must not save, or report, what is no number."""
    if not finite:
        raise UserError(
            f"{what} is no longer finite at step {step:,}, and this step is not saved; lower "
            "config.optimizer.learning_rate or lengthen config.schedule.warmup"
        )


class Window:
    """Sums of the steps since the last report, and how fast they went."""

    def __init__(self, batches: Feed) -> None:
        self._batches, self._waited = batches, 0.0
        self._sums: list[Sums] = []
        self._began: float | None = None  # None until the first step is done: its time is the compiler's

    def add(self, sums: Sums) -> None:
        """Takes the sums of one more step, and waits for an earlier one if the host has run ahead."""
        self._sums.append(sums)
        jax.block_until_ready(self._sums[-IN_FLIGHT:][0])

    def close(self, step: int) -> dict[str, Any]:
        """loss, accuracy, images_per_second and input_wait (a share of the time) of the window, which begins anew.

        With a guard also skipped; loss and accuracy are None if that is every update.
        Raises UserError if the loss is no number.
        """
        totals = total(self._sums)
        loss, accuracy = (totals[name] / (totals["examples"] or math.nan) for name in ("loss", "correct_top1"))
        means: dict[str, Any] = {"loss": loss, "accuracy": accuracy}
        if "skipped" in totals:
            means["skipped"] = totals["skipped"]
        if not totals["examples"]:
            means.update(loss=None, accuracy=None)
        check_finite(not totals["examples"] or math.isfinite(loss), "the loss", step)
        if self._began is not None:
            seconds = time.monotonic() - self._began
            means["images_per_second"] = totals["examples"] / seconds
            means["input_wait"] = (self._batches.waited - self._waited) / seconds
        self.restart()
        return means

    def restart(self) -> None:
        """Begins anew, without the time of what was done in between."""
        self._sums, self._began, self._waited = [], time.monotonic(), self._batches.waited
