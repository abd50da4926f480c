"""Optimizers from config.optimizer, chained from optax's parts."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from jax_resnet.errors import UserError
from jax_resnet.training.schedules import Schedule

# Each parameter is of the one kind whose rule its path fits; weight decay speaks of kinds.
KIND_RULES = {
    "kernel": r".*/kernel|kernel",
    "norm": r"(.*/)?norm\d*/(scale|bias|v|tau)",
    "bias": r"(.*/)?(?!norm\d*/)[^/]+/bias",
}
DECOUPLED = ("adamw", "lamb", "lion", "adafactor", "muon")  # as published


def parameter_kinds(params: Any) -> Any:
    """Return the kind (kernel, norm, bias) of each parameter, as a tree of strings like `params`.

    Raises ValueError naming a parameter that no rule, or more than one, covers.
    """
    return _by_name(_kind, params)


def _kind(name: str) -> str:
    kinds = [k for k, rule in KIND_RULES.items() if re.fullmatch(rule, name)]
    if len(kinds) != 1:
        raise ValueError(f"parameter {name}: covered by {len(kinds)} rules ({', '.join(kinds) or 'none'}), not one")
    return kinds[0]


def _by_name(value: Callable[[str], Any], params: Any) -> Any:
    """Map each parameter's name, such as stage1/block0/conv1/kernel, to a value: a tree like `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: value("/".join(str(key.key) for key in path)), params)


def _covers(rule: str, name: str) -> bool:
    """Tell whether an entry of no_decay or rate_factors, a kind or a pattern, covers that parameter."""
    if rule in KIND_RULES:
        return _kind(name) == rule
    return re.fullmatch(rule, name) is not None


def decayed(c: ConfigDict, params: Any) -> Any:
    """Return whether weight decay reaches each parameter, as a tree of bools: all that no_decay does not cover."""
    return _by_name(lambda name: not any(_covers(rule, name) for rule in c.no_decay), params)


def rate_factors(c: ConfigDict, params: Any) -> Any:
    """Return the factor on each parameter's learning rate: its entry of rate_factors times its layer's decay."""
    factors = _by_name(lambda name: next((f for rule, f in c.rate_factors if _covers(rule, name)), 1.0), params)
    if c.layer_decay == 1:
        return factors
    return jax.tree.map(operator.mul, factors, layer_scales(params, c.layer_decay))


def check_rules(c: ConfigDict, params: Any) -> None:
    """Raise UserError for a pattern that covers no parameter, and for two rate_factors that cover the same one.

    Raises ValueError naming a parameter that is of no kind, or of two.
    """
    parameter_kinds(params)
    names = jax.tree.leaves(_by_name(str, params))
    factored = [rule for rule, _ in c.rate_factors]
    for key, rules in (("no_decay", c.no_decay), ("rate_factors", factored)):
        for rule in rules:
            if rule not in KIND_RULES and not any(_covers(rule, name) for name in names):
                raise UserError(
                    f"config.optimizer.{key}: the pattern {rule!r} matches no parameter; it must match a whole name, "
                    f"such as {names[0]}"
                )
    for name in names:
        found = [rule for rule in factored if _covers(rule, name)]
        if len(found) > 1:
            raise UserError(
                f"config.optimizer.rate_factors: {found[0]!r} and {found[1]!r} both cover {name}; let one of them"
            )


def layer_scales(params: Any, decay: float) -> Any:
    """Layer-wise decay of the learning rate: for each parameter decay^(layers above it), as a tree like `params`.

    The stem is a layer, each block is one, the head (with a last norm) is the highest (Clark et al. 2020, "ELECTRA",
    section 3.2). Raises ValueError naming a parameter that is in none of them.
    """
    blocks = [(stage, block) for stage in sorted(params) if stage.startswith("stage") for block in params[stage]]
    order = sorted(blocks, key=lambda b: (int(b[0].removeprefix("stage")), int(b[1].removeprefix("block"))))

    def scale(name: str) -> float:
        part, *inside = name.split("/")
        if part.startswith("stage"):
            return decay ** (len(order) - order.index((part, inside[0])))
        above = {"stem": len(order) + 1, "norm": 0, "head": 0}.get(part)
        if above is None:
            raise ValueError(f"parameter {name}: in no layer that the rate could decay with")
        return decay**above

    return _by_name(scale, params)


def hidden_convolutions(params: Any) -> Any:
    """For each parameter "hidden" if it is the kernel of a convolution other than the stem's first, else "rest".

    The kernels of squeeze-and-excite, [in, out], and of ECA, [width, 1, 1], are of the rest.
    """
    first = _by_name(lambda name: name == "stem/conv1/kernel", params)
    return jax.tree.map(lambda w, is_first: "hidden" if w.ndim == 4 and not is_first else "rest", params, first)


def make_optimizer(c: ConfigDict, schedule: Schedule, freeze: Sequence[str] = ()) -> optax.GradientTransformation:
    """Make the optimizer that `config.optimizer` names, with what lies under `freeze` (stem, stage1, …) left alone.

    An update is made of these, in this order, each only where the config asks for it:

    1. Clipping of the gradient: clip_value, clip_norm over all that is trained.
    2. l1 · sign(w) and coupled decay, weight_decay · w, added to the gradient of what no_decay does not cover.
    3. The rule of the optimizer, with its momentum, and decoupled decay: weight_decay · w is added to the update and
       takes the rate with it (Loshchilov and Hutter 2017), as adamw, lamb, lion, adafactor and muon are published.
    4. The factors of each parameter's rate: rate_factors and layer_decay.

    Momentum is v ← m·v + g, w ← w − rate·v, as torch has it: a new rate works at once on all of v. With
    rate_in_momentum (sgd, rmsprop, lars; always in rmsprop_tf) it is v ← m·v + rate·g, w ← w − v, as in Caffe,
    TensorFlow and the paper of LARS: what is in v keeps the rate it came with. While the rate stays as it is they are
    the same; where it grows by a factor, v is too small by that factor in the second until it has been renewed
    (Goyal et al. 2017, section 3, remark 2, "momentum correction").

    sgd         Nesterov's momentum is g + m·v in place of v (Sutskever et al. 2013, as torch).
    rmsprop     g / (√mean square + epsilon), then momentum, as torch.  rmsprop_tf: g / √(mean square + epsilon), the
                mean square starting at 1, as TensorFlow and timm's RMSpropTF.
    adagrad     g / √(sum of squares + epsilon); torch adds epsilon to the root.
    lars        trust_coefficient · ‖w‖ / (‖g‖ + weight_decay · ‖w‖ + epsilon) · (g + weight_decay · w), then momentum
                (You et al. 2017, algorithm 1), for each parameter that decays; the others are sgd's. Where decay is
                decoupled, this is without it.
    lamb        adam's update plus decay, scaled to the norm of w, for each parameter that decays; the others are
                adam's (You et al. 2019, algorithm 2; timm's always_adapt=False).
    adafactor   mean squares factored over the two largest dimensions where both are at least 128, updates clipped to a
                root mean square of 1 and scaled by that of w, at least 1e-3; no momentum (Shazeer and Stern 2018).
    muon        for hidden convolutions, [H·W·in, out] as a matrix: momentum, orthogonalised by newton_schulz_steps,
                times √max(1, out / (H·W·in)) (Jordan et al. 2024); torch's "original". All else is optimizer.rest's,
                with the same schedule under its own peak: adam, or sgd with Nesterov's momentum.

    Its `init` raises UserError for entries of no_decay and rate_factors that do not fit the parameters, ValueError
    naming a parameter that is of no kind, or of two.
    """
    clips = [
        *([optax.clip(c.clip_value)] if c.clip_value else []),
        *([optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []),
    ]
    if c.name == "muon":
        of_rest = c.rest.learning_rate / c.learning_rate
        rules = {
            "hidden": _rule(c, "muon", schedule, c.momentum, c.nesterov),
            "rest": _rule(c, c.rest.name, lambda step: of_rest * schedule(step), c.rest.momentum, nesterov=True),
        }
        rule = optax.partition(rules, hidden_convolutions)
    else:
        rule = _rule(c, c.name, schedule, c.momentum, c.nesterov)
    optimizer = rule
    if clips:
        optimizer = optax.chain(*clips, rule)
    if freeze:
        parts = {"trained": optimizer, "frozen": optax.set_to_zero()}
        optimizer = optax.partition(parts, lambda params: {p: "frozen" if p in freeze else "trained" for p in params})
    if c.rate_factors or c.layer_decay != 1:

        def scaled(updates: Any, params: Any) -> Any:
            return jax.tree.map(operator.mul, updates, rate_factors(c, params))

        optimizer = optax.chain(optimizer, optax.stateless(scaled))

    def init(params: Any) -> Any:
        check_rules(c, params)
        return optimizer.init(params)

    return optax.GradientTransformation(init, optimizer.update)


# The optimizers that scale each gradient by what they know of earlier ones.
SCALES: dict[str, Callable[[ConfigDict], optax.GradientTransformation]] = {
    "rmsprop": lambda c: optax.scale_by_rms(c.beta2, c.epsilon, eps_in_sqrt=False),
    "rmsprop_tf": lambda c: optax.scale_by_rms(c.beta2, c.epsilon, initial_scale=1.0),
    "adagrad": lambda c: optax.scale_by_rss(initial_accumulator_value=0.0, eps=c.epsilon),
    "adam": lambda c: optax.scale_by_adam(c.beta1, c.beta2, c.epsilon),
    "adamw": lambda c: optax.scale_by_adam(c.beta1, c.beta2, c.epsilon),
    "lamb": lambda c: optax.scale_by_adam(c.beta1, c.beta2, c.epsilon),
    "lion": lambda c: optax.scale_by_lion(c.beta1, c.beta2),
    "adafactor": lambda c: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    ),
}


def _rule(
    c: ConfigDict, name: str, schedule: Schedule, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
    """Build steps 2 and 3 of make_optimizer."""
    mask = partial(decayed, c)
    decoupled = c.decoupled
    if decoupled is None:
        decoupled = c.name in DECOUPLED
    coupled_decay, decoupled_decay = c.weight_decay, 0.0
    if decoupled:
        coupled_decay, decoupled_decay = 0.0, c.weight_decay
    rate = optax.scale_by_learning_rate(schedule)
    rule = []
    if c.l1:
        rule.append(optax.masked(optax.stateless(partial(_add_signs, c.l1)), mask))
    if name == "lars":
        rule.append(optax.masked(optax.stateless(partial(_lars, c, coupled_decay)), mask))
    elif coupled_decay:
        rule.append(optax.add_decayed_weights(coupled_decay, mask))
    if name in SCALES:
        rule.append(SCALES[name](c))
    trace = []
    if momentum and name in ("sgd", "rmsprop", "rmsprop_tf", "lars", "muon"):
        trace.append(optax.trace(momentum, nesterov=nesterov and not name.startswith("rmsprop")))
    if c.rate_in_momentum or name == "rmsprop_tf":
        rule += [rate, *trace]
        if decoupled_decay:
            rule.append(optax.add_decayed_weights(lambda step: -decoupled_decay * schedule(step), mask))
        return optax.chain(*rule)
    rule += trace
    if name == "muon":
        rule.append(optax.stateless(partial(_orthogonalised, c)))
    if decoupled_decay:
        rule.append(optax.add_decayed_weights(decoupled_decay, mask))
    if name == "lamb":
        rule.append(optax.masked(optax.scale_by_trust_ratio(), mask))
    return optax.chain(*rule, rate)


def _add_signs(l1: float, grads: Any, params: Any) -> Any:
    return jax.tree.map(lambda g, w: g + l1 * jnp.sign(w), grads, params)


def _lars(c: ConfigDict, decay: float, grads: Any, params: Any) -> Any:
    # optax.scale_by_trust_ratio would have the norm of the sum in the denominator, the paper has the sum of the norms.
    def scaled(g: jax.Array, w: jax.Array) -> jax.Array:
        of_g, of_w = jnp.linalg.norm(g.ravel()), jnp.linalg.norm(w.ravel())
        ratio = c.trust_coefficient * of_w / (of_g + decay * of_w + c.epsilon)
        return jnp.where((of_g > 0) & (of_w > 0), ratio, 1.0) * (g + decay * w)

    return jax.tree.map(scaled, grads, params)


def _orthogonalised(c: ConfigDict, updates: Any, _: Any) -> Any:
    # Momentum has been done: optax's corrects the bias of Nesterov's two terms each by its own factor, which changes
    # their weights in the first updates. With beta = 0 it has none, and no state to keep.
    muon = optax.contrib.scale_by_muon(
        ns_steps=c.newton_schulz_steps,
        beta=0.0,
        eps=c.epsilon,
        nesterov=False,
        weight_dimension_numbers=partial(jax.tree.map, lambda _: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)),
    )
    updates, _ = muon.update(updates, muon.init(updates))
    return jax.tree.map(lambda u: max(1.0, u.shape[3] / math.prod(u.shape[:3])) ** 0.5 * u, updates)
