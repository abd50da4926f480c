"""The main job: a config and a workdir in, a trained network, its checkpoints and its result out."""

import os
import time
from contextlib import closing
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_resnet.ahead import StepsAhead
from jax_resnet.checkpoint import Checkpoints
from jax_resnet.config import to_json
from jax_resnet.data.loader import Feed, train_batches
from jax_resnet.errors import Interrupted, UserError
from jax_resnet.evaluate import IN_FLIGHT, evaluate_all
from jax_resnet.job import Job
from jax_resnet.metrics import Sums, accuracy_text, total
from jax_resnet.models.torch_weights import Arrays
from jax_resnet.paths import AnyPath, open_path
from jax_resnet.pretrained import placed
from jax_resnet.signals import Signals
from jax_resnet.telemetry import Telemetry
from jax_resnet.workdir import claimed, has_checkpoints, write_json


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains as `config` says, going on from the newest checkpoint in `workdir` if there is one.

    Leaves in workdir: config.json, data.json, checkpoints/, metrics.jsonl, tensorboard/; at the end curves.png and
    result.json.
    Returns {"step": updates done, "splits": {split: metrics}}, with metrics as `evaluate` gives them.

    Raises UserError for what the user can mend, and Interrupted, with everything saved, after SIGINT or SIGTERM.
    """
    workdir, job = open_path(workdir), Job(config)
    weights, about_weights = ({}, {}) if has_checkpoints(workdir) else job.weights_to_begin_with()
    with (
        claimed(workdir, job.config),
        Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
        Signals() as signals,
        Telemetry(workdir, job.plan, start := checkpoints.latest_step() or 0) as telemetry,
    ):
        if jax.process_index() == 0:
            facts = {"class_names": job.data.class_names, "image_shape": job.data.train.image_shape}
            write_json(workdir / "data.json", facts)
        telemetry.header(job.header(workdir, start) | about_weights)
        with (
            StepsAhead(job.train_step, job.plan.between(start, job.last_step), job.shapes) as steps,
            closing(_batches(job, start, telemetry)) as batches,
            jax.transfer_guard("disallow"),  # what moves between host and devices does so by name
        ):
            return _run(job, workdir, start, weights, steps, batches, checkpoints, telemetry, signals)


def _batches(job: Job, start: int, telemetry: Telemetry) -> Feed:
    config, split = job.config, job.data.train
    return train_batches(
        split,
        config.data,
        start=start,
        stop=job.last_step,
        seed=config.seed,
        phases=job.plan.phases,
        sharding=job.sharding,
        report=telemetry.broken,
    )


def _run(
    job: Job,
    workdir: AnyPath,
    start: int,
    weights: Arrays,
    steps: StepsAhead,
    batches: Feed,
    checkpoints: Checkpoints,
    telemetry: Telemetry,
    signals: Signals,
) -> dict[str, Any]:
    config, plan = job.config, job.plan
    state = checkpoints.restore(start, job.abstract_state) if start else placed(job.fresh_state(), weights)
    step, splits, window, train_step = start, {}, Window(batches), steps.at(start)

    def save(step: int, splits: dict[str, Any]) -> None:
        check_finite(bool(jax.device_get(job.all_finite(state))), "the state", step)
        telemetry.upload()  # before the checkpoint: no step is saved of which the lines could be lost
        # Of the weights and their running average, this is what a run is good for: it comes last.
        checkpoints.save(step, state, to_json(config), list(splits.values())[-1] if splits else None)

    def rescue(step: int) -> None:  # from files at fault: mended, the run goes on from here
        if step > start and jax.process_count() == 1:  # saving takes all processes
            save(step, {})

    for step in range(start + 1, job.last_step + 1):
        try:
            batch = next(batches)
        except UserError:
            rescue(step - 1)
            raise
        state, sums = train_step(state, batch, *job.teacher_weights)
        window.add(sums)
        train_step = steps.at(step, stopped=lambda: signals.received)
        leaving = step == job.last_step or bool(signals.received)
        saves = plan.saves(step) or leaving
        if saves or step % config.log_every == 0 or step == start + 1:
            rate = float(jax.device_get(job.learning_rate(jax.device_put(np.int32(step - 1)))))
            telemetry.train(step, learning_rate=rate, **window.close(step))
        if saves:
            try:
                splits = evaluate_all(job, state, telemetry.broken) if plan.evaluates(step) else {}
            except UserError:
                rescue(step)
                raise
            for split, metrics in splits.items():
                telemetry.evaluation(step, split, metrics)
            save(step, splits)
            window.restart()
        if leaving:
            break
    checkpoints.wait()

    if step < plan.steps:
        text = f"stopped after step {step:,} of {plan.steps:,}, saved in {workdir}; the same command"
        if signals.received:
            raise Interrupted(f"{text} goes on from there", signals.received)
        telemetry.say(f"{text} without --config.stop_after_steps goes on from there")
        return {"step": step, "splits": {}}
    if not splits:  # a finished run that is started again has taken no step
        splits = evaluate_all(job, state, telemetry.broken)
    telemetry.result(step, splits, to_json(config))
    found = ", ".join(f"{split} accuracy {accuracy_text(metrics)}" for split, metrics in splits.items())
    telemetry.say(f"done: step {step:,}, {found}, in {workdir}")
    return {"step": step, "splits": splits}


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

        Raises UserError if the loss is no number.
        """
        totals = total(self._sums)
        loss = totals["loss"] / totals["examples"]
        check_finite(bool(np.isfinite(loss)), "the loss", step)
        means = {"loss": loss, "accuracy": totals["correct_top1"] / totals["examples"]}
        if self._began is not None:
            seconds = time.monotonic() - self._began
            means["images_per_second"] = totals["examples"] / seconds
            means["input_wait"] = (self._batches.waited - self._waited) / seconds
        self.restart()
        return means

    def restart(self) -> None:
        """Begins anew, without the time of what was done in between."""
        self._sums, self._began, self._waited = [], time.monotonic(), self._batches.waited
