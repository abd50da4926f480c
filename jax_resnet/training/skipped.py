"""Updates that the guard skips: reported as they come; too many in a row end the run with a file to study."""

import math
from collections import deque
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jax_resnet.data.sampling import phase_at, train_indices
from jax_resnet.errors import UserError
from jax_resnet.runs.log import Telemetry
from jax_resnet.runs.paths import AnyPath
from jax_resnet.runs.workdir import write_json
from jax_resnet.training.evaluate import IN_FLIGHT
from jax_resnet.training.experiment import Experiment
from jax_resnet.training.metrics import Sums
from jax_resnet.training.state import TrainState


class Skipped:
    """Follows which of a run's updates are skipped, some steps late, and says so. Without a guard it sees none."""

    def __init__(self, experiment: Experiment, state: TrainState, start: int, telemetry: Telemetry) -> None:
        self._experiment, self._telemetry = experiment, telemetry
        self._unread: deque[tuple[int, Sums]] = deque()
        self._last = start  # the last step that was read
        self.row = int(jax.device_get(state.guard["row"])) if state.guard else 0  # skipped up to it, without a break

    @property
    def too_many(self) -> bool:
        """Whether `config.guard.max_skipped` in a row were skipped: all that follow will be too."""
        return 0 < self._experiment.config.guard.max_skipped <= self.row

    def add(self, step: int, sums: Sums) -> None:
        """Take the sums of one more step; read those of an earlier one, which is done or nearly so."""
        if "skipped" in sums:
            self._unread.append((step, sums))
            self.read(leave=IN_FLIGHT - 1)

    def read(self, leave: int = 0) -> None:
        """Read what was added, up to the last `leave` steps or to where too many are skipped."""
        while len(self._unread) > leave and not self.too_many:
            self._last, sums = self._unread.popleft()
            if not jax.device_get(sums["skipped"]):
                self.row = 0
                continue
            self.row += 1
            loss = float(jax.device_get(sums["skipped_loss"]))
            why = ", gradients not finite" if math.isfinite(loss) else ""
            self._telemetry.say(f"step {self._last:,}: update skipped: loss {loss:.4g}{why}")

    def study(self, state: TrainState, workdir: AnyPath) -> UserError:
        """Compute the skipped updates once more, write skipped-STEP.json, and return the error that ends the run.

        `state` is any after the first of them: it has the same parameters as they had. The file holds first_step and
        last_step; parameters, the norm of each part's; and updates, for each its step, its records' numbers in the
        split, its loss, and gradients, the norm of each part's before clipping. NaN and infinity are text, "nan".
        """
        first, last = self._last - self.row + 1, self._last
        file = workdir / f"skipped-{last}.json"
        with jax.transfer_guard("allow"):
            found = {
                "first_step": first,
                "last_step": last,
                "parameters": _norms(state.params),
                "updates": self._again(state, range(first, last + 1)),
            }
        written = f"{file} has their records, losses and norms"
        if jax.process_index() == 0:
            try:
                write_json(file, found)
            except OSError as e:
                written = f"{file}, of their records and norms, cannot be written ({e.strerror})"
        return UserError(
            f"the updates of steps {first:,} to {last:,} were all skipped, their loss or gradients being wrong, and "
            f"the run ends without saving; {written}; lower config.optimizer.learning_rate or lengthen "
            "config.schedule.warmup"
        )

    def _again(self, state: TrainState, steps: range) -> list[dict[str, Any]]:
        experiment, c = self._experiment, self._experiment.config
        split, phases = experiment.data.train, experiment.plan.phases
        updates = []
        with closing(experiment.train_batches(steps.start - 1, steps.stop - 1, self._telemetry.broken)) as feed:
            for done, batch in enumerate(feed, steps.start - 1):
                before = replace(state, step=jax.device_put(np.int32(done), state.step.sharding))
                grads, _, sums = experiment.steps.gradients(before, batch, *experiment.steps.teacher_weights)
                phase = phase_at(phases, done)
                records, _ = train_indices(c.seed, phase.examples(done), phase.batch_size, len(split), c.data.repeats)
                loss = float(sums["loss"]) / int(sums["examples"])
                updates.append(
                    {"step": done + 1, "records": records.tolist(), "loss": _json(loss), "gradients": _norms(grads)}
                )
        return updates


def _norms(tree: dict[str, Any]) -> dict[str, float | str]:
    """Return the norm of each part (stem, stage1, …, head)."""
    squares = {
        part: sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(jax.device_get(inside)))
        for part, inside in tree.items()
    }
    return {part: _json(math.sqrt(square)) for part, square in squares.items()}


def _json(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return str(number)  # JSON has no NaN
