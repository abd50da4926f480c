"""Losses, one value for each example."""

import jax
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy with label smoothing: float32 logits [N, classes], labels → [N].

    Labels are int [N], or float [N, classes] whose rows sum to 1. The target is (1 − smoothing) at the label and
    smoothing / classes everywhere (Szegedy et al. 2015, section 7).
    """
    if labels.ndim == 2:
        plain = optax.softmax_cross_entropy(logits, labels)
    else:
        plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return plain
    uniform = -jax.nn.log_softmax(logits).mean(-1)
    return (1 - smoothing) * plain + smoothing * uniform
