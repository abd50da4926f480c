import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from test_families import Keys

import jax_resnet
from jax_resnet.errors import UserError
from jax_resnet.models.cost import cost
from jax_resnet.models.norms import BatchNorm
from jax_resnet.models.spec import ResNetSpec
from jax_resnet.models.zoo import ZOO, create_model, model_spec

TIMM = json.loads((Path(__file__).parents[1] / "data" / "timm_golden.json").read_text())["models"]
TINY = {"depths": (1, 1), "widths": (4, 8), "stem": "cifar", "stem_width": 4}


@functools.cache
def abstract(name, num_classes=10, **options):
    """The model, with shapes in the place of arrays, in evaluation mode."""
    model = nnx.eval_shape(lambda: create_model(name, num_classes=num_classes, rngs=Keys(), **options))
    model.eval()
    return model


def filled(name, **options):
    """The model with random parameters and statistics, in evaluation mode."""
    model, r = nnx.clone(abstract(name, **options)), np.random.RandomState(0)
    nnx.update(model, jax.tree.map(lambda x: jnp.float32(r.uniform(-0.3, 0.7, x.shape)), pure(model)))
    nnx.update(model, jax.tree.map(jnp.abs, pure(model, nnx.BatchStat)))
    return model


def pure(model, kind=(nnx.Param, nnx.BatchStat)):
    return nnx.to_pure_dict(nnx.state(model, kind))


def shapes(model, kind=nnx.Param):
    return {"/".join(path): v.shape for path, v in nnx.to_flat_state(nnx.state(model, kind))}


def parameter_count(model):
    return sum(math.prod(shape) for shape in shapes(model).values())


def images(n=2, size=8, channels=3):
    return jnp.float32(np.random.RandomState(1).randn(n, size, size, channels))


@jax.jit
def run(module, x):
    return module(x)


def feature_maps(model, x):
    """Shapes and dtypes of what the stem and each stage give."""
    maps = []
    for module in (model.stem, *(getattr(model, f"stage{i + 1}") for i in range(len(model.spec.depths)))):
        x = jax.eval_shape(run, module, x)
        maps.append(x)
    return maps


def macs(model, n, size):
    return cost(run, model, jax.ShapeDtypeStruct((n, size, size, 3), jnp.float32)).multiply_adds


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        # torchvision's documentation
        ("resnet18", 1000, 11_689_512),
        ("resnet34", 1000, 21_797_672),
        ("resnet50", 1000, 25_557_032),
        ("resnet101", 1000, 44_549_160),
        ("resnet152", 1000, 60_192_808),
        ("wide_resnet50_2", 1000, 68_883_240),
        ("wide_resnet101_2", 1000, 126_886_696),
        # timm
        ("resnetv2_50", 1000, 25_549_352),
        # Zagoruyko and Komodakis 2016, table 4: 2.7M, 36.5M, 2.2M
        ("wrn_16_4", 10, 2_748_890),
        ("wrn_28_10", 10, 36_479_194),
        ("wrn_40_2", 10, 2_243_546),
        # He et al. 2015, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M, 19.4M
        ("cifar_resnet20", 10, 269_722),
        ("cifar_resnet32", 10, 464_154),
        ("cifar_resnet44", 10, 658_586),
        ("cifar_resnet56", 10, 853_018),
        ("cifar_resnet110", 10, 1_727_962),
        pytest.param("cifar_resnet1202", 10, 19_421_274, marks=pytest.mark.slow),
    ],
)
def test_published_parameter_counts(name, classes, expected):
    assert parameter_count(abstract(name, classes)) == expected


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 3)])
def test_wide_resnet_of_any_size(n, k):
    convs, norms, width = 3 * 9 * 16, 0, 16
    for planes in (16 * k, 32 * k, 64 * k):
        convs += 9 * width * planes + (2 * n - 1) * 9 * planes**2 + (width * planes if width != planes else 0)
        norms += 2 * width + (2 * n - 1) * 2 * planes
        width = planes
    head = 2 * width + 10 * width + 10
    assert parameter_count(abstract(f"wrn_{6 * n + 4}_{k}")) == convs + norms + head


def test_every_parameter_path():
    assert sorted(shapes(abstract("cifar_resnet8"))) == [
        "head/bias",
        "head/kernel",
        "stage1/block0/conv1/kernel",
        "stage1/block0/conv2/kernel",
        "stage1/block0/norm1/bias",
        "stage1/block0/norm1/scale",
        "stage1/block0/norm2/bias",
        "stage1/block0/norm2/scale",
        "stage2/block0/conv1/kernel",
        "stage2/block0/conv2/kernel",
        "stage2/block0/norm1/bias",
        "stage2/block0/norm1/scale",
        "stage2/block0/norm2/bias",
        "stage2/block0/norm2/scale",
        "stage3/block0/conv1/kernel",
        "stage3/block0/conv2/kernel",
        "stage3/block0/norm1/bias",
        "stage3/block0/norm1/scale",
        "stage3/block0/norm2/bias",
        "stage3/block0/norm2/scale",
        "stem/conv1/kernel",
        "stem/norm1/bias",
        "stem/norm1/scale",
    ]


@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        (
            "resnet50",
            {
                "stem/conv1/kernel": (7, 7, 3, 64),
                "stage1/block0/conv1/kernel": (1, 1, 64, 64),
                "stage1/block0/shortcut/conv/kernel": (1, 1, 64, 256),
                "stage1/block0/shortcut/norm/scale": (256,),
                "stage3/block5/conv2/kernel": (3, 3, 256, 256),
                "stage4/block2/norm3/bias": (2048,),
                "head/kernel": (2048, 10),
            },
            ["stage1/block1/shortcut/conv/kernel", "stage3/block6/conv1/kernel", "norm/scale", "stem/conv1/bias"],
        ),
        (
            "wide_resnet50_2",
            {"stage2/block0/conv2/kernel": (3, 3, 256, 256), "stage2/block0/conv3/kernel": (1, 1, 256, 512)},
            [],
        ),
        (
            "resnetv2_50",
            {
                "stage1/block0/norm1/scale": (64,),
                "stage2/block0/norm1/scale": (256,),
                "stage2/block0/shortcut/conv/kernel": (1, 1, 256, 512),
                "norm/scale": (2048,),
            },
            ["stem/norm1/scale", "stage1/block0/shortcut/norm/scale"],
        ),
        (
            "wrn_28_10",
            {
                "stem/conv1/kernel": (3, 3, 3, 16),
                "stage1/block0/shortcut/conv/kernel": (1, 1, 16, 160),
                "stage3/block3/conv2/kernel": (3, 3, 640, 640),
                "norm/bias": (640,),
            },
            ["stem/norm1/scale", "stage1/block1/shortcut/conv/kernel"],
        ),
    ],
)
def test_parameter_paths(name, present, absent):
    found = shapes(abstract(name))
    assert {path: found.get(path) for path in present} == present
    assert not found.keys() & set(absent)


def test_statistics_lie_beside_scale_and_bias():
    model = abstract("resnetv2_18")
    scales = {path.removesuffix("scale") for path in shapes(model) if path.endswith("scale")}
    assert shapes(model, nnx.BatchStat).keys() == {place + leaf for place in scales for leaf in ("mean", "var")}


def test_state_is_parameters_and_statistics_only():
    assert not nnx.split(abstract("cifar_resnet8", dropout=0.5), nnx.Param, nnx.BatchStat, ...)[-1]


def test_multiply_adds_layer_by_layer():
    model = abstract("resnet50", depths=(1, 1), widths=(8, 16), stem_width=4)
    stem = 16**2 * 7 * 7 * 3 * 4  # 32 px; max pool to 8 px
    stage1 = 8**2 * (4 * 8 + 9 * 8 * 8 + 8 * 32 + 4 * 32)
    stage2 = 8**2 * 32 * 16 + 4**2 * (9 * 16 * 16 + 16 * 64 + 32 * 64)
    head = 64 * 10
    assert macs(model, 1, 32) == stem + stage1 + stage2 + head
    assert macs(model, 3, 32) == 3 * (stem + stage1 + stage2 + head)


@pytest.mark.parametrize(
    ("name", "millions"),  # at 224 px; torchvision's documentation
    [
        ("resnet18", 1814),
        ("resnet34", 3664),
        ("resnet50", 4089),
        ("resnet101", 7801),
        ("resnet152", 11514),
        ("wide_resnet50_2", 11398),
        ("wide_resnet101_2", 22753),
    ],
)
def test_published_multiply_adds(name, millions):
    assert round(macs(abstract(name, 1000), 1, 224) / 1e6) == millions


def test_v1_halves_the_image_before_the_first_1x1():
    saved = 3 * (56**2 - 28**2) * 256 * 128  # alike in stages 2, 3 and 4
    assert macs(abstract("resnet50_v1"), 1, 224) == macs(abstract("resnet50"), 1, 224) - saved


def test_overrides_shape_the_network():
    model = abstract("resnet50", depths=(1, 2), widths=(8, 16), stem="cifar", stem_width=4, in_channels=1)
    found = shapes(model)
    assert found["stem/conv1/kernel"] == (3, 3, 1, 4)
    assert found["stage1/block0/conv1/kernel"] == (1, 1, 4, 8)
    assert found["stage2/block1/conv3/kernel"] == (1, 1, 16, 64)
    assert found["head/kernel"] == (64, 10)
    assert not any(path.startswith(("stage1/block1", "stage2/block2", "stage3")) for path in found)
    assert [m.shape for m in feature_maps(model, images(2, 8, 1))] == [(2, 8, 8, 4), (2, 8, 8, 32), (2, 4, 4, 64)]
    assert model.spec.total_stride == 2


def test_every_name_of_timm_is_here():
    assert len(TIMM) == 101
    assert not TIMM.keys() - ZOO.keys()


@pytest.mark.parametrize(
    ("name", "channels", "strides"),
    [
        ("resnet34", (64, 128, 256, 512), (4, 8, 16, 32)),
        ("wide_resnet50_2", (256, 512, 1024, 2048), (4, 8, 16, 32)),
        ("ecaresnet50d_pruned", (19, 171, 818, 2022), (4, 8, 16, 32)),
        ("test_resnet", (32, 48, 192, 96), (4, 8, 16, 32)),
        ("resnetv2_152x2_bit", (512, 1024, 2048, 4096), (4, 8, 16, 32)),
        ("wrn_28_10", (160, 320, 640), (1, 2, 4)),
    ],
)
def test_channels_and_strides_of_the_stages(name, channels, strides):
    spec = ZOO[name]
    assert (spec.channels, spec.strides, spec.total_stride) == (channels, strides, strides[-1])


SMALL = {"depths": (1, 1), "widths": (4, 8), "stem_width": 8}


@pytest.mark.parametrize("size", [(37, 50), (48, 32)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cifar_resnet8", TINY),
        ("resnet18d", SMALL | {"block": ("basic", "bottleneck"), "pool": "max"}),
        ("resnetblur18", SMALL),
        ("resnetrs50", SMALL),
        ("resnetv2_50t", SMALL),
        ("resnetv2_50x1_bit", SMALL | {"norm": "batch"}),
    ],
)
def test_pyramid_features_pooled_and_logits(name, options, size):
    @jax.jit
    def answers(model, x):
        first = model.stage1(model.stem(x))
        return [first, model.stage2(first)], model.pyramid(x), model.features(x), model.pooled(x), model(x)

    model, x = filled(name, **options), jnp.float32(np.random.RandomState(1).randn(2, *size, 3))
    spec = model.spec
    stages, maps, features, pooled, logits = jax.tree.map(np.asarray, answers(model, x))
    sides = [tuple(-(-side // stride) for side in size) for stride in spec.strides]
    assert [m.shape for m in maps] == [(2, *s, c) for s, c in zip(sides, spec.channels, strict=True)]
    for pair in zip(maps, stages, strict=True):
        assert_array_equal(*pair)
    expected = maps[-1]
    if spec.preactivation:
        scale, bias, mean, var = (np.float64(getattr(model.norm, leaf)) for leaf in ("scale", "bias", "mean", "var"))
        expected = np.maximum((expected - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
    assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert_allclose(pooled, features.mean((1, 2)) if spec.pool == "avg" else features.max((1, 2)), rtol=1e-5)
    assert_allclose(logits, pooled @ model.head.kernel[...] + model.head.bias[...], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["resnet50_gn", "seresnet50", "ecaresnet26t", "resnetaa50", "resnetblur50d", "resnetrs50", "resnetv2_50",
     "resnetv2_50d_evos", "resnetv2_50d_frn", "resnetv2_50x1_bit"],
)  # fmt: skip
def test_activations_stay_bfloat16_up_to_the_pool(name):
    def answers(model, x):
        return *model.pyramid(x), model.features(x), model.pooled(x), model(x)

    model = abstract(name, **SMALL, dtype=jnp.bfloat16)
    *maps, pooled, logits = jax.eval_shape(answers, model, images(2, 32))
    assert {m.dtype for m in maps} == {jnp.dtype("bfloat16")}
    assert (pooled.dtype, logits.dtype) == (jnp.float32, jnp.float32)
    assert {v.dtype for v in jax.tree.leaves(pure(model))} == {jnp.dtype("float32")}


def test_override_none_keeps_the_value():
    assert model_spec("wrn_28_10", widths=None, dropout=None) == ZOO["wrn_28_10"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (None, 0.9, 1e-5)),
        ({"bn_group_size": 4, "bn_momentum": 0.8, "bn_epsilon": 1e-3}, (4, 0.8, 1e-3)),
    ],
)
def test_every_norm_is_alike(options, expected):
    norms = [m for _, m in nnx.iter_modules(abstract("resnetv2_50", **options)) if isinstance(m, BatchNorm)]
    assert len(norms) == 3 * (3 + 4 + 6 + 3) + 1
    assert {(m.group_size, m.momentum, m.epsilon) for m in norms} == {expected}


def pad_channels(x, before, after):
    return np.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))


def mean_2x2(x):
    """Of an image of odd size: the last row and column are of half a window."""
    x = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=np.nan)
    return np.nanmean(np.stack([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]), 0)


@pytest.mark.parametrize("kind", ["A", "B", "D"])
def test_shortcut_to_half_the_image(kind):
    shortcut = filled("wrn_10_1", **TINY, shortcut=kind).stage2.block0.shortcut
    x = np.asarray(images(2, 5, 4))
    if kind == "A":
        expected = pad_channels(x[:, ::2, ::2], 2, 2)
    else:
        expected = (x[:, ::2, ::2] if kind == "B" else mean_2x2(x)) @ np.asarray(shortcut.conv.kernel[0, 0])
    assert_allclose(shortcut(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["A", "B", "D"])
@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize(("stem", "sizes"), [("cifar", [33, 33, 17, 9]), ("imagenet", [9, 9, 5, 3])])
def test_odd_image_sizes(block, preactivation, kind, stem, sizes):
    shape = {"depths": (1, 1, 1), "widths": (4, 8, 16), "stem": stem, "stem_width": 4}
    model = abstract("resnet18", **shape, block=block, preactivation=preactivation, shortcut=kind)
    assert [m.shape[1:3] for m in feature_maps(model, images(2, 33))] == [(size, size) for size in sizes]


def as_it_starts(name, **options):
    """The new model, except that its kernels come from `filled`: to compile their random draws takes seconds."""

    @jax.jit
    def start():
        model = create_model(name, num_classes=10, rngs=nnx.Rngs(0), **options)
        return nnx.to_pure_dict(nnx.state(model, lambda path, _: path[-1] != "kernel"))

    model = filled(name, **options)
    nnx.update(model, start())
    return model


def test_where_statistics_and_head_start():
    model = as_it_starts("cifar_resnet8", **TINY)
    for leaf, value in (("mean", 0), ("var", 1), ("bias", 0)):
        starts = [v[...] for path, v in nnx.to_flat_state(nnx.state(model)) if path[-1] == leaf]
        assert len(starts) >= 5
        assert all((start == value).all() for start in starts)
    kernel = jax.jit(lambda: create_model("resnet18", num_classes=1000, rngs=nnx.Rngs(0)).head.kernel[...])()
    assert np.std(kernel) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zero_init_makes_each_block_start_as_its_shortcut(block, training):
    widths = (16, 32) if block == "basic" else (4, 8)  # both lead from 16 to 16 to 32 channels
    options = {"block": block, "depths": (1, 1), "widths": widths, "stem": "cifar", "stem_width": 16, "shortcut": "A"}
    model = as_it_starts("resnet18", **options)
    plain = as_it_starts("resnet18", **options, zero_init_last=False)
    for m in (model, plain):
        m.train() if training else m.eval()
    x = np.asarray(images(2, 6, 16))
    assert_array_equal(run(model.stage1.block0, x), np.maximum(x, 0))
    assert_array_equal(run(model.stage2.block0, x), np.maximum(pad_channels(x[:, ::2, ::2], 8, 8), 0))
    assert not np.allclose(run(plain.stage1.block0, x), np.maximum(x, 0), atol=0.1)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_head_is_affine_in_the_pooled_features(pool):
    model, x = filled("cifar_resnet8", **TINY, pool=pool), images()
    features = np.asarray(run(model.stage2, run(model.stage1, run(model.stem, x))))
    pooled = features.mean((1, 2)) if pool == "avg" else features.max((1, 2))
    expected = pooled @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_in_training_scales_what_it_keeps():
    whole, dropping = (filled("cifar_resnet8", num_classes=8, **TINY, dropout=rate) for rate in (0.0, 0.25))
    for model in (whole, dropping):
        model.train()
        model.head.kernel[...], model.head.bias[...] = jnp.eye(8), jnp.zeros(8)

    @functools.partial(jax.jit, static_argnums=1)
    def pooled(model, seed):
        return model(images(128), rngs=nnx.Rngs(dropout=seed))

    features, left = pooled(whole, 0), pooled(dropping, 0)
    kept = left != 0
    assert_allclose(left[kept], features[kept] / 0.75, rtol=1e-5)
    assert np.mean(kept[features > 0]) == pytest.approx(0.75, abs=0.05)
    assert (pooled(dropping, 1) != left).any()
    with pytest.raises(ValueError, match="rngs"):
        run(dropping, images())


def test_dropout_is_off_in_evaluation():
    x = images()
    assert_array_equal(run(filled("wrn_10_1", dropout=0.5, **TINY), x), run(filled("wrn_10_1", **TINY), x))


def residual_times(factor, model, stage, block):
    """The model with one residual multiplied: by way of the parameters of the last layer in it."""
    model = nnx.clone(model)
    module = getattr(getattr(model, f"stage{stage}"), f"block{block}")
    last = 3 if hasattr(module, "conv3") else 2
    layer = getattr(module, f"conv{last}" if model.spec.preactivation else f"norm{last}")
    nnx.update(layer, jax.tree.map(lambda p: factor * p, nnx.state(layer, nnx.Param)))
    return model


@jax.jit
def pyramid(model, x):
    return model.pyramid(x, rngs=nnx.Rngs(dropout=1))


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_drop_path_leaves_whole_residuals_out(block, preactivation):
    options = TINY | {"depths": (2, 1), "block": block, "preactivation": preactivation, "norm": "group"}
    whole, dropping = filled("resnet18", **options), filled("resnet18", **options, drop_path=1 - 1e-6)
    dropping.train()
    x = images(16)
    first, last = pyramid(dropping, x)  # of three blocks: the first keeps all, the second half, the third none
    lost, doubled = (np.asarray(pyramid(residual_times(factor, whole, 1, 1), x)[0]) for factor in (0, 2))
    dropped = np.array([np.allclose(*pair, rtol=1e-4) for pair in zip(first, lost, strict=True)])
    assert 2 < dropped.sum() < 14
    assert_allclose(first, np.where(dropped[:, None, None, None], lost, doubled), rtol=1e-4, atol=1e-5)
    assert_allclose(last, run(residual_times(0, whole, 2, 0).stage2, first), rtol=1e-4, atol=1e-5)


def test_dropping_needs_keys_in_training_and_is_off_in_evaluation():
    whole, dropping = filled("wrn_10_1", **TINY), filled("wrn_10_1", **TINY, drop_path=0.9)
    assert_array_equal(run(dropping, images()), run(whole, images()))
    dropping.train()
    with pytest.raises(ValueError, match=r"drop_path in training needs keys: .*rngs"):
        run(dropping, images())


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_how_the_head_and_the_convolutions_start(std):
    options = {"depths": (1,), "widths": (64,), "stem": "cifar", "stem_width": 32, "head_std": std}
    model = create_model("resnet18", num_classes=50, rngs=nnx.Rngs(0), **options, head_prior=True, init="fan_in")
    kernel = np.asarray(model.head.kernel[...])
    assert kernel.std() == pytest.approx(std, rel=0.05)  # of 64 · 50
    assert_allclose(model.head.bias[...], np.full(50, -np.log(50)), rtol=1e-6)
    assert np.std(model.stage1.block0.conv1.kernel[...]) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)


def test_training_moves_every_statistic():
    model = filled("wrn_10_1", **TINY)
    model.train()

    @jax.jit
    def after(model, x):
        model(x)
        return pure(model, nnx.BatchStat)

    moved = jax.tree.map(lambda a, b: bool((a != b).all()), pure(model, nnx.BatchStat), after(model, images()))
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize("name", ["cifar_resnet8", "wrn_10_1"])
def test_bfloat16_activations_and_float32_logits(name):
    half, full = filled(name, **TINY, dtype=jnp.bfloat16), filled(name, **TINY)
    assert [m.dtype for m in feature_maps(half, images())] == [jnp.bfloat16] * 3
    assert {v.dtype for v in jax.tree.leaves(pure(half))} == {jnp.dtype("float32")}
    logits = run(half, images())
    assert logits.dtype == jnp.float32
    assert_allclose(logits, run(full, images()), rtol=0.02, atol=0.02)


ONE_STAGE = {"depths": (1,), "widths": (8,)}


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("resnet5o", {}, "did you mean resnet50"),
        ("wideresnet50_2", {}, "did you mean wide_resnet50_2"),
        ("zzz", {}, "known: cifar_resnet110"),
        ("cifar_resnet21", {}, "6n+2 layers; the nearest depth is 20"),
        ("cifar_resnet2", {}, "the nearest depth is 8"),
        ("wrn_27_10", {}, "6n+4 layers; the nearest depth is 28"),
        ("resnet50", {"shortcuts": "A"}, "no option 'shortcuts'; did you mean shortcut"),
        ("resnet50", {"shortcut": "C"}, "shortcut='C': must be A or B or D"),
        ("resnet50", {"stem": "mnist"}, "stem='mnist': must be imagenet or cifar"),
        ("resnet50", {"pool": "sum"}, "pool='sum': must be avg or max"),
        ("resnet50", {"block": "basics"}, "block='basics': must be basic or bottleneck"),
        ("resnet50", {"depths": (3, 4)}, "depths=(3, 4) and widths=(64, 128, 256, 512)"),
        ("resnet50", {"depths": (3, 4, 6, 0)}, "depths=(3, 4, 6, 0): must be whole numbers, at least 1"),
        ("resnet18", {"widths": (64, 128, 256, 51.2)}, "widths=(64, 128, 256, 51.2)"),
        ("resnet18", {"shortcut": "A", "widths": (32, 64, 128, 256)}, "shortcut A cannot take channels away"),
        ("resnet50", {"depths": 3}, "depths=3: must be whole numbers"),
        ("resnet50", {"depths": ()}, "depths=(): must be whole numbers"),
        ("resnet50", {"stem_pool": "avg"}, "stem_pool='avg': must be max or zero_max or blur_max or conv"),
        ("resnet50", {"shortcut_kernel": 5}, "shortcut_kernel=5: must be 1 or 3"),
        ("resnet50", {"attention": "cbam"}, "attention='cbam': must be None or se or eca"),
        ("resnet50", {"antialias": "max"}, "antialias='max': must be None or avg or blur or blur_conv"),
        ("resnet50", {"norm": "layer"}, "norm='layer': must be batch or group or evonorm or frn"),
        ("resnet50", {"stem_width": 0}, "stem_width=0: must be a whole number, at least 1"),
        ("resnet50", {"groups": 2.0}, "groups=2.0: must be a whole number, at least 1"),
        ("resnet50", {"bn_group_size": 0}, "bn_group_size=0: must be a whole number, at least 1"),
        ("resnet50", {"dropout": 1.0}, "dropout=1.0: must be at least 0 and less than 1"),
        ("resnet50", {"drop_path": -0.1}, "drop_path=-0.1: must be at least 0 and less than 1"),
        ("resnet50", {"head_std": -0.1}, "head_std=-0.1: must be at least 0"),
        ("resnet50", {"init": "fan_avg"}, "init='fan_avg': must be fan_out or fan_in"),
        ("resnet50", {"bn_momentum": 1.5}, "bn_momentum=1.5: must be at least 0 and less than 1"),
        ("resnet50", {"inner_factor": 0}, "inner_factor=0: must be more than 0"),
        ("resnet50", {"first_factor": -1.0}, "first_factor=-1.0: must be more than 0"),
        ("resnet50", {"se_ratio": 0.0}, "se_ratio=0.0: must be more than 0"),
        ("resnet50", {"bn_epsilon": 0.0}, "bn_epsilon=0.0: must be more than 0"),
        ("resnet50", {"block": ("basic", "basic")}, "block=('basic', 'basic'): must be basic or bottleneck, or one of"),
        ("resnet18", {"groups": 2}, "inner_factor and groups: only bottlenecks have an inside"),
        ("test_resnet", {"inner_factor": 2.0}, "inner_factor and groups: only bottlenecks have an inside"),
        ("resnet18", {"stride_in_1x1": True}, "stride_in_1x1: only post-activation bottlenecks"),
        ("resnetv2_50", {"stride_in_1x1": True}, "stride_in_1x1: only post-activation bottlenecks"),
        ("resnetaa50", {"stride_in_1x1": True}, "stride_in_1x1: only post-activation bottlenecks, not anti-aliased"),
        ("resnetv2_50", {"attention": "se"}, "attention, antialias=avg or blur, and stem_pool=conv: only for"),
        ("resnetv2_50", {"antialias": "blur"}, "attention, antialias=avg or blur, and stem_pool=conv: only for"),
        ("resnetv2_50", {"stem_pool": "conv"}, "attention, antialias=avg or blur, and stem_pool=conv: only for"),
        ("resnetaa50", {"stem_pool": "blur_max"}, "stem_pool=blur_max: antialias=avg has a pool of its own"),
        ("cifar_resnet8", {"stem_pool": "blur_max"}, "stem_pool=blur_max: the cifar stem does not pool"),
        ("cifar_resnet8", {"stem_pool": "conv"}, "stem_pool=conv: the cifar stem does not pool"),
        ("resnet50d", {"stem_width": 60}, "stem_width=60: must be a multiple of 8 for a deep stem"),
        ("resnet50t", {"stem_width": 60}, "stem_width=60: must be a multiple of 8 for a tiered stem"),
        ("ecaresnet50d_pruned", {"depths": (3, 4, 6, 2)}, "block_widths: must be of (3, 4, 6, 2) blocks"),
        ("ecaresnet50d_pruned", {"widths": (8, 16, 32, 64)}, "pruned to widths of its own"),
        ("resnet50", ONE_STAGE | {"block_widths": (((4, 4),),)}, "must be 3 whole numbers a block"),
        ("resnet18", ONE_STAGE | {"block_widths": (((4, 4, 4),),)}, "must be 2 whole numbers a block"),
        ("resnet18", ONE_STAGE | {"block_widths": (((),),)}, "must be 2 whole numbers a block"),
        ("resnet18", ONE_STAGE | {"block_widths": (((4, 8.0),),)}, "must be 2 whole numbers a block"),
        (
            "resnet18",
            {"depths": (2,), "widths": (8,), "block_widths": (((4, 8), (4, 9)),)},
            "the last alike in a stage",
        ),
        ("resnet50_gn", {"bn_group_size": 4}, "bn_group_size=4: group norm knows no groups of examples"),
        ("resnet50", {"in_channels": 0}, "in_channels=0 must be at least 1"),
        (
            "resnext50_32x4d",
            {"inner_factor": 1.25},
            "block 0 of stage 1 would have convolutions of (80, 80, 256) channels in 32 groups",
        ),
        ("resnet50", {"widths": (64, 128, 256, 1), "first_factor": 0.5}, "block 0 of stage 4 would have convolutions"),
    ],
)
def test_user_errors_name_what_is_near(name, options, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        create_model(name, num_classes=10, rngs=nnx.Rngs(0), **options)
    assert f"model {name!r}" in str(error.value)


def test_a_spec_by_itself_refuses_too():
    with pytest.raises(ValueError, match=r"depths=\(3, 4\)"):
        ResNetSpec(depths=(3, 4))


def test_package_exports_create_model():
    assert jax_resnet.create_model is create_model
    with pytest.raises(AttributeError, match="create_modle"):
        _ = jax_resnet.create_modle
