"""Which records a step takes: a function of (seed, step) and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Phase:
    """Updates whose batches are alike. What a batch holds follows from its step and the phases, plain numbers."""

    first_step: int  # updates done when it begins
    steps: int
    image_size: int | None  # pixels a side; None: the split's own
    batch_size: int
    first_example: int  # examples seen when it begins

    @property
    def end(self) -> int:
        """Updates done when the next phase begins."""
        return self.first_step + self.steps

    def examples(self, step: int) -> int:
        """How many examples are seen by the first `step` updates: where the batch of update `step`, from 0, begins."""
        return self.first_example + (step - self.first_step) * self.batch_size


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of update `step`, counted from 0; after the last one, the last."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)


@lru_cache(maxsize=4)  # a batch touches two epochs at most unless it is larger than one; threads read ahead by a few
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    key = np.array([seed, epoch | 1 << 63], np.uint64)  # the high bit: no record's key (batches.py) has it
    permutation = np.random.Generator(np.random.Philox(key=key)).permutation(num_examples)
    permutation.setflags(write=False)
    return permutation


@lru_cache(maxsize=1)
def _mirrored_first(seed: int, num_examples: int) -> np.ndarray:
    key = np.array([seed, 3 << 62], np.uint64)  # no epoch's key, nor a record's
    first = np.random.Generator(np.random.Philox(key=key)).integers(2, size=num_examples, dtype=bool)
    first.setflags(write=False)
    return first


def mirrored(seed: int, indices: np.ndarray, epochs: np.ndarray, num_examples: int) -> np.ndarray:
    """Whether records are mirrored in their epochs, bool: half of them in the first, each in every other from there.

    Alternating flip (Jordan 2024, section 3.3): two epochs show both sides of every image.
    """
    return _mirrored_first(seed, num_examples)[indices] ^ (epochs % 2).astype(bool)


def train_indices(
    seed: int, start: int, count: int, num_examples: int, repeats: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The records of a batch of `count` before which `start` are seen, and the epoch of each: two int64 [count].

    The training set is shuffled anew for each epoch and the epochs follow one another without a gap, so a batch may end
    one epoch and begin the next, and every record is seen once an epoch whatever the batch size.

    With `repeats`, which divides start and count, a batch holds count / repeats records, one after another, and then
    the same again, as of other epochs: so an epoch has as many examples as before, of fewer records (repeated
    augmentation, Hoffer et al. 2019).
    """
    distinct = count // repeats
    copy, position = np.divmod(np.arange(count, dtype=np.int64), distinct)
    epochs, offsets = np.divmod(start // repeats + position, num_examples)
    indices = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(seed, int(epoch), num_examples)[offsets[here]]
    return indices, epochs * repeats + copy
