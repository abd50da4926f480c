"""Learning rates against closed forms at every step, and against optax's and torch's own schedules."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jax_resnet.config import SCHEDULES, default, validate
from jax_resnet.data.sampling import Phase
from jax_resnet.errors import UserError
from jax_resnet.training.schedules import make_schedule, over_phases, peak_learning_rate

PEAK, STEPS, WARMUP, COOLDOWN, FROM, FINAL, POWER, FACTOR = 0.4, 100, 10, 20, 0.25, 0.05, 3.0, 0.2

CLOSED_FORMS = {  # of the step, once warmup is over
    "constant": lambda step: PEAK,
    "cosine": lambda step: PEAK * (FINAL + (1 - FINAL) * math.cos((step - 10) / 90 * math.pi / 2) ** 2),
    "one_cycle": lambda step: PEAK * (FINAL + (1 - FINAL) * math.sin((100 - step) / 90 * math.pi / 2) ** 2),
    "linear": lambda step: PEAK - (PEAK - PEAK * FINAL) * (step - 10) / 90,
    "polynomial": lambda step: PEAK * FINAL + PEAK * (1 - FINAL) * ((100 - step) / 90) ** 3,
    "exponential": lambda step: PEAK * math.exp(math.log(FINAL) * (step - 10) / 90),
    "step": lambda step: PEAK * (1 if step < 30 else 0.2 if step < 60 else FINAL),  # 0.04 and 0.008 are less
    "piecewise": lambda step: PEAK * (1 if step < 40 else max(FINAL, 1.9 - step * 0.9 / 40 if step < 80 else 0.1)),
    "inverse_sqrt": lambda step: PEAK * math.sqrt(10 / step),
}
KNOTS = ((0.1, 1.0), (0.4, 1.0), (0.8, 0.1))


def schedule_config(name: str, **changes: Any) -> ConfigDict:
    c = default().schedule
    c.update(name=name, warmup_from=FROM, final=FINAL, power=POWER, factor=FACTOR, boundaries=(0.3, 0.6, 0.8))
    c.update(knots=KNOTS, **changes)
    return c


def rates(c: ConfigDict, at: Any, *, steps: float = STEPS, warmup: int = WARMUP, cooldown: int = 0) -> np.ndarray:
    schedule = make_schedule(c, peak=PEAK, steps=steps, warmup_steps=warmup, cooldown_steps=cooldown)
    return np.array(jax.vmap(schedule)(jnp.asarray(at)))


def ramp(name: str, step: int) -> float:
    up = step / WARMUP
    return PEAK * (FROM + (1 - FROM) * (math.sin(up * math.pi / 2) ** 2 if name == "one_cycle" else up))


def test_every_schedule_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_its_closed_form_at_every_step(name):
    expected = [ramp(name, s) if s < WARMUP else CLOSED_FORMS[name](s) for s in range(STEPS)]
    np.testing.assert_allclose(rates(schedule_config(name), range(STEPS)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_the_same_one_step_at_a_time(name):
    schedule = make_schedule(schedule_config(name), peak=PEAK, steps=STEPS, warmup_steps=WARMUP, cooldown_steps=20)
    traced = rates(schedule_config(name), range(STEPS), cooldown=20)
    np.testing.assert_allclose([float(schedule(step)) for step in range(0, STEPS, 7)], traced[::7], rtol=1e-5)


@pytest.mark.parametrize("warmup_from", [0.0, 0.1, 1.0])
def test_warmup_starts_at_its_share_and_rises_evenly_to_the_peak(warmup_from):
    found = rates(schedule_config("cosine", warmup_from=warmup_from), range(WARMUP + 1))
    assert found[0] == pytest.approx(warmup_from * PEAK)
    assert found[-1] == pytest.approx(PEAK)
    np.testing.assert_allclose(np.diff(found), (1 - warmup_from) * PEAK / WARMUP, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(name):
    assert rates(schedule_config(name), [0], warmup=0) == pytest.approx(PEAK)


def test_inverse_sqrt_without_warmup_falls_from_the_first_step_on():
    found = rates(schedule_config("inverse_sqrt", final=0.0), range(STEPS), warmup=0)
    np.testing.assert_allclose(found, PEAK / np.sqrt(np.maximum(range(STEPS), 1)), rtol=1e-6)


def test_knots_say_all_of_a_piecewise_schedule():
    """FFCV's: from nothing to the peak over 2 of 16 epochs, to nothing at the end."""
    c = default().schedule
    c.update(name="piecewise", knots=((0.0, 0.0), (2 / 16, 1.0), (1.0, 0.0)))
    expected = [PEAK * min(s / 20, (160 - s) / 140) for s in range(161)]
    np.testing.assert_allclose(rates(c, range(161), steps=160, warmup=0), expected, atol=1e-7)


def test_step_schedule_drops_on_the_exact_step():
    c = schedule_config("step", boundaries=(30 / 90, 60 / 90, 80 / 90), factor=0.1, final=0.0)
    found = rates(c, [149, 150, 299, 300, 399, 400, 449], steps=450)
    np.testing.assert_allclose(found / PEAK, [1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)


DECAYING = ["cosine", "one_cycle", "linear", "polynomial", "exponential"]


@pytest.mark.parametrize("name", DECAYING)
def test_decay_ends_at_the_final_share_and_stays_there(name):
    np.testing.assert_allclose(rates(schedule_config(name), [STEPS, STEPS + 7]), FINAL * PEAK, rtol=1e-5)


@pytest.mark.parametrize("name", DECAYING)
def test_decay_ends_where_the_cooldown_begins(name):
    shorter = rates(schedule_config(name), range(STEPS - COOLDOWN), steps=STEPS - COOLDOWN)
    expected = [*shorter, *[FINAL * PEAK] * (COOLDOWN + 5)]
    np.testing.assert_allclose(rates(schedule_config(name), range(105), cooldown=COOLDOWN), expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - set(DECAYING)))
@pytest.mark.parametrize("final", [0.0, FINAL])
def test_cooldown_is_a_line_from_the_rate_where_it_begins(name, final):
    c = schedule_config(name, final=final)
    begin = STEPS - COOLDOWN
    before = rates(c, range(begin + 1))
    line = [before[-1] + (final * PEAK - before[-1]) * (s - begin) / COOLDOWN for s in range(begin, STEPS + 1)]
    expected = [*before[:-1], *line, final * PEAK]
    np.testing.assert_allclose(rates(c, range(STEPS + 2), cooldown=COOLDOWN), expected, rtol=2e-5, atol=1e-8)


def test_one_cycle_is_optaxs():
    c = default().schedule
    c.update(name="one_cycle", warmup_from=1 / 25, final=1 / 250)
    theirs = optax.cosine_onecycle_schedule(STEPS, PEAK, pct_start=0.3, div_factor=25, final_div_factor=10)
    np.testing.assert_allclose(rates(c, range(110), warmup=30), jax.vmap(theirs)(jnp.arange(110)), rtol=1e-5)


def torch_rates(make: Any, steps: int) -> list[float]:
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


TORCH = {  # the schedulers of torch that do the same over 100 steps, without warmup
    "cosine": ({}, lambda of, opt: of.CosineAnnealingLR(opt, STEPS, eta_min=PEAK * FINAL)),
    "linear": ({}, lambda of, opt: of.LinearLR(opt, 1.0, FINAL, STEPS)),
    "polynomial": ({"final": 0.0}, lambda of, opt: of.PolynomialLR(opt, STEPS, POWER)),
    "exponential": ({}, lambda of, opt: of.ExponentialLR(opt, FINAL ** (1 / STEPS))),
    "step": ({"final": 0.0}, lambda of, opt: of.MultiStepLR(opt, [30, 60, 80], FACTOR)),
}


@pytest.mark.parametrize("name", TORCH)
def test_schedules_are_torchs(name):
    changes, make = TORCH[name]
    found = rates(schedule_config(name, **changes), range(STEPS), warmup=0)
    np.testing.assert_allclose(found, torch_rates(make, STEPS), rtol=1e-5, atol=1e-8)


def test_torchs_one_cycle_is_of_a_step_less_and_a_warmup_of_a_step_less():
    c = default().schedule
    c.update(name="one_cycle", warmup_from=1 / 25, final=1 / 250)
    theirs = torch_rates(
        lambda of, opt: of.OneCycleLR(opt, PEAK, total_steps=STEPS, pct_start=0.3, final_div_factor=10), STEPS - 1
    )
    np.testing.assert_allclose(rates(c, range(STEPS - 1), steps=STEPS - 1, warmup=29), theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("warmup", "cooldown", "found"),
    [
        (100, 0, "warmup is 100 steps, the whole training 100:"),
        (5000, 0, "warmup is 5000 steps, the whole training 100:"),
        (60, 40, "warmup is 60 steps and cooldown 40, the whole training 100:"),
        (0, 100, "warmup is 0 steps and cooldown 100, the whole training 100:"),
    ],
)
def test_warmup_and_cooldown_that_leave_no_training_are_refused_in_a_line(warmup, cooldown, found):
    with pytest.raises(UserError, match=rf"^config\.schedule\.{found}") as e:
        rates(schedule_config("cosine"), [0], warmup=warmup, cooldown=cooldown)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("knots", ((0.0, 0.0),)),
        ("knots", ((0.0, 0.0), (0.5, math.inf))),
        ("knots", ((0.5, 1.0), (0.5, 0.0))),
        ("knots", ((0.0, 1.0), (1.5, 0.0))),
        ("boundaries", (0.5, 0.2)),
        ("final", 2.0),
        ("warmup_from", -0.1),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_its_key(key, value):
    c = default()
    c.schedule[key] = value
    with pytest.raises(UserError, match=rf"^config\.schedule\.{key}"):
        validate(c)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "reference", "scaling", "expected"),
    [
        (256, 256, "linear", 0.1),
        (1024, 256, "linear", 0.4),
        (64, 256, "linear", 0.025),
        (1024, 256, "sqrt", 0.2),
        (64, 256, "sqrt", 0.05),
        (1024, 0, "linear", 0.1),
        (1024, 0, "sqrt", 0.1),
    ],
)
def test_peak_follows_the_batch_unless_the_reference_is_0(batch_size, reference, scaling, expected):
    c = default().optimizer
    c.learning_rate, c.reference_batch, c.batch_scaling = 0.1, reference, scaling
    assert peak_learning_rate(c, batch_size) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reference", "scaling", "larger"),
    [(64, "linear", (4, 1, 0.25)), (64, "sqrt", (2, 1, 0.5)), (0, "sqrt", (1, 1, 1))],
)
def test_rates_in_phases_of_other_batches(reference, scaling, larger):
    """3 updates of 64 examples, 4 of 16, 4 of 4: 272 examples, of which the schedule takes 16 a step."""
    c = default().optimizer
    c.reference_batch, c.batch_scaling = reference, scaling
    phases = (Phase(0, 3, None, 64, 0), Phase(3, 4, None, 16, 192), Phase(7, 4, None, 4, 256))
    schedule = over_phases(lambda step: 100.0 - step, phases, c, batch_size=16)
    seen = [0, 64, 128, 192, 208, 224, 240, 256, 260, 264, 268]
    expected = [(100 - n / 16) * larger[0 if s < 3 else 1 if s < 7 else 2] for s, n in enumerate(seen)]
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(11)), expected, rtol=1e-6)


def test_one_batch_size_leaves_the_schedule_as_it_is():
    c = default().optimizer
    schedule = make_schedule(default().schedule, peak=1.0, steps=10)
    assert over_phases(schedule, (Phase(0, 5, 8, 16, 0), Phase(5, 5, 12, 16, 80)), c, batch_size=16) is schedule
