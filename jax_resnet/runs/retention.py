"""Which checkpoints of a run stay, and how good they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEST_BY = {"accuracy_top1": 1, "accuracy_top5": 1, "loss": -1}  # sign that makes the largest the best


@dataclass(frozen=True)
class Keep:
    """Keeps the `latest` checkpoints, the `best` by `metric` of those evaluated, and those that `always` says."""

    latest: int = 2
    best: int = 1
    metric: str = "accuracy_top1"
    always: Callable[[int], bool] = lambda step: False

    def of(self, steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
        """Choose those of `steps` that stay. `scores` has the evaluated ones, the larger the better."""
        ranked = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))
        kept = {*sorted(steps)[-self.latest :], *(step for step in steps if self.always(step))}
        return kept | (set(ranked[-self.best :]) if self.best else set())


def score(evaluations: Mapping[int, Mapping[str, Mapping[str, Any]]], metric: str) -> dict[int, float]:
    """Score each step of {step: {split: metrics}} by `metric`, the larger the better."""
    # A running average is evaluated after the weights, and is what a run is good for.
    last = {step: list(splits.values())[-1] for step, splits in evaluations.items()}
    return {step: BEST_BY[metric] * metrics[metric] for step, metrics in last.items() if metric in metrics}
