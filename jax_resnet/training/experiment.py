"""A config made ready to run on the devices at hand."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_resnet.config import model_overrides, phase_rows, validate
from jax_resnet.data.batches import Report
from jax_resnet.data.dataset import Dataset
from jax_resnet.data.loader import Feed, Readers, train_batches
from jax_resnet.data.sampling import Phase
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import UserError, choose
from jax_resnet.models.cost import cost
from jax_resnet.models.cpu import for_cpu, sum_gradients_in_float32
from jax_resnet.models.torch_names import Arrays
from jax_resnet.models.zoo import create_model, model_spec
from jax_resnet.runs.paths import AnyPath
from jax_resnet.runtime.mesh import (
    batch_sharding,
    check_divides,
    compiler_options,
    data_mesh,
    parts_sharding,
    replicated,
    spread,
)
from jax_resnet.training.distill import Teacher
from jax_resnet.training.optimizers import make_optimizer
from jax_resnet.training.plan import Plan, describe
from jax_resnet.training.pretrained import fitting
from jax_resnet.training.schedules import make_schedule, over_phases, peak_learning_rate
from jax_resnet.training.state import all_finite, make_state
from jax_resnet.training.step import make_eval_step, make_gradients, make_train_step


class Job:
    """A config made ready to run on the devices at hand: the data, the jitted steps, the shapes of the state.

    `config` is a copy in which dtype="auto" is decided, so that a run does not change it by moving to other devices.
    """

    def __init__(
        self, config: ConfigDict, *, training: bool = True, data: Dataset | None = None, mesh: Mesh | None = None
    ):
        """Raises UserError for what is wrong with the config, the data or their fit, before anything is compiled.

        Without `training` the batch may be any: evaluation fills up what the devices do not divide. `data` is what
        config.data names, where that is open already; `mesh` has other devices than those at hand, to compile for.
        """
        validate(config)
        self.mesh = mesh or data_mesh()
        c = self.config = config.copy_and_resolve_references()
        c.dtype = activation_dtype(c.dtype, self.mesh.devices.flat[0].platform).name
        overrides = model_overrides(c)
        spec = self.spec = model_spec(c.model.name, **overrides)
        self.sharding, whole = batch_sharding(self.mesh), replicated(self.mesh)
        rows, key = phase_rows(c), "config.progressive: batch_size" if c.progressive else "config.batch_size"
        batch_sizes = [batch_size for _, _, batch_size in rows] if training else []
        for batch_size in batch_sizes:
            check_divides(batch_size, self.mesh, key, c.accumulate)
        if c.accumulate > 1 and spec.norm == "batch" and not c.model.bn_group_size:
            part = math.gcd(*(batch_size // c.accumulate for _, _, batch_size in rows))
            raise UserError(
                f"config.accumulate={c.accumulate}: the statistics of batch norm cannot be over all of a batch that is "
                f"computed in parts; give --config.model.bn_group_size={part}, or less"
            )
        data = self.data = data or open_dataset(c.data)
        sides = [("data.image.size", min(data.train.image_shape[:2])), *(("progressive", size) for _, size, _ in rows)]
        for of, side in sides:
            if side is not None and side < spec.total_stride:
                stem = ", or --config.model.stem=cifar" if spec.stem == "imagenet" else ""
                raise UserError(
                    f"config.{of}: {c.model.name} takes images of at least {spec.total_stride} pixels a side, "
                    f"these have {side}; give {spec.total_stride} or more{stem}"
                )
        for batch_size in batch_sizes:
            if batch_size > len(data.train):
                raise UserError(
                    f"{key}={batch_size} is larger than the {data.train.name} split of {c.data.name}, "
                    f"{len(data.train)} examples"
                )
        if c.model.num_classes and c.model.num_classes != data.num_classes:
            raise UserError(
                f"config.model.num_classes={c.model.num_classes}, but {c.data.name} has {data.num_classes} "
                "classes; leave it out to take the data's"
            )
        plan = self.plan = Plan.of(c, len(data.train))
        self.last_step = min(plan.steps, c.stop_after_steps or plan.steps)
        wanted = min(c.eval.batch_size or c.batch_size, len(data.eval))
        self.eval_batch_size = -(-wanted // self.mesh.size) * self.mesh.size
        schedule = make_schedule(
            c.schedule,
            peak=peak_learning_rate(c.optimizer, c.batch_size),
            steps=plan.position(plan.steps),
            warmup_steps=plan.warmup_steps,
            cooldown_steps=plan.cooldown_steps,
        )
        schedule = over_phases(schedule, plan.phases, c.optimizer, batch_size=c.batch_size)
        self.learning_rate = jax.jit(schedule)
        self.all_finite = jax.jit(all_finite)
        optimizer = make_optimizer(c.optimizer, schedule, c.freeze)
        make_model = partial(
            create_model,
            c.model.name,
            num_classes=data.num_classes,
            in_channels=c.data.image.channels,
            dtype=jnp.dtype(c.dtype),
            **overrides,
        )
        computed: Callable[[nnx.Module], nnx.Module] = lambda model: model  # noqa: E731
        if c.gradient_sums == "float32" and c.dtype != "float32":
            computed = sum_gradients_in_float32
        elif self.mesh.devices.flat[0].platform == "cpu":
            computed = partial(for_cpu, mesh=self.mesh)
        self.graph, self.abstract_state, self.fresh_state = make_state(
            lambda rngs: computed(make_model(rngs=rngs)),
            optimizer,
            c.seed,
            whole,
            spread=partial(spread, self.mesh) if c.spread_optimizer else None,
            ema=bool(c.ema.decay),
            guard=bool(c.guard.max_skipped),
            loss_spike=bool(c.guard.loss_spike),
        )
        for part in c.freeze:
            choose("config.freeze", part, self.abstract_state.params)
        if set(c.freeze) >= self.abstract_state.params.keys():
            raise UserError(f"config.freeze={c.freeze}: nothing is left to be trained")
        teacher = None
        if training and c.distill.teacher:
            teacher = Teacher.of(c.distill, c.data.image, data.num_classes, jnp.dtype(c.dtype), whole)
        self.teacher_weights = (teacher.weights,) if teacher else ()
        given: dict[str, Any] = {
            "mix_stop": plan.step_at(c.data.mix_until) if c.data.mix_until < 1 else None,
            "teacher": teacher,
            "parts": parts_sharding(self.mesh),
        }
        train_step = make_train_step(self.graph, optimizer, c, ema_start=plan.update_at(plan.ema_warmup_steps), **given)
        constant = [whole] * len(self.teacher_weights)
        of_state = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        of_args = (of_state, self.sharding, *constant)
        self.train_step = jax.jit(
            train_step,
            donate_argnums=0,
            in_shardings=of_args,
            out_shardings=(of_state, whole),
            compiler_options=compiler_options(self.mesh.devices.flat[0]),
        )
        self.update_of = make_gradients(self.graph, c, **given)  # for who needs a part of it, in a jit of their own
        self.gradients = jax.jit(self.update_of, in_shardings=of_args, out_shardings=whole)
        self.gathered = jax.jit(lambda tree: tree, out_shardings=whole)
        self.eval_step = jax.jit(
            make_eval_step(self.graph, c), in_shardings=(whole, whole, self.sharding), out_shardings=whole
        )

    def shapes(self, phase: Phase) -> tuple[Any, ...]:
        """The abstract arguments of `train_step` in that phase."""
        height, width, channels = self.data.train.image_shape
        image = (phase.batch_size, phase.image_size or height, phase.image_size or width, channels)
        batch = self._batch(image, *(["mirrored"] if self.config.data.image.flip_alternate else []))
        return self.abstract_state, batch, *self.teacher_weights

    def eval_shapes(self) -> tuple[Any, ...]:
        """The abstract arguments of `eval_step`."""
        state = self.abstract_state
        batch = self._batch((self.eval_batch_size, *self.data.eval.image_shape), "mask", "undecodable")
        return state.params, state.batch_stats, batch

    def _batch(self, image: tuple[int, ...], *masks: str) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = {"image": (image, jnp.uint8), "label": (image[:1], jnp.int32)}
        arrays |= dict.fromkeys(masks, (image[:1], jnp.bool_))
        return {name: jax.ShapeDtypeStruct(*of, sharding=self.sharding) for name, of in arrays.items()}

    def train_batches(self, start: int, stop: int, report: Report) -> Feed:
        """The batches of updates start … stop − 1, counted from 0, on the devices; see loader.train_batches."""
        return train_batches(
            self.data.train,
            self.config.data,
            start=start,
            stop=stop,
            seed=self.config.seed,
            phases=self.plan.phases,
            sharding=self.sharding,
            report=report,
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
        there, image = weights.mean + weights.std, c.data.image
        if len(there) == 2 * image.channels and not np.allclose(there, (*image.mean, *image.std), atol=1e-3):
            rows["note"] = (
                f"the weights know images normalised with other numbers: --config.data.image.mean={weights.mean} "
                f"--config.data.image.std={weights.std}"
            )
        return arrays, rows

    def flops(self, height: int, width: int) -> int:
        """Floating-point operations of the network for one image of that size, counted from its trace."""
        image = jax.ShapeDtypeStruct((1, height, width, self.config.data.image.channels), jnp.float32)

        def forward(params: Any, stats: Any, image: Any) -> Any:
            model: Any = nnx.merge(self.graph, params, stats)
            model.eval()
            return model(image)

        return 2 * cost(forward, self.abstract_state.params, self.abstract_state.batch_stats, image).multiply_adds

    def header(self, workdir: AnyPath, start: int) -> dict[str, str]:
        """What is about to run, a line for each heading."""
        c, data, plan = self.config, self.data, self.plan
        height, width, channels = data.train.image_shape
        parameters = sum(p.size for p in jax.tree.leaves(self.abstract_state.params))
        device, count = jax.devices()[0], jax.device_count()
        group, norm = c.model.bn_group_size, self.spec.norm
        batches = {phase.batch_size for phase in plan.phases}
        ends = sorted({min(batches), max(batches)})
        batch, per_device = (" to ".join(f"{size // by:,}" for size in ends) for by in (1, count))
        epochs, every = (steps / plan.steps_per_epoch for steps in (plan.position(plan.steps), plan.eval_every))
        header = {
            "model": f"{c.model.name}, {short(parameters)} parameters, "
            f"{short(self.flops(height, width))}FLOPs an image",
            "data": f"{data.name}: {len(data.train):,} {data.train.name}, {len(data.eval):,} {data.eval.name}, "
            f"{data.num_classes} classes, {height}×{width}×{channels}",
            "input": f"{data.train.source}, {Readers.of(c.data, data.train)}",
            "devices": f"{count} × {device.device_kind}, activations {c.dtype}"
            + (", gradients summed in float32" if c.gradient_sums == "float32" else "")
            + (", the optimizer's state spread over them" if c.spread_optimizer else ""),
            "batch": f"{batch} ({per_device} per device"
            + (f", in {c.accumulate} parts)" if c.accumulate > 1 else ")")
            + (f", batch norm over {f'groups of {group}' if group else 'all of it'}" if norm == "batch" else ""),
            "steps": f"{plan.steps:,} ({epochs:.4g} epochs), evaluated every "
            + (f"{every:.4g} epochs" if plan.changes_batch else f"{plan.eval_every:,.4g}")
            + f", {c.optimizer.name} with {c.schedule.name} schedule",
        }
        if device.platform == "gpu" and os.environ.get("XLA_FLAGS"):
            header["flags"] = os.environ["XLA_FLAGS"]
        header |= {"progressive": describe(plan)} if c.progressive else {}
        header["workdir"] = str(workdir)
        return header | ({"resumed": f"from step {start:,}"} if start else {})


def activation_dtype(name: str, platform: str) -> Any:
    """config.dtype as a dtype: "auto" is bfloat16 on TPU and GPU, float32 on CPU, which only emulates bfloat16."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def short(number: float) -> str:
    """1234567 → '1.23 M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "
