"""What a config comes to, section by section, and the curve of its rates.

The numbers are those of Experiment, Plan and training/optimizers.py, which training has them from too. Only the
schedule is computed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_resnet.commands.cli import save_plot
from jax_resnet.config import PARAMETER_KINDS, model_overrides, validate
from jax_resnet.data.dataset import Dataset
from jax_resnet.data.image.device import ImageInputs
from jax_resnet.data.image.split import encoded
from jax_resnet.data.sources import open_dataset
from jax_resnet.errors import NotPrepared
from jax_resnet.models.zoo import model_spec
from jax_resnet.training import optimizers as optim
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.header import short
from jax_resnet.training.plan import Plan
from jax_resnet.training.schedules import peak_learning_rate

Row = tuple[str, str]  # a name and a text, of one line or more
Section = tuple[str, list[Row]]  # under its title

# For who has not prepared them: examples to train on and to evaluate on, classes, pixels a side (None: they differ).
PUBLISHED = {
    "imagenet2012": (1_281_167, 50_000, 1000, None),
    "cifar10": (50_000, 10_000, 10, 32),
    "cifar100": (50_000, 10_000, 100, 32),
}
USED = {  # of config.optimizer, by optimizers of that name alone
    "sgd": ("momentum", "rate_in_momentum", "nesterov"),
    "rmsprop": ("momentum", "rate_in_momentum", "beta2", "epsilon"),
    "rmsprop_tf": ("momentum", "beta2", "epsilon"),
    "adagrad": ("epsilon",),
    "adam": ("beta1", "beta2", "epsilon"),
    "adamw": ("beta1", "beta2", "epsilon"),
    "lamb": ("beta1", "beta2", "epsilon"),
    "lars": ("momentum", "rate_in_momentum", "nesterov", "trust_coefficient", "epsilon"),
    "lion": ("beta1", "beta2"),
    "adafactor": (),
    "muon": ("momentum", "nesterov", "newton_schulz_steps", "epsilon"),
}
WIDTH, HEIGHT = 46, 6  # of the curve, in characters
BARS = " ▁▂▃▄▅▆▇█"


def prepare(c: ConfigDict, mesh: Mesh | None = None) -> tuple[Experiment, bool]:
    """A config as ready for training as can be without weights, and whether its data is here, not just in PUBLISHED.

    Raises UserError as Experiment does. The weights of a teacher are not read. `mesh` is as for Experiment.
    """
    validate(c)
    c = c.copy_and_resolve_references()
    c.distill.update(teacher=None, model=None)
    try:
        data, here = open_dataset(c.data), True
    except NotPrepared:
        if c.data.name not in PUBLISHED or c.data.train_split or c.data.eval_split:
            raise
        data, here = _published(c.data), False
    return build(c, data=data, mesh=mesh), here


def _published(c: ConfigDict) -> Dataset:
    *counts, classes, side = PUBLISHED[c.name]
    c = c.copy_and_resolve_references()
    c.image.size = c.image.size or side
    names = "train", "test" if side else "validation"
    empty = (encoded(name, 0, lambda _: (), classes, c) for name in names)
    train, evaluation = (replace(split, length=count) for split, count in zip(empty, counts, strict=True))
    return Dataset(c.name, train, evaluation, tuple(map(str, range(classes))), ImageInputs(c))


def sections(c: ConfigDict, experiment: Experiment, here: bool) -> list[Section]:
    """What the config comes to, `experiment` and `here` being what `prepare` gives for it."""
    parts = {
        "model": _model(experiment, c.dtype),
        "data": _data(experiment, here),
        "batch": _batch(experiment),
        "steps": _steps(experiment),
        "learning rate": _learning_rate(experiment),
        "optimizer": _optimizer(experiment),
        "parameters": _parameters(experiment),
        "images": _images(experiment),
        "augmentation": _augmentation(experiment),
        "loss": _loss(c),
    }
    return [(title, [(name, text) for name, text in rows if text]) for title, rows in parts.items()]


def _model(experiment: Experiment, dtype: str) -> Iterator[Row]:
    c, usual = experiment.config, model_spec(experiment.config.model.name)
    yield "name", c.model.name
    yield "parameters", f"{sum(p.size for p in jax.tree.leaves(experiment.network.abstract_state.params)):,}"
    flops = {size: experiment.network.flops(*size, c.data.image.channels) for size in _sizes(experiment)}
    yield "cost", "\n".join(f"{short(count)}FLOPs for an image of {_by(*size)}" for size, count in flops.items())
    yield "activations", c.dtype + (" on this machine" if dtype == "auto" else "")
    for key in model_overrides(c):
        was, value = getattr(usual, key), getattr(experiment.network.spec, key)
        yield key, f"{value} (of {c.model.name} as it is: {was})" if value != was and key != "bn_group_size" else ""
    yield "init_from", c.init_from or ""


def _sizes(experiment: Experiment) -> list[tuple[int, int]]:
    """Of training images, phase by phase: height and width."""
    height, width, _ = experiment.data.input_shape
    return list(
        dict.fromkeys((phase.image_size or height, phase.image_size or width) for phase in experiment.plan.phases)
    )


def _by(height: int, width: int) -> str:
    return f"{height}×{width}"


def _data(experiment: Experiment, here: bool) -> Iterator[Row]:
    data = experiment.data
    yield "dataset", data.name + ("" if here else " (not here; sizes as published)")
    yield "examples", f"{len(data.train):,} {data.train.name}, {len(data.eval):,} {data.eval.name}"
    yield "classes", f"{data.num_classes:,}"


def _batch(experiment: Experiment) -> Iterator[Row]:
    c, devices, group = experiment.config, jax.devices(), experiment.config.model.bn_group_size

    def each(by: int) -> str:
        sizes = dict.fromkeys(phase.batch_size for phase in experiment.plan.phases)
        return ", then ".join(f"{size // by:,}" for size in sizes)

    yield "size", each(1)
    yield "accumulate", f"{c.accumulate} parts of {each(c.accumulate)}" if c.accumulate > 1 else ""
    yield "per device", f"{each(len(devices) * c.accumulate)}, with {len(devices)} × {devices[0].device_kind} as here"
    yield "repeats", f"each record {c.data.repeats} times" if c.data.repeats > 1 else ""
    over = f"over groups of {group:,}" if group else "over all of it"
    yield "batch norm", over if experiment.network.spec.norm == "batch" else ""


def _at(plan: Plan, step: int) -> str:
    return f"step {step:,}, epoch {_epoch(plan, step)}"


def _many(count: float, what: str) -> str:
    return (f"{count:,}" if isinstance(count, int) else f"{count:.4g}") + f" {what}{'' if count == 1 else 's'}"


def _epoch(plan: Plan, step: int) -> str:
    return f"{plan.position(step) / plan.steps_per_epoch:.4g}"


def _steps(experiment: Experiment) -> Iterator[Row]:
    c, plan = experiment.config, experiment.plan
    yield "training", f"{_many(plan.steps, 'step')}, {_epoch(plan, plan.steps)} epochs"
    yield "an epoch", f"{plan.steps_per_epoch:,.6g} steps" + (f" of {plan.batch_size:,}" if plan.changes_batch else "")
    yield "stretch", f"{c.stretch:g} × the recipe's length" if c.stretch != 1 else ""
    yield "stops after", _at(plan, experiment.last_step) if experiment.last_step < plan.steps else ""
    yield "warmup", f"to {_at(plan, _warmed_up(plan))}" if plan.warmup_steps else ""
    yield "cooldown", f"from {_at(plan, _cools_down(plan))}" if plan.cooldown_steps else ""
    for i, phase in enumerate(plan.phases if c.progressive else (), 1):
        yield f"phase {i}", f"{phase.image_size} px × {phase.batch_size:,}, to {_at(plan, phase.end)}"
    times = int(plan.position(plan.steps - 1) / plan.eval_every * (1 + 1e-12)) + 1  # the last step's is always one
    yield "evaluations", f"{times:,}, {_many(plan.eval_every / plan.steps_per_epoch, 'epoch')} apart"


def _warmed_up(plan: Plan) -> int:
    return plan.update_at(plan.warmup_steps)


def _cools_down(plan: Plan) -> int:
    return plan.update_at(plan.position(plan.steps) - plan.cooldown_steps)


def _learning_rate(experiment: Experiment) -> Iterator[Row]:
    c, o, plan = experiment.config.schedule, experiment.config.optimizer, experiment.plan
    larger = f"{plan.batch_size:,} / {o.reference_batch:,}"
    scale = f" × {f'√({larger})' if o.batch_scaling == 'sqrt' else larger}" if o.reference_batch else ""
    yield "peak", f"{o.learning_rate:g}{scale} = {peak_learning_rate(o, plan.batch_size):.4g}"
    yield "schedule", c.name + (f" of power {c.power:g}" if c.name == "polynomial" else "")
    rates = rates_at(experiment, np.arange(plan.steps))
    yield "", picture(rates, [_epoch(plan, step) for step in (0, plan.steps // 2, plan.steps)])
    for step, name in _moments(experiment).items():
        yield name, f"{rates[step]:.4g} at {_at(plan, step)}"


def rates_at(experiment: Experiment, steps: np.ndarray) -> np.ndarray:
    """The learning rates, float32 [n], of those updates, int [n], counted from 0."""
    return np.asarray(jax.vmap(experiment.steps.learning_rate)(steps))


def _moments(experiment: Experiment) -> dict[int, str]:
    """The updates whose rates tell a schedule from others, in their order."""
    c, plan = experiment.config.schedule, experiment.plan
    shares = {"step": c.boundaries, "piecewise": [at for at, _ in c.knots]}.get(c.name, ())
    moments = {plan.step_at(share): f"{share:.4g} of all" for share in shares}
    moments |= {phase.first_step: f"phase {i}" for i, phase in enumerate(plan.phases, 1)}
    moments |= {_warmed_up(plan): "warmed up", _cools_down(plan): "cooldown", 0: "first", plan.steps - 1: "last"}
    return {step: moments[step] for step in sorted(moments) if step < plan.steps}


def picture(rates: np.ndarray, epochs: Sequence[str]) -> str:
    """The curve of `rates`, [n], in blocks; each column is as high as the highest of its part of them.

    `epochs` are written at the left, in the middle and at the right.
    """
    edges = np.linspace(0, len(rates), WIDTH + 1).astype(int)
    highest = np.array([rates[a : max(a + 1, b)].max() for a, b in pairwise(edges)])
    heights = np.ceil(8 * HEIGHT * highest / (rates.max() or 1)).astype(int)  # what is not 0 is seen
    left, middle, right = epochs
    labels = [f"{rates.max():.4g}", *[""] * (HEIGHT - 1), "0", "epoch"]
    curve = ["".join(BARS[h] for h in np.clip(heights - 8 * row, 0, 8)) for row in reversed(range(HEIGHT))]
    axis = f"{left:<{(WIDTH - len(middle)) // 2}}{middle}".ljust(WIDTH - len(right)) + right
    lines = zip(labels, "┤" + "│" * (HEIGHT - 1) + "└ ", [*curve, "─" * WIDTH, axis], strict=True)
    margin = max(map(len, labels))
    return "\n".join(f"{label:>{margin}} {edge}{line}" for label, edge, line in lines)


def _optimizer(experiment: Experiment) -> Iterator[Row]:
    c, ema, plan = experiment.config.optimizer, experiment.config.ema, experiment.plan
    yield "name", c.name
    for key in ("clip_value", "clip_norm", "l1", *USED[c.name]):
        yield key, ("yes" if c[key] is True else f"{c[key]:.4g}") if c[key] else ""
    if c.name == "muon":
        sgd = c.rest.name == "sgd"
        values = f"momentum {c.rest.momentum:g}" if sgd else f"beta1 {c.beta1:g}, beta2 {c.beta2:g}"
        yield "rest", f"{c.rest.name}, {c.rest.learning_rate / c.learning_rate:.4g} × the rate, {values}"
    yield "sam_rho", f"{c.sam_rho:g}{_every(c.sam_every)}" if c.sam_rho else ""
    ramp = ", at most (1 + n) / (10 + n)" if ema.ramp else ""
    copied = f", a copy until step {plan.update_at(plan.ema_warmup_steps):,}" if plan.ema_warmup_steps else ""
    yield "ema", f"{ema.decay:g}{ramp}{_every(ema.every)}{copied}" if ema.decay else ""


def _every(steps: int) -> str:
    return f", every {steps:,} steps" if steps > 1 else ""


def _parameters(experiment: Experiment) -> Iterator[Row]:
    c, params, frozen = experiment.config.optimizer, experiment.network.abstract_state.params, experiment.config.freeze
    parts = {part: jax.tree.map(lambda _, part=part: part, inside) for part, inside in params.items()}
    trees = parts, optim.parameter_kinds(params), optim.decayed(c, params), optim.rate_factors(c, params), params
    each = list(zip(*map(jax.tree.leaves, trees), strict=True))
    order = "stem", *sorted(part for part in params if part.startswith("stage")), "norm", "head"
    each.sort(key=lambda row: (PARAMETER_KINDS.index(row[1]), order.index(row[0])))
    decays = bool(c.weight_decay or c.l1)
    for name, reached in (("decayed", True), ("not decayed", False)):
        found = ((kind, p) for part, kind, mask, _, p in each if part not in frozen and (mask and decays) == reached)
        yield name, _counts(found)
    decoupled = c.name in optim.DECOUPLED if c.decoupled is None else c.decoupled
    how = "times the rate" if decoupled else "through the gradient"
    yield "weight_decay", f"{c.weight_decay:.4g}, {how}" if c.weight_decay else ""
    yield "frozen", _counts((part, p) for part, *_, p in each if part in frozen)
    if c.name == "muon":
        trained = {part: inside for part, inside in params.items() if part not in frozen}
        labels = jax.tree.leaves(optim.hidden_convolutions(trained))
        rules = {"hidden": "muon", "rest": c.rest.name}
        yield "rules", _counts((rules[label], p) for label, p in zip(labels, jax.tree.leaves(trained), strict=True))
    factors: dict[str, dict[str, list[float]]] = {}
    for part, kind, _, factor, _ in each if c.rate_factors or c.layer_decay != 1 else ():
        factors.setdefault(part, {}).setdefault(kind, []).append(factor)
    yield "rate ×", "\n".join(f"{part}: {_ranges(of)}" for part, of in factors.items() if part not in frozen)


def _counts(parameters: Iterable[tuple[str, Any]]) -> str:
    """Lines such as `kernel: 54 tensors, 25,502,912 parameters`."""
    tensors, numbers = Counter[str](), Counter[str]()
    for name, parameter in parameters:
        tensors[name] += 1
        numbers[name] += parameter.size
    return "\n".join(f"{name}: {_many(tensors[name], 'tensor')}, {numbers[name]:,} parameters" for name in tensors)


def _ranges(factors: dict[str, list[float]]) -> str:
    """`0.5 … 0.7`, or where kinds of parameters differ `kernel 1, bias 10`."""
    texts = {kind: " … ".join(f"{f:.4g}" for f in sorted({min(fs), max(fs)})) for kind, fs in factors.items()}
    return min(texts.values()) if len(set(texts.values())) == 1 else ", ".join(map(" ".join, texts.items()))


def _images(experiment: Experiment) -> Iterator[Row]:
    c, (height, width, _) = experiment.config.data.image, experiment.data.eval.element_spec()["image"].shape
    crop = c.eval_crop if c.crop in ("random_resized", "scaled") else 1.0
    yield "train", ", then ".join(_by(*size) for size in _sizes(experiment))
    resized = f" in the centre of {max(height, round(height / crop))} on the short side" if crop < 1 else ""
    yield (
        "evaluation",
        _by(height, width) + resized + (", and their mirror images" if experiment.config.eval.mirror else ""),
    )
    yield "interpolation", c.interpolation + (", antialiased" if c.antialias else "")
    yield "mean ± std", ", ".join(f"{mean:g} ± {std:g}" for mean, std in zip(c.mean, c.std, strict=True))


def _augmentation(experiment: Experiment) -> Iterator[Row]:
    """In the order in which it is done: by data/image/augment.py, then, from `shift` on, by data/image/device.py."""
    data, c = experiment.config.data, experiment.config.data.image
    (low, high), (narrow, wide), (small, large) = c.crop_area, c.crop_ratio, c.crop_resize
    crops = {
        "random_resized": f"random_resized: area {low:.4g} … {high:.4g}, ratio {narrow:.4g} … {wide:.4g}",
        "scaled": f"scaled: short side {small:g} … {large:g}",
        "stretched": f"stretched: sides {small:g} … {large:g}",
    }
    timm, near = c.randaugment_timm, c.augment_interpolation
    timms = "{} operations, magnitude {:g} ± {:g} of 10, each with probability {:g}".format(*timm)
    jitter = "brightness {:g}, contrast {:g}, saturation {:g}, hue {:g}".format(*c.color_jitter)
    mixing = " or ".join(f"{key} α {alpha:g}" for key, alpha in (("mixup", data.mixup), ("cutmix", c.cutmix)) if alpha)
    yield "crop", crops.get(c.crop, "")
    yield "randaugment", "{} operations, magnitude {} of 30, {}".format(*c.randaugment, near) * bool(c.randaugment[0])
    yield "randaugment_timm", f"{timms}, {near}" if timm[0] else ""
    yield "trivial_augment", f"one operation of any magnitude, {near}" if c.trivial_augment else ""
    yield "color_jitter", jitter if any(c.color_jitter) else ""
    yield "shift", f"by up to {c.pad} pixels, {c.pad_mode} beyond the border" if c.crop == "pad" else ""
    yield "flip", ("each image every other epoch" if c.flip_alternate else "half of the images") if c.flip else ""
    yield "pca_noise", f"deviation {c.pca_noise:g}" if c.pca_noise else ""
    yield "erase", f"a rectangle, with probability {c.erase:g}" if c.erase else ""
    yield "colout", f"{c.colout:g} of rows and columns" if c.colout else ""
    yield "mixing", mixing


def _loss(c: ConfigDict) -> Iterator[Row]:
    loss, distill = c.loss, c.distill
    bce = loss.name == "bce"
    yield "name", loss.name + (f", {'sum' if loss.bce_sum else 'mean'} over classes" if bce else "")
    yield "label_smoothing", f"{loss.label_smoothing:g}" if loss.label_smoothing else ""
    of = f" ({distill.model})" if distill.model else ""
    share = f"{distill.alpha:g} of the loss, temperature {distill.temperature:g}"
    yield "teacher", f"{distill.teacher}{of}: {share}" if distill.teacher else ""


def draw(experiment: Experiment, file: Path) -> None:
    """The learning rate over the epochs as a PNG. Raises UserError if it cannot be written."""
    from matplotlib.figure import Figure

    steps = np.unique(
        np.append(np.linspace(0, experiment.plan.steps - 1, 2000).astype(int), list(_moments(experiment)))
    )
    epochs = [experiment.plan.position(step) / experiment.plan.steps_per_epoch for step in steps.tolist()]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, rates_at(experiment, steps))
    axes.set(xlabel="epoch", ylabel="learning rate")
    axes.grid(alpha=0.3)
    save_plot(figure, file)
