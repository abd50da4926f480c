"""The picture of a run."""

import io
from typing import Any

from jax_resnet.runs.paths import AnyPath, write


def draw_curves(rows: list[dict[str, Any]], file: AnyPath) -> None:
    """Loss, accuracy and learning rate over the steps, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, title, name in zip(
        panels, ("loss", "accuracy", "learning rate"), ("loss", "accuracy_top1", "learning_rate"), strict=True
    ):
        shown = [r for r in rows if r["kind"] in ("train", "eval") and name in r]
        for split in dict.fromkeys(r.get("split", r["kind"]) for r in shown):
            points = [(r["step"], r[name]) for r in shown if r.get("split", r["kind"]) == split]
            if points:
                axes.plot(*zip(*points, strict=True), label=split, marker="." if len(points) < 50 else "")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines and name != "learning_rate":
            axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write(file, picture.getvalue())
