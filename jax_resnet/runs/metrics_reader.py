"""Read metrics.jsonl, in which a run records one JSON object a line."""

import contextlib
import json
from typing import Any

from jax_resnet.errors import UserError
from jax_resnet.runs.paths import AnyPath, read

FILE = "metrics.jsonl"
NOT_METRICS = ("step", "kind", "seconds", "split")


def read_metrics(workdir: AnyPath) -> list[dict[str, Any]]:
    """Read the complete lines of metrics.jsonl: a killed process may have left half of one."""
    rows = []
    file = workdir / FILE
    try:
        text = read(file).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from None
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and row.keys() >= {"step", "kind", "seconds"}:
                rows.append(row)
    return rows


def evaluations(workdir: AnyPath) -> dict[int, dict[str, dict[str, Any]]]:
    """Read all evaluations, of each step and split the last: {step: {split: metrics}}."""
    splits_by_step: dict[int, dict[str, dict[str, Any]]] = {}
    for row in read_metrics(workdir):
        if row["kind"] == "eval" and "split" in row:
            metrics = {name: value for name, value in row.items() if name not in NOT_METRICS}
            splits_by_step.setdefault(row["step"], {})[row["split"]] = metrics
    return splits_by_step
