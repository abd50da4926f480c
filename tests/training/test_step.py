"""The jitted step: compiled once, nothing moved implicitly, a function of (state, batch)."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from jax_resnet.data.image import device
from jax_resnet.errors import UserError
from jax_resnet.models.zoo import create_model
from jax_resnet.training.experiment import Experiment, build
from jax_resnet.training.loop import train


def batches(experiment: Experiment, stop: int, start: int = 0) -> Any:
    return experiment.train_batches(start, stop, print)


def test_moves_nothing_implicitly_and_compiles_once(tiny_config: ConfigDict) -> None:
    experiment = build(tiny_config)
    state = experiment.network.fresh_state()
    with jax.transfer_guard("disallow"):
        for batch in batches(experiment, 4):
            state, _ = experiment.steps.train(state, batch)
    assert experiment.steps.train._cache_size() == 1
    on_host = jax.device_get(batch)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        experiment.steps.train(state, on_host)  # the guard does guard


def test_a_longer_run_compiles_no_more(tiny_config: ConfigDict, tmp_path: Path) -> None:
    compiled = []
    listener = lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    counts = []
    for steps in (9, 20, 20):
        compiled.clear()
        tiny_config.train.steps = steps
        train(tiny_config, tmp_path / f"{len(counts)}")
        counts.append(len(compiled))
    assert counts[1] > 0
    assert counts[1] == counts[2]
    assert counts[1] <= counts[0]  # steps, evaluations and checkpoints that come more than once add nothing


def test_state_is_donated(tiny_config: ConfigDict) -> None:
    experiment = build(tiny_config)
    state = experiment.network.fresh_state()
    new, _ = experiment.steps.train(state, next(batches(experiment, 1)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert int(new.step) == 1


def test_same_seed_same_numbers_other_seed_others(tiny_config: ConfigDict) -> None:
    def after_three_steps(seed: int) -> np.ndarray:
        tiny_config.seed = seed
        experiment = build(tiny_config)
        state = experiment.network.fresh_state()
        for batch in batches(experiment, 3):
            state, _ = experiment.steps.train(state, batch)
        return np.asarray(state.params["head"]["kernel"])

    first = after_three_steps(5)
    np.testing.assert_array_equal(first, after_three_steps(5))
    assert not np.array_equal(first, after_three_steps(6))


def test_bfloat16_keeps_parameters_statistics_and_optimizer_in_float32(tiny_config: ConfigDict) -> None:
    tiny_config.dtype = "bfloat16"
    experiment = build(tiny_config)
    state, sums = experiment.steps.train(experiment.network.fresh_state(), next(batches(experiment, 1)))
    floats = [x for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.floating) or x.dtype == jax.numpy.bfloat16]
    assert {x.dtype.name for x in floats} == {"float32"}
    assert sums["loss"].dtype == np.float32
    text = str(jax.make_jaxpr(experiment.steps.train)(state, next(batches(experiment, 1))))
    convolutions = [line for line in text.splitlines() if "conv_general_dilated[" in line]
    assert convolutions
    assert all("bf16[" in line for line in convolutions)


@pytest.mark.parametrize(("guard", "words"), [
    (0, r"the (loss|state) is no longer finite at step \d+.*learning_rate"),
    (10, r"the updates of steps 3 to 12 were all skipped.*learning_rate"),
])  # fmt: skip
def test_a_nan_ends_the_run_in_one_line(tiny_config: ConfigDict, tmp_path: Path, guard: int, words: str) -> None:
    tiny_config.optimizer.learning_rate, tiny_config.guard.max_skipped = 1e20, guard
    with pytest.raises(UserError, match=words):
        train(tiny_config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))  # nothing that is no number is saved
    tiny_config.optimizer.learning_rate = 0.1
    assert train(tiny_config, tmp_path)["step"] == 20  # and the advice can be followed in the same workdir


def test_mixed_labels_share_the_loss_and_the_larger_one_is_right(
    tiny_config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sums(experiment: Experiment, labels: np.ndarray) -> Any:
        batch = next(batches(experiment, 1)) | {"label": jax.device_put(labels, experiment.sharding)}
        return jax.device_get(experiment.steps.train(experiment.network.fresh_state(), batch)[1])

    tiny_config.model.update(depths=(1, 1, 1), widths=(16, 16, 24))  # the smaller net takes all for the same class
    labels = np.random.default_rng(0).integers(0, 4, 16, dtype=np.int32)
    without = build(tiny_config)
    own, partners = sums(without, labels), sums(without, labels[np.arange(16) ^ 1])
    assert own["correct_top1"] != partners["correct_top1"]  # or nothing would be told apart
    tiny_config.data.mixup = 0.2
    draw = device.draw
    drawn = {"weight": jax.numpy.float32(1.0), "kept": jax.numpy.float32(0.3)}  # the images are left as they are
    monkeypatch.setattr(device, "draw", lambda *of: (draw(*of)[0], drawn))
    mixed = sums(build(tiny_config), labels)
    np.testing.assert_allclose(mixed["loss"], 0.3 * own["loss"] + 0.7 * partners["loss"], rtol=1e-5)
    assert mixed["correct_top1"] == partners["correct_top1"]


def test_the_fresh_state_is_the_network_of_that_seed(tiny_config: ConfigDict) -> None:
    tiny_config.seed = 3
    fresh = build(tiny_config).network.fresh_state().params
    rngs = nnx.Rngs(params=jax.random.key(3))
    model = create_model("cifar_resnet8", num_classes=4, in_channels=1, depths=(1, 1), widths=(16, 24), rngs=rngs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        fresh,
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    )


def test_the_images_that_the_batch_says_are_mirrored(tiny_config: ConfigDict) -> None:
    tiny_config.data.image.crop, tiny_config.data.image.flip, tiny_config.data.image.flip_alternate = "none", True, True
    experiment = build(tiny_config)
    batch = next(batches(experiment, 1))
    assert {name: (of.shape, of.dtype) for name, of in batch.items()} == {
        name: (of.shape, of.dtype) for name, of in experiment.shapes(experiment.plan.phases[0])[1].items()
    }
    turned = np.where(batch["mirrored"][:, None, None, None], batch["image"][:, :, ::-1], batch["image"])
    none = np.zeros(16, bool)
    same = jax.device_put({"image": turned, "label": batch["label"], "mirrored": none}, experiment.sharding)
    losses = [float(experiment.steps.train(experiment.network.fresh_state(), b)[1]["loss"]) for b in (batch, same)]
    assert losses[0] == losses[1]
    others = jax.device_put({**same, "image": batch["image"]}, experiment.sharding)
    assert float(experiment.steps.train(experiment.network.fresh_state(), others)[1]["loss"]) != losses[0]
