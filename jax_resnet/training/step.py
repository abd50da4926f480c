"""One update and one evaluation: pure functions of (state, batch)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from jax_resnet.data.inputs import Draws, Inputs
from jax_resnet.training.distill import Teacher
from jax_resnet.training.losses import distillation
from jax_resnet.training.metrics import Sums
from jax_resnet.training.state import TrainState, all_finite
from jax_resnet.training.tasks import Task

Batch = dict[str, jax.Array]
STEP_KEYS = 2**32 - 1  # folded into the seed's key: the parameters are drawn from the same key, with counts from 0


@dataclass(frozen=True)
class Problem:
    """A network, a kind of input and a task."""

    graph: nnx.GraphDef
    inputs: Inputs
    task: Task


def make_train_step(
    problem: Problem,
    optimizer_at: Callable[[jax.Array], optax.GradientTransformation],
    config: ConfigDict,
    *,
    parts: NamedSharding,
    ema_start: int = 0,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[TrainState, Sums]]:
    """Return the update: (state, batch) → (new state, sums over the batch).

    A batch holds the arrays of the dataset's element_spec, [N, …] each; with a `teacher` its weights are a third
    argument. `optimizer_at` gives the optimizer with the learning rate of an update, counted from 0. `ema_start` is the
    step until which the average is a copy; the rest is as in `make_gradients`.

    Where the state has a guard, an update whose loss or gradients, before clipping, are not finite is skipped: of the
    state only step and guard change. So are all after `config.guard.max_skipped` in a row. The sums then also have
    skipped, int32 0 or 1, and skipped_loss, float32, the mean loss of a skipped batch, else 0; all others are 0.
    """
    c, gradients = config, make_gradients(problem, config, teacher=teacher, parts=parts)

    def train_step(state: TrainState, batch: Batch, *teacher_weights: Any) -> tuple[TrainState, Sums]:
        grads, batch_stats, sums = gradients(state, batch, *teacher_weights)
        updates, opt_state = optimizer_at(state.step).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = replace(state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        if c.ema.decay:
            new = replace(new, ema=_averaged(new, c.ema, ema_start))
        if state.guard:
            return _guarded(state, new, grads, sums, c.guard.max_skipped)
        return new, sums

    return train_step


def make_gradients(
    problem: Problem,
    config: ConfigDict,
    *,
    parts: NamedSharding,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[Any, Any, Sums]]:
    """Return what an update is made of: (state, batch) → gradients, the new batch statistics, sums over the batch.

    With a `teacher` its weights are a third argument. `parts` is the sharding of arrays [config.accumulate,
    N / config.accumulate, …].

    The parts of the network in `config.freeze` normalise by their running statistics and leave them as they are.
    All randomness comes from (seed, state.step) and the row in the global batch; that of dropout and drop_path from the
    part and the row in it.
    """
    c, inputs, task = config, problem.inputs, problem.task

    def of_batch(state: TrainState, batch: Batch, *teacher_weights: Any) -> tuple[Any, Any, Sums]:
        rows, shared, dropout_key = _drawn(batch, state.step, inputs, c.seed)

        def loss(params: Any, rows: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Any, Sums]]:
            augmented = inputs.augment(rows, shared)
            params = {name: jax.lax.stop_gradient(p) if name in c.freeze else p for name, p in params.items()}
            model = _model_in_training(problem.graph, params, state.batch_stats, c.freeze)
            logits = model(augmented, rngs=nnx.Rngs(dropout=key))
            targets = task.targets(rows, shared.get("kept"))
            losses = task.losses(logits, targets, training=True)
            if teacher:
                distilled = distillation(logits, teacher.logits(teacher_weights[0], augmented), c.distill.temperature)
                losses = (1 - c.distill.alpha) * losses + c.distill.alpha * distilled
            stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return losses.mean(), (stats, task.sums(logits, targets, losses))

        def gradients(params: Any) -> tuple[Any, tuple[Any, Sums]]:
            grad = jax.grad(loss, has_aux=True)
            if c.accumulate == 1:
                return grad(params, rows, dropout_key)
            return _accumulated(lambda part, key: grad(params, part, key), rows, dropout_key, c.accumulate, parts)

        grads, (batch_stats, sums) = gradients(state.params)
        if c.optimizer.sam_rho:
            grads = _sharpness_aware(
                grads, gradients, state, c.optimizer.sam_rho, c.optimizer.sam_every, _on_cpu(parts)
            )
        frozen = {name: stats for name, stats in state.batch_stats.items() if name in c.freeze}
        return grads, batch_stats | frozen, sums

    return of_batch


def _drawn(batch: Batch, step: jax.Array, inputs: Inputs, seed: int) -> tuple[Batch, Draws, jax.Array]:
    """Return the batch with the draws about each of its rows, those about all of them, and a key for dropout."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEP_KEYS), step)
    augment_key, dropout_key = jax.random.split(key)
    rows, shared = inputs.draw(augment_key, batch)
    return rows | batch, shared, dropout_key


def _model_in_training(graph: nnx.GraphDef, params: Any, batch_stats: Any, freeze: Sequence[str]) -> Any:
    model: Any = nnx.merge(graph, params, batch_stats)
    model.train()
    for name in freeze:
        getattr(model, name).eval()
    return model


def _accumulated(
    grad: Callable[[Batch, jax.Array], tuple[Any, tuple[Any, Sums]]],
    rows: Batch,
    key: jax.Array,
    count: int,
    sharding: NamedSharding,
) -> tuple[Any, tuple[Any, Sums]]:
    """Compute what `grad` gives of all of a batch, from `count` parts of consecutive rows, one after another.

    Each part begins with the same batch statistics. No group of batch norm is larger than a part, so the mean over the
    parts is the update of the whole batch.
    """

    def split(x: jax.Array) -> jax.Array:
        # Each part lies over all devices; consecutive rows lie on one device, so they are sent, as uint8.
        return jax.lax.with_sharding_constraint(x.reshape(count, -1, *x.shape[1:]), sharding)

    def add(total: Any, part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        number, some = part
        return jax.tree.map(jnp.add, total, grad(some, jax.random.fold_in(key, number))), None

    pieces = jnp.arange(count), jax.tree.map(split, rows)
    shapes = jax.eval_shape(grad, jax.tree.map(lambda x: x[0], pieces[1]), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # A convolution inside a loop misses the CPU's fast path.
    (grads, (stats, sums)), _ = jax.lax.scan(add, zeros, pieces, unroll=_on_cpu(sharding))
    grads, stats = jax.tree.map(lambda x: x / count, (grads, stats))
    return grads, (stats, sums)


def _on_cpu(sharding: NamedSharding) -> bool:
    """Tell whether the step is for CPUs, whatever the machine is that it is compiled on."""
    return sharding.mesh.devices.flat[0].platform == "cpu"


def _sharpness_aware(
    grads: Any, gradients: Callable[[Any], tuple[Any, Any]], state: TrainState, rho: float, every: int, on_cpu: bool
) -> Any:
    """Return the gradients at `rho` uphill of the parameters, at every `every`-th step (Foret et al. 2020, equation 2).

    Batch statistics are not taken from there: they belong to the parameters that are kept.
    """

    def uphill(grads: Any) -> Any:
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        return gradients(jax.tree.map(lambda p, g: p + scale * g, state.params, grads))[0]

    if every == 1:
        return uphill(grads)
    if on_cpu:  # where a convolution misses the fast path inside a conditional
        return jax.tree.map(partial(jnp.where, state.step % every == 0), uphill(grads), grads)
    return jax.lax.cond(state.step % every == 0, uphill, lambda same: same, grads)


def _averaged(new: TrainState, c: ConfigDict, start: int) -> Any:
    """Move the running average towards the new weights, as `config.ema` says."""
    decay = jnp.float32(c.decay)
    if c.ramp:
        updates = (new.step - start) // c.every
        decay = jnp.minimum(decay, (1 + updates) / (10 + updates))
    if start:
        decay = jnp.where(new.step <= start, 0.0, decay)
    if c.every > 1:
        decay = jnp.where(new.step % c.every == 0, decay, 1.0)
    return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, new.ema, new.weights)


def _guarded(old: TrainState, new: TrainState, grads: Any, sums: Sums, max_skipped: int) -> tuple[TrainState, Sums]:
    """Return `new` and `sums`, or where the update is to be skipped `old`, a step on, and sums that leave it out."""
    loss, row = sums["loss"] / sums["examples"], old.guard["row"]
    taken = jnp.isfinite(loss) & (row < max_skipped) & all_finite(grads)
    guard = {"row": jnp.where(taken, 0, row + 1)}
    state = jax.tree.map(partial(jnp.where, taken), replace(new, guard={}), replace(old, step=new.step, guard={}))
    sums = {name: jnp.where(taken, value, 0) for name, value in sums.items()}
    skipped = {"skipped": 1 - taken.astype(jnp.int32), "skipped_loss": jnp.where(taken, 0.0, loss)}
    return replace(state, guard=guard), sums | skipped


def make_eval_step(problem: Problem, config: ConfigDict) -> Callable[[Any, Any, Batch], Sums]:
    """Return the evaluation: (params, batch_stats, batch) → sums over the rows where the batch's mask holds.

    The batch is one of batches.eval_batch, with mask and undecodable, bool [N]. The sums also count the undecodable
    rows.
    """
    inputs, task = problem.inputs, problem.task

    def eval_step(params: Any, batch_stats: Any, batch: Batch) -> Sums:
        model: Any = nnx.merge(problem.graph, params, batch_stats)
        model.eval()
        normalised = inputs.normalise(batch)
        logits = model(normalised)
        if config.eval.mirror:
            logits = (logits + model(inputs.mirror(normalised))) / 2
        targets = task.targets(batch)
        losses = task.losses(logits, targets, training=False)
        counts = {"undecodable": batch["undecodable"].sum()}
        return task.sums(logits, targets, losses, batch["mask"]) | counts

    return eval_step
