"""The loss against its definition in float64, the metrics against a sort."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_resnet.training.losses import binary_cross_entropy, cross_entropy
from jax_resnet.training.metrics import accuracy_text, classification_sums, summary, total


def random_batch(examples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(examples * classes)
    return rng.normal(size=(examples, classes)).astype(np.float32), rng.integers(0, classes, examples)


def sums_of(logits, labels, losses=None, mask=None) -> dict[str, float | int]:
    """`classification_sums` of plain lists or arrays, as numbers."""
    labels = jnp.asarray(labels, jnp.int32)
    losses = jnp.zeros(labels.shape) if losses is None else jnp.asarray(losses, jnp.float32)
    mask = None if mask is None else jnp.asarray(mask)
    return total([classification_sums(jnp.asarray(logits, jnp.float32), labels, losses, mask)])


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_cross_entropy_is_the_mean_surprise_under_the_smoothed_target(smoothing, classes):
    logits, labels = random_batch(17, classes)
    wide = logits.astype(np.float64)
    surprise = np.log(np.exp(wide).sum(-1, keepdims=True)) - wide
    target = np.full(wide.shape, smoothing / classes)
    target[np.arange(17), labels] += 1 - smoothing
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    assert found.shape == (17,)
    np.testing.assert_allclose(found, (target * surprise).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_linear_in_the_target(smoothing):
    logits, labels = random_batch(6, 5)
    one, other = (cross_entropy(logits, jnp.asarray(of), smoothing) for of in (labels, labels[::-1].copy()))
    hot = np.eye(5, dtype=np.float32)
    mixed = cross_entropy(logits, jnp.asarray(0.3 * hot[labels] + 0.7 * hot[labels[::-1]]), smoothing)
    np.testing.assert_allclose(mixed, 0.3 * one + 0.7 * other, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_equal_logits_is_the_log_of_the_classes(smoothing):
    losses = cross_entropy(jnp.full((2, 7), 3.0), jnp.array([0, 6]), smoothing)
    np.testing.assert_allclose(losses, math.log(7), rtol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    losses = cross_entropy(jnp.array([[1e4, 0.0], [1e4, 0.0]]), jnp.array([0, 1]), 0.1)
    np.testing.assert_allclose(losses, [0.05 * 1e4, 0.95 * 1e4], rtol=1e-6)


def test_a_confident_right_answer_costs_more_when_smoothed():
    logits, labels = jnp.array([[20.0, 0.0, 0.0]]), jnp.array([0])
    assert cross_entropy(logits, labels, 0.1)[0] > cross_entropy(logits, labels, 0.0)[0]


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_the_surprise_of_each_class_by_itself(smoothing, sum_classes):
    logits, labels = random_batch(9, 7)
    target = 0.4 * np.eye(7)[labels] + 0.6 * np.eye(7)[labels[::-1]]  # of mixed images
    expected = (1 - smoothing) * target + smoothing / 7
    present = 1 / (1 + np.exp(-logits.astype(np.float64)))
    surprise = -expected * np.log(present) - (1 - expected) * np.log(1 - present)
    found = binary_cross_entropy(logits, jnp.asarray(target), smoothing, sum_classes)
    np.testing.assert_allclose(found, surprise.sum(-1) if sum_classes else surprise.mean(-1), rtol=1e-4)


def test_binary_cross_entropy_equals_torch():
    torch = pytest.importorskip("torch")
    logits, labels = random_batch(9, 7)
    target = torch.nn.functional.one_hot(torch.tensor(labels), 7).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), target, reduction="none")
    found = binary_cross_entropy(logits, jnp.asarray(labels))
    np.testing.assert_allclose(found, expected.mean(-1).numpy(), rtol=1e-5)


# ---- sums over a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [6, 10, 100])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_top_1_and_top_5_equal_a_stable_sort(classes, ties):
    logits, labels = random_batch(300, classes)
    if ties:
        logits = np.round(logits)  # a handful of values, so that many are equal; the lower class comes first
    order = np.argsort(-logits, axis=-1, kind="stable")
    found = sums_of(logits, labels)
    assert found["examples"] == 300
    assert found["correct_top1"] == (order[:, 0] == labels).sum()
    assert found["correct_top5"] == (order[:, :5] == labels[:, None]).any(-1).sum()


@pytest.mark.parametrize(("label", "top1", "top5"), [(0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0), (7, 0, 0)])
def test_of_equal_logits_the_lower_class_comes_first(label, top1, top5):
    found = sums_of(np.ones((1, 8)), [label])
    assert (found["correct_top1"], found["correct_top5"]) == (top1, top5)


@pytest.mark.parametrize(("classes", "counted"), [(2, False), (5, False), (6, True)])
def test_top_5_is_counted_only_for_more_than_5_classes(classes, counted):
    found = sums_of(*random_batch(4, classes))
    assert ("correct_top5" in found) is counted
    assert ("accuracy_top5" in summary(found)) is counted


@pytest.mark.parametrize(
    "row",
    [[math.nan] * 6, [math.nan, 0, 0, 0, 0, 0], [9, 0, 0, math.nan, 0, 0]],
    ids=["all", "the label's own", "another's"],
)
def test_logits_that_are_not_numbers_are_never_right(row):
    found = sums_of([row, [9, 0, 0, 0, 0, 0]], [0, 0])
    assert (found["examples"], found["correct_top1"], found["correct_top5"]) == (2, 1, 1)


def test_masked_rows_count_for_nothing():
    logits, labels = random_batch(40, 10)
    losses = np.arange(40, dtype=np.float32)
    mask = np.arange(40) % 3 == 0
    assert sums_of(logits, labels, losses, mask) == sums_of(logits[mask], labels[mask], losses[mask])
    assert sums_of(logits, labels, losses, mask)["loss"] == sum(range(0, 40, 3))


def test_no_mask_means_every_row():
    logits, labels = random_batch(12, 10)
    assert sums_of(logits, labels) == sums_of(logits, labels, mask=np.ones(12, bool))


def test_padded_rows_count_for_nothing_even_when_they_are_not_numbers():
    logits, labels = random_batch(8, 10)
    losses, mask = np.ones(8), np.arange(8) < 5
    clean = sums_of(logits, labels, losses, mask)
    logits[5:], losses[5:] = math.nan, math.nan
    assert sums_of(logits, labels, losses, mask) == clean
    assert clean["loss"] == 5


def test_all_rows_masked_sum_to_zero():
    logits, labels = random_batch(4, 10)
    found = sums_of(logits, labels, np.full(4, math.nan), np.zeros(4, bool))
    assert set(found.values()) == {0}


def test_sums_are_counts_in_int32_and_a_loss_in_float32_also_traced():
    logits, labels = random_batch(4, 10)
    sums = jax.jit(classification_sums)(logits, labels, np.ones(4, np.float32))
    assert {name: value.dtype for name, value in sums.items()} == {
        "examples": jnp.int32,
        "loss": jnp.float32,
        "correct_top1": jnp.int32,
        "correct_top5": jnp.int32,
    }


# ---- totals ----------------------------------------------------------------------------------------------------------


def test_total_counts_exactly_beyond_what_float32_and_int32_hold():
    ones = [{"examples": jnp.int32(2**31 - 1)}, {"examples": jnp.int32(2**31 - 1)}, {"examples": jnp.int32(3)}]
    found = total(ones)["examples"]
    assert isinstance(found, int)
    assert found == 2**32 + 1


def test_total_adds_the_loss_in_float64():
    losses = [np.float32(2**24), *[np.float32(0.1)] * 50]
    found = total({"loss": jnp.float32(x)} for x in losses)["loss"]
    assert found == pytest.approx(math.fsum(float(x) for x in losses), rel=1e-13)


def test_total_of_pieces_equals_the_whole():
    logits, labels = random_batch(30, 10)
    losses = np.arange(30, dtype=np.float32)
    cuts = [slice(0, 7), slice(7, 8), slice(8, 30)]
    pieces = total(classification_sums(logits[s], jnp.asarray(labels[s]), losses[s]) for s in cuts)
    assert pieces == sums_of(logits, labels, losses)


def test_summary_divides_by_the_examples():
    found = summary({"examples": 8, "correct_top1": 3, "correct_top5": 6, "loss": 4.0})
    expected = {"examples": 8, "correct_top1": 3, "accuracy_top1": 0.375, "accuracy_top5": 0.75, "loss": 0.5}
    assert found == expected


def test_summary_of_nothing_is_not_a_number():
    found = summary({"examples": 0, "correct_top1": 0, "loss": 0.0})
    assert math.isnan(found["accuracy_top1"])
    assert math.isnan(found["loss"])


def test_accuracy_is_written_with_its_counts():
    metrics = summary({"examples": 360, "correct_top1": 355, "loss": 1.0})
    assert accuracy_text(metrics) == "98.61 % (355 of 360)"
