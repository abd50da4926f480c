import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose, assert_array_equal

from jax_resnet.models.layers import BatchNorm, avg_pool, conv, max_pool

EPSILON = 0.1  # large enough to be seen


def examples(n=8, features=6, mean=1.0, dtype=jnp.float32):
    r = np.random.RandomState(0)
    return jnp.asarray(mean + r.uniform(0.5, 2, features) * r.randn(n, 3, 4, features), dtype)


def batch_norm(features=6, mean=1.0, **options):
    """A layer whose every parameter and statistic counts."""
    r = np.random.RandomState(1)
    bn = BatchNorm(features, epsilon=EPSILON, **options)
    bn.scale[...] = jnp.float32(r.uniform(0.5, 2, features))
    bn.bias[...] = jnp.float32(r.randn(features))
    bn.mean[...] = jnp.float32(mean + 0.1 * r.randn(features))
    bn.var[...] = jnp.float32(r.uniform(0.5, 2, features))
    return bn


def f64(x):
    return np.asarray(x, np.float64)


def affine(bn, x, mean, var):
    return (f64(x) - mean) / np.sqrt(var + EPSILON) * f64(bn.scale[...]) + f64(bn.bias[...])


def by_its_own_statistics(bn, x):
    x = f64(x)
    return affine(bn, x, x.mean((0, 1, 2)), x.var((0, 1, 2)))


def test_training_normalises_by_the_biased_variance():
    bn, x = batch_norm(), examples(n=2)
    assert_allclose(bn(x), by_its_own_statistics(bn, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.9, 0.6])
def test_running_statistics_keep_momentum_and_take_the_unbiased_variance(momentum):
    bn = batch_norm(momentum=momentum)
    mean, var = f64(bn.mean[...]), f64(bn.var[...])
    for x in (examples(n=2), examples(n=2, mean=-3.0)):
        bn(x)
        mean = momentum * mean + (1 - momentum) * f64(x).mean((0, 1, 2))
        var = momentum * var + (1 - momentum) * f64(x).var((0, 1, 2), ddof=1)
    assert_allclose(bn.mean[...], mean, rtol=1e-5)
    assert_allclose(bn.var[...], var, rtol=1e-5)


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_groups_are_runs_of_examples_normalised_apart(group_size):
    bn, x = batch_norm(group_size=group_size), examples(n=8) * jnp.arange(1.0, 9)[:, None, None, None]
    groups = np.split(f64(x), 8 // group_size)
    expected_mean = 0.9 * f64(bn.mean[...]) + 0.1 * np.mean([g.mean((0, 1, 2)) for g in groups], 0)
    expected_var = 0.9 * f64(bn.var[...]) + 0.1 * np.mean([g.var((0, 1, 2), ddof=1) for g in groups], 0)
    assert_allclose(bn(x), np.concatenate([by_its_own_statistics(bn, g) for g in groups]), rtol=1e-4, atol=1e-5)
    assert_allclose(bn.mean[...], expected_mean, rtol=1e-5)
    assert_allclose(bn.var[...], expected_var, rtol=1e-5)


def test_without_a_group_size_the_batch_is_one_group():
    x, whole, group = examples(), batch_norm(), batch_norm(group_size=8)
    assert_array_equal(whole(x), group(x))
    assert_array_equal(whole.mean[...], group.mean[...])
    assert_array_equal(whole.var[...], group.var[...])


def test_group_size_must_divide_the_batch():
    bn = batch_norm(group_size=3)
    with pytest.raises(ValueError, match=r"8 examples.*groups of 3"):
        bn(examples(n=8))
    bn.eval()
    bn(examples(n=8))


def test_evaluation_uses_and_keeps_the_running_statistics():
    bn, x = batch_norm(group_size=3), examples()
    mean, var = f64(bn.mean[...]), f64(bn.var[...])
    bn.eval()
    assert_allclose(bn(x), affine(bn, x, mean, var), rtol=1e-5, atol=1e-5)
    assert_array_equal(bn.mean[...], mean)
    assert_array_equal(bn.var[...], var)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_is_rounded_only_at_the_end(training):
    bn, x = batch_norm(mean=10.0, momentum=0.5), examples(mean=10.0, dtype=jnp.bfloat16)
    mean, var = f64(bn.mean[...]), f64(bn.var[...])
    bn.train() if training else bn.eval()
    y = bn(x)
    assert y.dtype == jnp.bfloat16
    expected = by_its_own_statistics(bn, x) if training else affine(bn, x, mean, var)
    assert_allclose(f64(y), expected, rtol=2**-8, atol=1e-4)  # half a unit in the last place, and a little
    if training:
        assert_allclose(bn.mean[...], 0.5 * mean + 0.5 * f64(x).mean((0, 1, 2)), rtol=1e-6)
        assert_allclose(bn.var[...], 0.5 * var + 0.5 * f64(x).var((0, 1, 2), ddof=1), rtol=1e-4)
    assert {v.dtype for v in (bn.scale, bn.bias, bn.mean, bn.var)} == {jnp.dtype("float32")}


def test_gradient_passes_through_the_statistics():
    bn, x = batch_norm(group_size=4), examples(n=8)
    cotangent = np.random.RandomState(2).randn(*x.shape)
    gradient = nnx.grad(lambda bn, x: (bn(x) * jnp.float32(cotangent)).sum(), argnums=1)(bn, x)
    for g, dx, dy in zip(np.split(f64(x), 2), np.split(gradient, 2), np.split(cotangent, 2), strict=True):
        std = np.sqrt(g.var((0, 1, 2)) + EPSILON)
        z = (g - g.mean((0, 1, 2))) / std
        centred = dy - dy.mean((0, 1, 2)) - z * (dy * z).mean((0, 1, 2))
        assert_allclose(dx, f64(bn.scale[...]) / std * centred, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 3, 3, 64), (1, 1, 1, 64)])
def test_constant_input_stays_finite(shape):
    bn = BatchNorm(64, momentum=0.0)
    values = np.float32(1000 * np.random.RandomState(3).randn(64))  # E[x²] - E[x]² comes out negative for some
    y = bn(jnp.broadcast_to(values, shape))
    assert np.isfinite(y).all()
    assert_allclose(bn.mean[...], values, rtol=1e-6)
    assert (bn.var[...] >= 0).all()


def test_zero_scale_gives_zeros():
    assert not BatchNorm(6, zero_scale=True)(examples()).any()


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_conv_pads_both_sides_alike(kernel_size, stride, size):
    layer = conv(3, 4, kernel_size, stride=stride, rngs=nnx.Rngs(0))
    x = np.random.RandomState(0).randn(2, size, size, 3)
    pad = kernel_size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = sliding_window_view(padded, (kernel_size, kernel_size), (1, 2))[:, ::stride, ::stride]
    expected = np.einsum("nhwcij,ijco->nhwo", windows, f64(layer.kernel[...]))
    assert_allclose(layer(jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)


def test_conv_starts_kaiming_normal_by_fan_out():
    layer = conv(64, 32, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.bias is None
    assert layer.kernel.dtype == jnp.float32
    std = (2 / (3 * 3 * 32)) ** 0.5
    assert np.std(layer.kernel[...]) == pytest.approx(std, rel=0.02)
    assert np.abs(layer.kernel[...]).max() > 3 * std  # not truncated


def windows_of(x, size, pad, value):
    """[N, h, w, C, size, size]: windows at stride 2 of x, padded by `pad` (before, after) with `value`."""
    padded = np.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=value)
    return sliding_window_view(padded, (size, size), (1, 2))[:, ::2, ::2]


@pytest.mark.parametrize("size", [7, 8])
def test_max_pool_border_never_wins(size):
    x = np.float32(-1 - np.random.RandomState(0).rand(2, size, size, 3))
    assert_array_equal(max_pool(jnp.asarray(x)), windows_of(x, 3, (1, 1), -np.inf).max((-2, -1)))


@pytest.mark.parametrize("size", [1, 7, 8])
def test_avg_pool_border_is_the_mean_of_what_is_there(size):
    x = np.random.RandomState(0).randn(2, size, size, 3)
    expected = np.nanmean(windows_of(x, 2, (0, size % 2), np.nan), (-2, -1))
    assert_allclose(avg_pool(jnp.float32(x)), expected, rtol=1e-5, atol=1e-6)
