"""The header of a run: what is about to run, in a few lines."""

import os

import jax

from jax_resnet.data.loader import Readers
from jax_resnet.runs.paths import AnyPath
from jax_resnet.training.experiment import Experiment
from jax_resnet.training.plan import describe
from jax_resnet.training.schedules import peak_learning_rate

CLASSES = 5  # whose names are shown


def header(experiment: Experiment, workdir: AnyPath, start: int) -> dict[str, str]:
    """Describe what is about to run, a line for each heading."""
    config, plan = experiment.config, experiment.plan
    rows = {
        "model": _model(experiment),
        "data": _data(experiment),
        "input": f"{experiment.data.train.source}, {Readers.of(config.data, experiment.data.train)}",
        "devices": _devices(experiment),
        "batch": _batch(experiment),
        "steps": _steps(experiment),
    }
    if jax.devices()[0].platform == "gpu" and os.environ.get("XLA_FLAGS"):
        rows["flags"] = os.environ["XLA_FLAGS"]
    if config.progressive:
        rows["progressive"] = describe(plan)
    rows["workdir"] = str(workdir)
    if start:
        rows["resumed"] = f"from step {start:,}"
    return rows


def _model(experiment: Experiment) -> str:
    params = experiment.network.abstract_state.params
    counts = {part: sum(p.size for p in jax.tree.leaves(inside)) for part, inside in params.items()}
    frozen = sum(counts[part] for part in experiment.config.freeze)
    parameters = f"{short(sum(counts.values()))} parameters"
    if frozen:
        parameters += f", {short(frozen)} of them frozen"
    flops = experiment.network.flops(*experiment.data.input_shape)
    return f"{experiment.config.model.name}, {parameters}, {short(flops)}FLOPs an {experiment.data.inputs.name}"


def _data(experiment: Experiment) -> str:
    data = experiment.data
    shape = "×".join(map(str, data.input_shape))
    text = f"{data.name}: {len(data.train):,} {data.train.name}, {len(data.eval):,} {data.eval.name}"
    text += f", {data.num_classes} classes, {shape}"
    if data.class_names[:1] == ("0",):  # The classes have numbers, no names.
        return text
    names = [*data.class_names[:CLASSES], *["…"] * (data.num_classes > CLASSES)]
    return f"{text}: {', '.join(names)}"


def _devices(experiment: Experiment) -> str:
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}, activations {experiment.config.dtype}"


def _batch(experiment: Experiment) -> str:
    config = experiment.config
    batches = {phase.batch_size for phase in experiment.plan.phases}
    ends = sorted({min(batches), max(batches)})
    batch, per_device = (" to ".join(f"{size // by:,}" for size in ends) for by in (1, jax.device_count()))
    parts = f", in {config.accumulate} parts" if config.accumulate > 1 else ""
    text = f"{batch} ({per_device} per device{parts})"
    if experiment.network.spec.norm == "batch":
        group = config.model.bn_group_size
        over = f"groups of {group}" if group else "all of it"
        text += f", batch norm over {over}"
    return text


def _steps(experiment: Experiment) -> str:
    config, plan = experiment.config, experiment.plan
    epochs, every = (steps / plan.steps_per_epoch for steps in (plan.position(plan.steps), plan.eval_every))
    evaluated = f"{every:.4g} epochs" if plan.changes_batch else f"{plan.eval_every:,.4g}"
    peak = peak_learning_rate(config.optimizer, config.batch_size)
    text = (
        f"{plan.steps:,} ({epochs:.4g} epochs), evaluated every {evaluated}, {config.optimizer.name} with "
        f"{config.schedule.name} schedule from {peak:.4g}"
    )
    if config.optimizer.layer_decay != 1:
        text += f", layer decay {config.optimizer.layer_decay:g}"
    return text


def short(number: float) -> str:
    """Write 1234567 as "1.23 M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "
