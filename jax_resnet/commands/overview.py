"""Describe a config: keys that differ from the defaults, derived numbers, the learning rate.

The numbers are those of the experiment that training builds; only the schedule is computed.
"""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_resnet.commands.cli import save_plot
from jax_resnet.config import default, model_overrides, validate
from jax_resnet.config.keys import leaves
from jax_resnet.data.dataset import Dataset
from jax_resnet.data.image.device import ImageInputs
from jax_resnet.data.image.split import encoded
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import NotPrepared
from jax_resnet.models.zoo import model_spec
from jax_resnet.training import optimizers
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.header import header
from jax_resnet.training.plan import Plan
from jax_resnet.training.schedules import peak_learning_rate

Rows = dict[str, str]  # texts by their names

# Sizes of splits, classes, pixels a side (None: they differ), for machines without the dataset.
PUBLISHED = {
    "imagenet2012": ({"train": 1_281_167, "validation": 50_000}, 1000, None),
    "cifar10": ({"train": 50_000, "test": 10_000}, 10, 32),
    "cifar100": ({"train": 50_000, "test": 10_000}, 100, 32),
}
COLUMNS, LINES = 46, 6  # of the curve, in characters
BARS = " ▁▂▃▄▅▆▇█"


def prepare(config: ConfigDict, mesh: Mesh | None = None) -> Experiment:
    """Build a config's experiment without a teacher; a missing dataset has published sizes.

    `mesh` is as for `build`. Raises UserError as `build` does.
    """
    validate(config)
    config = config.copy_and_resolve_references()
    config.distill.update(teacher=None, model=None)
    try:
        data = open_dataset(config.data)
    except NotPrepared:
        if config.data.name not in PUBLISHED or config.data.train_split or config.data.eval_split:
            raise
        data = _published_dataset(config.data)
    return build(config, data=data, mesh=mesh)


def _published_dataset(config: ConfigDict) -> Dataset:
    """Make a dataset of published sizes without records."""
    sizes, classes, side = PUBLISHED[config.name]
    config = config.copy_and_resolve_references()
    config.image.size = config.image.size or side
    train, evaluation = (
        replace(encoded(name, 0, lambda _: (), classes, config), length=size) for name, size in sizes.items()
    )
    name = f"{config.name} (not here; sizes as published)"
    return Dataset(name, train, evaluation, tuple(map(str, range(classes))), ImageInputs(config))


def changed_keys(config: ConfigDict) -> Rows:
    """Return the keys that differ from `default()`, and the named network's own values of them."""
    usual = dict(leaves(default()))
    # Only the unit of a duration that another unit replaces becomes None.
    rows = {key: str(value) for key, value in leaves(config) if value not in (None, usual[key])}
    network = model_spec(config.model.name)
    for key in model_overrides(config):
        if f"model.{key}" in rows:
            rows[f"model.{key}"] += f" ({config.model.name}: {getattr(network, key)})"
    return rows


def derived_numbers(experiment: Experiment) -> Rows:
    """Return the header of a training, and the numbers that its durations imply."""
    plan, optimizer = experiment.plan, experiment.config.optimizer
    rows = header(experiment, Path(), start=0)
    del rows["input"], rows["workdir"]
    peak = peak_learning_rate(optimizer, plan.batch_size)
    scaling = f"reference_batch {optimizer.reference_batch:,}, batch_scaling {optimizer.batch_scaling}"
    # An integer quotient may be rounded to just below it. The last step is always evaluated.
    evaluations = int(plan.position(plan.steps - 1) / plan.eval_every * (1 + 1e-12)) + 1
    return rows | {
        "warmup": f"{plan.update_at(plan.warmup_steps):,} steps",
        "cooldown": f"{plan.steps - _cooldown_start(plan):,} steps",
        "evaluations": f"{evaluations:,}",
        "peak rate": f"{peak:.4g}, from learning_rate {optimizer.learning_rate:g}, {scaling}",
    }


def _cooldown_start(plan: Plan) -> int:
    return plan.update_at(plan.position(plan.steps) - plan.cooldown_steps)


def parameters(experiment: Experiment) -> Rows:
    """Count the decayed, not decayed and frozen parameters by kind, and list rate factors."""
    config, params = experiment.config.optimizer, experiment.network.abstract_state.params
    trees = optimizers.parameter_kinds(params), optimizers.decayed(config, params), params
    decays = bool(config.weight_decay or config.l1)
    counts = Counter[str]()
    for part in params:
        for kind, is_decayed, parameter in zip(*(jax.tree.leaves(tree[part]) for tree in trees), strict=True):
            fate = ("not decayed", "decayed")[is_decayed and decays]
            if part in experiment.config.freeze:
                fate = "frozen"
            counts[f"{fate} {kind}"] += parameter.size
    rows = {name: f"{size:,} parameters" for name, size in sorted(counts.items())}
    for part, tree in optimizers.rate_factors(config, params).items():
        factors = jax.tree.leaves(tree)
        extremes = sorted({min(factors), max(factors)})
        if extremes != [1.0] and part not in experiment.config.freeze:
            rows[f"rate of {part}"] = " to ".join(f"× {factor:.4g}" for factor in extremes)
    return rows


def learning_rates(experiment: Experiment) -> Rows:
    """Return the curve of the learning rate, and its values where the schedule changes."""
    schedule, plan = experiment.config.schedule, experiment.plan
    shares = {"step": schedule.boundaries, "piecewise": [share for share, _ in schedule.knots]}
    moments = {plan.step_at(share): f"{share:.4g} of all" for share in shares.get(schedule.name, ())}
    moments |= {phase.first_step: f"phase {i}" for i, phase in enumerate(plan.phases, 1)}
    moments |= {plan.update_at(plan.warmup_steps): "warmed up", _cooldown_start(plan): "cooldown"}
    moments |= {0: "first", plan.steps - 1: "last"}
    rates = rates_at(experiment, np.arange(plan.steps))
    rows = {"": curve(rates, plan.epoch(plan.steps))}
    for step in sorted(moments.keys() - {plan.steps}):
        rows[moments[step]] = f"{rates[step]:.4g} at step {step:,}, epoch {plan.epoch(step):.4g}"
    return rows


def rates_at(experiment: Experiment, steps: np.ndarray) -> np.ndarray:
    """Compute the learning rates, float32 [n], of updates, int [n], counted from 0."""
    return np.asarray(jax.vmap(experiment.steps.learning_rate)(steps))


def curve(rates: np.ndarray, epochs: float) -> str:
    """Draw `rates`, [n], in blocks: each column shows the maximum of its share of them."""
    edges = np.linspace(0, len(rates), COLUMNS + 1).astype(int)
    highest = np.array([rates[start : max(start + 1, stop)].max() for start, stop in pairwise(edges)])
    # The heights are rounded up, so that every rate above 0 is visible.
    eighths = np.ceil(8 * LINES * highest / (rates.max() or 1)).astype(int)
    bars = ["".join(BARS[n] for n in np.clip(eighths - 8 * line, 0, 8)) for line in reversed(range(LINES))]
    labels = [f"{rates.max():.4g}", *[""] * (LINES - 1)]
    lines = [f"{label:>9} │{bar}" for label, bar in zip(labels, bars, strict=True)]
    axis = ["        0 └" + "─" * COLUMNS, f"    epoch  0{epochs:>{COLUMNS - 1}.4g}"]
    return "\n".join(lines + axis)


def draw(experiment: Experiment, file: Path) -> None:
    """Plot the learning rate over the epochs as a PNG. Raises UserError if it cannot be written."""
    from matplotlib.figure import Figure

    steps = np.linspace(0, experiment.plan.steps - 1, 2000).astype(int)
    epochs = [experiment.plan.epoch(step) for step in steps.tolist()]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, rates_at(experiment, steps))
    axes.set(xlabel="epoch", ylabel="learning rate")
    axes.grid(alpha=0.3)
    save_plot(figure, file)
