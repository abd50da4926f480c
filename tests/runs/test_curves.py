"""The picture of a run: windows of equal length, and an axis that one early loss does not flatten."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from jax_resnet.runs.curves import MAX_WINDOWS, curves, draw_curves, windowed


def test_means_over_unequal_windows_become_means_over_equal_ones() -> None:
    """Of a loss that is the number of its step: rows of 1, 9, 10, … steps, as a run with log_every=10 has them."""
    ends = np.array([1, *range(10, 101, 10)])
    begins = np.array([0, *ends[:-1]])
    rows = np.stack([ends, (begins + 1 + ends) / 2], -1)
    found = windowed(rows)
    np.testing.assert_array_equal(found[:, 0], [20, 40, 60, 80, 100])
    np.testing.assert_allclose(found[:, 1], [10.5, 30.5, 50.5, 70.5, 90.5])
    assert len(windowed(np.stack([np.arange(1, 5001.0)] * 2, -1))) == MAX_WINDOWS


@pytest.mark.parametrize("count", [2, 13, 400])
def test_one_early_loss_does_not_flatten_the_curve(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": step, "kind": "train", "loss": 0.5, "learning_rate": 0.1} for step in range(1, count + 1)]
    rows[0]["loss"] = 20 * count  # so that the mean of its window stands out too
    rows += [{"step": count, "kind": "eval", "split": "test", "loss": 0.7, "accuracy_top1": 0.9}]
    panels = []
    subplots = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda *of: panels.append(subplots(*of)) or panels[-1])
    draw_curves(rows, tmp_path / "curves.png")
    top = panels[0][0].get_ylim()[1]
    assert top < 1 or count == 2  # two rows are one window
    assert list(curves(rows, "accuracy_top1")) == ["test"]


def test_rates_are_as_they_were() -> None:
    rows = [{"step": step, "kind": "train", "learning_rate": step / 10} for step in (1, 5, 8)]
    np.testing.assert_array_equal(curves(rows, "learning_rate")["train"], [[1, 0.1], [5, 0.5], [8, 0.8]])
