"""Which records a step takes: a function of (seed, step) and nothing else."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)  # a batch touches two epochs at most unless it is larger than one; threads read ahead by a few
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    key = np.array([seed, epoch | 1 << 63], np.uint64)  # the high bit: no record's key (loader.py) has it
    permutation = np.random.Generator(np.random.Philox(key=key)).permutation(num_examples)
    permutation.setflags(write=False)
    return permutation


def train_indices(seed: int, step: int, *, batch_size: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The records of the global batch of `step` and the epoch each belongs to: two int64 [batch_size].

    The training set is shuffled anew for each epoch and the epochs follow one another without a gap, so a batch may end
    one epoch and begin the next, and every record is seen once an epoch whatever the batch size.
    """
    position = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(position, num_examples)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(seed, int(epoch), num_examples)[offsets[here]]
    return indices, epochs
