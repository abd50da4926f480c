"""Optimizers and schedules from config, all of them optax's."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jax_resnet.data.order import Phase
from jax_resnet.errors import UserError

# Each parameter is of the one kind whose rule its path fits; weight decay speaks of kinds.
KIND_RULES = {
    "kernel": r".*/kernel|kernel",
    "norm": r"(.*/)?norm\d*/(scale|bias|v|tau)",
    "bias": r"(.*/)?(?!norm\d*/)[^/]+/bias",
}


def parameter_kinds(params: Any) -> Any:
    """The kind (kernel, norm, bias) of each parameter, as a tree of strings like `params`.

    Raises ValueError naming a parameter that no rule, or more than one, covers.
    """

    def kind(path: Any, _: Any) -> str:
        name = "/".join(str(key.key) for key in path)
        kinds = [k for k, rule in KIND_RULES.items() if re.fullmatch(rule, name)]
        if len(kinds) != 1:
            raise ValueError(f"parameter {name}: covered by {len(kinds)} rules ({', '.join(kinds) or 'none'}), not one")
        return kinds[0]

    return jax.tree_util.tree_map_with_path(kind, params)


def layer_scales(params: Any, decay: float) -> Any:
    """Layer-wise decay of the learning rate: for each parameter decay^(layers above it), as a tree like `params`.

    The stem is a layer, each block is one, the head (with a last norm) is the highest (Clark et al. 2020, "ELECTRA",
    section 3.2). Raises ValueError naming a parameter that is in none of them.
    """
    blocks = [(stage, block) for stage in sorted(params) if stage.startswith("stage") for block in params[stage]]
    order = sorted(blocks, key=lambda b: (int(b[0].removeprefix("stage")), int(b[1].removeprefix("block"))))

    def scale(path: Any, _: Any) -> float:
        part, *inside = (str(key.key) for key in path)
        if part.startswith("stage"):
            return decay ** (len(order) - order.index((part, inside[0])))
        above = {"stem": len(order) + 1, "norm": 0, "head": 0}.get(part)
        if above is None:
            raise ValueError(f"parameter {'/'.join((part, *inside))}: in no layer that the rate could decay with")
        return decay**above

    return jax.tree_util.tree_map_with_path(scale, params)


def make_schedule(c: ConfigDict, *, peak: float, steps: float, warmup_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of each update, counted from 0: with warmup_from = 0 the first one moves nothing.

    Linear from peak · warmup_from over `warmup_steps`, then, with t the share of the rest that is done and f = final:
    cosine  peak · (f + (1 − f) · (1 + cos πt) / 2);  linear and polynomial  peak · (f + (1 − f) · (1 − t)^power);
    exponential  peak · f^t;  step  peak · factor for each boundary (a share of all steps) passed;  constant  peak.
    """
    if warmup_steps >= steps and warmup_steps > 0:
        raise UserError(f"config.schedule.warmup is {warmup_steps} steps, the whole training {steps:.0f}: shorten it")

    def schedule(step: Any) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        t = jnp.clip((done - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
        final = c.final
        if c.name == "cosine":
            share = final + (1 - final) * (1 + jnp.cos(jnp.pi * t)) / 2
        elif c.name in ("linear", "polynomial"):
            share = final + (1 - final) * (1 - t) ** (1.0 if c.name == "linear" else c.power)
        elif c.name == "exponential":
            share = final**t
        elif c.name == "step":
            passed = sum((jnp.asarray(step) >= round(b * steps)).astype(jnp.float32) for b in c.boundaries)
            share = c.factor ** jnp.asarray(passed)
        else:
            share = jnp.ones(())
        ramp = c.warmup_from + (1 - c.warmup_from) * done / max(warmup_steps, 1)
        return peak * jnp.where(done < warmup_steps, ramp, share)

    return schedule


def peak_learning_rate(c: ConfigDict, batch_size: int) -> float:
    """The highest rate: learning_rate · batch_size / reference_batch (Goyal et al. 2017), or unscaled if that is 0."""
    return c.learning_rate * (batch_size / c.reference_batch if c.reference_batch else 1.0)


def over_phases(
    schedule: Callable[[Any], jax.Array], phases: Sequence[Phase], *, batch_size: int, scaled: bool
) -> Callable[[Any], jax.Array]:
    """`schedule`, whose steps take `batch_size` examples, for updates that take as many as `phases` say.

    An update has the rate of the place in the data where its batch begins, if `scaled` times its batch / batch_size.
    """
    if all(phase.batch_size == batch_size for phase in phases):
        return schedule

    def of_update(step: Any) -> jax.Array:
        phase = (jnp.asarray(step) >= jnp.array([p.first_step for p in phases])).sum() - 1
        first_step = jnp.array([p.first_step for p in phases])[phase]
        first = jnp.array([p.first_example / batch_size for p in phases], jnp.float32)[phase]
        larger = jnp.array([p.batch_size / batch_size for p in phases], jnp.float32)[phase]
        return schedule(first + larger * (step - first_step)) * (larger if scaled else 1.0)

    return of_update


def make_optimizer(
    c: ConfigDict, schedule: Callable[[Any], jax.Array], freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optimizer that `config.optimizer` names, with what lies under `freeze` (stem, stage1, …) left alone.

    Weight decay reaches the kinds of parameters not in `no_decay`. For adamw it is added to the update (decoupled,
    Loshchilov and Hutter 2017), for the others to the gradient, before momentum and scaling (L2).
    """
    optimizer = _named_optimizer(c, schedule)
    if c.layer_decay != 1:

        def scaled(updates: Any, params: Any) -> Any:
            return jax.tree.map(lambda update, scale: update * scale, updates, layer_scales(params, c.layer_decay))

        optimizer = optax.chain(optimizer, optax.stateless(scaled))
    if not freeze:
        return optimizer

    def labels(params: Any) -> Any:
        return {part: "frozen" if part in freeze else "trained" for part in params}

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _named_optimizer(c: ConfigDict, schedule: Callable[[Any], jax.Array]) -> optax.GradientTransformation:

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda kind: kind not in c.no_decay, parameter_kinds(params))

    decay = optax.add_decayed_weights(c.weight_decay, mask=decayed)
    rate = optax.scale_by_learning_rate(schedule)
    if c.name == "sgd":
        momentum = optax.trace(c.momentum, nesterov=c.nesterov) if c.momentum else optax.identity()
        return optax.chain(decay, momentum, rate)
    if c.name in ("adam", "adamw"):
        adam = optax.scale_by_adam(c.beta1, c.beta2, c.epsilon)
        return optax.chain(adam, decay, rate) if c.name == "adamw" else optax.chain(decay, adam, rate)
    if c.name == "rmsprop":
        momentum = optax.trace(c.momentum) if c.momentum else optax.identity()
        return optax.chain(decay, optax.scale_by_rms(c.beta2, c.epsilon, eps_in_sqrt=False), momentum, rate)
    return optax.chain(decay, optax.scale_by_rss(initial_accumulator_value=0.0, eps=c.epsilon), rate)  # adagrad
