"""A config made ready to run on the devices at hand."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from jax_resnet.config import phase_rows, validate
from jax_resnet.data.batches import Report
from jax_resnet.data.dataset import Dataset
from jax_resnet.data.loader import Feed, train_batches
from jax_resnet.data.sampling import Phase
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import UserError
from jax_resnet.models.spec import ResNetSpec
from jax_resnet.runtime.mesh import batch_sharding, check_divides, data_mesh, replicated
from jax_resnet.training.distill import Teacher
from jax_resnet.training.jitted import ScheduledOptimizer, Steps, build_steps
from jax_resnet.training.network import Network, build_network, spec_of
from jax_resnet.training.optimizers import make_optimizer
from jax_resnet.training.plan import Plan
from jax_resnet.training.schedules import make_schedule, over_phases, peak_learning_rate
from jax_resnet.training.tasks import Task, task_of


@dataclass(frozen=True)
class Experiment:
    """A config made ready to run: the data, the plan, the network and the jitted steps."""

    config: ConfigDict  # a copy in which dtype="auto" is decided, so that other devices do not change a run
    data: Dataset
    plan: Plan
    network: Network
    steps: Steps

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.network.mesh

    @property
    def task(self) -> Task:
        """What the network is trained to answer."""
        return self.network.problem.task

    @property
    def sharding(self) -> NamedSharding:
        """How a batch lies over the devices."""
        return batch_sharding(self.mesh)

    @property
    def last_step(self) -> int:
        """Updates done when this run ends, which may be before the whole training does."""
        return min(self.plan.steps, self.config.stop_after_steps or self.plan.steps)

    @property
    def eval_batch_size(self) -> int:
        """Examples in a batch of the evaluation: rounded up to a multiple of the number of devices."""
        wanted = min(self.config.eval.batch_size or self.config.batch_size, len(self.data.eval))
        return -(-wanted // self.mesh.size) * self.mesh.size

    def shapes(self, phase: Phase) -> tuple[Any, ...]:
        """Return the abstract arguments of `steps.train` in that phase."""
        spec = self.data.train.element_spec(phase.image_size, training=True)
        return self.network.abstract_state, self._batch(phase.batch_size, spec), *self.steps.teacher_weights

    def eval_shapes(self) -> tuple[Any, ...]:
        """Return the abstract arguments of `steps.evaluate`."""
        state = self.network.abstract_state
        masks = dict.fromkeys(("mask", "undecodable"), jax.ShapeDtypeStruct((), jnp.bool_))
        batch = self._batch(self.eval_batch_size, self.data.eval.element_spec() | masks)
        return state.params, state.batch_stats, batch

    def _batch(self, size: int, spec: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=self.sharding) for name, x in spec.items()
        }

    def train_batches(self, start: int, stop: int, report: Report) -> Feed:
        """Read the batches of updates start … stop − 1, counted from 0, onto the devices; see loader.train_batches."""
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


def build(
    config: ConfigDict, *, training: bool = True, data: Dataset | None = None, mesh: Mesh | None = None
) -> Experiment:
    """Make `config` ready to run. Nothing is compiled or computed yet.

    Without `training` the batch may have any size: evaluation fills its last batch up. `data` is what
    config.data names, where that is open already; `mesh` has other devices than those at hand, to compile for.

    Raises UserError for what is wrong with the config, the data or their fit.
    """
    validate(config)
    mesh = mesh or data_mesh()
    config = config.copy_and_resolve_references()
    config.dtype = activation_dtype(config.dtype, mesh.devices.flat[0].platform).name
    spec = spec_of(config)
    if training:
        check_batch_sizes(config, mesh)
    check_accumulation(config, spec)
    data = data or open_dataset(config.data)
    check_data(config, spec, data)
    if training:
        check_batches_fit(config, data)
    plan = Plan.of(config, len(data.train))
    optimizer, task = build_optimizer(config, plan), task_of(config, data)
    network = build_network(config, mesh, data.inputs, task, optimizer.at(0))
    teacher = None
    if training and config.distill.teacher:
        dtype = jnp.dtype(config.dtype)
        teacher = Teacher.of(config.distill, config.data.image, task.outputs, dtype, replicated(mesh))
    steps = build_steps(config, plan, network, optimizer, teacher)
    return Experiment(config, data, plan, network, steps)


def activation_dtype(name: str, platform: str) -> Any:
    """Return config.dtype as a dtype: "auto" is bfloat16 on TPU and GPU, float32 on CPU, which only emulates it."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def build_optimizer(config: ConfigDict, plan: Plan) -> ScheduledOptimizer:
    """Build the optimizer of `config.optimizer`, with the learning rate that it follows."""
    schedule = make_schedule(
        config.schedule,
        peak=peak_learning_rate(config.optimizer, config.batch_size),
        steps=plan.position(plan.steps),
        warmup_steps=plan.warmup_steps,
        cooldown_steps=plan.cooldown_steps,
    )
    schedule = over_phases(schedule, plan.phases, config.optimizer, batch_size=config.batch_size)

    def at(step: Any) -> optax.GradientTransformation:
        # optax would give the schedule its own count, of the updates that were made: a skipped one is none of them.
        return make_optimizer(config.optimizer, lambda _: schedule(step), config.freeze)

    return ScheduledOptimizer(schedule, at)


def _batch_key(config: ConfigDict) -> str:
    return "config.progressive: batch_size" if config.progressive else "config.batch_size"


def check_batch_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Raise UserError where the devices do not divide the batch of a phase."""
    for _, _, batch_size in phase_rows(config):
        check_divides(batch_size, mesh, _batch_key(config), config.accumulate)


def check_accumulation(config: ConfigDict, spec: ResNetSpec) -> None:
    """Raise UserError where batch statistics would be over all of a batch that is computed in parts."""
    if config.accumulate > 1 and spec.norm == "batch" and not config.model.bn_group_size:
        part = math.gcd(*(batch_size // config.accumulate for _, _, batch_size in phase_rows(config)))
        raise UserError(
            f"config.accumulate={config.accumulate}: the statistics of batch norm cannot be over all of a batch that "
            f"is computed in parts; give --config.model.bn_group_size={part}, or a divisor of it"
        )


def check_data(config: ConfigDict, spec: ResNetSpec, data: Dataset) -> None:
    """Raise UserError where images are too small for the network, or their classes are not those it is to have."""
    sides = [("data.image.size", min(data.input_shape[:2]))]
    sides += [("progressive", size) for _, size, _ in phase_rows(config) if size is not None]
    for key, side in sides:
        if side < spec.total_stride:
            stem = ", or --config.model.stem=cifar" if spec.stem == "imagenet" else ""
            raise UserError(
                f"config.{key}: {config.model.name} takes images of at least {spec.total_stride} pixels a side, "
                f"these have {side}; give {spec.total_stride} or more{stem}"
            )
    if config.model.num_classes and config.model.num_classes != data.num_classes:
        raise UserError(
            f"config.model.num_classes={config.model.num_classes}, but {config.data.name} has {data.num_classes} "
            "classes; leave it out to take the data's"
        )


def check_batches_fit(config: ConfigDict, data: Dataset) -> None:
    """Raise UserError where a batch holds more examples than there are."""
    for _, _, batch_size in phase_rows(config):
        if batch_size > len(data.train):
            raise UserError(
                f"{_batch_key(config)}={batch_size} is larger than the {data.train.name} split of {config.data.name}, "
                f"{len(data.train)} examples"
            )
