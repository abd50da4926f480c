"""Distillation: the loss against its formula, a teacher that sees what the student sees, and is of the right kind."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_update import assert_close, trained

from jax_resnet.errors import UserError
from jax_resnet.inference.safetensors import export
from jax_resnet.training.experiment import build
from jax_resnet.training.loop import train
from jax_resnet.training.losses import distillation
from jax_resnet.training.network import initial_weights


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_loss_and_gradient_by_hand(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(scale=3, size=(2, 6, 5))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    found = distillation(student, teacher, temperature)
    np.testing.assert_allclose(found, temperature**2 * (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda s: distillation(s, teacher, temperature).sum())(student)
    np.testing.assert_allclose(gradient, temperature * (q - p), rtol=1e-4, atol=1e-5)


@pytest.fixture
def teacher(tiny_config: ConfigDict, tmp_path: Path) -> tuple[ConfigDict, Path]:
    """A config without a teacher, and a run of it that can be one."""
    c = tiny_config.copy_and_resolve_references()
    c.stop_after_steps = 8
    train(c, tmp_path / "teacher")
    return tiny_config, tmp_path / "teacher"


def test_a_student_that_is_its_teacher_learns_nothing(teacher: tuple[ConfigDict, Path]) -> None:
    """With all but the head frozen both normalise by the same statistics: so both must see the same pixels."""
    c, workdir = teacher
    c.init_from = c.distill.teacher = str(workdir)
    c.distill.alpha, c.distill.temperature = 1.0, 2.0
    c.freeze = ("stem", "stage1", "stage2")
    c.data.mixup = 0.2
    c.data.image.update({"flip": True, "cutmix": 1.0, "erase": 0.5})
    c.optimizer.weight_decay = 0.0
    c.schedule.warmup.steps = 0

    def of(c: ConfigDict) -> tuple[Any, Any, Any]:
        from jax_resnet.training.pretrained import placed

        experiment = build(c)
        start = placed(experiment.network.fresh_state(), initial_weights(experiment.config, experiment.network)[0])
        kept = jax.device_get(start)
        after, sums = trained(c, 3, start)
        return kept, after, sums

    start, after, sums = of(c)
    assert_close(after.params, start.params, rtol=1e-4, atol=1e-4)
    assert all(abs(found["loss"]) < 1e-3 for found in sums)
    c.distill.alpha = 1e-6  # the labels alone: it does learn
    start, after, sums = of(c)
    assert np.abs(after.params["head"]["kernel"] - start.params["head"]["kernel"]).max() > 1e-3
    assert all(found["loss"] > 1 for found in sums)
    c.distill.alpha = 1.0
    c.data.image.mean, c.data.image.std = (0.5,), (0.4,)  # the teacher goes on with the numbers of its own training
    _, _, sums = of(c)
    assert all(found["loss"] > 0.01 for found in sums)  # for the student is another now


def test_a_teacher_that_normalises_otherwise_is_given_its_own_numbers(teacher: tuple[ConfigDict, Path]) -> None:
    c, workdir = teacher
    c.distill.teacher = str(workdir)
    images = np.random.default_rng(0).uniform(size=(3, 12, 12, 1)).astype(np.float32)
    logits = []
    for mean, std in (((0.3,), (0.2,)), ((0.6,), (0.7,))):
        c.data.image.mean, c.data.image.std = mean, std
        experiment = build(c)
        from jax_resnet.training.distill import Teacher

        found = Teacher.of(
            c.distill, c.data.image, 4, np.float32, experiment.sharding.update(spec=jax.sharding.PartitionSpec())
        )
        logits.append(found.logits(found.weights, (images - np.float32(mean)) / np.float32(std)))
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)
    assert np.ptp(logits[0]) > 0.1


def test_weights_are_no_constant_of_the_program(teacher: tuple[ConfigDict, Path]) -> None:
    c, workdir = teacher
    c.distill.teacher = str(workdir)
    experiment = build(c)
    lowered = experiment.steps.train.lower(*experiment.shapes(experiment.plan.phases[0]))
    parameters = len(jax.tree.leaves(experiment.steps.teacher_weights))
    assert parameters > 20
    assert (
        len(jax.tree.leaves(lowered.in_avals))
        == len(jax.tree.leaves(experiment.network.abstract_state)) + 2 + parameters
    )
    trained_state, _ = trained(c, 2)
    assert jax.tree.structure(trained_state) == jax.tree.structure(
        experiment.network.abstract_state
    )  # it is in no checkpoint


def test_a_file_needs_the_name_of_its_network(teacher: tuple[ConfigDict, Path], tmp_path: Path) -> None:
    c, workdir = teacher
    (file,) = export(workdir, out=str(tmp_path / "out"))
    c.distill.teacher = str(file)
    with pytest.raises(UserError, match=rf"config\.distill\.teacher={file}: .*give config\.distill\.model"):
        build(c)
    c.distill.model = "resnet18"
    with pytest.raises(UserError, match=rf"config\.distill\.teacher={file}: holds another network"):
        build(c)
    c.distill.teacher = str(tmp_path / "nowhere.safetensors")
    with pytest.raises(UserError, match=r"config\.distill\.teacher=.*nowhere\.safetensors: no such file"):
        build(c)
    c.distill.teacher, c.distill.model = None, "resnet18"
    with pytest.raises(UserError, match=r"config\.distill\.model=resnet18: whose weights\?"):
        build(c)
