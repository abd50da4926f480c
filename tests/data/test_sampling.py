"""The order of the data: permutations, a function of (seed, step), the same for any number of hosts."""

import numpy as np
import pytest

from jax_resnet.data.sampling import train_indices
from jax_resnet.runtime.mesh import local_rows


def stream(seed: int, steps: int, *, batch_size: int, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Records and epochs of the first `steps` batches, one after another."""
    batches = [train_indices(seed, s * batch_size, batch_size, num_examples) for s in range(steps)]
    records, epochs = zip(*batches, strict=True)
    assert all(r.shape == e.shape == (batch_size,) for r, e in batches)
    return np.concatenate(records), np.concatenate(epochs)


@pytest.mark.parametrize(
    ("num_examples", "batch_size"), [(12, 4), (10, 4), (10, 10), (7, 1), (5, 13), (1, 3)], ids=lambda n: str(n)
)
def test_every_epoch_has_every_record_once_also_when_batches_straddle_its_end(num_examples, batch_size):
    epochs = 6
    steps = -(-epochs * num_examples // batch_size)
    records, epoch_of = stream(0, steps, batch_size=batch_size, num_examples=num_examples)
    for epoch in range(epochs):
        here = slice(epoch * num_examples, (epoch + 1) * num_examples)
        assert sorted(records[here]) == list(range(num_examples))
        assert set(epoch_of[here]) == {epoch}


def test_the_order_does_not_depend_on_the_batch_size():
    by_5, _ = stream(3, 12, batch_size=5, num_examples=17)
    by_12, _ = stream(3, 5, batch_size=12, num_examples=17)
    assert by_5.tolist() == by_12.tolist()


def test_the_answer_is_the_same_in_any_order_of_asking_and_after_many_others():
    def ask(step):
        return [a.tolist() for a in train_indices(7, 6 * step, 6, 20)]

    first = [ask(step) for step in range(40)]  # 12 epochs, more than are remembered
    for step in np.random.default_rng(0).permutation(40):
        assert ask(step) == first[step]


def test_changing_an_answer_does_not_change_the_next():
    before, _ = train_indices(0, 0, 10, 10)
    kept = before.copy()
    before[:] = 0
    after, _ = train_indices(0, 0, 10, 10)
    assert after.tolist() == kept.tolist()


def test_seeds_and_epochs_have_orders_of_their_own():
    epochs = 3
    orders = {
        tuple(records)
        for seed in (0, 1, 2, 2**32 - 1)
        for records in stream(seed, epochs, batch_size=50, num_examples=50)[0].reshape(epochs, 50)
    }
    assert len(orders) == 4 * epochs
    assert tuple(range(50)) not in orders


def test_every_record_comes_first_about_equally_often():
    firsts = [train_indices(0, 4 * epoch, 4, 4)[0][0] for epoch in range(800)]
    counts = np.bincount(firsts, minlength=4)
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(800 * 0.25 * 0.75))


def test_far_steps_are_as_good_as_near_ones():
    step, batch_size, num_examples = 10**9, 1024, 1_281
    records, epochs = train_indices(0, step * batch_size, batch_size, num_examples)
    assert epochs[0] == step * batch_size // num_examples
    assert len(set(records[epochs == epochs[0]])) == np.sum(epochs == epochs[0])
    assert records.min() >= 0
    assert records.max() < num_examples


class Host:
    """What `local_rows` asks of a sharding, answered for one of several hosts with `devices` devices each."""

    def __init__(self, host: int, hosts: int, devices: int):
        self.mine = range(host * devices, (host + 1) * devices)
        self.all = hosts * devices

    def addressable_devices_indices_map(self, shape):
        rows = shape[0] // self.all
        return {device: (slice(device * rows, (device + 1) * rows),) for device in self.mine}


@pytest.mark.parametrize(("hosts", "devices"), [(1, 1), (1, 4), (2, 1), (2, 4), (4, 2)])
def test_hosts_together_hold_the_global_batch(hosts, devices):
    whole, _ = train_indices(5, 48, 16, 37)
    rows = [local_rows(Host(h, hosts, devices), 16) for h in range(hosts)]
    assert all(len(r) == 16 // hosts for r in rows)
    np.testing.assert_array_equal(np.concatenate([whole[r] for r in rows]), whole)


def test_rows_that_several_devices_of_a_host_hold_are_read_once():
    class Replicated:
        def addressable_devices_indices_map(self, shape):
            return {device: (slice(None),) for device in range(3)}

    assert local_rows(Replicated(), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_repeats_hold_each_record_of_a_batch_so_often_each_time_as_of_another_epoch():
    size, repeats = 20, 3
    seen = []
    for step in range(10):
        records, epochs = train_indices(5, 12 * step, 12, size, repeats)
        copies = records.reshape(repeats, 4)  # neighbours differ: mixup pairs them
        assert (copies == copies[0]).all()
        assert len(set(zip(records.tolist(), epochs.tolist(), strict=True))) == 12
        seen += zip(copies[0].tolist(), (epochs // repeats).reshape(repeats, 4)[0].tolist(), strict=True)
    assert [epoch for _, epoch in seen] == 20 * [0] + 20 * [1]
    assert sorted(record for record, epoch in seen if epoch == 0) == list(range(size))
    plain = np.concatenate([train_indices(5, 4 * step, 4, size)[0] for step in range(10)])
    assert [record for record, _ in seen] == plain.tolist()
