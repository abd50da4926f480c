"""What a kind of input does inside the jitted step: the interface of data/image and of the kinds to come."""

from collections.abc import Mapping
from typing import Protocol

import jax

Draws = dict[str, jax.Array]


class Inputs(Protocol):
    """Turns the arrays of a batch into what the network sees."""

    @property
    def name(self) -> str:
        """Array in a batch, group in config.data, and the word for an example in messages, such as "image"."""

    def draw(self, key: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[Draws, Draws]:
        """Draw all random numbers for a batch: arrays with a row for each example, and arrays shared by the batch.

        Where examples are mixed in pairs the latter hold "kept", float32 []: the share of its own label that each
        keeps.
        """

    def augment(self, rows: Mapping[str, jax.Array], shared: Draws) -> jax.Array:
        """Return the network's input in training, float32, from a batch, or a part of it, and its draws."""

    def normalise(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the network's input in evaluation, float32."""

    def mirror(self, inputs: jax.Array) -> jax.Array:
        """Return the input mirrored, for evaluation over both views."""


def mix(rows: jax.Array, weight: jax.Array) -> jax.Array:
    """Return `weight` · row + (1 − `weight`) · its partner's row: float [N, …] → same, N even.

    Rows 0 and 1 are partners, 2 and 3, and so on. Batches are shuffled, so a neighbour is as good as any, and it is on
    the same device when that has an even number of rows: nothing is sent. Which rows are mixed never depends on the
    devices.
    """
    return weight * rows + (1 - weight) * _partners(rows)


def _partners(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, 2, *rows.shape[1:])[:, ::-1].reshape(rows.shape)
