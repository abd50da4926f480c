"""A config's durations, and its phases of image and batch size, as steps."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ml_collections import ConfigDict

from jax_resnet.config import in_steps, phase_rows
from jax_resnet.data.sampling import Phase, phase_at


@dataclass(frozen=True)
class Plan:
    """A config's durations in steps. The periods are not rounded, so that they stay in step with the epochs.

    Where batches change, an update is a step of its own, but durations count examples, in steps of `batch_size`.
    """

    phases: tuple[Phase, ...]
    batch_size: int
    warmup_steps: int
    cooldown_steps: int
    ema_warmup_steps: int
    eval_every: float
    save_every: float
    keep_every: float  # 0: never
    steps_per_epoch: float

    @classmethod
    def of(cls, c: ConfigDict, num_examples: int) -> "Plan":
        """Convert the durations of a config; those of the schedule are stretched by `config.stretch`.

        Raises UserError naming the duration that is at fault.
        """
        length = partial(in_steps, batch_size=c.batch_size, num_examples=num_examples)
        return cls(
            phases=_phases(phase_rows(c), c.stretch * length(c.train, "train"), c.batch_size),
            batch_size=c.batch_size,
            warmup_steps=round(c.stretch * length(c.schedule.warmup, "schedule.warmup")),
            cooldown_steps=round(c.stretch * length(c.schedule.cooldown, "schedule.cooldown")),
            ema_warmup_steps=round(c.stretch * length(c.ema.warmup, "ema.warmup")),
            eval_every=length(c.eval.every, "eval.every"),
            save_every=length(c.checkpoint.every, "checkpoint.every"),
            keep_every=length(c.checkpoint.keep_every, "checkpoint.keep_every"),
            steps_per_epoch=num_examples / c.batch_size,
        )

    @property
    def steps(self) -> int:
        """Updates in the whole training."""
        return self.phases[-1].end

    @property
    def changes_batch(self) -> bool:
        """Whether some updates take more or fewer than `batch_size` examples."""
        return any(phase.batch_size != self.batch_size for phase in self.phases)

    def between(self, start: int, stop: int) -> tuple[Phase, ...]:
        """Return the phases of the updates start … stop − 1."""
        return tuple(phase for phase in self.phases if phase.first_step < stop and start < phase.end)

    def position(self, step: int) -> float:
        """Return how far `step` updates come, in steps of `batch_size` examples: `step` where all batches have that."""
        return phase_at(self.phases, step).examples(step) / self.batch_size

    def epoch(self, step: int) -> float:
        """Return how many epochs `step` updates come to."""
        return self.position(step) / self.steps_per_epoch

    def step_at(self, share: float) -> int:
        """Return the first update, counted from 0, that begins at or after that share of the training, or `steps`.

        Shares are of the examples, so that phases of other batches count for what they are.
        """
        return self.update_at(share * self.position(self.steps))

    def update_at(self, position: float) -> int:
        """Return the first update, counted from 0, that begins at or after `position`, in steps of `batch_size`."""
        part = (1 - 1e-12) * position  # a product that is a whole number may be just above it
        return bisect_left(range(self.steps), part, key=self.position)

    def evaluates(self, step: int) -> bool:
        """Tell whether the state after `step` updates is evaluated."""
        return step == self.steps or self._passes(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Tell whether it is saved; what is evaluated always is, so that the best can be restored."""
        return self.evaluates(step) or self._passes(step, self.save_every) or self.keeps(step)

    def keeps(self, step: int) -> bool:
        """Tell whether what is saved then stays for good."""
        return bool(self.keep_every) and self._passes(step, self.keep_every)

    def _passes(self, step: int, period: float) -> bool:
        whole = 1 + 1e-12  # a quotient that is a whole number must not be rounded to just below it
        return int(self.position(step) / period * whole) > int(self.position(step - 1) / period * whole)


def _phases(rows: Sequence[tuple[float, int | None, int]], length: float, batch_size: int) -> tuple[Phase, ...]:
    """Divide a training of `length` steps of `batch_size`: a phase ends where the next begins, to half a batch."""
    phases: list[Phase] = []
    step = example = 0
    ends = [begin for begin, _, _ in rows[1:]] + [1.0]
    for (_, size, batch), end in zip(rows, ends, strict=True):
        # Whole batches already seen are taken off after rounding: sizes alone do not change the number of steps.
        steps = round(end * length * (batch_size / batch) - example % batch / batch) - example // batch
        phases.append(Phase(step, max(1, steps), size, batch, example))
        step, example = phases[-1].end, phases[-1].examples(phases[-1].end)
    return tuple(phases)


def describe(plan: Plan) -> str:
    """`128 px × 1,024 to step 400, 224 px × 256 to the end`; batches only where they are not all `batch_size`."""
    untils = [*(f"step {phase.end:,}" for phase in plan.phases[:-1]), "the end"]
    batches = [f" × {phase.batch_size:,}" * plan.changes_batch for phase in plan.phases]
    return ", ".join(
        f"{phase.image_size} px{batch} to {until}"
        for phase, batch, until in zip(plan.phases, batches, untils, strict=True)
    )
