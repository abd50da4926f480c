"""Lengths of training: in epochs, steps or examples, and as steps."""

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
    """The duration `length` in steps, not rounded.

    Raises UserError naming `what` when not exactly one unit is given, or it is negative.
    """
    given = {unit: length[unit] for unit in UNITS if length[unit] is not None}
    if len(given) != 1:
        found = " and ".join(f"{u}={v}" for u, v in given.items()) or "none of them"
        raise UserError(
            f"config.{what}: give exactly one of {', '.join(UNITS)}; found {found} "
            "(a config file sets it whole, with duration(steps=…))"
        )
    ((unit, value),) = given.items()
    if not 0 <= value < 1e15:
        raise UserError(f"config.{what}.{unit}={value}: must be a number, not negative")
    return {"epochs": value * num_examples / batch_size, "steps": value, "examples": value / batch_size}[unit]


def traced_steps(profile: str) -> range:
    """The updates that config.profile, "FIRST:LAST", names. Raises UserError if it names none."""
    found = re.fullmatch(r"(\d+):(\d+)", profile)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"config.profile={profile}: must be the first and the last update to trace, such as 100:105")
    return range(first, last + 1)


def phase_rows(c: ConfigDict) -> list[tuple[float, int | None, int]]:
    """Of each phase the share of the training at which it begins, its image size (None: the data's), its batch size."""
    rows = c.progressive or ((0.0, None),)
    return [(begin, size, batch[0] if batch else c.batch_size) for begin, size, *batch in rows]
