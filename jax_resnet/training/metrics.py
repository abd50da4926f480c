"""Metrics as sums with counts, divided once, at the end."""

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jax_resnet.runs.console import percent

Sums = dict[str, jax.Array]


def classification_sums(logits: jax.Array, labels: jax.Array, losses: jax.Array, mask: jax.Array | None = None) -> Sums:
    """Sum examples, answers right among the first 1 and 5, and losses, over the rows where mask holds.

    logits [N, classes], labels [N], losses [N], mask bool [N] → scalars: counts int32, loss float32. Of equal logits
    the lower class comes first; a logit that is not a number is never right. Top 5 only for more than 5 classes.
    """
    if mask is None:
        mask = jnp.ones(labels.shape, bool)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])
    # Counting what lies before the label needs no sort, and stays on the device that holds the row.
    rank = (logits > own).sum(-1) + ((logits == own) & (classes < labels[:, None])).sum(-1)
    right = mask & jnp.isfinite(logits).all(-1)
    sums = {
        "examples": mask.sum(),
        "loss": jnp.where(mask, losses, 0.0).sum(),
        "correct_top1": (right & (rank < 1)).sum(),
    }
    if logits.shape[-1] > 5:
        sums["correct_top5"] = (right & (rank < 5)).sum()
    return sums


def total(sums: Iterable[Sums]) -> dict[str, float | int]:
    """Add up sums on the host: counts exactly, the loss in float64."""
    totals: dict[str, float | int] = {}
    for one in jax.device_get(list(sums)):
        for name, value in one.items():
            totals[name] = totals.get(name, 0) + np.asarray(value).item()
    return totals


def summary(totals: Mapping[str, float | int]) -> dict[str, float | int]:
    """Return examples, correct_top1, accuracy_top1, loss and, where counted, accuracy_top5: NaN without examples."""
    count = totals["examples"] or math.nan
    result = {
        "examples": int(totals["examples"]),
        "correct_top1": int(totals["correct_top1"]),
        "accuracy_top1": totals["correct_top1"] / count,
    }
    if "correct_top5" in totals:
        result["accuracy_top5"] = totals["correct_top5"] / count
    result["loss"] = totals["loss"] / count
    return result


def accuracy_text(metrics: Mapping[str, float | int]) -> str:
    """Write an accuracy as `98.61 % (355 of 360)`."""
    return f"{percent(metrics['accuracy_top1'], 2)} ({metrics['correct_top1']:,} of {metrics['examples']:,})"
