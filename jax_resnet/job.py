"""A config made ready to run on the devices at hand."""

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
from jax_resnet.config import in_steps, model_overrides, validate
from jax_resnet.data.source import open_dataset
from jax_resnet.errors import UserError, choose
from jax_resnet.models.cost import multiply_adds
from jax_resnet.models.torch_weights import Arrays
from jax_resnet.models.zoo import create_model, model_spec
from jax_resnet.optim import make_optimizer, make_schedule, peak_learning_rate
from jax_resnet.pretrained import fitting
from jax_resnet.state import make_state
from jax_resnet.step import make_eval_step, make_train_step


@dataclass(frozen=True)
class Plan:
    """A config's durations in steps. The periods are not rounded, so that they stay in step with the epochs."""

    steps: int
    warmup_steps: int
    eval_every: float
    save_every: float
    steps_per_epoch: float

    @classmethod
    def of(cls, c: ConfigDict, num_examples: int) -> "Plan":
        """Raises UserError naming the duration that is at fault."""
        length = partial(in_steps, batch_size=c.batch_size, num_examples=num_examples)
        return cls(
            steps=max(1, round(length(c.train, "train"))),
            warmup_steps=round(length(c.schedule.warmup, "schedule.warmup")),
            eval_every=length(c.eval.every, "eval.every"),
            save_every=length(c.checkpoint.every, "checkpoint.every"),
            steps_per_epoch=num_examples / c.batch_size,
        )

    def evaluates(self, step: int) -> bool:
        """Whether the state after `step` updates is evaluated."""
        return step == self.steps or _passes(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Whether it is saved; what is evaluated always is, so that the best can be restored."""
        return self.evaluates(step) or _passes(step, self.save_every)


def _passes(step: int, period: float) -> bool:
    whole = 1 + 1e-12  # a quotient that is a whole number must not be rounded to just below it
    return int(step / period * whole) > int((step - 1) / period * whole)


class Job:
    """A config made ready to run on the devices at hand: the data, the jitted steps, the shapes of the state.

    `config` is a copy in which dtype="auto" is decided, so that a run does not change it by moving to other devices.
    """

    def __init__(self, config: ConfigDict, *, training: bool = True):
        """Raises UserError for what is wrong with the config, the data or their fit, before anything is compiled.

        Without `training` the batch may be any: evaluation fills up what the devices do not divide.
        """
        validate(config)
        c = self.config = config.copy_and_resolve_references()
        c.dtype = activation_dtype(c.dtype).name
        overrides = model_overrides(c)
        spec = self.spec = model_spec(c.model.name, **overrides)
        self.mesh = parallel.data_mesh()
        self.sharding, whole = parallel.batch_sharding(self.mesh), parallel.replicated(self.mesh)
        if training:
            parallel.check_divides(c.batch_size, self.mesh, "config.batch_size")
        data = self.data = open_dataset(c.data)
        side = min(data.train.image_shape[:2])
        if side < spec.total_stride:
            stem = ", or --config.model.stem=cifar" if spec.stem == "imagenet" else ""
            raise UserError(
                f"config.data.image_size: {c.model.name} takes images of at least {spec.total_stride} pixels a side, "
                f"these have {side}; give --config.data.image_size={spec.total_stride} or more{stem}"
            )
        if training and c.batch_size > len(data.train):
            raise UserError(
                f"config.batch_size={c.batch_size} is larger than the {data.train.name} split of "
                f"{c.data.name}, {len(data.train)} examples"
            )
        if c.model.num_classes and c.model.num_classes != data.num_classes:
            raise UserError(
                f"config.model.num_classes={c.model.num_classes}, but {c.data.name} has {data.num_classes} "
                "classes; leave it out to take the data's"
            )
        self.plan = Plan.of(c, len(data.train))
        self.last_step = min(self.plan.steps, c.stop_after_steps or self.plan.steps)
        wanted = min(c.eval.batch_size or c.batch_size, len(data.eval))
        self.eval_batch_size = -(-wanted // self.mesh.size) * self.mesh.size
        schedule = make_schedule(
            c.schedule,
            peak=peak_learning_rate(c.optimizer, c.batch_size),
            steps=self.plan.steps,
            warmup_steps=self.plan.warmup_steps,
        )
        self.learning_rate = jax.jit(schedule)
        self.all_finite = jax.jit(_all_finite)
        optimizer = make_optimizer(c.optimizer, schedule, c.freeze)
        make_model = partial(
            create_model,
            c.model.name,
            num_classes=data.num_classes,
            in_channels=c.data.channels,
            dtype=jnp.dtype(c.dtype),
            **overrides,
        )
        self.graph, self.abstract_state, self.fresh_state = make_state(
            lambda rngs: make_model(rngs=rngs), optimizer, c.seed, whole
        )
        for part in c.freeze:
            choose("config.freeze", part, self.abstract_state.params)
        if set(c.freeze) >= self.abstract_state.params.keys():
            raise UserError(f"config.freeze={c.freeze}: nothing is left to be trained")
        pixels = {"mean": tuple(c.data.mean), "std": tuple(c.data.std)}
        self.train_step = jax.jit(
            make_train_step(
                self.graph,
                optimizer,
                seed=c.seed,
                pad=c.data.pad if c.data.crop == "pad" else 0,
                flip=c.data.flip,
                label_smoothing=c.label_smoothing,
                erase=c.data.erase,
                mixup=c.data.mixup,
                cutmix=c.data.cutmix,
                freeze=c.freeze,
                **pixels,
            ),
            in_shardings=(whole, self.sharding),
            out_shardings=whole,
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            make_eval_step(self.graph, **pixels), in_shardings=(whole, whole, self.sharding), out_shardings=whole
        )

    def weights_to_begin_with(self) -> tuple[Arrays, dict[str, str]]:
        """The arrays of `config.init_from` by name, and a line for each heading about them; nothing if it is not given.

        Raises UserError if it cannot be read or does not fit.
        """
        c = self.config
        if not c.init_from:
            return {}, {}
        arrays, report, weights = fitting(c.init_from, self.abstract_state, self.spec)
        rows = {"weights": c.init_from, **report.lines()}
        there = weights.mean + weights.std
        if len(there) == 2 * c.data.channels and not np.allclose(there, (*c.data.mean, *c.data.std), atol=1e-3):
            rows["note"] = (
                f"the weights know images normalised with other numbers: --config.data.mean={weights.mean} "
                f"--config.data.std={weights.std}"
            )
        return arrays, rows

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
            "devices": f"{count} × {device.device_kind}, activations {c.dtype}",
            "batch": f"{c.batch_size:,} ({c.batch_size // count:,} per device), batch norm over "
            + (f"groups of {group}" if group else "all of it"),
            "steps": f"{plan.steps:,} ({plan.steps / plan.steps_per_epoch:.4g} epochs), evaluated every "
            f"{plan.eval_every:,.4g}, {c.optimizer.name} with {c.schedule.name} schedule",
            "workdir": str(workdir),
        }
        return header | ({"resumed": f"from step {start:,}"} if start else {})


def _all_finite(tree: Any) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def activation_dtype(name: str) -> Any:
    """config.dtype as a dtype: "auto" is bfloat16 on TPU and GPU, float32 on CPU, which only emulates bfloat16."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _short(number: float) -> str:
    """1234567 → '1.23 M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "
