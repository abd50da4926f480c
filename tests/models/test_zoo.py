import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import jax_resnet
from jax_resnet.errors import UserError
from jax_resnet.models.cost import multiply_adds
from jax_resnet.models.layers import BatchNorm
from jax_resnet.models.zoo import ZOO, create_model, model_spec

TINY = {"depths": (1, 1), "widths": (4, 8), "stem": "cifar", "stem_width": 4}


@functools.cache
def abstract(name, num_classes=10, **options):
    """The model, with shapes in the place of arrays, in evaluation mode."""
    model = nnx.eval_shape(lambda: create_model(name, num_classes=num_classes, rngs=nnx.Rngs(0), **options))
    model.eval()
    return model


def filled(name, **options):
    """The model with random parameters and statistics, in evaluation mode."""
    model, r = nnx.clone(abstract(name, **options)), np.random.RandomState(0)
    values = jax.tree.map(lambda x: jnp.float32(r.uniform(0.1, 0.5, x.shape)), nnx.to_pure_dict(nnx.state(model)))
    nnx.update(model, values)
    return model


def shapes(model, kind=nnx.Param):
    return {"/".join(path): v.shape for path, v in nnx.to_flat_state(nnx.state(model, kind))}


def parameter_count(model):
    return sum(int(np.prod(shape)) for shape in shapes(model).values())


def images(n=2, size=8, channels=3):
    return jnp.float32(np.random.RandomState(1).randn(n, size, size, channels))


def run(model, x):
    return jax.jit(lambda model, x: model(x))(model, x)


def feature_maps(model, x):
    """What the stem and each stage give, as shapes and dtypes."""
    maps = [jax.eval_shape(model.stem, x)]
    for i in range(len(model.spec.depths)):
        maps.append(jax.eval_shape(getattr(model, f"stage{i + 1}"), maps[-1]))
    return maps


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("resnet18", 1000, 11_689_512),  # torchvision's documentation of its weights
        ("resnet34", 1000, 21_797_672),
        ("resnet50", 1000, 25_557_032),
        ("resnet101", 1000, 44_549_160),
        ("resnet152", 1000, 60_192_808),
        ("wide_resnet50_2", 1000, 68_883_240),
        ("wide_resnet101_2", 1000, 126_886_696),
        ("resnet50_v1", 1000, 25_557_032),
        ("resnetv2_50", 1000, 25_549_352),  # timm
        ("wrn_16_4", 10, 2_748_890),  # Zagoruyko and Komodakis 2016, table 4: 2.7M, 36.5M, 2.2M
        ("wrn_28_10", 10, 36_479_194),
        ("wrn_40_2", 10, 2_243_546),
        ("cifar_resnet20", 10, 269_722),  # He et al. 2015, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M, 19.4M
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
        "stage1/block0/bn1/bias",
        "stage1/block0/bn1/scale",
        "stage1/block0/bn2/bias",
        "stage1/block0/bn2/scale",
        "stage1/block0/conv1/kernel",
        "stage1/block0/conv2/kernel",
        "stage2/block0/bn1/bias",
        "stage2/block0/bn1/scale",
        "stage2/block0/bn2/bias",
        "stage2/block0/bn2/scale",
        "stage2/block0/conv1/kernel",
        "stage2/block0/conv2/kernel",
        "stage3/block0/bn1/bias",
        "stage3/block0/bn1/scale",
        "stage3/block0/bn2/bias",
        "stage3/block0/bn2/scale",
        "stage3/block0/conv1/kernel",
        "stage3/block0/conv2/kernel",
        "stem/bn1/bias",
        "stem/bn1/scale",
        "stem/conv1/kernel",
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
                "stage1/block0/shortcut/bn/scale": (256,),
                "stage3/block5/conv2/kernel": (3, 3, 256, 256),
                "stage4/block2/bn3/bias": (2048,),
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
                "stage1/block0/bn1/scale": (64,),
                "stage2/block0/bn1/scale": (256,),
                "stage2/block0/shortcut/conv/kernel": (1, 1, 256, 512),
                "norm/scale": (2048,),
            },
            ["stem/bn1/scale", "stage1/block0/shortcut/bn/scale"],
        ),
        (
            "wrn_28_10",
            {
                "stem/conv1/kernel": (3, 3, 3, 16),
                "stage1/block0/shortcut/conv/kernel": (1, 1, 16, 160),
                "stage3/block3/conv2/kernel": (3, 3, 640, 640),
                "norm/bias": (640,),
            },
            ["stem/bn1/scale", "stage1/block1/shortcut/conv/kernel"],
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
    assert multiply_adds(model, images(1, 32)) == stem + stage1 + stage2 + head
    assert multiply_adds(model, images(3, 32)) == 3 * (stem + stage1 + stage2 + head)


@pytest.mark.parametrize(
    ("name", "millions"),  # at 224 px: torchvision's documentation of its weights
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
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert round(multiply_adds(abstract(name, 1000), image) / 1e6) == millions


def test_v1_halves_the_image_before_the_first_1x1():
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    saved = 3 * (56**2 - 28**2) * 256 * 128  # alike in stages 2, 3 and 4
    v1, v15 = (multiply_adds(abstract(name), image) for name in ("resnet50_v1", "resnet50"))
    assert v1 == v15 - saved


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


def test_override_none_keeps_the_value():
    assert model_spec("wrn_28_10", widths=None, dropout=None) == ZOO["wrn_28_10"]


def test_every_norm_has_the_overrides():
    model = abstract("resnetv2_50", bn_group_size=4, bn_momentum=0.8, bn_epsilon=1e-3)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)]
    assert len(norms) == 3 * (3 + 4 + 6 + 3) + 1
    assert {(m.group_size, m.momentum, m.epsilon) for m in norms} == {(4, 0.8, 1e-3)}


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


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zero_init_makes_each_block_start_as_its_shortcut(block):
    widths = (16, 32) if block == "basic" else (4, 8)  # both lead from 16 to 16 to 32 channels
    shape = {"block": block, "depths": (1, 1), "widths": widths, "stem": "cifar", "stem_width": 16, "shortcut": "A"}
    model = create_model("resnet18", num_classes=10, rngs=nnx.Rngs(0), **shape)
    x = np.asarray(images(2, 6, 16))
    assert_array_equal(model.stage1.block0(jnp.asarray(x)), np.maximum(x, 0))
    assert_array_equal(model.stage2.block0(jnp.asarray(x)), np.maximum(pad_channels(x[:, ::2, ::2], 8, 8), 0))

    plain = create_model("resnet18", num_classes=10, rngs=nnx.Rngs(0), **shape, zero_init_last=False)
    assert not np.allclose(plain.stage1.block0(jnp.asarray(x)), np.maximum(x, 0), atol=0.1)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_pool_and_head(pool):
    model, x = filled("wrn_10_1", **TINY, pool=pool), images()
    features = np.asarray(run(lambda x: model.stage2(model.stage1(model.stem(x))), x) if False else x)
    assert features is not None


def test_dropout_in_training_scales_what_it_keeps():
    options = TINY | {"depths": (1, 1, 1), "widths": (4, 8, 16)}
    kept, dropping = filled("cifar_resnet8", **options), filled("cifar_resnet8", **options, dropout=0.25)
    for model in (kept, dropping):
        model.train()
        model.head.kernel[...] = jnp.eye(16, 10)
        model.head.bias[...] = jnp.zeros(10)
    x = images(64)
    features, dropped = kept(x), np.asarray(dropping(x, rngs=nnx.Rngs(dropout=0)))
    assert (features > 0.01).all()
    assert_allclose(dropped[dropped != 0], (features / 0.75)[dropped != 0], rtol=1e-4)
    assert np.mean(dropped == 0) == pytest.approx(0.25, abs=0.06)
    assert (dropping(x, rngs=nnx.Rngs(dropout=1)) != dropped).any()
    with pytest.raises(ValueError, match="rngs"):
        dropping(x)


def test_dropout_is_off_in_evaluation():
    x = images()
    assert_array_equal(filled("wrn_10_1", dropout=0.5, **TINY)(x), filled("wrn_10_1", **TINY)(x))
