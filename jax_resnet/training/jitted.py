"""The jitted functions of a training, with their shardings: compiled on the first call, or ahead by StepsAhead."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from jax_resnet.runtime.mesh import batch_sharding, compiler_options, parts_sharding, replicated
from jax_resnet.training.distill import Teacher
from jax_resnet.training.network import Network
from jax_resnet.training.plan import Plan
from jax_resnet.training.schedules import Schedule
from jax_resnet.training.state import all_finite
from jax_resnet.training.step import make_eval_step, make_gradients, make_train_step


class ScheduledOptimizer(NamedTuple):
    """An optimizer and the learning rate that it follows."""

    learning_rate: Schedule  # by update, counted from 0
    at: Callable[[Any], optax.GradientTransformation]  # update, counted from 0 → the optimizer with its learning rate


@dataclass(frozen=True)
class Steps:
    """The jitted functions of a training."""

    train: Any  # (state, batch, *teacher_weights) → (state, sums); the state is donated
    evaluate: Any  # (params, batch_stats, batch) → sums
    gradients: Any  # (state, batch, *teacher_weights) → (gradients, batch_stats, sums)
    compute_gradients: Any  # the same, not jitted, so that average.py can compile the statistics alone
    all_finite: Any  # a tree → bool []
    learning_rate: Any  # update, counted from 0 → float32 []
    teacher_weights: tuple[Any, ...]  # those of distillation, or none


def build_steps(
    config: ConfigDict, plan: Plan, network: Network, optimizer: ScheduledOptimizer, teacher: Teacher | None
) -> Steps:
    """Jit the functions of a training of `network`, distilled from `teacher` if there is one."""
    mesh, problem = network.mesh, network.problem
    everywhere, sharding = replicated(mesh), batch_sharding(mesh)
    teacher_weights = (teacher.weights,) if teacher else ()
    options: dict[str, Any] = {"teacher": teacher, "parts": parts_sharding(mesh)}
    ema_start = plan.update_at(plan.ema_warmup_steps)
    train_step = make_train_step(problem, optimizer.at, config, ema_start=ema_start, **options)
    compute_gradients = make_gradients(problem, config, **options)
    of_arguments = (everywhere, sharding, *[everywhere] * len(teacher_weights))
    return Steps(
        train=jax.jit(
            train_step,
            donate_argnums=0,
            in_shardings=of_arguments,
            out_shardings=everywhere,
            compiler_options=compiler_options(mesh.devices.flat[0]),
        ),
        evaluate=jax.jit(
            make_eval_step(problem, config), in_shardings=(everywhere, everywhere, sharding), out_shardings=everywhere
        ),
        gradients=jax.jit(compute_gradients, in_shardings=of_arguments, out_shardings=everywhere),
        compute_gradients=compute_gradients,
        all_finite=jax.jit(all_finite),
        learning_rate=jax.jit(optimizer.learning_rate),
        teacher_weights=teacher_weights,
    )
