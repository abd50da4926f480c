import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.testing import assert_allclose, assert_array_equal

from jax_resnet.models.layers import (
    DropPath,
    EfficientChannelAttention,
    SqueezeExcite,
    avg_pool,
    blur_pool,
    conv,
    max_pool,
)
from jax_resnet.models.norms import BatchNorm, EvoNorm, FilterResponseNorm, GroupNorm

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


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_ends_in_the_activation(training):
    x, plain, active = examples(), batch_norm(), batch_norm(activation=True)
    for bn in (plain, active):
        bn.train() if training else bn.eval()
    y = np.asarray(plain(x))
    assert (y < 0).any()
    assert_array_equal(active(x), np.maximum(y, 0))


def grouped(x):
    """[N, H, W, C] → [N, H, W, groups, C / groups], the groups being the most of 32 that divide C."""
    groups = max(g for g in range(1, 33) if 32 % g == 0 and x.shape[-1] % g == 0)
    return x.reshape(*x.shape[:3], groups, -1)


def group_norm(x, scale, bias, activation):
    g = grouped(x)
    mean, var = g.mean((1, 2, 4), keepdims=True), g.var((1, 2, 4), keepdims=True)
    y = ((g - mean) / np.sqrt(var + EPSILON)).reshape(x.shape) * scale + bias
    return np.maximum(y, 0) if activation else y


def evonorm(x, scale, bias, activation, v=None):
    if activation:
        std = np.sqrt(grouped(x).var((1, 2, 4), keepdims=True) + EPSILON)
        x = (grouped(x / (1 + np.exp(-v * x))) / std).reshape(x.shape)
    return x * scale + bias


def filter_response_norm(x, scale, bias, activation, tau=None):
    y = x / np.sqrt((x**2).mean((1, 2), keepdims=True) + EPSILON) * scale + bias
    return np.maximum(y, tau) if activation else y


@pytest.mark.parametrize(("dtype", "mean"), [(jnp.float32, 1.0), (jnp.bfloat16, 10.0)])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("features", [6, 48, 96])  # 2, 16 and 32 groups of 3
@pytest.mark.parametrize(
    ("kind", "formula"),
    [(GroupNorm, group_norm), (EvoNorm, evonorm), (FilterResponseNorm, filter_response_norm)],
)
def test_norms_of_single_examples(kind, formula, features, activation, dtype, mean):
    norm, r = kind(features, epsilon=EPSILON, activation=activation), np.random.RandomState(1)
    parameters = nnx.to_pure_dict(nnx.state(norm))
    assert {p.dtype.name for p in parameters.values()} == {"float32"}
    parameters = {name: np.float32(r.uniform(-0.5, 1.5, features)) for name in parameters}
    nnx.update(norm, parameters)
    x = examples(n=3, features=features, mean=mean, dtype=dtype)
    y = jax.jit(norm)(x)
    assert y.dtype == dtype
    expected = formula(f64(x), activation=activation, **{name: f64(p) for name, p in parameters.items()})
    assert_allclose(f64(y), expected, rtol=1e-4 if dtype == jnp.float32 else 2**-8, atol=1e-4)


@pytest.mark.parametrize("kind", [GroupNorm, EvoNorm, FilterResponseNorm])
def test_norms_of_single_examples_start_at_one_and_zero(kind):
    starts = {"scale": 1, "bias": 0, "v": 1, "tau": 0}
    for name, p in nnx.to_pure_dict(nnx.state(kind(4, activation=True))).items():
        assert_array_equal(p, np.full(4, starts[name]))
    assert not kind(4, zero_scale=True)(examples(features=4)).any()


@pytest.mark.parametrize("kind", [GroupNorm, EvoNorm])
def test_constant_groups_stay_finite(kind):
    values = np.float32(1000 * np.random.RandomState(3).randn(32)).repeat(2)  # E[x²] - E[x]² is negative for some
    assert np.isfinite(kind(64, activation=True)(jnp.broadcast_to(values, (2, 3, 3, 64)))).all()


def convolved(x, kernel, stride=1, groups=1):
    """Padded by half the kernel on every side; in float64."""
    size, pad, outputs = len(kernel), len(kernel) // 2, np.split(f64(kernel), groups, -1)
    inputs = np.split(np.pad(f64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0))), groups, -1)
    windows = [sliding_window_view(i, (size, size), (1, 2))[:, ::stride, ::stride] for i in inputs]
    maps = [np.einsum("nhwcij,ijco->nhwo", *pair) for pair in zip(windows, outputs, strict=True)]
    return np.concatenate(maps, -1)


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_conv_pads_both_sides_alike(kernel_size, stride, size):
    layer = conv(3, 4, kernel_size, stride=stride, rngs=nnx.Rngs(0))
    x = np.random.RandomState(0).randn(2, size, size, 3)
    assert_allclose(layer(jnp.float32(x)), convolved(x, layer.kernel[...], stride), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("standardise", [False, True])
def test_conv_groups_are_runs_of_channels(standardise):
    layer = conv(6, 9, 3, stride=2, groups=3, standardise=standardise, rngs=nnx.Rngs(0))
    kernel, x = f64(layer.kernel[...]), np.random.RandomState(0).randn(2, 7, 8, 6)
    if standardise:
        kernel = (kernel - kernel.mean((0, 1, 2))) / kernel.std((0, 1, 2))
    assert_allclose(layer(jnp.float32(x)), convolved(x, kernel, 2, groups=3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (20, 0.1), (0, 1e-4), (1, 0)])  # BiT's epsilon is (1e-4)²
def test_standardised_kernel_has_mean_0_and_variance_1(mean, std, dtype):
    layer = conv(4, 5, 3, standardise=True, dtype=dtype, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.float32(mean + std * np.random.RandomState(1).randn(3, 3, 4, 5))
    kernel, x = f64(layer.kernel[...]), jnp.asarray(np.random.RandomState(0).randn(2, 5, 6, 4), dtype)
    kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-8)
    y = jax.jit(layer)(x)
    assert y.dtype == dtype
    error = 1e-3 if dtype == jnp.float32 else 2**-6
    assert_allclose(f64(y), convolved(x, kernel), rtol=error, atol=10 * error)


BINOMIAL = np.array([[math.comb(2, i) * math.comb(2, j) / 16 for j in range(3)] for i in range(3)])


@pytest.mark.parametrize("size", [1, 7, 8])
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 4)])
def test_conv_with_a_stride_sees_its_input_blurred(kernel_size, groups, standardise, size):
    options = {"groups": groups, "standardise": standardise, "blur": True, "rngs": nnx.Rngs(0)}
    x = np.random.RandomState(0).randn(2, size, size, 16)
    blurred = np.einsum("nhwcij,ij->nhwc", windows_of(x, 3, (1, 1), 0, stride=1), BINOMIAL)
    for features, stride, seen in ((16, 2, blurred), (16, 1, x), (12, 2, x[..., :12])):  # 12: too few channels
        layer = conv(features, 8, kernel_size, stride=stride, **options)
        kernel = f64(layer.kernel[...])
        if standardise:
            kernel = (kernel - kernel.mean((0, 1, 2))) / kernel.std((0, 1, 2))
        expected = convolved(seen, kernel, stride, groups)
        assert_allclose(layer(jnp.float32(x[..., :features])), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("init", "fan"), [("fan_out", 32), ("fan_in", 64)])
def test_conv_starts_kaiming_normal(init, fan):
    layer = conv(64, 32, 3, init=init, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.bias is None
    assert layer.kernel.dtype == jnp.float32
    std = (2 / (3 * 3 * fan)) ** 0.5
    assert np.std(layer.kernel[...]) == pytest.approx(std, rel=0.02)
    assert np.abs(layer.kernel[...]).max() > 3 * std  # not truncated


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("features", "ratio", "inside"),
    [(32, 1 / 16, 8), (64, 1 / 16, 8), (192, 1 / 16, 16), (2048, 1 / 16, 128), (64, 1 / 4, 16), (24, 1, 24)],
)
def test_squeeze_excite_width(features, ratio, inside):
    layer = nnx.eval_shape(lambda: SqueezeExcite(features, ratio=ratio, rngs=nnx.Rngs(0)))
    assert (layer.fc1.kernel.shape, layer.fc2.kernel.shape) == ((features, inside), (inside, features))


def with_random_parameters(layer):
    r = np.random.RandomState(1)
    nnx.update(layer, jax.tree.map(lambda p: jnp.float32(r.randn(*p.shape)), nnx.state(layer)))
    return layer, jax.tree.map(f64, nnx.to_pure_dict(nnx.state(layer)))


def squeeze_excite(x, fc1, fc2):
    inside = np.maximum(x.mean((1, 2)) @ fc1["kernel"] + fc1["bias"], 0)
    return x * sigmoid(inside @ fc2["kernel"] + fc2["bias"])[:, None, None]


def efficient_channel_attention(x, conv):
    means = x.mean((1, 2))
    gates = sigmoid(np.stack([np.correlate(row, conv["kernel"][:, 0, 0], "same") for row in means]))
    return x * gates[:, None, None]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("kind", "formula"), [(SqueezeExcite, squeeze_excite), (EfficientChannelAttention, efficient_channel_attention)]
)
def test_attention_weighs_channels_by_their_means(kind, formula, dtype):
    layer, parameters = with_random_parameters(kind(24, rngs=nnx.Rngs(0)))
    x = examples(features=24, dtype=dtype)
    y = jax.jit(layer)(x)
    assert y.dtype == dtype
    expected = formula(f64(x), **parameters)
    assert_allclose(f64(y), expected, rtol=1e-4 if dtype == jnp.float32 else 2**-7, atol=1e-5)  # two roundings


@pytest.mark.parametrize(
    ("features", "nominal", "size"),
    [(8, None, 3), (64, None, 3), (256, None, 5), (512, None, 5), (2048, None, 7), (19, 256, 5), (2022, 2048, 7)],
)
def test_eca_kernel_by_width(features, nominal, size):
    layer, parameters = with_random_parameters(EfficientChannelAttention(features, nominal=nominal, rngs=nnx.Rngs(0)))
    assert layer.conv.kernel.shape == (size, 1, 1)
    x = examples(n=2, features=features)
    assert_allclose(layer(x), efficient_channel_attention(f64(x), **parameters), rtol=1e-4, atol=1e-5)


def test_drop_path_keeps_by_a_linear_rule_and_scales():
    scales = f64(DropPath(0.6, 4)(4000, jax.random.key(0)))
    assert scales.shape == (4, 4000, 1, 1, 1)
    for scale, keep in zip(scales, (1, 0.8, 0.6, 0.4), strict=True):
        assert set(np.round(scale * keep, 5).flat) == ({0, 1} if keep < 1 else {1})
        assert np.mean(scale != 0) == pytest.approx(keep, abs=0.04)  # five standard deviations
    likeness = np.corrcoef(scales[1:].reshape(3, -1)) - np.eye(3)
    assert np.abs(likeness).max() < 0.08  # each block draws for itself


def test_drop_path_is_a_function_of_the_key():
    draw = DropPath(0.5, 3)
    assert_array_equal(draw(64, jax.random.key(1)), draw(64, jax.random.key(1)))
    assert (draw(64, jax.random.key(1)) != draw(64, jax.random.key(2))).any()
    assert_array_equal(DropPath(0.9, 1)(64, jax.random.key(1)), np.ones((1, 64, 1, 1, 1)))  # an only block is the first


def windows_of(x, size, pad, value, stride=2):
    """[N, h, w, C, size, size]: windows of x, padded by `pad` (before, after) with `value`."""
    padded = np.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=value)
    return sliding_window_view(padded, (size, size), (1, 2))[:, ::stride, ::stride]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("zero_padded", "border"), [(False, -np.inf), (True, 0)])
@pytest.mark.parametrize("size", [7, 8])
def test_max_pool_border_never_wins_unless_it_is_of_zeros(size, zero_padded, border, stride):
    x = np.float32(-1 - np.random.RandomState(0).rand(2, size, size, 3))
    expected = windows_of(x, 3, (1, 1), border, stride).max((-2, -1))
    assert_array_equal(max_pool(jnp.asarray(x), stride=stride, zero_padded=zero_padded), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3), (7, 8), (8, 7)])
def test_blur_pool_is_a_binomial_filter_mirrored_at_the_border(shape, dtype):
    x = jnp.asarray(10 + np.random.RandomState(0).randn(2, *shape, 3), dtype)
    mirrored = np.pad(f64(x), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    expected = np.einsum("nhwcij,ij->nhwc", windows_of(mirrored, 3, (0, 0), 0), BINOMIAL)
    y = blur_pool(x)
    assert y.dtype == dtype
    assert y.shape == (2, -(-shape[0] // 2), -(-shape[1] // 2), 3)
    assert_allclose(f64(y), expected, rtol=1e-6 if dtype == jnp.float32 else 2**-8)


@pytest.mark.parametrize("size", [1, 7, 8])
def test_avg_pool_border_is_the_mean_of_what_is_there(size):
    x = np.random.RandomState(0).randn(2, size, size, 3)
    expected = np.nanmean(windows_of(x, 2, (0, size % 2), np.nan), (-2, -1))
    assert_allclose(avg_pool(jnp.float32(x)), expected, rtol=1e-5, atol=1e-6)
