"""What a network is trained to answer: the loss, the metrics and the size of the head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax
from ml_collections import ConfigDict

from jax_resnet.data.dataset import Dataset
from jax_resnet.data.inputs import mix
from jax_resnet.training.losses import make_loss
from jax_resnet.training.metrics import Sums, accuracy_text, classification_sums, summary


class Task(Protocol):
    """A kind of answer, one for each example."""

    @property
    def outputs(self) -> int:
        """Outputs of the head."""

    @property
    def headline(self) -> str:
        """The metric that a run is known by."""

    def targets(self, batch: Mapping[str, jax.Array], kept: jax.Array | None = None) -> jax.Array:
        """Return what the outputs of a batch, or a part of it, are compared with: [N, …].

        Where examples are mixed, `kept` is the share of its own target that each keeps: see data.inputs.mix.
        """

    def losses(self, logits: jax.Array, targets: jax.Array, *, training: bool) -> jax.Array:
        """Return the loss of each example, float32 [N], of logits float32 [N, outputs]."""

    def sums(self, logits: jax.Array, targets: jax.Array, losses: jax.Array, mask: jax.Array | None = None) -> Sums:
        """Sum the metrics, "examples" and "loss" among them, over the rows where `mask`, bool [N], holds."""

    def summary(self, totals: Mapping[str, float | int]) -> dict[str, float | int]:
        """Turn added-up sums into metrics: "examples", "loss", the headline, and others."""

    def text(self, metrics: Mapping[str, float | int]) -> str:
        """Write the headline of `metrics` as the last line of a run has it."""


@dataclass(frozen=True)
class OneLabel:
    """Each example is of one class."""

    loss: ConfigDict  # config.loss
    outputs: int
    headline: ClassVar[str] = "accuracy_top1"

    def targets(self, batch: Mapping[str, jax.Array], kept: jax.Array | None = None) -> jax.Array:
        """Return the labels, int32 [N]; of mixed examples the probabilities of the classes, float32 [N, outputs]."""
        labels = batch["label"]
        if kept is None:
            return labels
        return mix(jax.nn.one_hot(labels, self.outputs), kept)

    def losses(self, logits: jax.Array, targets: jax.Array, *, training: bool) -> jax.Array:
        """See Task."""
        return make_loss(self.loss, training=training)(logits, targets)

    def sums(self, logits: jax.Array, targets: jax.Array, losses: jax.Array, mask: jax.Array | None = None) -> Sums:
        """See Task.

        Of a mixed example the class with more weight is the right one (of equals the lower), as torchvision counts too.
        """
        if targets.ndim == 2:
            targets = targets.argmax(-1)
        return classification_sums(logits, targets, losses, mask)

    def summary(self, totals: Mapping[str, float | int]) -> dict[str, float | int]:
        """See Task."""
        return summary(totals)

    def text(self, metrics: Mapping[str, float | int]) -> str:
        """See Task: `accuracy 98.61 % (355 of 360)`."""
        return f"accuracy {accuracy_text(metrics)}"


def task_of(config: ConfigDict, data: Dataset) -> Task:
    """Return the task of the data: one label for each example, the only one so far."""
    return OneLabel(config.loss, data.num_classes)
