"""Choose the records of a step: a function of (seed, step) and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Phase:
    """Consecutive updates with batches of one size and images of one size."""

    first_step: int  # updates done before it
    steps: int
    image_size: int | None  # pixels a side; None: the split's own
    batch_size: int
    first_example: int  # examples seen before it

    @property
    def end(self) -> int:
        """Updates done when the next phase begins."""
        return self.first_step + self.steps

    def examples(self, step: int) -> int:
        """Count the examples before update `step`, which counts from 0."""
        return self.first_example + (step - self.first_step) * self.batch_size


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase of update `step`, counted from 0; the last phase for steps after its end."""
    return next(phase for phase in reversed(phases) if phase.first_step <= step)


# A batch spans two epochs, more only if it is larger than one; threads read a few steps ahead.
@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    # No record's key (batches.py) has the high bit.
    key = np.array([seed, epoch | 1 << 63], np.uint64)
    permutation = np.random.Generator(np.random.Philox(key=key)).permutation(num_examples)
    permutation.setflags(write=False)
    return permutation


@lru_cache(maxsize=1)
def _mirrored_first(seed: int, num_examples: int) -> np.ndarray:
    key = np.array([seed, 3 << 62], np.uint64)  # no epoch's or record's
    first = np.random.Generator(np.random.Philox(key=key)).integers(2, size=num_examples, dtype=bool)
    first.setflags(write=False)
    return first


def mirrored(seed: int, indices: np.ndarray, epochs: np.ndarray, num_examples: int) -> np.ndarray:
    """Tell which records are mirrored in their epochs: int64 [N] each → bool [N].

    Half of the records are mirrored in the first epoch, and each in every other epoch from there:
    alternating flip (Jordan 2024, section 3.3), two epochs show both sides of every image.
    """
    return _mirrored_first(seed, num_examples)[indices] ^ (epochs % 2).astype(bool)


def train_indices(
    seed: int, start: int, count: int, num_examples: int, repeats: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the records of a batch of `count` examples, before which `start` were seen.

    Returns the records and the epoch of each, two int64 [count]. The training set is reshuffled for
    each epoch and the epochs follow one another without a gap, so a batch may end one epoch and
    begin the next, and every record is seen once an epoch whatever the batch size.

    With `repeats`, which divides start and count, a batch holds count / repeats records, and then
    the same records again, as in other epochs. An epoch then has as many examples as before, of
    fewer records (repeated augmentation, Hoffer et al. 2019).
    """
    distinct = count // repeats
    copy, position = np.divmod(np.arange(count, dtype=np.int64), distinct)
    epochs, offsets = np.divmod(start // repeats + position, num_examples)
    indices = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        indices[rows] = _permutation(seed, int(epoch), num_examples)[offsets[rows]]
    return indices, epochs * repeats + copy
