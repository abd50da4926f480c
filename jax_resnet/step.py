"""One update and one evaluation: pure functions of (state, batch)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from jax_resnet.data import device
from jax_resnet.loss import cross_entropy
from jax_resnet.metrics import Sums, classification_sums
from jax_resnet.state import TrainState

Batch = dict[str, jax.Array]
STEPS = 2**32 - 1  # folded into the seed's key: the parameters are drawn from the same key, with counts from 0


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    data: ConfigDict,
    label_smoothing: float,
    freeze: Sequence[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The update: (state, {image uint8 [N, H, W, C], label int32 [N]}) → (new state, sums over the batch).

    `data` is config.data; with its flip_alternate the batch also has mirrored, bool [N].
    Of a mixed image the label with more weight is the right one (of equals the lower), as torchvision counts too.
    The parts of the network in `freeze` normalise by their running statistics and leave them as they are.
    All randomness comes from (seed, state.step) and the row in the global batch.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEPS), state.step)
        augment_key, dropout_key = jax.random.split(key)
        rows, drawn = device.draw(augment_key, batch["image"].shape, data)
        if data.flip_alternate:
            rows["mirrored"] = batch["mirrored"]
        images = device.augment(batch["image"], rows, drawn, data)

        def loss(params: Any) -> tuple[jax.Array, tuple[Any, Sums]]:
            model: Any = nnx.merge(graph, params, state.batch_stats)
            model.train()
            for part in freeze:
                getattr(model, part).eval()
            logits = model(images, rngs=nnx.Rngs(dropout=dropout_key))
            labels = right = batch["label"]
            if "kept" in drawn:
                labels = device.mix_labels(right, drawn["kept"], logits.shape[-1])
                right = labels.argmax(-1)
            losses = cross_entropy(logits, labels, label_smoothing)
            stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            return losses.mean(), (stats, classification_sums(logits, right, losses))

        grads, (batch_stats, sums) = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return replace(state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), sums

    return train_step


def make_eval_step(
    graph: nnx.GraphDef,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[Any, Any, Batch], Sums]:
    """The evaluation: (params, batch_stats, {image, label, mask, undecodable}) → sums over the rows where mask holds.

    mask and undecodable, bool [N], are those of batches.eval_batch; the latter's rows are counted too.
    """

    def eval_step(params: Any, batch_stats: Any, batch: Batch) -> Sums:
        model: Any = nnx.merge(graph, params, batch_stats)
        model.eval()
        logits = model(device.normalise(batch["image"], mean, std))
        losses = cross_entropy(logits, batch["label"])
        counts = {"undecodable": batch["undecodable"].sum()}
        return classification_sums(logits, batch["label"], losses, batch["mask"]) | counts

    return eval_step
