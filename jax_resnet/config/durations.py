"""Lengths of training in epochs, steps or examples, converted to steps."""

import re

from ml_collections import ConfigDict

from jax_resnet.errors import UserError

UNITS = ("epochs", "steps", "examples")
DURATIONS = (
    *("train", "schedule.warmup", "schedule.cooldown", "ema.warmup", "eval.every"),
    *("checkpoint.every", "checkpoint.keep_every"),
)
MAY_BE_0 = ("schedule.warmup", "schedule.cooldown", "ema.warmup", "checkpoint.keep_every")


def in_steps(length: ConfigDict, what: str, *, batch_size: int, num_examples: int) -> float:
    """Convert the duration `length` to steps, not rounded.

    Raises UserError naming `what` unless exactly one unit is set, to a number that is not negative.
    """
    set_units = {unit: length[unit] for unit in UNITS if length[unit] is not None}
    if len(set_units) != 1:
        settings = " and ".join(f"{u}={v}" for u, v in set_units.items()) or "none of them"
        raise UserError(
            f"config.{what}: give exactly one of {', '.join(UNITS)}; found {settings} "
            "(a config file sets it whole, with duration(steps=…))"
        )
    ((unit, value),) = set_units.items()
    if not 0 <= value < 1e15:
        raise UserError(f"config.{what}.{unit}={value}: must be a number, not negative")
    if unit == "epochs":
        return value * num_examples / batch_size
    if unit == "examples":
        return value / batch_size
    return value


def traced_steps(profile: str) -> range:
    """Parse config.profile, "FIRST:LAST", as updates. Raises UserError if it names none."""
    if match := re.fullmatch(r"(\d+):(\d+)", profile):
        first, last = map(int, match.groups())
        if 1 <= first <= last:
            return range(first, last + 1)
    rule = "must be the first and the last update to trace, such as 100:105"
    raise UserError(f"config.profile={profile}: {rule}")


def phase_rows(config: ConfigDict) -> list[tuple[float, int | None, int]]:
    """List each phase's first share of the training, image size in pixels and batch size.

    An image size of None is that of the data.
    """
    rows = config.progressive or ((0.0, None),)
    return [(begin, size, *(batch or [config.batch_size])) for begin, size, *batch in rows]
