"""What a dataset is: two splits, whose records are read by their numbers, and what the network sees of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jax_resnet.data.inputs import Inputs

EVAL_SPLITS = ("validation", "val", "valid", "test")  # names that the split for evaluation goes by

Rngs = Sequence[np.random.Generator]


class Rows(NamedTuple):
    """Records that were read."""

    arrays: dict[str, np.ndarray]  # [rows, …] each, by the names of element_spec
    broken: dict[int, tuple[str, str]]  # row → name and reason, of what could not be decoded; its input is 0


@dataclass(frozen=True)
class Split(ABC):
    """One part of a dataset."""

    name: str  # what the dataset calls it

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def element_spec(self, size: int | None = None, *, training: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Return names, shapes and dtypes of one example's arrays, at the `size` of a phase or their own.

        In `training` with what `marks` adds.
        """

    @abstractmethod
    def read(self, indices: np.ndarray, rngs: Rngs | None, size: int | None = None) -> Rows:
        """Read those records; `rngs`, one for each, crop and augment them at random. None: nothing is random.

        Raises UserError naming a record that cannot be read, or whose label is out of range.
        """

    def marks(self, seed: int, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return extra arrays for the step that depend on the epoch, [rows] each."""
        del seed, indices, epochs
        return {}

    @property
    @abstractmethod
    def random(self) -> bool:
        """Whether training needs generators: making them takes time."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the arrays come from: memory, or which decoder."""

    @property
    def in_memory(self) -> bool:
        """Whether the records are in memory, where worker processes would only copy them."""
        return False


@dataclass(frozen=True)
class Dataset:
    """A dataset's two splits, its classes, and what turns a batch of it into what the network sees."""

    name: str
    train: Split
    eval: Split
    class_names: tuple[str, ...]
    inputs: Inputs

    @property
    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and dtypes of one example's arrays in training."""
        return self.train.element_spec(training=True)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input, before Inputs.augment."""
        return self.element_spec[self.inputs.name].shape

    @property
    def num_classes(self) -> int:
        """How many classes the labels tell apart."""
        return len(self.class_names)
