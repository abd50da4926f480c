"""Exact evaluation: every example of a split once, whatever the batch and the mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from jax_resnet.data.loader import eval_batches
from jax_resnet.data.source import Split
from jax_resnet.metrics import Sums, summary, total
from jax_resnet.state import TrainState

IN_FLIGHT = 4  # steps the host may run ahead: enough to hide it, few enough that their batches fit on the device


def evaluate(eval_step: Callable[..., Sums], state: TrainState, split: Split, *, batch_size: int,
             sharding: NamedSharding, threads: int) -> dict[str, Any]:
    """examples, correct_top1, accuracy_top1, accuracy_top5 (more than 5 classes) and loss over the whole of `split`."""
    sums: list[Sums] = []
    for batch in eval_batches(split, batch_size=batch_size, sharding=sharding, threads=threads):
        sums.append(eval_step(state.params, state.batch_stats, batch))
        jax.block_until_ready(sums[-IN_FLIGHT:][0])
    totals = total(sums)
    if totals["examples"] != len(split):
        raise RuntimeError(f"evaluated {totals['examples']} examples of the {split.name} split, which has {len(split)}")
    return summary(totals)
