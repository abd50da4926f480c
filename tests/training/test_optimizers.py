"""Optimizers against torch's and timm's, or their papers' formulas in float64; which parameters each rule is about."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict
from optimizer_goldens import (
    CASES,
    GOLDENS,
    SHAPES,
    UPDATES,
    config_of,
    import_timm,
    named,
    random_trees,
    rate_at,
    reference,
    sample,
    start_and_gradients,
)

from jax_resnet.config import OPTIMIZERS, default, validate
from jax_resnet.errors import UserError
from jax_resnet.models.norms import BatchNorm
from jax_resnet.models.zoo import create_model
from jax_resnet.training import optimizers as optim
from jax_resnet.training.experiment import build

NAMES = set(named(random_trees(SHAPES, 1)[0]))


def config(**changes: Any) -> ConfigDict:
    """config.optimizer: plain gradient descent, changed."""
    c = default().optimizer
    c.update({"momentum": 0.0, "weight_decay": 0.0} | changes)
    return c


def trained(c: ConfigDict, params: Any, grads: list[Any], rate: Any = rate_at, freeze: Any = ()) -> Any:
    optimizer = optim.make_optimizer(c, rate, freeze)
    params = jax.tree.map(jnp.float32, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in grads:
        updates, state = update(jax.tree.map(jnp.float32, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


def change(c: ConfigDict, params: Any, grads: Any, freeze: Any = ()) -> dict[str, Any]:
    """What one update at a rate of 1 adds to each parameter, by name."""
    found = trained(c, params, [grads], lambda step: 1.0, freeze)
    return named(jax.tree.map(lambda a, b: np.asarray(a - b), found, params))


def close(found: Any, expected: Any, rtol: float = 2e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), found, expected)


# ---- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_20_updates_equal_torch_or_timm(case):
    c = default().optimizer
    c.update(config_of(case))
    start, *grads = start_and_gradients(case)
    np.testing.assert_allclose(sample(trained(c, start, grads)), np.load(GOLDENS)[case], rtol=3e-6, atol=3e-6)


def test_every_optimizer_is_among_those_compared():
    assert {changes["name"] for changes, _ in CASES.values()} == set(OPTIMIZERS)


@pytest.mark.slow
def test_the_goldens_are_what_torch_and_timm_say_today():
    pytest.importorskip("torch", minversion="2.9", reason="needs its Muon")
    try:
        import_timm()
    except ImportError:
        pytest.skip("needs timm, and a torchvision that torch can load")
    goldens = np.load(GOLDENS)
    assert set(goldens) == set(CASES)
    for case in CASES:
        np.testing.assert_allclose(reference(case), goldens[case], rtol=1e-9, atol=1e-12, err_msg=case)


@pytest.mark.parametrize(("nesterov", "decoupled"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["sgd", "rmsprop", "lars"])
def test_with_the_rate_in_momentum_20_updates_equal_the_formula(name, nesterov, decoupled):
    """The paper of LARS, algorithm 1, and without its local rate for the others and what does not decay."""
    c = config(name=name, nesterov=nesterov, momentum=0.9, rate_in_momentum=True, weight_decay=0.1, decoupled=decoupled)
    c.update(trust_coefficient=0.1, epsilon=0.01, beta2=0.95)
    start, *grads = random_trees(SHAPES, 1 + UPDATES)

    def formula(kind: str, w: np.ndarray, *grads: np.ndarray) -> np.ndarray:
        decays, v, square = kind == "kernel", 0.0, 0.0
        coupled, apart = (0.0, 0.1 * decays) if decoupled else (0.1 * decays, 0.0)
        for step, g in enumerate(grads):
            of_w, of_g = np.linalg.norm(w), np.linalg.norm(g)
            g = g + coupled * w
            if name == "lars" and decays:
                g = 0.1 * of_w / (of_g + coupled * of_w + 0.01) * g
            elif name == "rmsprop":
                square = 0.95 * square + 0.05 * g**2
                g = g / (np.sqrt(square) + 0.01)
            v = 0.9 * v + rate_at(step) * g
            w = w - (0.9 * v + rate_at(step) * g if nesterov and name != "rmsprop" else v) - rate_at(step) * apart * w
        return w

    expected = jax.tree.map(formula, optim.parameter_kinds(start), start, *grads)
    close(trained(c, start, grads), expected, 4e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_two_momentums_part_where_the_rate_changes_by_what_is_documented(nesterov):
    """Alike before. Then torch's moves rate'/rate times as far by what is in v (Goyal et al. 2017, remark 2)."""
    before, after, m, changed_at = 0.1, 0.7, 0.9, 5
    c = config(name="sgd", momentum=m, nesterov=nesterov)
    start, *grads = random_trees({"head": {"kernel": (3,)}}, 1 + changed_at + 1)

    def run(updates: int, in_momentum: bool) -> np.ndarray:
        c.rate_in_momentum = in_momentum
        rate = lambda step: jnp.where(step < changed_at, before, after)  # noqa: E731
        return np.asarray(trained(c, start, grads[:updates], rate)["head"]["kernel"])

    np.testing.assert_allclose(run(changed_at, True), run(changed_at, False), rtol=1e-6)
    v = sum(m ** (changed_at - 1 - i) * g["head"]["kernel"] for i, g in enumerate(grads[:changed_at]))
    farther = (after - before) * m * v * (m if nesterov else 1)
    np.testing.assert_allclose(run(changed_at + 1, True) - run(changed_at + 1, False), farther, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "first_step"),
    [
        ("adam", lambda g, eps: g / (g + eps)),
        ("adamw", lambda g, eps: g / (g + eps)),
        ("lamb", lambda g, eps: g / (g + eps)),
        ("rmsprop", lambda g, eps: g / (math.sqrt((1 - 0.95) * g**2) + eps)),
        ("rmsprop_tf", lambda g, eps: g / math.sqrt(0.95 + (1 - 0.95) * g**2 + eps)),
        ("adagrad", lambda g, eps: g / math.sqrt(g**2 + eps)),  # optax; torch has √(…) + eps
    ],
)
def test_where_epsilon_stands(name, first_step):
    c = config(name=name, beta2=0.95, epsilon=1e-3)
    g = 1e-3  # as small as epsilon, so that its place shows
    found = trained(c, {"head": {"kernel": np.zeros(1)}}, [{"head": {"kernel": np.full(1, g)}}])
    np.testing.assert_allclose(found["head"]["kernel"], -rate_at(0) * first_step(g, c.epsilon), rtol=1e-4)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_trust_ratio_is_1_where_the_weights_or_the_gradient_are_0(name):
    c = config(name=name, weight_decay=0.1, epsilon=1e-6)
    one, nothing = np.ones(4), np.zeros(4)
    params = {"stem": {"conv1": {"kernel": nothing}}, "head": {"kernel": one}}
    found = change(c, params, {"stem": {"conv1": {"kernel": one}}, "head": {"kernel": nothing}})
    close(found["stem/conv1/kernel"], -one, 1e-5)  # lars: the gradient; lamb: adam's first update
    close(found["head/kernel"], -0.1 * one if name == "lars" else -one)


# ---- what works on the gradient --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees() -> tuple[Any, Any]:
    return tuple(random_trees(SHAPES, 2))


def test_clipping_by_value_then_by_norm(trees):
    params, grads = trees
    clipped = jax.tree.map(lambda g: np.clip(g, -0.7, 0.7), grads)
    norm = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(clipped)))
    found = change(config(clip_value=0.7, clip_norm=2.0), params, grads)
    close(found, named(jax.tree.map(lambda g: -g * 2.0 / norm, clipped)))
    found = change(config(clip_norm=2 * norm), params, grads)
    close(found, named(jax.tree.map(np.negative, grads)))


def test_the_norm_is_that_of_what_is_trained(trees):
    params, grads = trees
    norm = math.sqrt(sum((g**2).sum() for part, tree in grads.items() if part != "stem" for g in jax.tree.leaves(tree)))
    found = change(config(clip_norm=2.0), params, grads, freeze=("stem",))
    assert not np.any(found["stem/conv1/kernel"])
    close(found["head/bias"], -grads["head"]["bias"] * 2.0 / norm)


def test_the_gradient_is_clipped_before_decay_is_added(trees):
    params, grads = trees
    c = config(clip_value=0.1, weight_decay=0.5, l1=0.25, no_decay=("norm", "bias"))
    expected = -0.1 * np.sign(grads["head"]["kernel"]) - 0.5 * params["head"]["kernel"]
    close(change(c, params, grads)["head/kernel"], expected - 0.25 * np.sign(params["head"]["kernel"]))
    close(change(c, params, grads)["head/bias"], -0.1 * np.sign(grads["head"]["bias"]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_asked_for_takes_no_memory(name):
    """A buffer for each parameter where the optimizer has one, and counters; nothing for what is off."""
    params = jax.tree.map(jnp.float32, random_trees(SHAPES, 1)[0])
    state = optim.make_optimizer(config(name=name, momentum=0.9, weight_decay=0.1), rate_at).init(params)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    size, hidden = sum(p.size for p in jax.tree.leaves(params)), 3 * 3 * 4 * 3 + 3 * 6
    buffers = {"adam": 2, "adamw": 2, "lamb": 2, "rmsprop": 2, "rmsprop_tf": 2}.get(name, 1)
    unfactored = 2 * len(jax.tree.leaves(params)) if name == "adafactor" else 0  # optax's place holders
    rest = size - hidden if name == "muon" else 0  # adam's second
    assert sum(x.size for x in arrays) == buffers * size + unfactored + rest


def test_the_program_of_the_defaults_is_that_of_three_parts():
    params = jax.tree.map(jnp.float32, random_trees(SHAPES, 1)[0])
    c = default().optimizer
    mask = jax.tree.map(lambda kind: kind == "kernel", optim.parameter_kinds(params))
    by_hand = optax.chain(
        optax.add_decayed_weights(1e-4, mask), optax.trace(0.9, nesterov=True), optax.scale_by_learning_rate(rate_at)
    )
    optimizer = optim.make_optimizer(c, rate_at)
    state = optimizer.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(by_hand.init(params))
    programs = [str(jax.make_jaxpr(o.update)(params, state, params)) for o in (optimizer, by_hand)]
    assert programs[0] == programs[1]


# ---- which parameters ------------------------------------------------------------------------------------------------


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
    optimizer = optim.make_optimizer(config(no_decay=()), rate_at)
    with pytest.raises(ValueError, match="parameter stem/gamma"):
        optimizer.init({"stem": {"gamma": jnp.zeros(1)}})


@pytest.mark.parametrize(
    ("no_decay", "expected"),
    [
        ((), NAMES),
        (("norm", "bias"), {name for name in NAMES if name.endswith("kernel")}),
        (("kernel",), {name for name in NAMES if not name.endswith("kernel")}),
        (("kernel", "norm", "bias"), set()),
        ((r"stem/.*", r".*/conv2/kernel", "norm"), {"stage1/block0/conv1/kernel", "head/kernel", "head/bias"}),
        ((r"(?!head/).*",), {"head/kernel", "head/bias"}),
    ],
)
def test_decay_reaches_exactly_what_no_decay_does_not_cover(trees, no_decay, expected):
    params, _ = trees
    found = change(config(weight_decay=0.5, no_decay=no_decay), params, jax.tree.map(np.zeros_like, params))
    assert {name for name, moved in found.items() if moved.any()} == expected
    close({n: found[n] for n in expected}, {n: -0.5 * named(params)[n] for n in expected})


def test_factors_of_the_rate(trees):
    params, grads = trees
    c = config(rate_factors=(("norm", 64.0), ("head/.*", 10.0), (r"stem/.*kernel", 0.0)))
    found = change(c, params, grads)
    factor = {"stem/conv1/kernel": 0.0, "head/kernel": 10.0, "head/bias": 10.0}
    for name, g in named(grads).items():
        close(found[name], -g * (64.0 if "norm" in name else factor.get(name, 1.0)))


def test_factors_and_layer_decay_with_parts_frozen(trees):
    params, grads = trees
    c = config(rate_factors=(("bias", 3.0),), layer_decay=0.5)
    found = change(c, params, grads, freeze=("stage1",))
    of_layer = {"stem": 0.25, "stage1": 0.0, "norm": 1.0, "head": 1.0}
    for name, g in named(grads).items():
        close(found[name], -g * of_layer[name.split("/")[0]] * (3.0 if name == "head/bias" else 1.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"no_decay": ("norm", "haed/.*")}, r"no_decay: the pattern 'haed/\.\*' matches no parameter"),
        ({"no_decay": ("conv1/kernel",)}, "no_decay: the pattern 'conv1/kernel' matches no parameter"),
        ({"rate_factors": (("fc/.*", 2.0),)}, r"rate_factors: the pattern 'fc/\.\*' matches no parameter"),
        (
            {"rate_factors": (("kernel", 2.0), ("head/.*", 10.0))},
            r"rate_factors: 'kernel' and 'head/\.\*' both cover head/kernel",
        ),
    ],
)
def test_rules_that_do_not_fit_the_parameters_are_refused_in_a_line(trees, changes, words):
    optimizer = optim.make_optimizer(config(**changes), rate_at)
    with pytest.raises(UserError, match=rf"^config\.optimizer\.{words}") as e:
        jax.eval_shape(optimizer.init, trees[0])
    assert "\n" not in str(e.value)


def test_a_job_refuses_them_before_anything_is_compiled(tiny_config):
    tiny_config.optimizer.no_decay = ("haed/.*",)
    with pytest.raises(UserError, match=r"^config\.optimizer\.no_decay: the pattern 'haed/\.\*' matches no parameter"):
        build(tiny_config)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_everything_on_a_network_gets_updates_of_its_shapes(name):
    model = nnx.eval_shape(
        lambda: create_model("seresnext50_32x4d", depths=(1, 1), widths=(64, 64), num_classes=10, rngs=nnx.Rngs(0))
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    c = config(name=name, momentum=0.9, weight_decay=0.1, l1=0.1, clip_norm=1.0, clip_value=1.0)
    c.update(layer_decay=0.9, rate_factors=((r".*/attention/.*", 2.0),), no_decay=(r".*/attention/.*", "bias"))
    optimizer = optim.make_optimizer(c, rate_at, freeze=("stem", "stage1"))
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    for found, expected in ((updates, params), (after, state)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_muon_is_for_hidden_convolutions():
    model = nnx.eval_shape(lambda: create_model("ecaresnet50d", depths=(1, 1, 1, 1), num_classes=10, rngs=nnx.Rngs(0)))
    labels = named(optim.hidden_convolutions(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    convolutions = {
        "/".join((*map(str, path), "kernel")) for path, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv)
    }
    hidden = {name for name, label in labels.items() if label == "hidden"}
    rest = convolutions - hidden
    assert hidden < convolutions
    assert rest == {"stem/conv1/kernel", *(name for name in convolutions if "attention" in name)}
    assert {"stem/conv2/kernel", "stage1/block0/shortcut/conv/kernel"} <= hidden


# ---- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "adam", "epsilon": 0.0}, "epsilon=0.0: must be more than 0 for adam"),
        ({"name": "muon", "epsilon": 0.0}, "epsilon=0.0: must be more than 0 for muon"),
        ({"name": "adam", "rate_in_momentum": True}, "rate_in_momentum: adam has no momentum to have the rate in"),
        ({"no_decay": ("nrom",)}, "no_decay: unknown name 'nrom'; did you mean norm"),
        ({"no_decay": ("head/(",)}, r"no_decay: 'head/\(' is no pattern"),
        ({"no_decay": (3,)}, r"no_decay=\(3,\): 3 is no name"),
        ({"rate_factors": ((3, 1.0),)}, "rate_factors=.*: 3 is no name"),
        ({"rate_factors": ("norm", 3.0)}, "rate_factors=.*: must be pairs"),
        ({"rate_factors": (("head/.*",),)}, "rate_factors=.*: must be pairs"),
        ({"rate_factors": (("head/.*", -1.0),)}, "rate_factors=.*: must be pairs"),
        ({"batch_scaling": "cubic"}, "batch_scaling: unknown name 'cubic'"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes, words):
    c = default()
    c.optimizer.update(changes)
    with pytest.raises(UserError, match=rf"^config\.optimizer\.{words}") as e:
        validate(c)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["sgd", "lars", "lion", "adafactor"])
def test_epsilon_may_be_0_where_none_is_needed(name):
    c = default()
    c.optimizer.update(name=name, epsilon=0.0)
    validate(c)
