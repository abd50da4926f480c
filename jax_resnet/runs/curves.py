"""Draw the curves of a run."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_resnet.runs.paths import AnyPath, write

MAX_WINDOWS = 100  # of the training curve
PANELS = {"loss": "loss", "accuracy_top1": "accuracy", "learning_rate": "learning rate"}


def draw_curves(rows: list[dict[str, Any]], file: AnyPath) -> None:
    """Draw loss, accuracy and learning rate over the steps, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        tops = []
        for split, points in curves(rows, name).items():
            steps, values = points.T
            axes.plot(steps, values, label=split, marker="." if len(points) < 50 else "")
            tops.append(np.quantile(values, 0.95, method="lower"))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if name == "loss" and max(tops, default=0) > 0:
            # One early loss of 20 would flatten all that comes after it.
            axes.set_ylim(0, 1.15 * max(tops))
        if axes.lines and name != "learning_rate":
            axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write(file, picture.getvalue())


def curves(rows: Sequence[dict[str, Any]], name: str) -> dict[str, np.ndarray]:
    """Return the points of a metric, float64 [points, 2], for "train" and each split that has it.

    The points of "train" are means over windows of equally many steps, except for the learning rate.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["kind"] in ("train", "eval") and name in row:
            points.setdefault(row.get("split", row["kind"]), []).append((row["step"], row[name]))
    arrays = {split: np.array(pairs, np.float64) for split, pairs in points.items()}
    if name != "learning_rate" and "train" in arrays:
        arrays["train"] = windowed(arrays["train"])
    return arrays


def windowed(points: np.ndarray) -> np.ndarray:
    """Average means over unequal numbers of steps into windows of equally many steps.

    [n, 2] of (last step, mean) → [at most MAX_WINDOWS, 2]. A mean covers the steps since the one
    before it, and counts in the window in which most of them lie.
    """
    steps, values = points.T
    covered = np.diff(steps, prepend=0)
    count = min(MAX_WINDOWS, max(1, len(points) // 2))
    window = np.minimum((steps - covered / 2) * count // steps[-1], count - 1).astype(int)
    weight = np.bincount(window, covered, count)
    filled = weight > 0
    means = np.bincount(window, covered * values, count)[filled] / weight[filled]
    ends = (np.arange(count) + 1) * steps[-1] / count
    return np.stack([ends[filled], means], -1)
