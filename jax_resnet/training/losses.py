"""Losses, one value for each example. Labels are int [N], or float [N, classes] whose rows sum to 1."""

from functools import partial

import jax
import optax
from ml_collections import ConfigDict


def make_loss(c: ConfigDict, *, training: bool) -> partial[jax.Array]:
    """Return the loss that `config.loss` names: (logits, labels) → [N]. Evaluation takes labels as they are."""
    smoothing = c.label_smoothing if training else 0.0
    if c.name == "cross_entropy":
        return partial(cross_entropy, smoothing=smoothing)
    return partial(binary_cross_entropy, smoothing=smoothing, sum_classes=c.bce_sum)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy with label smoothing: float32 logits [N, classes], labels → [N].

    The target is (1 − smoothing) at the label and smoothing / classes everywhere (Szegedy et al. 2015, section 7).
    """
    if labels.ndim == 2:
        plain = optax.softmax_cross_entropy(logits, labels)
    else:
        plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return plain
    uniform = -jax.nn.log_softmax(logits).mean(-1)
    return (1 - smoothing) * plain + smoothing * uniform


def binary_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    smoothing: float = 0.0,
    sum_classes: bool = False,
) -> jax.Array:
    """Take every class by itself as present or absent: float32 logits [N, classes], labels → [N].

    Targets are smoothed as in `cross_entropy`. The mean over classes, or with `sum_classes` their sum (Wightman et al.
    2021, section 2.1).
    """
    targets = labels if labels.ndim == 2 else jax.nn.one_hot(labels, logits.shape[-1])
    if smoothing:
        targets = (1 - smoothing) * targets + smoothing / logits.shape[-1]
    losses = optax.sigmoid_binary_cross_entropy(logits, targets)
    if sum_classes:
        return losses.sum(-1)
    return losses.mean(-1)


def distillation(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """T² · KL(teacher ‖ student), both softened by T (Hinton et al. 2015, section 2): two [N, classes] → [N].

    T² keeps the gradient's size from falling with T.
    """
    softened = (jax.nn.log_softmax(each / temperature) for each in (logits, teacher_logits))
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(*softened)
