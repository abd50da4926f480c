"""The learning rate of each update, from config.schedule and the size of the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_resnet.data.sampling import Phase
from jax_resnet.errors import UserError

Schedule = Callable[[Any], jax.Array]


def make_schedule(
    c: ConfigDict, *, peak: float, steps: float, warmup_steps: int = 0, cooldown_steps: int = 0
) -> Schedule:
    """Return the learning rate by update, counted from 0: with warmup_from = 0 the first one moves nothing.

    It is peak · share, and with f = final and t the part that is done, 0 … 1, of what lies between warmup and cooldown:
    cosine, one_cycle  f + (1 − f) · (1 + cos πt) / 2;  linear, polynomial  f + (1 − f) · (1 − t)^power, power 1 in
    linear;  exponential  f^t.  These end at f, where the cooldown begins. The others are at least f:  constant  1;
    step  factor for each boundary passed;  piecewise  linear between knots, both at shares of all steps, warmup and
    cooldown included;  inverse_sqrt  √(W / step), W being warmup_steps and at least 1 (Vaswani et al. 2017, section
    5.3).

    Over the first `warmup_steps` the share is multiplied by a line from warmup_from to 1, in one_cycle by half a
    cosine. Over the last `cooldown_steps` it falls in a line from what it is where they begin to f.

    one_cycle is optax.cosine_onecycle_schedule(steps, peak, warmup_steps / steps, 1 / warmup_from, warmup_from / f).
    torch's OneCycleLR(anneal_strategy="cos") reaches the peak and the end an update earlier: of total_steps = n it
    is what here are n − 1 steps, with a warmup of pct_start · n − 1.

    Raises UserError if warmup and cooldown leave nothing between them.
    """
    if warmup_steps + cooldown_steps >= steps and warmup_steps + cooldown_steps:
        lengths = f"warmup is {warmup_steps} steps" + (f" and cooldown {cooldown_steps}" if cooldown_steps else "")
        raise UserError(f"config.schedule.{lengths}, the whole training {steps:.0f}: leave some for what is between")
    cooldown = steps - cooldown_steps

    def share(done: jax.Array) -> jax.Array:
        t = jnp.clip((done - warmup_steps) / (cooldown - warmup_steps), 0.0, 1.0)
        if c.name in ("cosine", "one_cycle"):
            return c.final + (1 - c.final) * (1 + jnp.cos(jnp.pi * t)) / 2
        if c.name in ("linear", "polynomial"):
            return c.final + (1 - c.final) * (1 - t) ** (1.0 if c.name == "linear" else c.power)
        if c.name == "exponential":
            return c.final**t
        if c.name == "step":
            passed = (done >= jnp.array([round(b * steps) for b in c.boundaries], jnp.float32)).sum()
            value = c.factor ** passed.astype(jnp.float32)
        elif c.name == "piecewise":
            at, values = zip(*c.knots, strict=True)
            value = jnp.interp(done / steps, jnp.array(at), jnp.array(values))
        elif c.name == "inverse_sqrt":
            value = jnp.sqrt(max(warmup_steps, 1) / jnp.maximum(done, max(warmup_steps, 1)))
        else:
            value = jnp.ones(())
        if c.final:
            value = jnp.maximum(value, c.final)
        return value

    def schedule(step: Any) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        before_cooldown = jnp.minimum(done, cooldown) if cooldown_steps else done
        value = share(before_cooldown)
        if warmup_steps:
            up = jnp.clip(done / warmup_steps, 0.0, 1.0)
            if c.name == "one_cycle":
                up = (1 - jnp.cos(jnp.pi * up)) / 2
            value = value * (c.warmup_from + (1 - c.warmup_from) * up)
        if cooldown_steps:
            value = c.final + (value - c.final) * jnp.clip((steps - done) / cooldown_steps, 0.0, 1.0)
        return peak * value

    return schedule


def peak_learning_rate(c: ConfigDict, batch_size: int) -> float:
    """Return the highest rate that `config.optimizer` gives a batch of that many examples.

    learning_rate · batch_size / reference_batch (Goyal et al. 2017, section 2.1), the root of that quotient with
    batch_scaling = "sqrt" (Krizhevsky 2014, "One weird trick"), or unscaled if reference_batch is 0.
    """
    if not c.reference_batch:
        return c.learning_rate
    larger = batch_size / c.reference_batch
    if c.batch_scaling == "sqrt":
        larger **= 0.5
    return c.learning_rate * larger


def over_phases(schedule: Schedule, phases: Sequence[Phase], c: ConfigDict, *, batch_size: int) -> Schedule:
    """Adapt `schedule`, whose steps take `batch_size` examples, to updates that take as many as `phases` say.

    An update has the rate of the place in the data where its batch begins, scaled to its batch as `config.optimizer`
    scales the peak.
    """
    if all(phase.batch_size == batch_size for phase in phases):
        return schedule

    def of_update(step: Any) -> jax.Array:
        phase = (jnp.asarray(step) >= jnp.array([p.first_step for p in phases])).sum() - 1
        first_step = jnp.array([p.first_step for p in phases])[phase]
        first = jnp.array([p.first_example / batch_size for p in phases], jnp.float32)[phase]
        larger = jnp.array([p.batch_size / batch_size for p in phases], jnp.float32)[phase]
        peaks = jnp.array([peak_learning_rate(c, p.batch_size) for p in phases], jnp.float32)
        return schedule(first + larger * (step - first_step)) * (peaks / peak_learning_rate(c, batch_size))[phase]

    return of_update
