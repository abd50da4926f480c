"""Score the checkpoints of a run, and choose which stay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The sign of each metric that makes the largest the best.
BEST_BY = {"accuracy_top1": 1, "accuracy_top5": 1, "loss": -1}


@dataclass(frozen=True)
class Keep:
    """Keep the `latest` checkpoints, the `best` by `metric`, and those that `always` names."""

    latest: int = 2
    best: int = 1
    metric: str = "accuracy_top1"
    always: Callable[[int], bool] = lambda step: False

    def of(self, steps: Sequence[int], scores: Mapping[int, float]) -> set[int]:
        """Choose the steps that stay. `scores` holds the evaluated ones, the larger the better."""
        evaluated = [step for step in steps if step in scores]
        ranked = sorted(evaluated, key=lambda step: (scores[step], step), reverse=True)
        latest = sorted(steps)[-self.latest :]
        return {*latest, *ranked[: self.best], *filter(self.always, steps)}


def score(evaluations: Mapping[int, Mapping[str, Mapping[str, Any]]], metric: str) -> dict[int, float]:
    """Score each step of {step: {split: metrics}} by `metric`, the larger the better."""
    # A running average is evaluated after the weights, and its metrics count.
    last = {step: list(splits.values())[-1] for step, splits in evaluations.items()}
    return {step: BEST_BY[metric] * metrics[metric] for step, metrics in last.items() if metric in metrics}
