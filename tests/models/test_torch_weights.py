"""Weights out and in under PyTorch's names; against torch, timm and torchvision themselves where they are installed."""

import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal
from test_families import FAMILIES, SMALL, Keys

from jax_resnet import create_model, export_weights, import_weights
from jax_resnet.errors import UserError
from jax_resnet.models.torch_names import Report, flatten

SHIM = Path(__file__).parents[3] / "shared" / "tools" / "torchvision_shim.py"


def random_value(name, shape, r):
    leaf = name.rpartition("/")[2]
    if leaf == "kernel":
        return r.randn(*shape) * np.prod(shape[:-1]) ** -0.5
    return r.uniform(0.5, 1.5, shape) if leaf in ("scale", "var") else 0.1 * r.randn(*shape)


def random_model(name, *, seed=0, num_classes=10, **options):
    """In evaluation mode, every parameter and statistic random."""
    model = nnx.eval_shape(lambda: create_model(name, num_classes=num_classes, rngs=Keys(), **options))
    model.eval()
    r, state = np.random.RandomState(seed), nnx.state(model)
    values = {key: np.float32(random_value(key, leaf.shape, r)) for key, leaf in flatten(state).items()}
    nnx.update(model, nnx.traversals.unflatten_mapping({tuple(key.split("/")): v for key, v in values.items()}))
    return model


def arrays(model):
    return flatten(jax.device_get(nnx.to_pure_dict(nnx.state(model))))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_exported_is_imported_bit_by_bit(name):
    there = random_model(name, **FAMILIES[name])
    tensors = export_weights(there)
    assert {(t.dtype.name, t.flags.c_contiguous) for t in tensors.values()} == {("float32", True)}
    here = random_model(name, **FAMILIES[name], seed=1)
    report = import_weights(here, tensors)
    assert_same(arrays(here), arrays(there))
    assert report == Report(loaded=tuple(arrays(there)), left_out=(), new=())
    assert_same(export_weights(here), tensors)


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "axes", "ones"),
    [
        ("resnext50_32x4d", "stage1/block0/conv2/kernel", "layer1.0.conv2.weight", (3, 2, 0, 1), 0),
        ("resnet50", "head/kernel", "fc.weight", (1, 0), 0),
        ("resnetv2_50d", "head/kernel", "head.fc.weight", (1, 0), 2),  # there a 1×1 convolution
        ("seresnet18", "stage1/block0/attention/fc1/kernel", "layer1.0.se.fc1.weight", (1, 0), 2),
        ("ecaresnet50t", "stage2/block0/attention/conv/kernel", "layer2.0.se.conv.weight", (2, 1, 0), 0),
        ("resnet50", "stem/norm1/var", "bn1.running_var", (0,), 0),
    ],
)
def test_layouts(name, ours, theirs, axes, ones):
    model = random_model(name, **FAMILIES.get(name, SMALL))
    tensor, array = export_weights(model)[theirs], arrays(model)[ours]
    assert tensor.shape == tuple(array.shape[axis] for axis in axes) + (1,) * ones
    for index in np.random.RandomState(0).randint(0, array.shape, (20, array.ndim)):
        assert tensor[tuple(index[list(axes)]) + (0,) * ones] == array[tuple(index)]


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: without(t, "bn1.weight"), "bn1.weight (stem/norm1/scale) is missing, one of 1"),
        (lambda t: without(t, "bn1.bias", "layer2.0.bn1.running_var"), "is missing, one of 2"),
        (
            lambda t: t | {"layer1.1.conv1.weight": t["layer1.0.conv1.weight"]},
            "layer1.1.conv1.weight is not of this network, one of 1",
        ),
        (
            lambda t: t | {"layer2.0.conv1.weight": np.zeros((16, 8, 1, 1))},
            "layer2.0.conv1.weight (stage2/block0/conv1/kernel) is (16, 8, 1, 1) there, (16, 8, 3, 3) in this network",
        ),
        (
            lambda t: t | {"layer2.0.conv1.weight": t["layer2.0.conv1.weight"].transpose(1, 0, 2, 3)},
            "layer2.0.conv1.weight (stage2/block0/conv1/kernel) is (8, 16, 3, 3) there, (16, 8, 3, 3) in this network",
        ),
        (
            lambda t: t | {"bn1.bias": np.zeros(9)},
            "bn1.bias (stem/norm1/bias) is (9,) there, (8,) in this network",
        ),
    ],
)
def test_an_error_names_both_sides_and_leaves_the_model_alone(change, line, strict):
    tensors, model = export_weights(random_model("resnet18", **SMALL, seed=1)), random_model("resnet18", **SMALL)
    before = arrays(model)
    with pytest.raises(UserError, match=re.escape(line)):
        import_weights(model, change(tensors), strict=strict)
    assert_same(arrays(model), before)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: without(t, "fc.bias"), "fc.bias (head/bias) is missing, one of 1"),
        (lambda t: t | {"fc_aux.bias": t["fc.bias"]}, "fc_aux.bias is not of this network, one of 1"),
        (lambda t: t | {"fc.bias": np.zeros(7)}, "fc.bias (head/bias) is (7,) there, (10,) in this network"),
        (
            lambda t: t | {"conv1.weight": np.zeros((8, 1, 7, 7))},
            "conv1.weight (stem/conv1/kernel) is (8, 1, 7, 7) there, (8, 3, 7, 7) in this network",
        ),
    ],
)
def test_strictly_the_head_and_the_first_kernel_must_fit_too(change, line):
    tensors, model = export_weights(random_model("resnet18", **SMALL, seed=1)), random_model("resnet18", **SMALL)
    before = arrays(model)
    with pytest.raises(UserError, match=re.escape(line)):
        import_weights(model, change(tensors))
    assert_same(arrays(model), before)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18"])
@pytest.mark.parametrize("lacking", ["other classes", "no head", "no bias"])
def test_another_head_stays_the_models_own(name, lacking):
    there = random_model(name, **SMALL, num_classes=7 if lacking == "other classes" else 10)
    here = random_model(name, **SMALL, seed=1)
    tensors, own = export_weights(there), arrays(here)
    head = "head.fc." if "v2" in name else "fc."
    gone = {"other classes": (), "no head": (f"{head}weight", f"{head}bias"), "no bias": (f"{head}bias",)}[lacking]
    tensors = without(tensors, *gone)
    report = import_weights(here, tensors, strict=False)
    new = {leaf: own[leaf] for leaf in ("head/bias", "head/kernel")}
    assert_same(arrays(here), arrays(there) | new)
    assert set(report.new) == set(new)
    assert set(report.left_out) == {key for key in tensors if key.startswith(head)}
    assert set(report.loaded) == own.keys() - new.keys()


@pytest.mark.parametrize(("theirs", "ours"), [(3, 1), (3, 4), (1, 3), (4, 3)])
@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "resnetv2_18"])
def test_a_first_kernel_for_other_channels_answers_grey_alike(name, theirs, ours):
    there = random_model(name, **SMALL, in_channels=theirs)
    here = random_model(name, **SMALL, seed=1, in_channels=ours)
    report = import_weights(here, export_weights(there), strict=False)
    assert report.summed == ("stem/conv1/kernel",)
    kernels = [arrays(model)["stem/conv1/kernel"] for model in (here, there)]
    assert kernels[0].shape == (*kernels[1].shape[:2], ours, kernels[1].shape[3])
    np.testing.assert_allclose(kernels[0].sum(2), kernels[1].sum(2), rtol=1e-5, atol=1e-6)
    assert (kernels[0] == kernels[0][:, :, :1]).all()
    assert_same(arrays(here) | {"stem/conv1/kernel": kernels[1]}, arrays(there))
    with pytest.raises(UserError, match="stem/conv1/kernel"):
        import_weights(here, export_weights(there))


def test_what_is_beside_the_network_is_left_out_and_named():
    there, here = random_model("resnet18", **SMALL), random_model("resnet18", **SMALL, seed=1)
    more = {"fc_aux.weight": np.ones((2, 2)), "projector.0.bias": np.ones(2)}
    report = import_weights(here, export_weights(there) | more, strict=False)
    assert_same(arrays(here), arrays(there))
    assert report.left_out == ("fc_aux.weight", "projector.0.bias")
    count = len(arrays(here))
    expected = {"loaded": f"{count} of {count} arrays", "left out": "fc_aux.weight, projector.0.bias", "new": "nothing"}
    assert report.lines() == expected


LONGER = SMALL | {"depths": (2, 1)}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("here", "there"),
    [
        (("resnet18", SMALL), ("resnet18", LONGER)),
        (("resnet18", LONGER), ("resnet18", SMALL)),
        (("resnetv2_18", SMALL), ("resnetv2_18", LONGER)),
        (("resnetv2_18", LONGER), ("resnetv2_18", SMALL)),
        (("resnet18", SMALL), ("resnetv2_18", SMALL)),
        (("resnetv2_18", SMALL), ("resnet18", SMALL)),
        (("resnet18", SMALL), ("resnet50", SMALL)),
        (("resnet50", SMALL), ("resnet18", SMALL)),
        (("resnet50", SMALL), ("seresnet50", SMALL)),
        (("seresnet50", SMALL), ("resnet50", SMALL)),
        (("resnet50", SMALL), ("resnet50d", SMALL)),
        (("resnet50d", SMALL), ("resnet50", SMALL)),
        (("resnet50d", SMALL), ("resnet50s", SMALL)),
        (("resnet50", SMALL), ("resnet50_gn", SMALL)),
        (("resnet50_gn", SMALL), ("resnet50", SMALL)),
        (("resnetrs50", SMALL), ("seresnet152d", SMALL)),
        (("seresnet152d", SMALL | {"se_ratio": 1 / 4}), ("resnetrs50", SMALL)),
        (("resnet50", SMALL), ("wide_resnet50_2", SMALL)),
        (("resnetv2_50d", SMALL), ("resnetv2_50d_evos", SMALL)),
    ],
)
def test_another_network_is_refused(here, there, strict):
    model, tensors = random_model(here[0], **here[1]), export_weights(random_model(there[0], **there[1], seed=1))
    before = arrays(model)
    with pytest.raises(UserError, match=r"is missing|is not of this network|in this network"):
        import_weights(model, tensors, strict=strict)
    assert_same(arrays(model), before)


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda good, other: {"state_dict": good, "epoch": 3, "optimizer": {"state": other}},
        lambda good, other: {"model": {"state_dict": good}},
        lambda good, other: {"model": other, "model_ema": good},
        lambda good, other: {"state_dict": other, "state_dict_ema": good},
        lambda good, other: {"model": good, "model_ema": None, "state_dict_ema": {}},
        lambda good, other: prefixed(good, "ema.") | prefixed(other, "model."),
        lambda good, other: prefixed(other, "model.") | prefixed(good, "ema."),
        lambda good, other: {"ema": prefixed(good, "module."), "model": other},
        lambda good, other: prefixed(good, "module."),
        lambda good, other: prefixed(good, "_orig_mod."),
        lambda good, other: {"state_dict": prefixed(good, "model.")},
        lambda good, other: prefixed(good, "module._orig_mod."),
        lambda good, other: {"model": other, "model_ema": prefixed(good, "module.") | {"n_averaged": np.int64(9)}},
        lambda good, other: good | {"bn1.num_batches_tracked": np.int64(9), "version": 2, "arch": "resnet18"},
        lambda good, other: {
            name.replace("fc.", "linear.").replace("downsample", "shortcut"): tensor for name, tensor in good.items()
        },
    ],
)
def test_what_scripts_wrap_around_is_taken_off(wrap):
    there, here = random_model("resnet18", **SMALL), random_model("resnet18", **SMALL, seed=1)
    other = export_weights(random_model("resnet18", **SMALL, seed=2))
    report = import_weights(here, wrap(export_weights(there), other))
    assert_same(arrays(here), arrays(there))
    assert (report.left_out, report.new) == ((), ())


def test_a_file_without_tensors_is_refused():
    with pytest.raises(UserError, match="holds no tensors"):
        import_weights(random_model("resnet18", **SMALL), {"state_dict": {"epoch": 3}})


def test_a_name_that_stands_twice_is_refused():
    model = random_model("resnet18", **SMALL)
    tensors = export_weights(model)
    with pytest.raises(UserError, match=r"holds bn1\.bias twice"):
        import_weights(model, tensors | {"module.bn1.bias": tensors["bn1.bias"]})


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_other_types_become_float32(dtype):
    there, here = random_model("resnet18", **SMALL), random_model("resnet18", **SMALL, seed=1)
    tensors = {name: tensor.astype(dtype) for name, tensor in export_weights(there).items()}
    import_weights(here, tensors)
    assert_same(export_weights(here), {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
    assert {leaf.dtype.name for leaf in arrays(here).values()} == {"float32"}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc.weight"), ("resnetv2_18", "head.fc.weight")])
def test_a_head_fits_as_a_matrix_and_as_a_1x1_convolution(name, head, strict):
    there = random_model(name, **SMALL)
    for shape in ((10, 16), (10, 16, 1, 1)):
        here, tensors = random_model(name, **SMALL, seed=1), export_weights(there)
        assert import_weights(here, tensors | {head: tensors[head].reshape(shape)}, strict=strict).new == ()
        assert_same(arrays(here), arrays(there))


# With torch. A float32 answer is that of another program if they differ by less than this part of the largest.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch")


@pytest.fixture(scope="module")
def torchvision(torch):
    try:
        import torchvision
    except RuntimeError:  # its compiled part is for another build of torch
        if not SHIM.exists():
            pytest.skip(f"needs {SHIM}, or a torchvision that torch can load")
        sys.path.insert(0, str(SHIM.parent))
        import torchvision_shim  # noqa: F401
    except ImportError:
        pytest.skip("needs torchvision")
    import torchvision

    return torchvision


@pytest.fixture(scope="module")
def timm(torchvision):
    return pytest.importorskip("timm", reason="needs timm")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_of_torch(torch, dtype):
    there, here = random_model("resnet18", **SMALL), random_model("resnet18", **SMALL, seed=1)
    exported = {name: torch.from_numpy(tensor) for name, tensor in export_weights(there).items()}
    tensors = {name: torch.nn.Parameter(tensor.to(getattr(torch, dtype))) for name, tensor in exported.items()}
    import_weights(here, tensors)
    assert_same(export_weights(here), {name: tensor.detach().float().numpy() for name, tensor in tensors.items()})


@jax.jit
def run(model, x):
    return model(x)


def check_both_ways(torch, theirs, name, **options):
    """Ours in theirs with strict=True gives our logits; theirs in ours is what was in theirs."""
    ours = random_model(name, **options)
    theirs.eval().load_state_dict(
        {key: torch.from_numpy(tensor) for key, tensor in export_weights(ours).items()}, strict=True
    )
    x = np.random.RandomState(0).randn(2, 75, 64, 3).astype(np.float32)
    if options.get("in_channels") == 1:
        x = x[..., :1]
    elif "aa" in name:  # which timm has only for even sizes
        x = x[:, :64]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    assert np.abs(run(ours, x) - expected).max() < CLOSE * np.abs(expected).max()
    again = random_model(name, **options, seed=1)
    import_weights(again, theirs.state_dict())
    assert_same(arrays(again), arrays(ours))


OFTEN = ("resnet18", "resnet50", "seresnext26t_32x4d", "ecaresnet50t", "resnetblur50d", "resnetv2_50d_evos")
RARELY = ("resnet50c", "resnet50d", "resnet50s", "resnet50t", "resnet50_gn", "wide_resnet50_2", "resnext50_32x4d",
          "senet154", "resnetaa50d", "resnetrs50", "resnetv2_18", "resnetv2_50d", "resnetv2_50t",
          "resnetv2_50d_frn")  # fmt: skip


@pytest.mark.parametrize("name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.soak) for name in RARELY)])
def test_timm_loads_it_strictly_and_answers_alike(torch, timm, name):
    theirs = timm.create_model(name, layers=(1, 1, 1, 1), num_classes=10)
    check_both_ways(torch, theirs, name, depths=(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnext50_32x4d", {"stem_pool": "blur_max"}), ("resnetv2_18", {"stem_pool": "blur_max"}), ("resnetrs50", {})],
)
def test_blurred_before_strides_as_torch_would(torch, timm, name, options):
    weights = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16

    def blur(x, stride=1):
        channels = x.shape[1]
        return torch.nn.functional.conv2d(x, weights.expand(channels, 1, 3, 3), None, stride, 1, groups=channels)

    theirs = timm.create_model(name, layers=(1, 1, 1, 1), num_classes=10)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2) and module.in_channels >= 16:
            module.register_forward_pre_hook(lambda _, inputs: blur(*inputs))
        elif isinstance(module, torch.nn.MaxPool2d):
            module.stride = 1
            module.register_forward_hook(lambda _, inputs, output: blur(output, 2))
    check_both_ways(torch, theirs, name, depths=(1, 1, 1, 1), antialias="blur_conv", **options)


@pytest.mark.parametrize(("name", "channels"), [("test_resnet", 3), ("test_resnet", 1), ("ecaresnet50d_pruned", 3)])
def test_timm_loads_these_whole(torch, timm, name, channels):
    check_both_ways(torch, timm.create_model(name, num_classes=10, in_chans=channels), name, in_channels=channels)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet50"),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("resnext50_32x4d", "wide_resnet50_2")),
    ],
)
def test_torchvision_loads_it_strictly_and_answers_alike(torch, torchvision, name):
    check_both_ways(torch, getattr(torchvision.models, name)(num_classes=10), name)
