"""Schedules against closed forms, optimizers against torch's update rules written out in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from jax_resnet import optim
from jax_resnet.config import OPTIMIZERS, SCHEDULES, default
from jax_resnet.errors import UserError
from jax_resnet.models.layers import BatchNorm
from jax_resnet.models.zoo import create_model

# ---- schedules -------------------------------------------------------------------------------------------------------

PEAK, STEPS, WARMUP, FROM, FINAL, POWER, FACTOR = 0.4, 100, 10, 0.25, 0.05, 3.0, 0.2

CLOSED_FORMS = {  # of the step, once warmup is over
    "constant": lambda step: PEAK,
    "cosine": lambda step: PEAK * (FINAL + (1 - FINAL) * math.cos((step - 10) / 90 * math.pi / 2) ** 2),
    "linear": lambda step: PEAK - (PEAK - PEAK * FINAL) * (step - 10) / 90,
    "polynomial": lambda step: PEAK * FINAL + PEAK * (1 - FINAL) * ((100 - step) / 90) ** 3,
    "exponential": lambda step: PEAK * math.exp(math.log(FINAL) * (step - 10) / 90),
    "step": lambda step: PEAK * (1 if step < 30 else 0.2 if step < 60 else 0.04 if step < 80 else 0.008),
}


def schedule_config(name: str, **changes: Any) -> ConfigDict:
    c = default().schedule
    c.update(name=name, warmup_from=FROM, final=FINAL, power=POWER, factor=FACTOR, boundaries=(0.3, 0.6, 0.8))
    c.update(changes)
    return c


def rates(c: ConfigDict, at: Any, *, steps: int = STEPS, warmup_steps: int = WARMUP) -> np.ndarray:
    schedule = optim.make_schedule(c, peak=PEAK, steps=steps, warmup_steps=warmup_steps)
    return np.array([float(schedule(step)) for step in at])


def test_every_schedule_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_its_closed_form_at_every_step(name):
    expected = [PEAK * (FROM + (1 - FROM) * s / 10) if s < 10 else CLOSED_FORMS[name](s) for s in range(STEPS)]
    np.testing.assert_allclose(rates(schedule_config(name), range(STEPS)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_same_traced_over_an_int32_step(name):
    c = schedule_config(name)
    traced = jax.jit(jax.vmap(optim.make_schedule(c, peak=PEAK, steps=STEPS, warmup_steps=WARMUP)))(jnp.arange(STEPS))
    np.testing.assert_allclose(traced, rates(c, range(STEPS)), rtol=1e-5)


@pytest.mark.parametrize("warmup_from", [0.0, 0.1, 1.0])
def test_warmup_starts_at_its_share_and_rises_evenly_to_the_peak(warmup_from):
    ramp = rates(schedule_config("cosine", warmup_from=warmup_from), range(WARMUP + 1))
    assert ramp[0] == pytest.approx(warmup_from * PEAK)
    assert ramp[-1] == pytest.approx(PEAK)
    np.testing.assert_allclose(np.diff(ramp), (1 - warmup_from) * PEAK / WARMUP, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(name):
    assert rates(schedule_config(name), [0], warmup_steps=0) == pytest.approx(PEAK)


def test_step_schedule_drops_on_the_exact_step():
    c = schedule_config("step", boundaries=(30 / 90, 60 / 90, 80 / 90), factor=0.1)
    found = rates(c, [149, 150, 299, 300, 399, 400, 449], steps=450)
    np.testing.assert_allclose(found / PEAK, [1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "exponential"])
def test_decay_ends_at_the_final_share_and_stays_there(name):
    np.testing.assert_allclose(rates(schedule_config(name), [STEPS, STEPS + 7]), FINAL * PEAK, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [100, 101, 5000])
def test_warmup_that_leaves_no_training_is_refused(warmup_steps):
    with pytest.raises(UserError, match=r"config\.schedule\.warmup is \d+ steps, the whole training 100") as e:
        optim.make_schedule(schedule_config("cosine"), peak=PEAK, steps=STEPS, warmup_steps=warmup_steps)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("batch_size", "reference", "expected"), [(256, 256, 0.1), (1024, 256, 0.4), (64, 256, 0.025), (1024, 0, 0.1)]
)
def test_peak_follows_the_batch_unless_the_reference_is_0(batch_size, reference, expected):
    c = default().optimizer
    c.learning_rate, c.reference_batch = 0.1, reference
    assert optim.peak_learning_rate(c, batch_size) == pytest.approx(expected)


# ---- optimizers ------------------------------------------------------------------------------------------------------

SHAPES = {  # one parameter or more of each kind, under the names the networks use
    "stem": {"conv1": {"kernel": (3, 3, 2, 4)}, "norm1": {"scale": (4,), "bias": (4,)}},
    "norm": {"scale": (4,), "bias": (4,)},
    "head": {"kernel": (4, 3), "bias": (3,)},
}
KINDS = {
    "stem": {"conv1": {"kernel": "kernel"}, "norm1": {"scale": "norm", "bias": "norm"}},
    "norm": {"scale": "norm", "bias": "norm"},
    "head": {"kernel": "kernel", "bias": "bias"},
}
UPDATES = 20


def rate_at(step: Any) -> Any:
    return 0.05 / (1 + step)


def random_trees(count: int) -> list[Any]:
    """Values between 0.5 and 1.5 of either sign: far from 0, where the place of epsilon would show."""
    rng = np.random.default_rng(count)

    def values(shape):
        return rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)

    return [jax.tree.map(values, SHAPES, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(count)]


def as_torch(c: ConfigDict, w: np.ndarray, grads: list[np.ndarray], decay: float) -> np.ndarray:
    """One tensor after torch.optim's documented algorithm, in float64. torch's RMSprop knows no Nesterov momentum."""
    momentum, first, second = 0.0, 0.0, 0.0
    for step, g in enumerate(grads):
        if c.name == "adamw":
            w = w * (1 - rate_at(step) * decay)
        else:
            g = g + decay * w
        if c.name in ("adam", "adamw"):
            first = c.beta1 * first + (1 - c.beta1) * g
            second = c.beta2 * second + (1 - c.beta2) * g**2
            corrected = second / (1 - c.beta2 ** (step + 1))
            g = first / (1 - c.beta1 ** (step + 1)) / (np.sqrt(corrected) + c.epsilon)
        elif c.name == "rmsprop":
            second = c.beta2 * second + (1 - c.beta2) * g**2
            g = g / (np.sqrt(second) + c.epsilon)
        elif c.name == "adagrad":
            second = second + g**2
            g = g / (np.sqrt(second) + c.epsilon)
        if c.name in ("sgd", "rmsprop"):
            momentum = c.momentum * momentum + g
            g = g + c.momentum * momentum if c.nesterov and c.name == "sgd" else momentum
        w = w - rate_at(step) * g
    return w


def as_library(c: ConfigDict, params: Any, grads: list[Any]) -> Any:
    optimizer = optim.make_optimizer(c, rate_at)
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("no_decay", [(), ("norm", "bias"), ("kernel",), ("kernel", "norm", "bias")])
@pytest.mark.parametrize(
    ("name", "momentum", "nesterov"),
    [
        ("sgd", 0.0, False),
        ("sgd", 0.0, True),
        ("sgd", 0.9, False),
        ("sgd", 0.9, True),
        ("adam", 0.9, True),
        ("adamw", 0.9, True),
        ("rmsprop", 0.0, False),
        ("rmsprop", 0.9, False),
        ("rmsprop", 0.9, True),  # which is for sgd only
        ("adagrad", 0.9, True),
    ],
)
def test_20_updates_equal_torch_rules_with_decay_on_exactly_the_stated_kinds(name, momentum, nesterov, no_decay):
    c = default().optimizer
    c.update(name=name, momentum=momentum, nesterov=nesterov, beta1=0.8, beta2=0.95, weight_decay=0.1)
    c.no_decay = no_decay
    params, *grads = random_trees(1 + UPDATES)
    expected = jax.tree.map(
        lambda kind, w, *g: as_torch(c, w, list(g), 0.0 if kind in no_decay else 0.1), KINDS, params, *grads
    )
    found = as_library(c, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


def test_every_optimizer_is_among_those_compared():
    assert set(OPTIMIZERS) == {"sgd", "adam", "adamw", "rmsprop", "adagrad"}


@pytest.mark.parametrize(
    ("name", "first_step"),
    [
        ("adam", lambda g, eps: g / (g + eps)),
        ("adamw", lambda g, eps: g / (g + eps)),
        ("rmsprop", lambda g, eps: g / (math.sqrt((1 - 0.95) * g**2) + eps)),
        ("adagrad", lambda g, eps: g / math.sqrt(g**2 + eps)),  # optax; torch has √(…) + eps
    ],
)
def test_where_epsilon_stands(name, first_step):
    c = default().optimizer
    c.update(name=name, momentum=0.0, beta2=0.95, weight_decay=0.0, epsilon=1e-3)
    g = 1e-3  # as small as epsilon, so that its place shows
    found = as_library(c, {"head": {"kernel": np.zeros(1)}}, [{"head": {"kernel": np.full(1, g)}}])
    np.testing.assert_allclose(found["head"]["kernel"], -rate_at(0) * first_step(g, c.epsilon), rtol=1e-4)


# ---- kinds of parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", "resnetv2_50"])
def test_every_parameter_of_a_network_has_the_kind_of_its_layer(name):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=10, rngs=nnx.Rngs(0)))
    expected = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv | nnx.Linear):
            expected[*path, "kernel"] = "kernel"
        if isinstance(module, nnx.Linear):
            expected[*path, "bias"] = "bias"
        if isinstance(module, BatchNorm):
            expected[*path, "scale"] = expected[*path, "bias"] = "norm"
    kinds = optim.parameter_kinds(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    found = {tuple(k.key for k in path): kind for path, kind in jax.tree_util.tree_leaves_with_path(kinds)}
    assert found == expected


@pytest.mark.parametrize("path", ["stem/gamma", "norm1/offset", "stage1/block0/conv1/weight", "bias", "se/scale"])
def test_parameter_with_a_strange_name_is_an_error_that_names_it(path):
    tree: Any = np.zeros(1)
    for key in reversed(path.split("/")):
        tree = {key: tree}
    with pytest.raises(ValueError, match=rf"parameter {path}: covered by 0 rules"):
        optim.parameter_kinds(tree)


def test_parameter_that_two_rules_cover_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(optim.KIND_RULES, "head", r"head/.*")
    with pytest.raises(ValueError, match=r"parameter head/kernel: covered by 2 rules \(kernel, head\)"):
        optim.parameter_kinds({"head": {"kernel": np.zeros(1)}})


def test_an_uncovered_parameter_stops_the_optimizer_before_the_first_update():
    optimizer = optim.make_optimizer(default().optimizer, rate_at)
    with pytest.raises(ValueError, match="parameter stem/gamma"):
        optimizer.init({"stem": {"gamma": jnp.zeros(1)}})
