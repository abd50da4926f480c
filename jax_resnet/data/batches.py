"""What a batch holds, on the host: a function of (seed, step), whichever thread, process or machine reads it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_resnet.data.dataset import Split
from jax_resnet.data.sampling import Phase, train_indices
from jax_resnet.errors import UserError

Broken = list[tuple[str, str]]  # name and reason of each image that could not be decoded
Batch = dict[str, Any]  # arrays [rows, …], and "broken"
Report = Callable[[str, str, str], None]  # takes split, name and reason of an image that cannot be decoded
SUBSTITUTES = 100  # tried for one broken image
MANY = 20  # broken images


def train_batch(
    split: Split,
    step: int,
    *,
    seed: int,
    phase: Phase,
    rows: np.ndarray,
    repeats: int = 1,
) -> Batch:
    """Read rows `rows` of the global batch of `step`, which is in `phase`: the arrays of the split's element_spec.

    What is random about a record is keyed by (seed, epoch, record), so no other rows or threads change it. A record
    that cannot be decoded gives its place, and its randomness, to another, which follows from the same key; "broken"
    has its name and the reason, and those of others that were tried.
    Raises UserError as `Split.read`, or when none can be decoded.
    """
    indices, epochs = train_indices(seed, phase.examples(step), phase.batch_size, len(split), repeats)
    indices, epochs = indices[rows], epochs[rows]
    keys = zip(epochs.tolist(), indices.tolist(), strict=True)
    read = split.read(indices, [generator(seed, *key) for key in keys] if split.random else None, phase.image_size)
    broken = list(read.broken.values())
    for row in read.broken:
        epoch, record = int(epochs[row]), int(indices[row])
        for other in generator(seed, epoch, record | 1 << 62).integers(len(split), size=SUBSTITUTES):
            found = split.read(np.array([other]), [generator(seed, epoch, record)], phase.image_size)
            for name, array in read.arrays.items():
                array[row] = found.arrays[name][0]
            if not found.broken:
                break
            broken += found.broken.values()
        else:
            name, reason = read.broken[row]
            raise UserError(f"{split.name} split: {name}: {reason}; nor can any of {SUBSTITUTES} others be decoded")
    return read.arrays | split.marks(seed, indices, epochs) | {"broken": broken}


def generator(seed: int, epoch: int, record: int) -> np.random.Generator:
    """What is random about a record's pixels in an epoch; seed and epoch below 2³².

    Of the key's second number bit 62 marks what takes a broken record's place; the order of an epoch has bit 63.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed << 32 | epoch, record], np.uint64)))


def eval_batch(split: Split, number: int, *, batch_size: int, rows: np.ndarray) -> Batch:
    """Read those rows of the batch of that number, in the split's order: the arrays of its element_spec, and mask.

    mask, bool [len(rows)], is False where there is no example any more, or one that cannot be decoded; undecodable,
    bool too, tells which. Raises UserError as `Split.read`.
    """
    position = number * batch_size + rows
    read = split.read(position[position < len(split)], None)
    undecodable = np.isin(np.arange(len(rows)), list(read.broken))
    batch = read.arrays | {"mask": np.ones(np.count_nonzero(position < len(split)), bool)}
    for name, found in batch.items():
        batch[name] = np.zeros((len(rows), *found.shape[1:]), found.dtype)
        batch[name][: len(found)] = found  # rows ascend: what is beyond the end is last
    batch["mask"] &= ~undecodable
    return batch | {"undecodable": undecodable, "broken": list(read.broken.values())}


class Ledger:
    """The images of a split that could not be decoded: each is reported once. In training too many end the run."""

    def __init__(self, split: Split, report: Report, max_broken: float | None = None):
        self._split, self._report, self._share = split, report, max_broken
        self._names: dict[str, None] = {}
        self._read = self._failed = 0

    def add(self, broken: Broken, read: int) -> None:
        """Takes what was broken among `read` more of a batch.

        Raises UserError when that is more than the share `max_broken` of the split; or, not to wait for an epoch's
        end, of what was read so far, once MANY are found.
        """
        self._read += read + len(broken)  # for each that failed another was tried
        self._failed += len(broken)
        for name, reason in broken:
            if name not in self._names:
                self._names[name] = None
                self._report(self._split.name, name, reason)
        if self._share is None:
            return
        many = len(self._names) >= MANY and self._failed > self._share * self._read
        if many or len(self._names) > self._share * len(self._split):
            more = ", …" if len(self._names) > MANY else ""
            raise UserError(
                f"{self._split.name} split: {len(self._names)} images of {min(self._read, len(self._split)):,} read "
                f"cannot be decoded, more than config.data.max_broken={self._share:g} allows; repair or remove them: "
                + ", ".join(list(self._names)[:MANY])
                + more
            )
