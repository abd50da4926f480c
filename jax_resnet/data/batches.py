"""Batches on the host: functions of (seed, step), whichever thread, process or host reads them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_resnet.data.dataset import Split
from jax_resnet.data.sampling import Phase, train_indices
from jax_resnet.errors import UserError

Broken = list[tuple[str, str]]  # names of undecodable images, and reasons
Batch = dict[str, Any]  # arrays [rows, …], and "broken"
Report = Callable[[str, str, str], None]  # (split, name of the image, reason)
MAX_SUBSTITUTES = 100  # tried for one broken image
# So many broken images may end a run before its first epoch is over; a message names no more.
MAX_REPORTED_IMAGES = 20


def train_batch(
    split: Split,
    step: int,
    *,
    seed: int,
    phase: Phase,
    rows: np.ndarray,
    repeats: int = 1,
) -> Batch:
    """Read rows `rows` of the global batch of `step`, which counts from 0 and is in `phase`.

    Returns the arrays of the split's element_spec, and "broken". What is random about a record is
    keyed by (seed, epoch, record), so no other rows or threads change it. A record that cannot be
    decoded is replaced by another, chosen by the same key and augmented with its random numbers;
    "broken" has its name and the reason, and those of the substitutes that failed as well.
    Raises UserError as `Split.read`, or when no substitute can be decoded.
    """
    indices, epochs = train_indices(seed, phase.examples(step), phase.batch_size, len(split), repeats)
    indices, epochs = indices[rows], epochs[rows]
    rngs = None
    if split.random:
        keys = zip(epochs.tolist(), indices.tolist(), strict=True)
        rngs = [generator(seed, *key) for key in keys]
    read = split.read(indices, rngs, phase.image_size)
    broken = list(read.broken.values())
    for row, (name, reason) in read.broken.items():
        epoch, record = int(epochs[row]), int(indices[row])
        choice = generator(seed, epoch, record | 1 << 62)
        for index in choice.integers(len(split), size=MAX_SUBSTITUTES):
            rng = generator(seed, epoch, record)
            substitute = split.read(np.array([index]), [rng], phase.image_size)
            if not substitute.broken:
                break
            broken += substitute.broken.values()
        else:
            nor = f"nor can any of {MAX_SUBSTITUTES} others be decoded"
            raise UserError(f"{split.name} split: {name}: {reason}; {nor}")
        for key, array in read.arrays.items():
            array[row] = substitute.arrays[key][0]
    return read.arrays | split.marks(seed, indices, epochs) | {"broken": broken}


def generator(seed: int, epoch: int, record: int) -> np.random.Generator:
    """Make the generator of a record's augmentation in an epoch; seed and epoch are below 2³².

    In the key's second number bit 62 is set to choose a broken record's substitutes, bit 63 for the
    order of an epoch.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed << 32 | epoch, record], np.uint64)))


def eval_batch(split: Split, number: int, *, batch_size: int, rows: np.ndarray) -> Batch:
    """Read rows `rows` of batch `number`, from 0, in the split's order.

    Returns the arrays of the split's element_spec, "broken" and two of bool [len(rows)]: mask is
    False past the split's end and for an image that cannot be decoded, undecodable is True for the
    latter. Raises UserError as `Split.read`.
    """
    positions = number * batch_size + rows
    positions = positions[positions < len(split)]
    read = split.read(positions, None)
    undecodable = np.isin(np.arange(len(rows)), list(read.broken))
    batch = read.arrays | {"mask": np.ones(len(positions), bool)}
    for name, array in batch.items():
        # Rows ascend, so those past the end of the split come last.
        batch[name] = np.zeros((len(rows), *array.shape[1:]), array.dtype)
        batch[name][: len(array)] = array
    batch["mask"] &= ~undecodable
    return batch | {"undecodable": undecodable, "broken": list(read.broken.values())}


class Ledger:
    """Count a split's broken images: report each once, and end training when they are too many."""

    def __init__(self, split: Split, report: Report, max_broken: float | None = None):
        self._split, self._report, self._share = split, report, max_broken
        self._names: dict[str, None] = {}
        self._read = self._failed = 0

    def add(self, broken: Broken, read: int) -> None:
        """Add the broken images of a batch of `read` rows.

        Raises UserError when there are more than the share `max_broken` of the split. Not to wait
        for the end of an epoch, it does so too when there are MAX_REPORTED_IMAGES and more than
        that share of what was read so far.
        """
        # A substitute was read for each image that failed.
        self._read += read + len(broken)
        self._failed += len(broken)
        for name, reason in broken:
            if name not in self._names:
                self._names[name] = None
                self._report(self._split.name, name, reason)
        if self._share is None:
            return
        names = list(self._names)
        many = len(names) >= MAX_REPORTED_IMAGES and self._failed > self._share * self._read
        if many or len(names) > self._share * len(self._split):
            listed = ", ".join(names[:MAX_REPORTED_IMAGES])
            if len(names) > MAX_REPORTED_IMAGES:
                listed += ", …"
            raise UserError(
                f"{self._split.name} split: {len(names)} images of "
                f"{min(self._read, len(self._split)):,} read cannot be decoded, more than "
                f"config.data.max_broken={self._share:g} allows; repair or remove them: {listed}"
            )
