"""Durations in steps, and where a plan evaluates and saves, against exact fractions."""

from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from ml_collections import ConfigDict

from jax_resnet.config import default, duration, in_steps
from jax_resnet.errors import UserError
from jax_resnet.training.plan import Plan


def plan_config(batch_size: int = 64, **durations: dict[str, Any]) -> ConfigDict:
    """The default config with durations such as train={"epochs": 3}; underscores in a key are dots."""
    c = default()
    c.batch_size = batch_size
    for key, units in durations.items():
        group, _, leaf = key.partition("_")
        if leaf:
            c[group][leaf] = duration(**units)
        else:
            c[group] = duration(**units)
    return c


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"epochs": 2}, 2 * 1000 / 64),
        ({"epochs": 0.5}, 500 / 64),
        ({"epochs": 0}, 0),
        ({"steps": 7}, 7),
        ({"steps": 0}, 0),
        ({"examples": 640}, 10),
        ({"examples": 96}, 1.5),
    ],
)
def test_one_unit_gives_steps_without_rounding(units, expected):
    assert in_steps(duration(**units), "train", batch_size=64, num_examples=1000) == expected


@pytest.mark.parametrize(
    ("units", "found"),
    [
        ({}, "none of them"),
        ({"epochs": 1, "steps": 2}, "epochs=1.0 and steps=2"),
        ({"steps": 2, "examples": 0}, "steps=2 and examples=0"),
        ({"epochs": 0, "steps": 2}, "epochs=0.0 and steps=2"),
    ],
)
def test_none_or_two_units_are_refused_in_a_line_that_names_the_key(units, found):
    with pytest.raises(UserError) as e:
        in_steps(duration(**units), "schedule.warmup", batch_size=64, num_examples=1000)
    assert str(e.value).startswith(
        f"config.schedule.warmup: give exactly one of epochs, steps, examples; found {found} ("
    )


@pytest.mark.parametrize(("unit", "value"), [("epochs", -1), ("steps", -3), ("examples", -64)])
def test_a_negative_duration_is_refused_in_a_line_that_names_the_key(unit, value):
    with pytest.raises(UserError, match=rf"config\.eval\.every\.{unit}=-.*: must be a number, not negative") as e:
        in_steps(duration(**{unit: value}), "eval.every", batch_size=64, num_examples=1000)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"epochs": 30}, 674),  # of 1437 / 64 steps: 673.59
        ({"epochs": 20}, 449),  # 449.06
        ({"steps": 11}, 11),
        ({"examples": 100}, 2),  # 1.56
        ({"examples": 1}, 1),  # never none
    ],
)
def test_training_is_rounded_to_whole_steps_and_at_least_one(train, steps):
    c = plan_config(train=train, schedule_warmup={"steps": 0})
    assert Plan.of(c, 1437).steps == steps


def test_warmup_is_rounded_to_whole_steps():
    assert Plan.of(plan_config(schedule_warmup={"epochs": 2}), 1437).warmup_steps == 45  # 44.9
    assert Plan.of(plan_config(schedule_warmup={"steps": 0}), 1437).warmup_steps == 0


def test_cooldown_and_the_warmup_of_the_average_are_rounded_to_whole_steps():
    plan = Plan.of(plan_config(schedule_cooldown={"epochs": 2}, ema_warmup={"examples": 100}), 1437)
    assert (plan.cooldown_steps, plan.ema_warmup_steps) == (45, 2)  # 44.9, 1.56


def test_stretch_makes_the_recipe_longer_and_leaves_what_looks_at_it():
    durations = {"train": {"epochs": 4}, "schedule_warmup": {"epochs": 1}, "schedule_cooldown": {"examples": 100}}
    c = plan_config(100, **durations, ema_warmup={"steps": 3}, eval_every={"epochs": 1})
    c.stretch = 2.5
    plan = Plan.of(c, 1000)
    assert plan.steps == 100
    assert (plan.warmup_steps, plan.cooldown_steps, plan.ema_warmup_steps) == (25, 2, 8)  # of 25, 2.5, 7.5
    assert (plan.eval_every, plan.save_every) == (10, 10)


@pytest.mark.parametrize("steps", [1, 7, 49, 50, 90, 100, 449])
def test_the_update_at_a_share_of_the_training(steps):
    plan = Plan.of(plan_config(train={"steps": steps}), 1437)
    for k in range(steps + 1):
        assert plan.step_at(k / steps) == k
    for share in (Fraction(1, 3), Fraction(1, 10), Fraction(35, 50), Fraction(99, 100)):
        assert plan.step_at(float(share)) == ceil(share * steps)


def test_the_update_at_a_share_of_the_training_counts_examples():
    c = plan_config(16, train={"examples": 300})
    c.progressive = ((0.0, 6, 32), (0.4, 10), (0.75, 12, 8))
    plan = Plan.of(c, 100)
    seen = [phase.examples(step) for phase in plan.phases for step in range(phase.first_step, phase.end)]
    shares = [0.0, 0.1, 32 / 304, 0.33, 128 / 304, 0.5, 0.73, 224 / 304, 0.9, 0.99, 1.0]
    whole = plan.phases[-1].examples(plan.steps)
    assert whole == 304
    assert [plan.step_at(share) for share in shares] == [
        next((i for i, n in enumerate(seen) if n >= share * whole - 1e-9), plan.steps) for share in shares
    ]


def test_the_update_at_a_position_in_the_data_where_batches_change():
    c = plan_config(16, train={"examples": 320}, ema_warmup={"examples": 192})
    c.progressive = ((0.0, 6, 32), (0.5, 10))  # five updates of 32, then ten of 16
    plan = Plan.of(c, 100)
    assert [plan.update_at(position) for position in (0, 1, 4, 10, 12, 20)] == [0, 1, 2, 5, 7, 15]
    assert plan.update_at(plan.ema_warmup_steps) == 7


@pytest.mark.parametrize(
    "key", ["train", "schedule_warmup", "schedule_cooldown", "ema_warmup", "eval_every", "checkpoint_every"]
)
def test_a_plan_names_the_duration_at_fault(key):
    with pytest.raises(UserError, match=rf"config\.{key.replace('_', '.')}: give exactly one"):
        Plan.of(plan_config(**{key: {"epochs": 1, "steps": 1}}), 1437)


def first_steps_at_or_after(period: Fraction, steps: int) -> set[int]:
    return {ceil(k * period) for k in range(1, int(steps / period) + 1)}


@pytest.mark.parametrize(
    ("examples", "batch_size", "every"),
    [
        (1437, 64, 5),
        (1437, 64, 1),
        (1437, 96, 1),
        (1437, 64, 0.25),
        (50_000, 128, 1),
        (1000, 100, 1),
        pytest.param(*(1000, 7, 5)),
    ],
)
def test_evaluations_follow_the_epochs_without_drift(examples, batch_size, every):
    epochs = 60
    plan = Plan.of(plan_config(batch_size, train={"epochs": epochs}, eval_every={"epochs": every}), examples)
    found = {step for step in range(1, plan.steps + 1) if plan.evaluates(step)}
    expected = first_steps_at_or_after(Fraction(every) * examples / batch_size, plan.steps)
    assert found == expected | {plan.steps}
    assert epochs / every <= len(found) <= epochs / every + 1


@pytest.mark.parametrize("every", [{"steps": 7}, {"steps": 1}, {"steps": 1000}, {"examples": 96}, {"examples": 10}])
def test_the_last_step_is_always_evaluated_and_saved(every):
    c = plan_config(train={"steps": 50}, eval_every=every, checkpoint_every={"steps": 1000})
    plan = Plan.of(c, 1437)
    assert plan.evaluates(50)
    assert plan.saves(50)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ({"steps": 7}, [7, 14, 20]),
        ({"steps": 20}, [20]),
        ({"steps": 1}, [*range(1, 21)]),
        ({"examples": 96}, [2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20]),  # every 1.5 steps
        ({"examples": 16}, [*range(1, 21)]),  # less than a step: no more often than each
    ],
)
def test_evaluations_at_other_periods(every, expected):
    plan = Plan.of(plan_config(train={"steps": 20}, eval_every=every), 1437)
    assert [step for step in range(1, 21) if plan.evaluates(step)] == expected


def test_saves_at_its_own_period_and_at_every_evaluation():
    c = plan_config(train={"steps": 20}, eval_every={"steps": 6}, checkpoint_every={"steps": 8})
    plan = Plan.of(c, 1437)
    assert [step for step in range(1, 21) if plan.saves(step)] == [6, 8, 12, 16, 18, 20]
