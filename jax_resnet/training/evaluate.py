"""Exact evaluation: every example of a split once, whatever the batch and the mesh."""

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax
from ml_collections import ConfigDict

from jax_resnet.config import to_json
from jax_resnet.data.batches import Report
from jax_resnet.data.loader import eval_batches
from jax_resnet.errors import UserError
from jax_resnet.runs.checkpoint import Checkpoints
from jax_resnet.runs.paths import make_folder, open_path
from jax_resnet.runs.workdir import check_same_config, has_checkpoints, read_config, write_json
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.metrics import Sums, total
from jax_resnet.training.network import initial_weights
from jax_resnet.training.pretrained import placed
from jax_resnet.training.state import AS_SAVED, TrainState, from_fields, to_fields

IN_FLIGHT = 4  # steps the host may run ahead: enough to hide it, few enough that their batches fit on the device


def to_stderr(split: str, name: str, reason: str) -> None:
    """Report an image that cannot be decoded in a line on stderr."""
    print(f"{split} split: {name}: {reason}; left out", file=sys.stderr)


def evaluate(
    experiment: Experiment,
    state: TrainState,
    report: Report = to_stderr,
    stop: Callable[[], bool] = lambda: False,
    eval_step: Callable[..., Sums] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a state: the metrics of the experiment's task over the evaluation split.

    What cannot be decoded is left out, counted as undecodable, and reported. `stop` is asked after every batch; None if
    it said so. `eval_step` is the experiment's, compiled.

    Raises UserError if too much cannot be decoded, or the loss is not finite.
    """
    split = experiment.data.eval
    sums: list[Sums] = []
    batches = eval_batches(
        split,
        experiment.config.data,
        batch_size=experiment.eval_batch_size,
        sharding=experiment.sharding,
        report=report,
    )
    with closing(batches):
        for batch in batches:
            sums.append((eval_step or experiment.steps.evaluate)(state.params, state.batch_stats, batch))
            if len(sums) >= IN_FLIGHT:
                jax.block_until_ready(sums[-IN_FLIGHT])
            if stop():
                return None
    totals = total(sums)
    undecodable, most = totals.pop("undecodable"), experiment.config.data.max_broken
    if undecodable > most * len(split):
        raise UserError(
            f"{split.name} split: {undecodable} of {len(split):,} images cannot be decoded, more than "
            f"config.data.max_broken={most:g} allows; repair or remove them, they are named above"
        )
    if not math.isfinite(totals["loss"]):
        raise UserError(
            f"the loss over the {split.name} split is {totals['loss']}; the network has diverged: lower "
            "config.optimizer.learning_rate or lengthen config.schedule.warmup"
        )
    if totals["examples"] + undecodable != len(split):
        raise RuntimeError(f"evaluated {totals['examples']} examples of the {split.name} split, which has {len(split)}")
    metrics = experiment.task.summary(totals)
    if undecodable:
        metrics["undecodable"] = undecodable
    return metrics


def evaluate_all(
    experiment: Experiment,
    state: TrainState,
    report: Report = to_stderr,
    stop: Callable[[], bool] = lambda: False,
    eval_step: Callable[..., Sums] | None = None,
) -> dict[str, dict[str, Any]] | None:
    """Return {split: metrics} as `evaluate` does, and where there is a running average {split_ema: its metrics}."""
    split = experiment.data.eval.name
    states = {split: state}
    if state.ema:
        states[f"{split}_ema"] = state.averaged()
    found = {}
    for name, weights in states.items():
        metrics = evaluate(experiment, weights, report, stop, eval_step)
        if metrics is None:
            return None
        found[name] = metrics
    return found


def evaluate_checkpoint(
    workdir: str | os.PathLike[str], *, config: ConfigDict | None = None, which: str = "best"
) -> dict[str, Any]:
    """Evaluate a checkpoint of `workdir`: "best", "latest" or a step. Write eval.json and return its content.

    The config is the one the run was begun with; one that is given must name the same network, and may name other data.
    "init" evaluates the weights of `config.init_from` instead: step 0, for which nothing need be in the workdir.
    Raises UserError for a workdir without that checkpoint, or a config that does not fit it.
    """
    workdir = open_path(workdir)
    stored = read_config(workdir)
    if stored is None and which != "init":
        raise UserError(f"{workdir}: no run has been begun here")
    config = config or stored
    if config is None or (which == "init" and not config.init_from):
        raise UserError("--checkpoint=init: evaluates config.init_from, which is not given")
    if stored is not None:
        check_same_config(stored, config, workdir, "model.")
    began = time.monotonic()
    if which == "init":
        experiment, step = build(config, training=False), 0
        weights, rows = initial_weights(experiment.config, experiment.network)
        state = replace(placed(experiment.network.fresh_state(), weights), ema={})
        if jax.process_index() == 0:
            print("\n".join(f"{name:<8}  {text}" for name, text in rows.items()))
            make_folder(workdir)
    else:
        if not has_checkpoints(workdir):
            raise UserError(f"{workdir}: no checkpoint has been saved yet")
        experiment = build(config, training=False)
        with Checkpoints(workdir) as checkpoints:
            step = checkpoints.find(which)
            like = experiment.network.abstract_state
            fields = checkpoints.restore(step, to_fields(like), as_saved=AS_SAVED)
            state = from_fields(fields, like)
    splits = evaluate_all(experiment, state)
    assert splits
    result = {
        "step": step,
        "splits": splits,
        "wall_seconds": round(time.monotonic() - began, 1),
        "config": to_json(experiment.config),
    }
    if jax.process_index() == 0:
        for name, metrics in splits.items():
            print(f"step {step:,}: {name} {experiment.task.text(metrics)}, loss {metrics['loss']:.4f}")
        try:
            write_json(workdir / "eval.json", result)
            print(f"in {workdir / 'eval.json'}")
        except OSError as e:
            raise UserError(f"{workdir / 'eval.json'}: cannot be written ({e.strerror})") from None
    return result
