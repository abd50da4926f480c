"""The main job: a config and a workdir in, a trained network, its checkpoints and its result out."""

import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from jax_resnet import parallel
from jax_resnet.checkpoint import Checkpoints, read_config
from jax_resnet.config import differences, from_json, to_json, to_steps, validate
from jax_resnet.data.loader import train_batches
from jax_resnet.data.source import Dataset, open_dataset
from jax_resnet.errors import UserError
from jax_resnet.evaluate import IN_FLIGHT, evaluate
from jax_resnet.metrics import Sums, total
from jax_resnet.models.cost import multiply_adds
from jax_resnet.models.zoo import create_model, model_spec
from jax_resnet.optim import make_optimizer, make_schedule, peak_learning_rate
from jax_resnet.state import make_state
from jax_resnet.step import make_eval_step, make_train_step
from jax_resnet.telemetry import Telemetry, accuracy_text, write_json


class Interrupted(Exception):
    """A signal ended the run; its state is saved. The text says how to go on, `signum` which signal it was."""

    def __init__(self, text: str, signum: int):
        super().__init__(text)
        self.signum = signum


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains as `config` says, going on from the newest checkpoint in `workdir` if there is one.

    Leaves in workdir: config.json, checkpoints/, metrics.jsonl, tensorboard/, and at the end curves.png and result.json.
    Returns {"step": updates done, "splits": {split: metrics}}, with metrics as `evaluate` gives them.

    Raises UserError for what the user can mend, and Interrupted, with everything saved, after SIGINT or SIGTERM.
    """
    job = Job.of(config)
    workdir = _claim(Path(workdir), config)
    data, plan = job.data, job.plan
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints, _Signals() as signals:
        start = checkpoints.latest_step() or 0
        telemetry = Telemetry(workdir, start_step=start, total_steps=plan.steps, steps_per_epoch=plan.steps_per_epoch)
        try:
            telemetry.header(job.header(workdir, start))
            state = checkpoints.restore(start, job.abstract_state) if start else job.fresh_state()
            stop = min(plan.steps, config.stop_after_steps or plan.steps)
            batches = train_batches(data.train, start=start, stop=stop, seed=config.seed, batch_size=config.batch_size,
                                    sharding=job.sharding, threads=config.data.threads)
            window = _Window(config.batch_size)
            metrics: dict[str, Any] | None = None
            with jax.transfer_guard("disallow"):
                for step in range(start + 1, stop + 1):
                    state, sums = job.train_step(state, next(batches))
                    window.add(sums)
                    leaving = step == stop or signals.received
                    evaluates = step % plan.eval_every == 0 or step == plan.steps
                    saves = step % plan.save_every == 0 or leaving or evaluates
                    if step % config.log_every == 0 or step == start + 1 or saves:
                        rate = float(jax.device_get(job.learning_rate(jax.device_put(np.int32(step - 1)))))
                        telemetry.train(step, learning_rate=rate, **window.close(step))
                    metrics = job.evaluate(state) if evaluates else None
                    if metrics:
                        telemetry.evaluation(step, data.eval.name, metrics)
                    if saves:
                        checkpoints.save(step, state, to_json(config), metrics)
                    if evaluates or saves:
                        window.restart()
                    if signals.received:
                        break
            step = int(jax.device_get(state.step))
            checkpoints.wait()
            if signals.received and step < plan.steps:
                raise Interrupted(f"stopped at step {step:,} of {plan.steps:,}, saved in {workdir}; "
                                  "the same command goes on from there", signals.received)
            if step < plan.steps:
                telemetry.say(f"stopped after step {step:,} of {plan.steps:,}, saved in {workdir}; "
                              "without --config.stop_after_steps the same command goes on from there")
                return {"step": step, "splits": {}}
            metrics = metrics or job.evaluate(state)  # a finished run, started again
            telemetry.result(step, {data.eval.name: metrics}, to_json(config))
            telemetry.say(f"done: step {step:,}, {data.eval.name} accuracy {accuracy_text(metrics)}, in {workdir}")
            return {"step": step, "splits": {data.eval.name: metrics}}
        finally:
            telemetry.close()


def evaluate_checkpoint(workdir: str | os.PathLike[str], *, config: ConfigDict | None = None,
                        which: str = "best") -> dict[str, Any]:
    """Evaluates a checkpoint of `workdir`: "best", "latest" or a step. Writes eval.json and returns its content.

    The config is the one the run was begun with; one that is given must agree with it in all that is computed.
    """
    workdir = Path(workdir)
    stored = read_config(workdir)
    if stored is None:
        raise UserError(f"{workdir}: no run has been begun here (no config.json)")
    config = config or from_json(stored)
    _check_same_config(from_json(stored), config, workdir)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: no checkpoint has been saved yet")
    job = Job.of(config)
    with Checkpoints(workdir) as checkpoints:
        named = {"best": checkpoints.best_step() or checkpoints.latest_step(), "latest": checkpoints.latest_step()}
        if which not in named and not which.isdigit():
            raise UserError(f"--checkpoint={which}: must be best, latest or a step")
        step = named[which] if which in named else int(which)
        if step is None or step not in checkpoints.steps():
            known = ", ".join(map(str, checkpoints.steps())) or "none"
            raise UserError(f"{workdir}: no checkpoint at step {which}; saved: {known}")
        began = time.monotonic()
        metrics = job.evaluate(checkpoints.restore(step, job.abstract_state))
    result = {"step": step, "splits": {job.data.eval.name: metrics},
              "wall_seconds": round(time.monotonic() - began, 1), "config": to_json(config)}
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", result)
        print(f"step {step:,}: {job.data.eval.name} accuracy {accuracy_text(metrics)}, loss {metrics['loss']:.4f}, "
              f"in {workdir / 'eval.json'}")
    return result


@dataclass(frozen=True)
class Plan:
    """A config's durations in steps."""

    steps: int
    warmup_steps: int
    eval_every: int
    save_every: int
    steps_per_epoch: float

    @classmethod
    def of(cls, c: ConfigDict, num_examples: int) -> "Plan":
        """Raises UserError naming the duration that is at fault."""
        count = partial(to_steps, batch_size=c.batch_size, num_examples=num_examples)
        return cls(count(c.train, "train"), count(c.schedule.warmup, "schedule.warmup"),
                   count(c.eval.every, "eval.every"), count(c.checkpoint.every, "checkpoint.every"),
                   num_examples / c.batch_size)


class Job:
    """A config made ready to run on the devices at hand: the data, the jitted steps, the shapes of the state."""

    @classmethod
    def of(cls, c: ConfigDict) -> "Job":
        """Raises UserError for what is wrong with the config, the data or their fit, before anything is compiled."""
        validate(c)
        overrides = {k: v for k, v in c.model.items() if k not in ("name", "num_classes")}
        spec = model_spec(c.model.name, **overrides)
        mesh = parallel.data_mesh()
        parallel.check_divides(c.batch_size, mesh, "config.batch_size")
        parallel.check_divides(c.eval.batch_size or c.batch_size, mesh, "config.eval.batch_size")
        if c.data.image_size and c.data.image_size < spec.total_stride:
            raise _too_small(c.model.name, c.data.image_size, spec.total_stride)
        data = open_dataset(c.data)
        if min(data.train.image_shape[:2]) < spec.total_stride:
            raise _too_small(c.model.name, min(data.train.image_shape[:2]), spec.total_stride)
        if c.batch_size > len(data.train):
            raise UserError(f"config.batch_size={c.batch_size} is larger than the {data.train.name} split of "
                            f"{c.data.name}, {len(data.train)} examples")
        if c.model.num_classes and c.model.num_classes != data.num_classes:
            raise UserError(f"config.model.num_classes={c.model.num_classes}, but {c.data.name} has {data.num_classes} "
                            "classes; leave it out to take the data's")
        return cls(c, data, mesh, overrides)

    def __init__(self, c: ConfigDict, data: Dataset, mesh: jax.sharding.Mesh, overrides: dict[str, Any]):
        self.config, self.data, self.plan = c, data, Plan.of(c, len(data.train))
        self.mesh, self.sharding, whole = mesh, parallel.batch_sharding(mesh), parallel.replicated(mesh)
        self.dtype = _activation_dtype(c.dtype)
        schedule = make_schedule(c.schedule, peak=peak_learning_rate(c.optimizer, c.batch_size),
                                 steps=self.plan.steps, warmup_steps=self.plan.warmup_steps)
        self.learning_rate = jax.jit(schedule)
        optimizer = make_optimizer(c.optimizer, schedule)
        make_model = partial(create_model, c.model.name, num_classes=data.num_classes, in_channels=c.data.channels,
                             dtype=self.dtype, **overrides)
        self.graph, self.abstract_state, self.fresh_state = make_state(
            lambda rngs: make_model(rngs=rngs), optimizer, c.seed, whole)
        pixels = {"mean": tuple(c.data.mean), "std": tuple(c.data.std)}
        self.train_step = jax.jit(
            make_train_step(self.graph, optimizer, seed=c.seed, pad=c.data.pad if c.data.crop == "pad" else 0,
                            flip=c.data.flip, label_smoothing=c.label_smoothing, **pixels),
            in_shardings=(whole, self.sharding), out_shardings=whole, donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(self.graph, **pixels),
                                 in_shardings=(whole, whole, self.sharding), out_shardings=whole)

    def evaluate(self, state: Any) -> dict[str, Any]:
        """Metrics of the evaluation split."""
        c = self.config
        return evaluate(self.eval_step, state, self.data.eval, batch_size=c.eval.batch_size or c.batch_size,
                        sharding=self.sharding, threads=c.data.threads)

    def header(self, workdir: Path, start: int) -> dict[str, str]:
        """What is about to run, a line for each heading."""
        c, data, plan = self.config, self.data, self.plan
        height, width, channels = data.train.image_shape
        image = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)

        def forward(params: Any, stats: Any, image: Any) -> Any:
            model: Any = nnx.merge(self.graph, params, stats)
            model.eval()
            return model(image)

        macs = multiply_adds(forward, self.abstract_state.params, self.abstract_state.batch_stats, image)
        parameters = sum(p.size for p in jax.tree.leaves(self.abstract_state.params))
        device, count = jax.devices()[0], jax.device_count()
        group = c.model.bn_group_size
        header = {
            "model": f"{c.model.name}, {_short(parameters)} parameters, {_short(2 * macs)}FLOPs an image",
            "data": f"{data.name}: {len(data.train):,} {data.train.name}, {len(data.eval):,} {data.eval.name}, "
                    f"{data.num_classes} classes, {height}×{width}×{channels}",
            "devices": f"{count} × {device.device_kind}, activations {jnp.dtype(self.dtype).name}",
            "batch": f"{c.batch_size:,} ({c.batch_size // count:,} per device), batch norm over "
                     + (f"groups of {group}" if group else "all of it"),
            "steps": f"{plan.steps:,} ({plan.steps / plan.steps_per_epoch:.4g} epochs), evaluated every "
                     f"{plan.eval_every:,}, {c.optimizer.name} with {c.schedule.name} schedule",
            "workdir": str(workdir),
        }
        return header | ({"resumed": f"from step {start:,}"} if start else {})


class _Window:
    """Sums of the steps since the last report, and how fast they went."""

    def __init__(self, batch_size: int):
        self._sums: list[Sums] = []
        self._began: float | None = None  # None until the first step is done: its time is the compiler's
        self._batch_size = batch_size

    def add(self, sums: Sums) -> None:
        self._sums.append(sums)
        jax.block_until_ready(self._sums[-IN_FLIGHT:][0])

    def close(self, step: int) -> dict[str, Any]:
        """loss, accuracy and images_per_second; raises UserError if the loss is no number."""
        totals = total(self._sums)
        loss = totals["loss"] / totals["examples"]
        if not np.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step:,}; nothing of it is saved. Lower "
                            "config.optimizer.learning_rate or lengthen config.schedule.warmup")
        speed = totals["examples"] / (time.monotonic() - self._began) if self._began is not None else None
        self.restart()
        return {"loss": loss, "accuracy": totals["correct_top1"] / totals["examples"], "images_per_second": speed}

    def restart(self) -> None:
        self._sums, self._began = [], time.monotonic()


class _Signals:
    """Notes the first SIGINT or SIGTERM, so that the loop can save and leave; a second one acts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "_Signals":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        self.received = signum
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(2, b"\nstopping: the step at hand ends, then its state is saved; once more to leave at once\n")


def _claim(workdir: Path, config: ConfigDict) -> Path:
    """Makes the folder and writes config.json, or checks that it is of the same run."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as e:
        raise UserError(f"--workdir={workdir}: cannot be written ({e.strerror}); choose another") from None
    stored = read_config(workdir)
    if stored is not None:
        _check_same_config(from_json(stored), config, workdir)
    elif jax.process_index() == 0:
        write_json(workdir / "config.json", to_json(config))
    return workdir


def _check_same_config(stored: ConfigDict, config: ConfigDict, workdir: Path) -> None:
    if different := differences(stored, config):
        raise UserError(f"--workdir={workdir}: holds a run of another config ({'; '.join(different)}); "
                        "choose another workdir, or delete this one")


def _activation_dtype(name: str) -> Any:
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _too_small(model: str, size: int, stride: int) -> UserError:
    return UserError(f"config.data.image_size: {model} takes images of at least {stride} pixels a side, these have "
                     f"{size}; give --config.data.image_size={stride} or more, or --config.model.stem=cifar")


def _short(number: float) -> str:
    """1234567 → '1.23 M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "
